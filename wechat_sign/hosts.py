"""A page's host as browsers write it in location.href: what `page_hosts` has to name."""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from typing import Final

import idna

from .texts import Text

_NAME: Final = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_NUMBER_AT_END: Final = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)")
"""What a browser takes for an IPv4 address."""
_NO_HOST: Final = (
    "must be a host name alone, without scheme, port or path, like h5.example.com or *.example.com"
)


def page_host(text: str) -> str:
    """The host, or *. and a domain below which all are meant.

    Raises ValueError that says what to write in its place, without repeating it.
    """
    star, host = ("*.", text[2:]) if text.startswith("*.") else ("", text)
    host = host.lower() if host.isascii() else _in_ascii(host)
    if ":" in host:
        right = _ipv6(host.strip("[]"))
    elif not _NAME.fullmatch(host):
        right = ""
    else:
        right = _ipv4(host) if _NUMBER_AT_END.fullmatch(host) else host
    if right != host:
        raise ValueError(
            Text("browsers write it {right}", right=right) if right else Text(_NO_HOST)
        )
    if star and not re.search(r"\.[^.]*[a-z_-][^.]*$", host):
        raise ValueError(Text("after *. must come a domain with a dot in it, as in *.example.com"))
    return star + host


def _in_ascii(host: str) -> str:
    """The host with xn-- for what is not ASCII, where all browsers agree on that: they went from
    IDNA 2003 to 2008 one by one, and some names became others by it."""
    old = new = ""
    with suppress(UnicodeError):
        old = host.encode("idna").decode().lower()
    with suppress(idna.IDNAError):
        new = idna.encode(host, uts46=True).decode()
    if new and old != new:
        changed = "browsers of today write it {new}, older ones did not: list that"
        raise ValueError(Text(changed, new=new))
    if not new:
        in_ascii = "{no_host}; one that is not ASCII as location.host has it, with xn--"
        raise ValueError(Text(in_ascii, no_host=Text(_NO_HOST)))
    return new


def _ipv4(host: str) -> str:
    with suppress(OSError):
        return str(IPv4Address(socket.inet_aton(host)))
    raise ValueError(Text("browsers take it for an IPv4 address, by its end, and it is none"))


def _ipv6(host: str) -> str:
    with suppress(ValueError):
        address = IPv6Address(host)
        if address.scope_id is None:
            mapped = address.ipv4_mapped
            if mapped is None:
                return f"[{address}]"
            # As Python writes it before 3.13, and browsers do.
            high, low = divmod(int(mapped), 0x10000)
            return f"[::ffff:{high:x}:{low:x}]"
    return ""
