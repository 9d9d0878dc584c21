"""The numbers that the manual and the code's docstrings tell are those that the code has."""

from __future__ import annotations

import pytest
from manuals import ENGLISH

from wechat_sign import renewal
from wechat_sign.settings import Limits, RedisSettings, Settings, WeChatSettings

MANUAL = " ".join(ENGLISH.split())
DOCSTRING = " ".join((renewal.__doc__ or "").split())
SETTINGS = Settings(wechat=WeChatSettings(appid="wx1", secret="s"))
LIMITS, REDIS = Limits(), RedisSettings()


def test_the_numbers_are_those_that_are_told() -> None:
    """These, and a day's 2000 tokens, were reasoned about together."""
    assert (LIMITS.look_interval, LIMITS.look_soon, LIMITS.drain) == (10, 0.5, 5)
    assert (LIMITS.redis_timeout, LIMITS.redis_pause, LIMITS.undated_life) == (1, 2, 60)
    assert (REDIS.recheck, REDIS.expire, renewal.MARGIN) == (600, 7100, 100)
    assert (SETTINGS.wechat.timeout, SETTINGS.lease, renewal.CALLS) == (5, 13, 3)


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
        (DOCSTRING, "13 the lock's lease"),
        (DOCSTRING, "39 a look, and the wait for another instance's: three calls"),
    ],
)
def test_the_numbers_are_told(text: str, told: str) -> None:
    assert told in text
