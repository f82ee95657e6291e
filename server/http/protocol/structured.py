"""The wire format of structured output: what an answer's text must be. OpenAI's `response_format`, and vLLM's fields."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, StringConstraints, Tag
from pydantic_core import PydanticCustomError

from server.http.protocol.base import TAG, Body, Neutral

MAX_GRAMMAR = 1 << 16
MAX_CHOICES = 4096

Pattern = Annotated[str, StringConstraints(min_length=1, max_length=MAX_GRAMMAR)]
GrammarText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_GRAMMAR)]
Choices = Annotated[
    list[Annotated[str, StringConstraints(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)
]


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonFormat(Body):
    """A JSON object."""

    type: Literal["json_object"]


class SchemaOfFormat(Body):
    """A JSON schema with a name."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    description: str | None = None
    json_schema: dict[str, Any] = Field(
        alias="schema", description="What an answer is; it is always enforced."
    )
    strict: bool | None = Field(default=None, description="It changes nothing: every schema is enforced.")


class SchemaFormat(Body):
    """JSON under a schema."""

    type: Literal["json_schema"]
    json_schema: SchemaOfFormat


def _format_tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"{TAG}{kind}" if kind in ("text", "json_object", "json_schema") else None


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag(f"{TAG}text")]
    | Annotated[JsonFormat, Tag(f"{TAG}json_object")]
    | Annotated[SchemaFormat, Tag(f"{TAG}json_schema")],
    Discriminator(
        _format_tag,
        custom_error_type="response_format",
        custom_error_message='must be {{"type": "text"}}, {{"type": "json_object"}} or '
        '{{"type": "json_schema", "json_schema": {{"name": "...", "schema": {{...}}}}}}',
    ),
]


class TextSchemaFormat(SchemaOfFormat):
    """JSON under a schema, as /v1/responses has it."""

    type: Literal["json_schema"]


ResponseTextFormat = Annotated[
    Annotated[TextFormat, Tag(f"{TAG}text")]
    | Annotated[JsonFormat, Tag(f"{TAG}json_object")]
    | Annotated[TextSchemaFormat, Tag(f"{TAG}json_schema")],
    Discriminator(
        _format_tag,
        custom_error_type="text_format",
        custom_error_message='must be {{"type": "text"}}, {{"type": "json_object"}} or '
        '{{"type": "json_schema", "name": "...", "schema": {{...}}}}',
    ),
]


class OutputFormat(Body):
    """JSON under a schema, as /v1/messages has it."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(
        alias="schema", description="What the text is; it is always enforced."
    )


def schema_format(schema: dict[str, Any], name: str = "answer") -> SchemaFormat:
    """What other forms of a schema are in a chat."""
    named = SchemaOfFormat.model_construct(name=name, json_schema=schema)
    return SchemaFormat.model_construct(type="json_schema", json_schema=named)


def _schema_tag(value: Any) -> str | None:
    return f"{TAG}text" if isinstance(value, str) else f"{TAG}object" if isinstance(value, dict) else None


Schema = Annotated[
    Annotated[str, StringConstraints(max_length=1 << 20), Tag(f"{TAG}text")]
    | Annotated[dict[str, Any], Tag(f"{TAG}object")],
    Discriminator(
        _schema_tag,
        custom_error_type="schema",
        custom_error_message="must be a JSON schema: an object, or its text",
    ),
]


_BLANKS = re.compile(r"(?:\\[ntr]|[ \t\n\r]|[\[\]()|?*+]|\{[0-9]{0,3},?[0-9]{0,3}\})+")


def _blanks(pattern: str) -> str:
    if len(pattern) > 256 or not _BLANKS.fullmatch(pattern):
        raise PydanticCustomError(
            "blanks", "must be a regular expression of blanks, tabs and line breaks only, such as '[ \\n]?'"
        )
    return pattern


class StructuredOutputs(Body):
    """What an answer is; exactly one of the first five. The names are vLLM's."""

    json_schema: Schema | None = Field(default=None, alias="json", description="A JSON schema, or its text.")
    regex: Pattern | None = Field(
        default=None, description="A regular expression that matches the whole answer, without look-around."
    )
    choice: Choices | None = Field(default=None, description="The answer is one of these.")
    grammar: GrammarText | None = Field(
        default=None, description="A grammar: GBNF, or llguidance's variant of Lark."
    )
    json_object: bool | None = Field(default=None, description="True: a JSON object.")
    disable_any_whitespace: bool | None = Field(
        default=None, description="True: no whitespace between the parts of JSON."
    )
    disable_fallback: bool | None = Field(default=None, description="It changes nothing: there is none.")
    disable_additional_properties: Annotated[
        Any, Neutral(False, advice="must be false or null: say additionalProperties false in the schema")
    ] = None
    structural_tag: Annotated[Any, Neutral(advice="must be null: send tools instead, with strict true")] = (
        None
    )
    whitespace_pattern: Annotated[str, AfterValidator(_blanks)] | None = Field(
        default=None,
        description="What may be between the parts of JSON besides nothing, as a regular expression of blanks, tabs and "
        "line breaks. Default: one blank, or a line break with indentation.",
    )
