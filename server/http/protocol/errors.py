"""Errors as clients see them: OpenAI's `{"error": {...}}`, or under /v1/messages Anthropic's form, whatever went wrong.

A message is one sentence that says what to change. Other modules decide when to raise which error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, Field
from starlette.responses import Response

INVALID_REQUEST = "invalid_request_error"
UNAVAILABLE = "service_unavailable_error"
ENGINE = "engine_error"
SERVER = "server_error"
RATE_LIMIT = "rate_limit_error"
TIMEOUT = "timeout_error"


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="One sentence for a human: what is wrong and what to change.")
    type: str = Field(description="The class of the error, such as `invalid_request_error`.")
    param: str | None = Field(description="The field of the request that is at fault, if one is.")
    code: str | None = Field(description="A stable word for programs, such as `context_length_exceeded`.")


class ErrorResponse(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorDetail


class MessagesErrorDetail(BaseModel):
    """What went wrong."""

    type: str = Field(description="The class of the error, such as `invalid_request_error`.")
    message: str = Field(description="One sentence for a human: what is wrong and what to change.")


class MessagesErrorResponse(BaseModel):
    """The body of every response of /v1/messages that is not a success."""

    type: Literal["error"]
    error: MessagesErrorDetail


MESSAGES = "/v1/messages"
"""The path of the endpoints whose errors have Anthropic's form."""

_MESSAGES_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    408: "timeout_error",
}


class ApiError(Exception):
    """An answer that is not a success. Any code below a route may raise it; the app renders it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(message=message, type=kind, param=param, code=code)
        self.headers = dict(headers or {})

    def to_json(self) -> str:
        """The body. It is pure ASCII, so that it can always be encoded, whatever a client sent."""
        return json.dumps({"error": self.detail.model_dump()}, separators=(",", ":"))

    def to_messages_json(self) -> str:
        """The body in Anthropic's form, pure ASCII, too."""
        kind = _MESSAGES_KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        detail = MessagesErrorDetail(type=kind, message=self.detail.message)
        return json.dumps({"type": "error", "error": detail.model_dump()}, separators=(",", ":"))

    def to_response(self, path: str = "") -> Response:
        """The HTTP response, in the form of the endpoint at `path`."""
        is_messages = path == MESSAGES or path.startswith(f"{MESSAGES}/")
        body = self.to_messages_json() if is_messages else self.to_json()
        return Response(body, self.status, self.headers, media_type="application/json")


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Make a 400: the client must change its request."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, *, code: str, kind: str = UNAVAILABLE, retry_after: int = 5) -> ApiError:
    """Make a 503: the same request may succeed after `retry_after` seconds."""
    return ApiError(503, message, kind=kind, code=code, headers={"retry-after": str(retry_after)})


def draining() -> ApiError:
    """Make the 503 of a server that is about to exit."""
    return unavailable(
        "the server is shutting down and takes no new requests; send it to another", code="draining"
    )


def internal_error() -> ApiError:
    """Make a 500: a fault of the server. The log has the details; the client gets none."""
    return ApiError(
        500,
        "the server met an unexpected fault; its log has the details under this response's x-request-id",
        kind=SERVER,
        code="internal_error",
    )
