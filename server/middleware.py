"""What surrounds every route: the request's id, its record, the last resort, the bound on bodies.

Plain ASGI, because anything else would buffer streams or hide a client that hangs up.
"""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.metrics import Metrics
from server.protocol.errors import ApiError, internal_error

logger = logging.getLogger("server.requests")

_RECORD = "dsa.record"


@dataclass(slots=True)
class Record:
    """What becomes known about a request while it is served.

    Attributes:
        request_id: made here; a client's own is never used.
        started: when it arrived, on the monotonic clock.
        outcome: how it ended, where the status alone does not say.
    """

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.monotonic)
    outcome: str | None = None


def record_of(scope: Scope) -> Record:
    """The record of a request."""
    record = scope[_RECORD]
    assert isinstance(record, Record)
    return record


class RecordMiddleware:
    """Gives every request an id and every failure an answer, and counts both."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope[_RECORD] = Record()
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed", record.request_id)
            record.outcome = "server_error"
            if status is not None:
                raise  # half a response is out: the connection must break, or it would look complete
            await internal_error().to_response()(scope, receive, send_with_id)
        finally:
            self._metrics.request_ended(_endpoint(scope), record.outcome or outcome_of(status))


class BodyLimitMiddleware:
    """Refuses bodies that are too large, while they arrive."""

    def __init__(self, app: ASGIApp, *, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > self._limit):
            await self._refusal().to_response()(scope, receive, send)
            return
        received = 0

        async def receive_some() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._limit:
                    raise self._refusal()
            return message

        await self._app(scope, receive_some, send)

    def _refusal(self) -> ApiError:
        return ApiError(
            413,
            f"the body has more than the {self._limit} bytes that this server takes; send less",
            code="body_too_large",
            headers={"connection": "close"},  # the rest of the body is not worth reading
        )


def _endpoint(scope: Scope) -> str:
    route = scope.get("route")
    return str(getattr(route, "path", "other"))


def outcome_of(status: int | None) -> str:
    """How a request ended, as far as its status tells."""
    if status is None:
        return "disconnected"
    if status == 429:
        return "rejected"
    if status == 503:
        return "unavailable"
    return {2: "ok", 4: "client_error", 5: "server_error"}.get(status // 100, "other")
