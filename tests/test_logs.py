"""What the log shows, whatever is written to it."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from urllib.parse import unquote

import pytest
from harness import PAGE, MovedClock, Start, fetch
from hypothesis import given
from hypothesis import strategies as st

from wechat_sign.logs import LineFormatter, Throttle, redacted, sanitize

HARM = "\x85\x9b2J\x1b]0;x\x07\u202e\u2028\ud800\r\n2026-11-24 00:00:00,000 INFO forged"
"""A line of its own, a terminal that is told what to do, and text that runs backwards."""


@given(st.text(), st.integers(1, 400))
def test_what_is_shown_is_printable_and_not_too_long(text: str, longest: int) -> None:
    shown = sanitize(text, longest)
    assert shown.isprintable()
    assert len(shown) <= longest
    if text.isprintable():
        assert shown == (text if len(text) <= longest else text[: longest - 1] + "…")


VARIANTS = [str, str.upper, lambda text: "".join(f"%{ord(letter):02X}" for letter in text)]


@given(st.text("aB1%é"), st.text("aB1.", min_size=4), st.sampled_from(VARIANTS), st.text("aB1%é"))
def test_a_secret_is_not_shown_in_any_case_or_escaped(
    before: str, secret: str, variant: Callable[[str], str], after: str
) -> None:
    shown = redacted(before + variant(secret) + after, ["other", secret])
    assert "***" in shown
    assert secret.lower() not in (shown + "|" + unquote(shown, "latin-1")).lower()
    assert redacted(before + after, ["other", "aaa"]) == before + after


@pytest.mark.parametrize("unit", ["a", "ab", "%61", "%", "a%"])
@pytest.mark.parametrize("secret", ["a" * 512, "a" * 511 + "b", "b" + "a" * 511, "aaaa", "aaab"])
def test_to_redact_takes_time_in_proportion_to_the_text(unit: str, secret: str) -> None:
    def took(length: int) -> float:
        text, began = (unit * length)[:length], time.process_time()
        for _ in range(4):
            redacted(text, [secret] * 9)
        return time.process_time() - began

    took(8192)
    assert min(took(32768) for _ in range(3)) < 6 * min(took(8192) for _ in range(3))


def test_a_record_is_one_line_and_its_traceback_is_printable() -> None:
    try:
        raise ValueError(HARM)
    except ValueError:
        error = sys.exc_info()
    record = logging.LogRecord("x", logging.ERROR, "x", 1, "it said %s", (HARM,), error)
    first, *traceback = LineFormatter("%(levelname)s %(message)s").format(record).split("\n")
    assert first.startswith(r"ERROR it said \x85\x9b2J\x1b]0;x\x07\u202e\u2028\ud800\r\n2026")
    assert traceback[0] == "Traceback (most recent call last):"
    assert all(line.isprintable() for line in traceback)


def test_one_record_of_a_kind_is_logged_in_a_second_and_the_next_tells_how_many_were_not(
    clock: MovedClock, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("throttled")
    logger.addFilter(Throttle(clock))

    def lines(kind: str | None, number: int) -> list[str]:
        caplog.clear()
        for _ in range(number):
            logger.warning("%d %%", 7, extra={"kind": kind})
        return caplog.messages

    assert lines("404s", 3) == ["7 %"]
    clock.advance(0.9)
    assert lines("404s", 2) == []
    assert lines("400s", 2) == ["7 %"]
    assert lines(None, 2) == ["7 %"] * 2
    clock.advance(0.1)
    assert lines("404s", 2) == ["7 % (4 more 404s since the last such line)"]
    clock.advance(1)
    assert lines("404s", 1) == ["7 % (1 more 404s since the last such line)"]


def test_a_flood_of_refusals_is_a_line_a_second_and_hides_no_other_kind(start: Start) -> None:
    running = start(verbose=False)
    began = time.monotonic()
    with running.connect() as connection:
        for _ in range(30):
            connection.sendall(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n" * 100)
            received = 0
            while received < 100:
                received += connection.recv(65536).count(b"there is nothing here")
    fetch(f"{running.url}/getApi?url={PAGE.replace('https', 'ftp')}")
    running.says("400 GET /getApi for h5.example.com/a")
    assert 1 <= running.output.count("404 GET /x ") <= 1 + time.monotonic() - began
