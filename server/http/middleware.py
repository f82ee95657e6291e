"""Middleware around every route: request ids, records, the answer to unexpected errors, compressed and large bodies.

It is plain ASGI, because Starlette's base class for middleware would buffer streams or hide that a client hangs up.
"""

from __future__ import annotations

import logging
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access.keys import Caller
from server.http.protocol.errors import ApiError, bad_request, internal_error
from server.telemetry.metrics import Metrics
from server.telemetry.record import Ended, GenerationRecord

logger = logging.getLogger("server.requests")

_RECORD = "dsa.record"
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


@dataclass(slots=True)
class Record:
    """What becomes known about a request while it is served.

    Attributes:
        request_id: made here; an id that the client sends is never used.
        started: when the request arrived, in seconds on the monotonic clock.
        started_ns: the same moment in nanoseconds since 1970.
        outcome: how the request ended, if the status alone does not say it.
        generation: what is generated; None until generation begins.
        caller: who sent it; None until that is known.
        headers: more headers of the response.
        send: takes the body's messages once the response has started. No middleware looks at these, so a stream
            need not pass each event through all of them.
    """

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.monotonic)
    started_ns: int = field(default_factory=time.time_ns)
    outcome: str | None = None
    generation: GenerationRecord | None = None
    caller: Caller | None = None
    headers: dict[str, str] = field(default_factory=dict)
    send: Send | None = None


def record_of(scope: Scope) -> Record:
    """The record of a request."""
    record = scope[_RECORD]
    assert isinstance(record, Record)
    return record


class RecordMiddleware:
    """Gives every request an id and every failure an answer, counts the request, and calls the observers at its end."""

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, observers: Sequence[Callable[[Ended], None]] = ()
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope[_RECORD] = Record(send=send)
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = (
                    record.request_id
                )  # OpenAI's name, Anthropic's
                for name, value in record.headers.items():
                    headers[name] = value
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed", record.request_id)
            record.outcome = "server_error"
            if status is not None:
                raise  # half a response was sent: the connection must break, or the response would look complete
            await internal_error().to_response(scope["path"])(scope, receive, send_with_id)
        finally:
            outcome = record.outcome or outcome_of(status)
            self._metrics.request_ended(_endpoint(scope), outcome)
            if record.caller is not None and record.caller.record is not None:
                self._metrics.callers.ended(record.caller.name, outcome)
            self._tell(scope, record, status, outcome)

    def _tell(self, scope: Scope, record: Record, status: int | None, outcome: str) -> None:
        if not self._observers:
            return
        headers = Headers(scope=scope)
        ended = Ended(
            request_id=record.request_id,
            method=scope["method"] if scope["method"] in _METHODS else "other",
            endpoint=_endpoint(scope),
            status=status,
            outcome=outcome,
            started_ns=record.started_ns,
            started=record.started,
            seconds=time.monotonic() - record.started,
            traceparent=headers.get("traceparent"),
            tracestate=headers.get("tracestate"),
            generation=record.generation,
            key=None if record.caller is None else record.caller.name,
        )
        for observe in self._observers:
            try:
                observe(ended)
            except Exception:  # a log that fails must not make an answered request fail
                logger.exception("request %s was not recorded", record.request_id)


class BodyLimitMiddleware:
    """Refuses a body that is too large as soon as too many bytes are announced or have arrived.

    A compressed body (gzip, deflate) is unpacked here, and never beyond the limit.
    """

    def __init__(self, app: ASGIApp, *, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > self._limit):
            await self._refusal().to_response(scope["path"])(scope, receive, send)
            return
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", *_WINDOWS):
            message = f"a body may be sent as gzip, deflate or plain, not in the encoding {encoding[:64]!a}"
            refusal = ApiError(415, message, code="unsupported_encoding")
            await refusal.to_response(scope["path"])(scope, receive, send)
            return
        unpack = _Unpacker(encoding) if encoding in _WINDOWS else None
        received = 0

        async def receive_some() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                body = message.get("body", b"")
                if unpack is not None:
                    body = unpack(body, self._limit + 1 - received)
                    message = {**message, "body": body}
                received += len(body)
                if received > self._limit:
                    raise self._refusal()
                if unpack is not None and not message.get("more_body", False) and not unpack.complete:
                    raise _damaged()
            return message

        await self._app(scope, receive_some, send)

    def _refusal(self) -> ApiError:
        return ApiError(
            413,
            f"the body has more than the {self._limit} bytes that this server takes; send less",
            code="body_too_large",
            headers={"connection": "close"},  # the rest of the body is not worth reading
        )


_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


class _Unpacker:
    """Unpacks a compressed body piece by piece."""

    def __init__(self, encoding: str) -> None:
        self._stream = zlib.decompressobj(_WINDOWS[encoding])

    @property
    def complete(self) -> bool:
        return self._stream.eof

    def __call__(self, data: bytes, limit: int) -> bytes:
        """Return what `data` adds to the body: at most `limit` bytes."""
        try:
            return self._stream.decompress(data, max(limit, 1)) if data else b""
        except zlib.error:
            raise _damaged() from None


def _damaged() -> ApiError:
    return bad_request("the compressed body is damaged or cut short; send it again", code="invalid_encoding")


def _endpoint(scope: Scope) -> str:
    route = scope.get("route")
    return str(getattr(route, "path", "other"))


def outcome_of(status: int | None) -> str:
    """How a request with this HTTP status ended; None is a request without a response."""
    if status is None:
        return "disconnected"
    if status == 429:
        return "rejected"
    if status == 503:
        return "unavailable"
    if status == 408:
        return "deadline"
    return {2: "ok", 4: "client_error", 5: "server_error"}.get(status // 100, "other")
