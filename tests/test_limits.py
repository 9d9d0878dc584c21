"""The numbers that the manual and the code's docstrings tell are those that the code has."""

from __future__ import annotations

import dataclasses

import pytest
from manuals import ENGLISH

from wechat_sign import credentials, process, renewal
from wechat_sign.settings import Limits, RedisSettings, Settings, WeChatSettings

MANUAL = " ".join(ENGLISH.split())
DOCSTRING = " ".join((renewal.__doc__ or "").split())
SETTINGS = Settings(wechat=WeChatSettings(appid="wx1", secret="s"))


def test_every_limit_has_its_value() -> None:
    assert dataclasses.asdict(Limits()) == {
        "look_interval": 10,
        "look_soon": 0.5,
        "redis_timeout": 1,
        "redis_pause": 2,
        "lease_margin": 3,
        "undated_life": 60,
        "lock_wait": 0.2,
        "left_behind": 16,
        "idle_timeout": 75,
        "unread": 1,
        "drain": 5,
        "grace": 1,
    }
    constants = {
        "recheck": RedisSettings().recheck,
        "expire": RedisSettings().expire,
        "timeout": SETTINGS.wechat.timeout,
        "lease": SETTINGS.lease,
        "calls": renewal.CALLS,
        "back-off": (renewal.TRANSIENT_BACK_OFF, renewal.TOKEN_BACK_OFF, renewal.BACK_OFF),
        "margin": renewal.MARGIN,
        "shortest life": credentials.SHORTEST_LIFE,
        "connections": process.MAX_CONNECTIONS,
        "backlog": process.BACKLOG,
        "head": process.SIZES["max_header_size"],
    }
    assert constants == {
        "recheck": 600,
        "expire": 7100,
        "timeout": 5,
        "lease": 13,
        "calls": 3,
        "back-off": ((1, 60), (1, 600), (60, 600)),
        "margin": 100,
        "shortest life": 60,
        "connections": 4096,
        "backlog": 1024,
        "head": 32 * 1024,
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (MANUAL, "Every 10 s the server looks at what Redis has"),
        (MANUAL, "if nobody asked WeChat for 10 minutes"),
        (MANUAL, "7100 s of WeChat's 7200"),
        (MANUAL, "1 s, doubling to a minute, after what may pass"),
        (MANUAL, "a minute, doubling to ten, after what a person must mend"),
        (MANUAL, "finishing what was begun, within 5 s"),
        (MANUAL, "tries everything once, for a second"),
        (DOCSTRING, "10 the server looks at the cache again"),
        (DOCSTRING, "600 `recheck`"),
        (DOCSTRING, "7100 `expire`"),
        (DOCSTRING, "7200 WeChat lets them go; the 100 in between"),
        (DOCSTRING, "1 to 60 back-off after what may pass"),
        (DOCSTRING, "1 to 600 back-off where WeChat refuses a token"),
        (DOCSTRING, "60 to 600 back-off after what a person must mend"),
        (DOCSTRING, "10 a call to WeChat, if its answer does not drip: `timeout` to connect"),
        (DOCSTRING, "13 the lock's lease"),
        (DOCSTRING, "39 a look, and the wait for another instance's: three calls"),
        (DOCSTRING, "Every 10 s the server looks"),
        (DOCSTRING, "if nobody asked WeChat for 10 minutes"),
    ],
)
def test_the_numbers_are_told(text: str, told: str) -> None:
    assert told in text
