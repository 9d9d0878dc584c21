from __future__ import annotations

import pytest
import urls
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wechat_sign.hosts import page_host


def browsers_host(host: str) -> str | None:
    """The host as a browser writes it; None where it takes it for none."""
    return urls.browsers_host(f"https://{host}/")


def refusal(host: str) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        page_host(host)
    assert host not in str(caught.value).split()
    return str(caught.value)


@pytest.mark.parametrize(
    ("host", "listed"),
    [
        ("H5.Example.com", "h5.example.com"),
        ("*.example.com", "*.example.com"),
        ("localhost", "localhost"),
        ("a_b.r3---x.com", "a_b.r3---x.com"),
        ("xn--zca.de", "xn--zca.de"),
        ("xn--ls8h.la", "xn--ls8h.la"),
        ("例子.com", "xn--fsqu00a.com"),
        ("*.例子。com", "*.xn--fsqu00a.com"),
        ("BÜCHER.de", "xn--bcher-kva.de"),
        ("127.0.0.1", "127.0.0.1"),
        ("１２７.0.0.1", "127.0.0.1"),
        ("[::1]", "[::1]"),
        ("[2001:DB8::7]", "[2001:db8::7]"),
        ("[::ffff:102:304]", "[::ffff:102:304]"),
    ],
)
def test_a_host_is_listed_as_browsers_write_it(host: str, listed: str) -> None:
    assert page_host(host) == listed


@pytest.mark.parametrize(
    ("host", "right"),
    [
        ("127.1", "127.0.0.1"),
        ("0x7f.1", "127.0.0.1"),
        ("1.2.3", "1.2.0.3"),
        ("010.0.0.1", "8.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("[::0001]", "[::1]"),
        ("::1", "[::1]"),
        ("[::FFFF:1.2.3.4]", "[::ffff:102:304]"),
        ("[::1.2.3.4]", "[::102:304]"),
        ("[1:0:0:2:0:0:0:3]", "[1:0:0:2::3]"),
    ],
)
def test_an_address_that_browsers_write_otherwise_is_refused_with_their_way(
    host: str, right: str
) -> None:
    assert refusal(host) == f"browsers write it {right}"
    assert browsers_host(right) == right
    assert browsers_host(host) in (right, None)


@pytest.mark.parametrize(
    ("host", "right"),
    [
        ("straße.de", "xn--strae-oqa.de"),
        ("*.faß.de", "xn--fa-hia.de"),
        ("βόλος.com", "xn--nxasmm1c.com"),
    ],
)
def test_a_name_that_browsers_have_not_always_written_alike_is_asked_for_in_ascii(
    host: str, right: str
) -> None:
    assert refusal(host) == f"browsers of today write it {right}, older ones did not: list that"
    assert page_host(right) == right == browsers_host(host.removeprefix("*."))


@pytest.mark.parametrize("host", ["💩.la", "例／子.com", "ا1٢.com", "-é.com"])
def test_a_name_that_has_no_form_in_both_is_asked_for_in_ascii(host: str) -> None:
    assert refusal(host).endswith("one that is not ASCII as location.host has it, with xn--")


@pytest.mark.parametrize("host", ["*.com", "*.localhost", "*.127.0.0.1", "*.[::1]"])
def test_a_star_stands_before_a_domain_of_two_labels_at_least(host: str) -> None:
    assert refusal(host) == "after *. must come a domain with a dot in it, as in *.example.com"


@pytest.mark.parametrize(
    "host",
    [
        "*",
        "a:80",
        "a..b",
        ".a",
        "a.",
        "https://a/",
        "a/b",
        "a@b",
    ]
    + ["[::1", "[::1]:80", "[fe80::1%eth0]", "[1.2.3.4]", "[a]", "a" * 64, "a%62"],
)
def test_what_is_no_host_is_refused(host: str) -> None:
    assert refusal(host).startswith(("must be a host name alone, ", "browsers write it [::1]"))


@pytest.mark.parametrize("host", ["256.1.1.1", "a.1", "a.0x", "08.1", "1.2.3.4.5", "*.a.1"])
def test_what_ends_with_a_number_is_an_ipv4_address_or_refused(host: str) -> None:
    assert refusal(host) == "browsers take it for an IPv4 address, by its end, and it is none"
    assert browsers_host(host.removeprefix("*.")) is None


pieces = st.sampled_from(
    ["a", "B", "1", "0", "08", "0x", "7f", "256", "f", "_", "-", "--", ".", "..", "。", "xn--"]
    + ["[", "]", ":", "::", "::1", "ffff", "1.2.3.4", "127", "%", "*", "*.", "com", ".com", "@"]
    + ["ß", "ς", "İ", "ſ", "例", "ü", "ａ", "１", "／", "\u200d", "\u200c", "\u00ad", "\u0301", "K"]
    + ["א", "ا", "٢", "क\u094d", "💩", "☃", "xn--zca", "xn--a", "ⴀ", "ꭰ", "℀", "㏂", "·", "l·l"]
)
hosts = st.one_of(
    st.lists(pieces, min_size=1, max_size=6).map("".join),
    st.lists(st.integers(0, 0xFFFF), min_size=8, max_size=8).map(
        lambda parts: "[" + ":".join(f"{part % 7 and part:x}" for part in parts) + "]"
    ),
    st.ip_addresses().map(lambda ip: f"[{ip}]" if ip.version == 6 else str(ip)),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
)


@given(hosts)
@example("[::ffff:102:304]")
@example("[::ffff:0:0]")
@settings(max_examples=300, deadline=None)
def test_what_is_listed_is_what_a_browser_has(host: str) -> None:
    try:
        listed = page_host(host).removeprefix("*.")
    except ValueError:
        return
    assert browsers_host(listed) == listed
    assert browsers_host(host.removeprefix("*.")) in (listed, None)
