"""The numbers that the manual tells are those that the code has."""

from __future__ import annotations

from manuals import ENGLISH

from wechat_sign import renewal
from wechat_sign.settings import Limits, RedisSettings, Settings, WeChatSettings

SETTINGS = Settings(wechat=WeChatSettings(appid="wx1", secret="s"))
LIMITS, REDIS = Limits(), RedisSettings()


def test_the_numbers_are_those_that_are_told() -> None:
    """These, and a day's 2000 tokens, were reasoned about together."""
    assert (LIMITS.look_interval, LIMITS.look_soon, LIMITS.drain) == (10, 0.5, 5)
    assert (LIMITS.redis_timeout, LIMITS.redis_pause, LIMITS.undated_life) == (1, 2, 60)
    assert (REDIS.recheck, REDIS.expire, renewal.MARGIN) == (600, 7100, 100)
    assert (SETTINGS.wechat.timeout, SETTINGS.lease, renewal.CALLS) == (5, 13, 3)
    manual = " ".join(ENGLISH.split())
    for told in (
        "Every 10 s the server looks at what Redis has",
        "if nobody asked WeChat for 10 minutes",
        "7100 s of WeChat's 7200",
        "1 s, doubling to a minute, after what may pass",
        "a minute, doubling to ten, after what a person must mend",
        "finishing what was begun, within 5 s",
        "tries everything once, for a second",
    ):
        assert told in manual
