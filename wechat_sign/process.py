"""How the process lives: what it listens on, how many connections it has, and how it stops.

A stop closes the listener and finishes what was begun, within `drain` seconds. It promises no more:
connections that wait in the kernel's queue are reset with the listener, unless the socket
outlives the process. With systemd's socket activation it does, and a restart loses nothing.

What it relies on in Tornado that is not documented; tests in test_process.py hold it:

- `HTTPServer.conn_params`: without a `header_timeout` no timer is set for a request's head, and
  `no_keep_alive` counts from the next request on.
- `IOStream.read_until_regex` is called for each request's head, and for nothing else.
- A request that Tornado can't read is answered by `IOStream.write` with a status line alone.
- `IOStream.close_fd` closes the socket; `error` is an UnsatisfiableReadError by then where a head
  was too long.
"""

from __future__ import annotations

import asyncio
import errno
import json
import math
import os
import signal
import socket
import sys
import time
from asyncio import Future
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any, Final

from tornado.httpserver import HTTPServer
from tornado.ioloop import PeriodicCallback
from tornado.iostream import IOStream, StreamClosedError, UnsatisfiableReadError
from tornado.log import access_log
from tornado.netutil import bind_sockets

from .errors import ConfigError
from .settings import Limits, ServerSettings
from .texts import Text

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
    "max_body_size": 32 * 1024,  # read, so that a POST gets a 405 with advice
    "max_buffer_size": 64 * 1024,  # Tornado reads half as much at once
    "body_timeout": 10,  # seconds
}
_MALFORMED: Final = (
    "this is no HTTP/1.1 request with one Host header, or it has more than 1,000 parameters, "
    "32 KiB of headers or 32 KiB of body; https ends at a proxy in front"
)
_HEAD_END: Final = rb"\n\r?\n"
"""Matches where Tornado's pattern ends. That one begins with what may be missing, so it takes
0.3 ms to find nothing in 32 KiB, and again for each byte that comes."""
_TLS_BEGINS: Final = 0x16


class BoundedServer(HTTPServer):
    """Holds `limit` connections at the most. When full, it closes the one that is longest idle or
    unread. If all wait for an answer, it refuses the new one."""

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
        self._active: OrderedDict[_Stream, float] = OrderedDict()
        """When each connection was last active; the oldest first."""
        self._all_busy_until = -math.inf
        """Before this time no connection can be evicted, unless one is answered."""
        self._sweeping = PeriodicCallback(self._close_idle, 1000 * limits.idle_timeout / 15)
        self._sweeping.start()

    def _close_idle(self) -> None:
        over = self._clock() - self._limits.idle_timeout
        for stream, since in list(self._active.items()):
            if since > over:
                break
            if stream.is_idle() or stream.writing():
                stream.close()

    @property
    def busy(self) -> bool:
        """Whether a request is in flight or, within `grace`, may be on its way."""
        newest = next(reversed(self._active.values()), -math.inf)
        recent = self._clock() < newest + self._limits.grace
        return recent or not all(stream.reading() for stream in self._active)

    def handle_stream(self, stream: IOStream, address: Any) -> None:
        """Tornado calls it when a connection has been accepted."""
        sizes = {"max_buffer_size": stream.max_buffer_size}
        sizes |= {"read_chunk_size": stream.read_chunk_size}
        accepted = _Stream(stream.socket, self._touch, **sizes)
        if len(self._active) >= self._limit:
            longest = self._evictable() or accepted
            self._active.pop(longest, None)
            longest.close()
        if not accepted.closed():
            self._touch(accepted)
            super().handle_stream(accepted, address)

    def _evictable(self) -> _Stream | None:
        """The connection that is idle longest, or whose client does not read its answer."""
        now = self._clock()
        if now < self._all_busy_until:
            return None
        self._all_busy_until = math.inf
        for stream, since in self._active.items():
            unread = since + self._limits.unread if stream.writing() else math.inf
            if now >= unread or stream.is_idle():
                return stream
            self._all_busy_until = min(unread, self._all_busy_until)
        return None

    def _touch(self, stream: _Stream) -> None:
        self._active[stream] = self._clock()
        self._active.move_to_end(stream)
        self._all_busy_until = -math.inf

    def stop(self) -> None:
        """Closes the listener. A connection ends after its next answer."""
        self._sweeping.stop()
        self.conn_params.no_keep_alive = True
        super().stop()

    def on_close(self, server_conn: Any) -> None:
        self._active.pop(server_conn.stream, None)
        super().on_close(server_conn)


class _Stream(IOStream):
    """A connection. A request that can't be read is answered in JSON, logged, and closed."""

    def __init__(
        self, connection: socket.socket, on_answer: Callable[[_Stream], None], **sizes: int
    ) -> None:
        super().__init__(connection, **sizes)
        self._on_answer = on_answer
        self._begun = self._refused = False
        self._answered = True  # it is about to read
        with suppress(OSError):  # some systems refuse it where the client is gone by now
            super().set_nodelay(True)

    def is_idle(self) -> bool:
        """Whether it waits for a request, or is answered and about to."""
        return self.reading() or (self._answered and not self.writing())

    def set_nodelay(self, value: bool) -> None:
        """Tornado switches it twice for each request. Here each answer is written at once."""

    def read_until_regex(self, regex: bytes, max_bytes: int | None = None) -> Awaitable[bytes]:
        """Tornado calls it for the head of the next request."""
        if self.closed():  # Tornado would go on to answer all that it has read
            raise StreamClosedError
        self._answered = False
        return super().read_until_regex(_HEAD_END, max_bytes)

    def read_from_fd(self, buf: bytearray | memoryview) -> int | None:
        """Turns a TLS ClientHello into an empty head, so that it is refused at once."""
        number = super().read_from_fd(buf)
        if self._begun or not number:
            return number
        self._begun = True
        if buf[0] == _TLS_BEGINS:
            buf[:2], number = b"\n\n", 2
        return number

    def write(self, data: bytes | memoryview) -> Future[None]:
        # A status line alone is Tornado's own; an answer of ours has headers.
        if data[:10] == b"HTTP/1.1 4" and bytes(data).find(b"\r\n") == len(data) - 4:
            self._refused, data = True, self._refusal()
        written = super().write(data)
        if data[9:10] != b"1":  # 100 Continue is no answer
            self._answered = True
            self._on_answer(self)
        return written

    def close_fd(self) -> None:
        """Tornado calls it to close the socket."""
        too_long = isinstance(self.error, UnsatisfiableReadError)
        if too_long or self._refused:
            with suppress(OSError):
                if too_long:
                    self.socket.send(self._refusal())
                self.socket.shutdown(socket.SHUT_WR)
                # Read the rest: closing with unread input sends a RST, which may lose the answer.
                for _ in range(16):
                    self.socket.recv(65536)
        super().close_fd()

    def _refusal(self) -> bytes:
        with suppress(OSError):
            name = self.socket.getpeername()
            peer = name[0] if isinstance(name, tuple) else "a unix socket"
            access_log.warning("400 from %s: %s", peer, _MALFORMED, extra={"kind": "400s"})
        body = json.dumps({"error": _MALFORMED})
        head = "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n"
        head += f"Content-Type: application/json; charset=UTF-8\r\nContent-Length: {len(body)}"
        return f"{head}\r\n\r\n{body}".encode("ascii")


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
        with suppress(ValueError, OSError):  # macOS has a limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return max(1, min(files * 3 // 4, files - 16))


def forbid_core_dumps() -> None:
    """Forbids core dumps, which would have the ticket in them. The limit is 1 byte: with 0 the
    kernel still pipes a core to the program in core_pattern."""
    if sys.platform != "win32":
        with suppress(ValueError, OSError):  # they are forbidden already
            resource.setrlimit(resource.RLIMIT_CORE, (1, 1))


def listen(settings: ServerSettings) -> list[socket.socket]:
    """Listening sockets: systemd's where it hands some over, else bound to address and port.

    Raises ConfigError where they can't be had.
    """
    try:
        sockets = take_handed_over(os.environ)
        sockets = sockets or bind_sockets(settings.port, settings.address, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            reason = Text("it is in use, maybe by this server: ss -ltnp tells by what")
        problem = Text(
            "can't listen on {address} port {port}: {reason}. "
            "Choose another with --address and --port, or in [server]",
            address=settings.address,
            port=settings.port,
            reason=reason,
        )
        raise ConfigError(problem) from None
    for listening in sockets:  # what it accepts has these, too
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    return sockets


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
            raise OSError(Text("it is no stream socket that listens"))
    except OSError as error:
        problem = Text(
            "can't listen on file descriptor {descriptor}, which LISTEN_FDS hands over: {reason}. "
            "Give the unit's [Socket] a ListenStream, and no Accept=yes",
            descriptor=descriptor,
            reason=error.strerror or str(error),
        )
        raise ConfigError(problem) from None
    listening.set_inheritable(False)
    listening.setblocking(False)
    return listening


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
