"""The generating endpoints' part of the OpenAPI schema.

`server.http.protocol.validation` reads their bodies, not FastAPI, so FastAPI does not know the schemas by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypedDict

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.http.protocol.admin import SettingsBody
from server.http.protocol.base import ID_TITLE, LOGPROBS_TITLE, Body
from server.http.protocol.chat import ChatCompletionBody, ChatCompletionChunk
from server.http.protocol.completions import Completion, CompletionBody
from server.http.protocol.errors import ErrorResponse
from server.http.protocol.generate import GenerateBody
from server.http.protocol.messages import CountTokensBody, MessageEvent, MessagesBody
from server.http.protocol.responses import ResponseBody, ResponseEvent
from server.http.protocol.tokens import DetokenizeBody, TokenizeBody

_REFERENCE = "#/components/schemas/{model}"

_ERRORS = {
    400: "The request cannot be run as it is; `message` says what to change.",
    401: "No valid key was sent, and this server asks for one.",
    402: "The key's budget is spent, or too small for the request.",
    403: "The key does not allow it.",
    404: "The model is not served here.",
    413: "The body is too large.",
    415: "The body is not declared to be JSON.",
    429: "The server is full, or the key has reached a limit; `Retry-After` says when to try again.",
    500: "The engine could not run this request, or the server met a fault.",
    408: "The answer did not end within the time that the request, or the server, allows.",
    503: "The model is loading, the engine has died or the server is shutting down.",
}


class Description(TypedDict):
    """Arguments of a route's decorator."""

    responses: dict[int | str, dict[str, Any]]
    openapi_extra: dict[str, Any]


def describe(
    *,
    body: type[Body],
    whole: type[BaseModel],
    chunk: type[BaseModel],
    error: type[BaseModel] = ErrorResponse,
    done: bool = True,
) -> Description:
    """Describe a generating endpoint for the schema: its body, response, stream events and errors."""
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": error, "description": text} for status, text in _ERRORS.items()
    }
    events = (
        f"With `stream`: server-sent events, each a `{chunk.__name__}`"
        f"{', then `data: [DONE]`' if done else ''}. "
        f"A failure on the way is an event with an `{error.__name__}`, and the last one."
    )
    responses[200] = {
        "description": "The response.",
        "model": whole,
        "content": {"text/event-stream": {"schema": {"type": "string", "description": events}}},
    }
    request = {"required": True, "content": {"application/json": {"schema": _reference(body)}}}
    return {"responses": responses, "openapi_extra": {"requestBody": request}}


def describe_plain(
    *,
    body: type[Body],
    answer: type[BaseModel],
    error: type[BaseModel] = ErrorResponse,
    generates: bool = False,
) -> Description:
    """Describe an endpoint that reads a body and has one form of answer. If it does not generate, it meets fewer errors."""
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": error, "description": _ERRORS[status]}
        for status in (_ERRORS if generates else (400, 401, 403, 404, 413, 415, 429))
    }
    responses[200] = {"description": "The response.", "model": answer}
    request = {"required": True, "content": {"application/json": {"schema": _reference(body)}}}
    return {"responses": responses, "openapi_extra": {"requestBody": request}}


def openapi_of(
    app: FastAPI, *, vocabulary: int, max_logprobs: int, empty_prompts: bool, open_paths: Collection[str]
) -> Callable[[], dict[str, Any]]:
    """Return the function that makes the app's schema at its first call.

    Args:
        app: with all its routes.
        vocabulary: the number of token ids, which bounds them in the schema.
        max_logprobs: the most alternatives of a log-probability; -1: any number.
        empty_prompts: an empty text is a prompt, because a token begins every sequence.
        open_paths: paths that never ask for a key.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            _, definitions = models_json_schema(
                [
                    (ChatCompletionBody, "validation"),
                    (CompletionBody, "validation"),
                    (GenerateBody, "validation"),
                    (TokenizeBody, "validation"),
                    (DetokenizeBody, "validation"),
                    (ResponseBody, "validation"),
                    (SettingsBody, "validation"),
                    (ResponseEvent, "serialization"),
                    (MessagesBody, "validation"),
                    (CountTokensBody, "validation"),
                    (MessageEvent, "serialization"),
                    (ChatCompletionChunk, "serialization"),
                    (Completion, "serialization"),
                ],
                ref_template=_REFERENCE,
            )
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            for name, definition in definitions["$defs"].items():
                components.setdefault(name, definition)
            _bound(schema, ID_TITLE, maximum=vocabulary - 1)
            if max_logprobs == -1:
                _bound(schema, LOGPROBS_TITLE, minimum=-1)
            else:
                _bound(schema, LOGPROBS_TITLE, maximum=max_logprobs)
            if not empty_prompts:
                _set_min_length(components["CompletionBody"]["properties"]["prompt"])
            _close(schema, open_paths)
            app.openapi_schema = schema
        return app.openapi_schema

    return openapi


def _bound(schema: Any, title: str, **bounds: int) -> None:
    """Write the bounds of a kind of numbers into a schema."""
    if isinstance(schema, dict):
        if schema.get("title") == title:
            schema.update(bounds)
        for part in schema.values():
            _bound(part, title, **bounds)
    elif isinstance(schema, list):
        for part in schema:
            _bound(part, title, **bounds)


def _close(schema: dict[str, Any], open_paths: Collection[str]) -> None:
    """Write down how a key is sent, and what is answered without one."""
    schema["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    for path, operations in schema["paths"].items():
        if path in open_paths:
            continue
        for operation in operations.values():
            operation["security"] = [{"bearer": []}, {"x-api-key": []}, {}]  # the last: a server without keys
            for status in (401, 403):
                content = {"application/json": {"schema": _reference(ErrorResponse)}}
                refusal = {"description": _ERRORS[status], "content": content}
                operation["responses"].setdefault(str(status), refusal)


def _set_min_length(prompt: dict[str, Any]) -> None:
    for kind in prompt["anyOf"] if "anyOf" in prompt else prompt["oneOf"]:
        text = kind.get("items", kind)
        if text.get("type") == "string":
            text["minLength"] = 1


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}
