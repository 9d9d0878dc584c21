"""How the process lives: what it listens on, how many connections it has, and how it stops.

A stop closes the listener and finishes what was begun, within `drain` seconds. It promises no more:
connections that wait in the kernel's queue are reset with the listener, unless the socket
outlives the process. With systemd's socket activation it does, and a restart loses nothing.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import sys
import time
from asyncio import Future
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final

from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPMessageDelegate
from tornado.ioloop import PeriodicCallback
from tornado.iostream import IOStream, StreamClosedError, UnsatisfiableReadError
from tornado.netutil import bind_sockets

from .errors import ConfigError
from .sentences import say
from .settings import Limits, Network, ServerSettings

if sys.platform != "win32":
    import resource

MAX_CONNECTIONS: Final = 4096
"""Connections at once; an idle one takes some 10 KiB."""
BACKLOG: Final = 1024
"""Connections that wait in the kernel's queue."""
SEND_BUFFER: Final = 64 * 1024
"""Bytes of answers that the kernel holds for a client; by itself it grows to 4 MiB."""
SIZES: Final[dict[str, int]] = {
    "max_header_size": 32 * 1024,  # an escaped url of 8192 characters is 24 KiB at most
    "max_body_size": 0,  # no request here has one
    "max_buffer_size": 64 * 1024,  # Tornado reads half as much at once
    "body_timeout": 10,  # seconds
}
_UNIX_SOCKET: Final = ip_address("0.0.0.0")
"""What Tornado calls the peer on a unix socket; no other has that address."""


def _refusal(status: str, error: str) -> bytes:
    body = json.dumps({"error": error})
    return (
        f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: application/json; charset=UTF-8"
        f"\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode("ascii")


_HEAD_TOO_LONG: Final = _refusal(
    "431 Request Header Fields Too Large", "the request line and headers are longer than 32 KiB"
)
_MALFORMED: Final = _refusal(
    "400 Bad Request", "the request is malformed, or has a body, which none here may have"
)
_HEAD_END: Final = rb"\n\r?\n"
"""Ends where Tornado's own does, which begins with what may be missing: that takes 0.3 ms to find
nothing in 32 KiB, and again for each byte that comes."""
_MALFORMED_TO_TORNADO: Final = b"HTTP/1.1 400 Bad Request\r\n\r\n"


class BoundedServer(HTTPServer):
    """Has `limit` connections at the most, and closes the one that is idle longest for a new one.

    Where all wait for an answer, that is the new one itself. A class because it carries since when
    each connection is there, is answered, or waits for its next request; the longest first.
    """

    def initialize(
        self,
        *arguments: Any,
        limit: int = MAX_CONNECTIONS,
        limits: Limits = Limits(),
        clock: Callable[[], float] = time.monotonic,
        **more: Any,
    ) -> None:
        super().initialize(*arguments, **more)
        # A timer for each request costs a twentieth of it; here one looks after all.
        self.conn_params.header_timeout = None
        self._limit = limit
        self._limits = limits
        self._clock = clock
        self._since: OrderedDict[_Stream, float] = OrderedDict()
        self._all_wait = False
        """Whether none was idle when last looked for, and none has been since."""
        self._sweeping = PeriodicCallback(self._close_idle, 1000 * limits.idle_timeout / 15)
        self._sweeping.start()

    def _close_idle(self) -> None:
        over = self._clock() - self._limits.idle_timeout
        for stream, since in list(self._since.items()):
            if since > over:
                break
            if stream.idle:
                stream.close()

    @property
    def busy(self) -> bool:
        """Whether a request is in flight or, within `grace`, may be on its way."""
        newest = next(reversed(self._since.values()), -math.inf)
        recent = self._clock() < newest + self._limits.grace
        return recent or not all(stream.reading() for stream in self._since)

    def handle_stream(self, stream: IOStream, address: Any) -> None:
        """Tornado calls it when a connection has been accepted."""
        sizes = {"max_buffer_size": stream.max_buffer_size}
        sizes |= {"read_chunk_size": stream.read_chunk_size}
        accepted = _Stream(stream.socket, self.note_idle, self._limits.write_timeout, **sizes)
        if len(self._since) >= self._limit:
            idle = (one for one in self._since if not self._all_wait and one.idle)
            longest = next(idle, accepted)
            self._all_wait = longest is accepted
            self._since.pop(longest, None)
            longest.close()
        if not accepted.closed():
            self._since[accepted] = self._clock()
            super().handle_stream(accepted, address)

    def note_idle(self, stream: _Stream) -> None:
        """Called when a connection is answered, and when it begins to wait for its next request."""
        self._since[stream] = self._clock()
        self._since.move_to_end(stream)
        self._all_wait = False

    def stop(self) -> None:
        """Closes the listener."""
        self._sweeping.stop()
        super().stop()

    def start_request(self, server_conn: Any, request_conn: Any) -> HTTPMessageDelegate:
        """Tornado calls it when a connection begins to wait for its next request."""
        self.note_idle(server_conn.stream)
        return super().start_request(server_conn, request_conn)

    def on_close(self, server_conn: Any) -> None:
        self._since.pop(server_conn.stream, None)
        super().on_close(server_conn)


class _Stream(IOStream):
    """A connection. Where a request is malformed or its head too long it is closed with an answer
    in JSON, and without one where what is written is not read within `write_timeout` seconds."""

    def __init__(
        self,
        connection: socket.socket,
        note_idle: Callable[[_Stream], None],
        write_timeout: float,
        **sizes: int,
    ) -> None:
        super().__init__(connection, **sizes)
        self._note_idle = note_idle
        self._write_timeout = write_timeout
        self._answered = False
        self._unreadable = _HEAD_TOO_LONG
        self._refused = False
        with suppress(OSError):  # some systems refuse it where the client is gone by now
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            super().set_nodelay(True)

    @property
    def idle(self) -> bool:
        """Whether it waits for a request, or is answered and about to."""
        return self.reading() or (self._answered and not self.writing())

    def set_nodelay(self, value: bool) -> None:
        """Tornado calls it twice for each request. Here an answer is written at once, and no delay
        is any good."""

    def read_until_regex(self, regex: bytes, max_bytes: int | None = None) -> Awaitable[bytes]:
        """Tornado calls it for the head of the next request."""
        if self.closed():  # Tornado would go on to answer all that it has read
            raise StreamClosedError
        self._unreadable = _HEAD_TOO_LONG
        self._answered = False
        return super().read_until_regex(_HEAD_END, max_bytes)

    def read_until(self, delimiter: bytes, max_bytes: int | None = None) -> Awaitable[bytes]:
        """Tornado calls it for the size of a chunk; only that of none passes."""
        self._unreadable = _MALFORMED
        return super().read_until(delimiter, max_bytes)

    def write(self, data: bytes | memoryview) -> Future[None]:
        if data == _MALFORMED_TO_TORNADO:
            data, self._refused = _MALFORMED, True
        written = super().write(data)
        if data[:10] != b"HTTP/1.1 1":  # 100 Continue is no answer
            self._answered = True
            self._note_idle(self)
        if not written.done():  # the kernel did not take all of it
            timeout = self.io_loop.call_later(self._write_timeout, self.close)
            written.add_done_callback(lambda _: self.io_loop.remove_timeout(timeout))
        return written

    def close_fd(self) -> None:
        unreadable = isinstance(self.error, UnsatisfiableReadError)
        if unreadable or self._refused:
            with suppress(OSError):
                if unreadable:
                    self.socket.send(self._unreadable)
                self.socket.shutdown(socket.SHUT_WR)
                # Closed with something unread, the kernel resets it and the answer may be lost.
                for _ in range(16):
                    self.socket.recv(65536)
        super().close_fd()


def raise_file_limit(connections: int) -> int:
    """Raises this process's limit of file descriptors for so many connections, where it may.

    Returns how many connections fit; a quarter is left for Redis, WeChat and new connections.
    """
    if sys.platform == "win32":
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections * 4 // 3 + 1
    files = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return files * 3 // 4


def forbid_core_dumps() -> None:
    """Has the kernel keep none of this process, and no child's: the ticket would be in it.

    By a limit of one byte, which no file fits in, and which alone keeps the kernel from piping
    the core to a program, too, where core_pattern says so: of a limit of 0 it takes no notice.
    """
    if sys.platform == "win32":
        return
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    limit = 0 if hard == 0 else 1
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))


def listen(settings: ServerSettings) -> list[socket.socket]:
    """Listening sockets: systemd's where it hands some over, else bound to address and port.

    Raises ConfigError where they can't be had.
    """
    handed_over = take_handed_over(os.environ)
    if handed_over:
        return handed_over
    try:
        return bind_sockets(settings.port, settings.address, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        problem = say(
            "can't listen on {address} port {port}: {reason}. "
            "Choose another with --address and --port, or in [server]",
            address=settings.address,
            port=settings.port,
            reason=reason,
        )
        raise ConfigError(problem) from None


def take_handed_over(environ: MutableMapping[str, str], first: int = 3) -> list[socket.socket]:
    """The sockets that systemd holds for this process, from file descriptor 3 on; see
    sd_listen_fds(3). No child sees them.

    Raises ConfigError where one is none to listen on.
    """
    process = environ.pop("LISTEN_PID", "")
    number = environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if process != str(os.getpid()) or not number.isdecimal():
        return []
    return [_listening(first + place) for place in range(int(number))]


def _listening(descriptor: int) -> socket.socket:
    try:
        listening = socket.socket(fileno=descriptor)
        listens = listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if not listens or listening.type != socket.SOCK_STREAM:
            raise OSError(say("it is no stream socket that listens"))
    except OSError as error:
        problem = say(
            "can't listen on file descriptor {descriptor}, which LISTEN_FDS hands over: {reason}. "
            "Give the unit's [Socket] a ListenStream, and no Accept=yes",
            descriptor=descriptor,
            reason=error.strerror or str(error),
        )
        raise ConfigError(problem) from None
    listening.set_inheritable(False)
    listening.setblocking(False)
    return listening


def client_address(peer: str, forwarded: str, trusted_proxies: Collection[Network]) -> str:
    """The address that a request is from: the peer's, or what it names if it is a trusted proxy.

    Each proxy adds the address it was called from at the end of X-Forwarded-For (`forwarded`);
    what stands before the first one that is not trusted may be made up by the client.
    """
    client = _ip(peer)
    for hop in reversed(forwarded.split(",")):
        trusted = client == _UNIX_SOCKET or any(client in network for network in trusted_proxies)
        if not trusted:
            break
        try:
            named = _ip(hop)
        except ValueError:
            break
        if named == _UNIX_SOCKET or "%" in hop:  # no proxy's; a scope may be any text
            break
        client = named
    return "a unix socket" if client == _UNIX_SOCKET else str(client)


def is_loopback(client: str) -> bool:
    """Whether what `client_address` gave is this very host."""
    return client != "a unix socket" and _ip(client).is_loopback


def _ip(text: str) -> IPv4Address | IPv6Address:
    """A socket for IPv6 and IPv4 calls an IPv4 peer ::ffff:127.0.0.1."""
    address = ip_address(text.strip())
    return getattr(address, "ipv4_mapped", None) or address


def address_of(listening: socket.socket) -> str:
    """`http://HOST:PORT`, or `unix:PATH`."""
    name = listening.getsockname()
    if not isinstance(name, tuple):
        return "unix:" + os.fsdecode(name).replace("\0", "@")
    host, port = name[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set, and SIGHUP where it is not ignored, as under nohup.

    A second SIGTERM or SIGINT ends the process at once. A second SIGHUP changes nothing: a
    terminal that closes may send it twice.
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def set_stop(_number: int, _frame: object) -> None:
        loop.call_soon_threadsafe(stop.set)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, set_stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def drain(server: BoundedServer, *, deadline: float) -> None:
    """Closes the listener, finishes what was begun, and closes the rest at the deadline."""
    server.stop()
    while server.busy and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    await server.close_all_connections()
