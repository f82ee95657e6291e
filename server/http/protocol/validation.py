"""Reads bytes as a request body, or says in one sentence what is wrong with them."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from server.http.protocol.base import TAG, Body
from server.http.protocol.errors import ApiError, bad_request

B = TypeVar("B", bound=Body)

_LONGEST_NAME = 64


def parse_body(model: type[B], content_type: str | None, raw: bytes) -> B:
    """Read a JSON body.

    Raises:
        ApiError: 415 if the body is not sent as JSON, 400 if it is wrong; the message says what to change.
    """
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise ApiError(
            415,
            "the body must be JSON, sent with the header 'Content-Type: application/json'",
            code="unsupported_media_type",
        )
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise _explain(model, error) from None


def _explain(model: type[Body], error: ValidationError) -> ApiError:
    problems = error.errors(include_url=False, include_input=False)
    problem = min(problems, key=_rank)
    if problem["type"] == "json_invalid":
        return bad_request(f"the body is not valid JSON: {_reason(problem)}", code="invalid_json")
    location = [part for part in problem["loc"] if not _is_tag(part)]
    path = _path(location)
    if not location:
        return bad_request("the body must be a JSON object", code="invalid_body")
    if problem["type"] == "extra_forbidden":
        hint = _nearest(str(location[-1]), _model_at(model, location[:-1]))
        return bad_request(
            f"{path} is not a field that this endpoint knows; {hint}", param=path, code="unknown_field"
        )
    if problem["type"] == "missing":
        return bad_request(f"{path} is required", param=path, code="missing_field")
    return bad_request(f"{path} {_reason(problem)}", param=path, code="invalid_value")


def _rank(problem: ErrorDetails) -> int:
    """How useful a problem is to the client; of several problems the one with the lowest rank is reported."""
    if problem["type"] == "literal_error" and problem["loc"][-1] == "type":
        return 0  # a part of an unknown type also has unknown fields: report the type
    return 1 if problem["type"] == "extra_forbidden" else 2  # a misspelt name also makes a missing field


def _reason(problem: ErrorDetails) -> str:
    """Pydantic's message, changed so that it can follow a field's name."""
    message = problem["msg"].removeprefix("Invalid JSON: ").removeprefix("Value error, ")
    for beginning, better in (("Input should", "must"), ("String should", "must"), ("List should", "must")):
        if message.startswith(beginning):
            return better + message.removeprefix(beginning)
    return message


def _is_tag(part: str | int) -> bool:
    """Whether a part of a location comes from pydantic or our tags, and not from the client's JSON."""
    return isinstance(part, str) and (part.startswith(TAG) or part == "[key]")


def _path(location: Sequence[str | int]) -> str:
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
            continue
        name = "".join(character if character.isprintable() else "\ufffd" for character in part)
        if len(name) > _LONGEST_NAME:
            name = name[:_LONGEST_NAME] + "..."
        text += f".{name}" if text else name
    return text


def _nearest(name: str, model: type[BaseModel] | None) -> str:
    known = list(model.model_fields) if model is not None else []
    name = name[:_LONGEST_NAME]
    close = difflib.get_close_matches(name, known, n=1) or [other for other in known if name in other]
    return f"did you mean {close[0]}?" if close else "remove it"


def _model_at(model: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel] | None:
    """The model whose fields are expected at a location inside a body; None if there is none."""
    current: type[BaseModel] | None = model
    for part in location:
        if isinstance(part, int) or current is None:
            continue
        field = current.model_fields.get(part)
        current = _model_in(field.annotation) if field is not None else None
    return current


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _model_in(part))), None)
