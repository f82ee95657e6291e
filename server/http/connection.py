"""One client's connection, with limits that uvicorn's protocol does not have.

A client that is slow hurts itself only. Its headers have a limit in bytes and in seconds, its body has to come at some
rate, and it has to read what it is sent; else the connection is cut. Where an answer comes before the end of a body, the
rest of the body is read and thrown away for a while, because a connection closed with unread bytes is reset, and the
client would lose the answer (as with nginx's lingering_close).
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_BYTES = 64 << 10
LINGER_SECONDS = 5.0
_CHECK_SECONDS = 0.5
_LEAST_RATE = 256  # bytes a second of a body, over the time that a client has


PROBE_CONNECTIONS = 64
"""So many clients beyond the limit may still ask how the server is. A server that is busy must not look dead."""

PROBE_PATHS = frozenset((b"/health", b"/health/live", b"/health/ready", b"/ping"))


@dataclass(slots=True)
class Connected:
    """How many clients are connected, and may be."""

    limit: int
    count: int = 0


class Connection(HttpToolsProtocol):
    """uvicorn's HTTP protocol over httptools, for clients that may be slow or hostile."""

    def __init__(self, *args: Any, seconds: float, connected: Connected, **more: Any) -> None:
        """Args: see `connections`; and what counts all of them."""
        super().__init__(*args, **more)
        self._connected = connected
        self._surplus = False
        self._refused = False
        self._seconds = seconds
        self._check_handle: asyncio.TimerHandle | None = None
        self._in_headers = True
        self._in_body = False
        self._not_headers = False  # the newest data had the end of headers or of a body
        self._header_bytes = 0
        self._body_bytes = 0
        self._since = 0.0  # when the headers or this part of the body began
        self.written = 0  # bytes of answers that were given to the transport
        self._taken = 0  # of these, what the system had taken at the last check
        self._unread_since: float | None = None  # since when it takes no more
        self._linger_until: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch the clock."""
        super().connection_made(transport)
        self._connected.count += 1
        self._surplus = self._connected.count > self._connected.limit
        if self._connected.count > self._connected.limit + PROBE_CONNECTIONS:
            transport.abort()
        self._since = self.loop.time()
        self._check_handle = self.loop.call_later(_CHECK_SECONDS, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        """Watch no more."""
        self._connected.count -= 1
        if self._check_handle is not None:
            self._check_handle.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what comes, unless the headers are too long or nobody wants it any more."""
        if self._linger_until is not None or self.transport.is_closing():
            return
        if self._in_headers and not self._header_bytes:
            self._since = self.loop.time()
        self._not_headers = False
        super().data_received(data)
        if self._in_headers and not self._not_headers and not self.transport.is_closing():
            self._header_bytes += len(data)
            if self._header_bytes > HEADER_BYTES:
                self._refuse(
                    431,
                    f"the headers have more than the {HEADER_BYTES} bytes that this server takes; send fewer",
                )

    def eof_received(self) -> None:
        """The client sends no more."""
        if self._linger_until is not None:
            self.transport.close()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_headers = True

    def on_headers_complete(self) -> None:
        """A body begins, which may be empty."""
        self._in_headers, self._in_body, self._not_headers = False, True, True
        self._header_bytes = self._body_bytes = 0
        self._since = self.loop.time()
        if self._surplus and self.url.partition(b"?")[0] not in PROBE_PATHS:
            self._surplus_refused()
            return
        existing = self.cycle
        super().on_headers_complete()
        if self.cycle is not None and self.cycle is not existing:
            self.cycle.transport = _Closing(self)  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        """A part of a body came."""
        self._body_bytes += len(body)
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request was read. What comes next, if anything, are headers."""
        self._in_body, self._in_headers, self._not_headers = False, True, True
        if not self._refused:
            super().on_message_complete()

    def close_gently(self) -> None:
        """Close after an answer. If the body is not read, throw its rest away first."""
        if not self._in_body or self.transport.is_closing():
            self.transport.close()
            return
        self._linger_until = self.loop.time() + LINGER_SECONDS
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _check(self) -> None:
        """Look, now and then, whether the client is too slow."""
        now = self.loop.time()
        self._check_handle = self.loop.call_later(_CHECK_SECONDS, self._check)
        unsent = self.transport.get_write_buffer_size()
        if not unsent or self.written - unsent > self._taken:
            self._unread_since = None
        elif self._unread_since is None:
            self._unread_since = now
        self._taken = self.written - unsent
        if self._unread_since is not None and now - self._unread_since > self._seconds:
            self.transport.abort()  # it does not read
        elif self._linger_until is not None:
            if now > self._linger_until:
                self.transport.close()
        elif now - self._since <= self._seconds or self.transport.is_closing():
            return
        elif self._in_body:
            if self.flow.read_paused or self._body_bytes >= _LEAST_RATE * self._seconds:
                self._body_bytes, self._since = 0, now  # as fast as we read, or fast enough
            else:
                self._refuse(
                    408, f"the body came too slowly: hardly anything for {self._seconds:g} s; send it again"
                )
        elif self.cycle is None and not self._header_bytes:
            self.transport.close()  # it has sent nothing
        elif self._header_bytes:
            self._refuse(408, f"the headers did not come within {self._seconds:g} s; send the request again")

    def _surplus_refused(self) -> None:
        self._refused = True
        self._refuse(
            503,
            f"{self._connected.limit} clients are connected, which is all that this server takes; try again later",
        )

    def _refuse(self, status: int, message: str) -> None:
        """Answer in place of the application, if it has not begun to, and close."""
        if (
            self.cycle is None
            or self.cycle.response_complete
            or (self._in_body and not self.cycle.response_started)
        ):
            error = {
                "message": message,
                "type": "invalid_request_error",
                "param": None,
                "code": _CODES[status],
            }
            body = json.dumps({"error": error}).encode()
            head = (
                f"HTTP/1.1 {status} {_PHRASES[status]}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n{_MORE.get(status, '')}\r\n"
            )
            self.transport.write(head.encode() + body)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application need not wait for the rest
            self.cycle.message_event.set()
        self._in_body = True  # more may come, and is thrown away
        self.close_gently()


_CODES = {408: "request_timeout", 431: "headers_too_large", 503: "too_many_connections"}
_PHRASES = {408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}
_MORE = {503: "retry-after: 5\r\n"}


class _Closing:
    """A transport for the answer to one request; closing it is gentle."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.is_closing = connection.transport.is_closing

    def write(self, data: bytes) -> None:
        self._connection.written += len(data)
        self._connection.transport.write(data)

    def close(self) -> None:
        self._connection.close_gently()


def connections(seconds: float, limit: int = 4096) -> Any:
    """The protocol class for `uvicorn.Config`, which makes one for each client.

    Args:
        seconds: how long a client may take for its headers, or do nothing in the middle of a body or an answer.
        limit: clients connected at once; beyond, only probes are answered.
    """
    return partial(Connection, seconds=seconds, connected=Connected(limit))
