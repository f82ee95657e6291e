"""The base of all request bodies: strict models, numbers with bounds, and fields that must have a neutral value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StringConstraints,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


def _fail_fast(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for name, part in schema.items():
            if name not in ("metadata", "serialization"):
                _fail_fast(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part)


class Body(BaseModel):
    """Base of what clients send: no coercion, no NaN or infinity.

    Fields with unknown names are kept apart. `server.http.protocol.validation` names or refuses them.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """End the validation of a list at its first bad element: a body may have millions, and one is reported."""
        schema = handler(source)
        _fail_fast(schema)
        return schema


MAX_INTEGER = 2**63 - 1


def _whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


def _wholes(value: Any) -> Any:
    if type(value) is list and float in set(map(type, value)):
        return list(map(_whole, value))
    return value


WHOLE = BeforeValidator(_whole)
"""Annotation of an integer field. JSON has one kind of number, so 2.0 is the integer 2."""

WHOLES = BeforeValidator(_wholes)
"""The same for a list of integers, which may be long."""

AtLeastOne = Annotated[int, Field(ge=1, le=MAX_INTEGER), WHOLE]
Natural = Annotated[int, Field(ge=0, le=MAX_INTEGER), WHOLE]

ID_TITLE = "TokenId"
"""The title of the schema of a token id. The published schema gets the vocabulary's bound there."""

TokenId = Annotated[int, WithJsonSchema({"type": "integer", "minimum": 0, "title": ID_TITLE})]
"""A token id; `server.generation.intake` checks it against the model's vocabulary."""


LOGPROBS_TITLE = "LogprobCount"
"""The title of the schema of a number of alternatives. The published schema gets the server's bound there."""

LogprobCount = Annotated[
    int,
    Field(ge=-1, le=MAX_INTEGER),
    WHOLE,
    WithJsonSchema({"type": "integer", "minimum": 0, "title": LOGPROBS_TITLE}),
]
"""So many of the likeliest tokens, -1 is all; `server.generation.logprobs` checks it against the server's bound."""


Label = Annotated[str, StringConstraints(max_length=512)]
"""Text that the client attaches for its own bookkeeping; it changes nothing here."""


CacheControl = Annotated[Any, Field(description="It has no effect: every prompt is cached, without marks.")]


class Neutral:
    """Annotation of a field that this server does not implement. The field accepts null and values without effect.

    Args:
        allowed: the neutral values besides null.
        advice: what is accepted, what this server lacks and what to do instead. The error message is the
            field's name and then this text.
    """

    def __init__(self, *allowed: Any, advice: str) -> None:
        self._allowed = (None, *allowed)
        self._advice = advice

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self._allowed), "description": self._advice}

    def _check(self, value: Any) -> Any:
        if any(type(value) is type(item) and value == item for item in self._allowed):
            return value
        raise PydanticCustomError("not_neutral", "{advice}", {"advice": self._advice})


TAG = "\x00"
"""The tag of every union member begins with it. So tags and field names differ in pydantic's error locations."""


def tag_of_list(value: Any, *, text: str, empty: str, kinds: Sequence[tuple[type, str]]) -> str | None:
    """Choose the member of a union by a value's JSON type; for a list, by the type of its first element.

    Args:
        value: the JSON value.
        text: the tag for a string.
        empty: the tag for an empty list.
        kinds: (type of the first element, tag) for other lists.

    Returns:
        The tag; None if no member fits.
    """
    if isinstance(value, str):
        return text
    if not isinstance(value, list):
        return None
    if not value:
        return empty
    return next((tag for kind, tag in kinds if isinstance(value[0], kind)), None)
