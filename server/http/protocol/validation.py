"""Reads bytes as a request body, or says in one sentence what is wrong with them."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from server.http.protocol.base import TAG, Body
from server.http.protocol.errors import ApiError, bad_request

B = TypeVar("B", bound=Body)

_LONGEST_NAME = 64
_MAX_NOTICES = 20


@dataclass(frozen=True, slots=True)
class UnknownField:
    """A field of a body that its endpoint does not know.

    Attributes:
        path: where it is, such as `messages[0].colour`.
        hint: what to do about it.
    """

    path: str
    hint: str

    @property
    def message(self) -> str:
        """One sentence for the client."""
        return f"{self.path} is not a field that this endpoint knows; {self.hint}"


def parse_body(model: type[B], content_type: str | None, raw: bytes) -> B:
    """Read a JSON body. Fields that are not known are left out; `unknown_fields` finds them.

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
        raise _explain(error) from None


def unknown_fields(body: Body) -> list[UnknownField]:
    """Find the fields of a body, and of what is inside it, that are not known: at most twenty."""
    return list(itertools.islice(_unknown(body, []), _MAX_NOTICES))


def refused(field: UnknownField) -> ApiError:
    """The 400 for a field that is not known."""
    return bad_request(field.message, param=field.path, code="unknown_field")


def _unknown(value: Any, location: list[str | int]) -> Iterator[UnknownField]:
    if isinstance(value, Body):
        for name in value.__pydantic_extra__ or ():
            yield UnknownField(_path([*location, name]), _nearest(name, type(value)))
        for name in value.model_fields_set:
            if name in type(value).model_fields:
                yield from _unknown(getattr(value, name), [*location, name])
    elif isinstance(value, list):
        for index, part in enumerate(value):
            if not isinstance(part, Body | list):
                return  # a list has parts of one kind
            yield from _unknown(part, [*location, index])


def _explain(error: ValidationError) -> ApiError:
    problems = error.errors(include_url=False)
    problem = min(problems, key=_rank)
    if problem["type"] == "json_invalid":
        return bad_request(f"the body is not valid JSON: {_reason(problem)}", code="invalid_json")
    location = [part for part in problem["loc"] if not _is_tag(part)]
    path = _path(location)
    if not location:
        return bad_request("the body must be a JSON object", code="invalid_body")
    if problem["type"] == "missing":
        given = problem["input"] if isinstance(problem["input"], dict) else {}
        near = difflib.get_close_matches(str(location[-1]), list(given)[:256], n=1)
        hint = (
            f"; {_path([*location[:-1], near[0]])} is not known: did you mean {location[-1]}?" if near else ""
        )
        return bad_request(f"{path} is required{hint}", param=path, code="missing_field")
    return bad_request(f"{path} {_reason(problem)}", param=path, code="invalid_value")


def _rank(problem: ErrorDetails) -> int:
    """How useful a problem is to the client; of several problems the one with the lowest rank is reported."""
    # A part of an unknown type also lacks the fields of the known types: report the type.
    return 0 if problem["type"] == "literal_error" and problem["loc"][-1] == "type" else 1


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


def _nearest(name: str, model: type[BaseModel]) -> str:
    known = list(model.model_fields)
    name = name[:_LONGEST_NAME]
    close = difflib.get_close_matches(name, known, n=1) or [other for other in known if name in other]
    return f"did you mean {close[0]}?" if close else "remove it"
