"""Pieces of grammars, in llguidance's variant of Lark: literal text, text that is free, and JSON under a schema.

Definition of the variant: docs/syntax.md and docs/json_schema.md of guidance-ai/llguidance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.chat.errors import UnfitToolError

BEGIN = '%llguidance {"no_forcing": true}\n'
"""The first line: text that must come may come in any tokens, as the model likes."""

BLANKS = r"( |\n[ \t]{0,24})"
"""Whitespace between two parts of JSON: one blank, or a line break and the next line's indentation. Without a bound a weak
model may write nothing else. llama.cpp's `json-schema-to-grammar` has such a rule, too."""

FREE = r"/(?s:.*)/"
"""Any text. It has no control tokens, because no text has one in a grammar."""


_ROOT_KEYS = frozenset(
    "type properties required additionalProperties title description $schema $id $defs definitions".split()
)


def without(words: Sequence[str]) -> str:
    """Any text in which none of these words is, as an expression with the terminal that it refers to."""
    some = "|".join(map(re.escape, words))
    return f"WITHOUT\nWITHOUT: {FREE} & ~{regex(f'(?s:.*)({some})(?s:.*)')}"


@dataclass(frozen=True, slots=True)
class ArgumentList:
    """The arguments of a tool whose schema is a plain list of properties.

    Attributes:
        schemas: of the properties, and of others that are required.
        required: the names of those that must come.
        shared: definitions that the schemas may refer to.
        open: nothing is said about the arguments, so there may be any.
    """

    schemas: Mapping[str, Any]
    required: frozenset[str]
    shared: Mapping[str, Any]
    open: bool

    def schema(self, key: str) -> Mapping[str, Any] | bool:
        """The schema of an argument, with the definitions that it may refer to."""
        schema = self.schemas[key]
        return {**self.shared, **schema} if isinstance(schema, dict) else schema is not False


@dataclass(frozen=True, slots=True)
class ToolForm:
    """What the arguments of a tool's calls must be.

    Attributes:
        name: the tool's.
        schema: of the arguments.
        strict: all of the schema is enforced; else what cannot be enforced is left out.
    """

    name: str
    schema: Mapping[str, Any]
    strict: bool

    def parameters(self) -> ArgumentList | None:
        """The arguments one by one; None if the schema is not a plain list of properties."""
        properties, required = self.schema.get("properties", {}), self.schema.get("required", [])
        if (
            self.schema.get("type", "object") != "object"
            or not isinstance(properties, dict)
            or not isinstance(required, list)
            or not _ROOT_KEYS.issuperset(self.schema)
        ):
            return None
        closed = self.strict or self.schema.get("additionalProperties") is False
        return ArgumentList(
            schemas={key: properties.get(key, True) for key in dict.fromkeys([*properties, *required])},
            required=frozenset(required),
            shared={key: self.schema[key] for key in ("$defs", "definitions") if key in self.schema},
            open=not (properties or required or closed),
        )

    def listed(self, names: str) -> ArgumentList | None:
        """The arguments one by one, for a format that writes them so; None: they may be any.

        Args:
            names: a regular expression of the names of arguments that the format can write

        Raises:
            UnfitToolError: the tool is strict, and its schema is not a plain list of such arguments.
        """
        parameters = self.parameters()
        if parameters is not None and all(re.fullmatch(names, key) for key in parameters.schemas):
            return None if parameters.open else parameters
        if self.strict:
            raise UnfitToolError(
                f"the parameters of {self.name!r} must be an object with properties and no other conditions, because "
                "this model's format writes them one by one"
            )
        return None

    def arguments(self) -> str:
        """The expression for the arguments as JSON."""
        is_open = not any(
            key in self.schema for key in ("type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const")
        )
        schema = {**self.schema, "type": "object"} if is_open else self.schema
        return json_value(schema, lenient=not self.strict)


@dataclass(frozen=True, slots=True)
class CallRules:
    """How a format writes calls, as expressions in Lark.

    Attributes:
        lines: the rules that the expressions refer to.
        said: text, with or without calls after it.
        calls: calls without text.
        rest: what follows the opening of a call, which is in the prompt.
        reasoning: text of reasoning, which begins no call; it stands in a terminal of its own.
    """

    lines: Sequence[str]
    said: str
    calls: str
    rest: str
    reasoning: str = FREE


def literal(text: str, control_tokens: Mapping[str, int] | None = None) -> str:
    """Return the expression for exactly this text, in which control tokens (text -> id) are themselves."""
    tokens = control_tokens or {}
    pattern = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    pieces = re.split(f"({pattern})", text) if pattern else [text]
    parts = [f"<[{tokens[piece]}]>" if piece in tokens else json.dumps(piece) for piece in pieces if piece]
    return " ".join(parts) or '""'


def json_value(
    schema: Mapping[str, Any] | bool, *, lenient: bool = False, blanks: str | None = BLANKS
) -> str:
    """Return the expression for JSON that a schema allows.

    Args:
        schema: a JSON schema
        lenient: leave out what cannot be enforced
        blanks: what whitespace there may be between the parts, as a regular expression; None: there is none
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    options: dict[str, Any] = {"whitespace_pattern": blanks} if blanks else {"whitespace_flexible": False}
    if lenient:
        options["lenient"] = True
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def regex(pattern: str) -> str:
    """Return the expression for the texts that a regular expression matches as a whole (syntax of Rust's `regex`)."""
    written = re.sub(r"\\.|/", lambda match: r"\/" if match[0] == "/" else match[0], pattern, flags=re.DOTALL)
    for character, name in (("\n", r"\n"), ("\r", r"\r")):
        written = written.replace("\\" + character, name).replace(character, name)
    return f"/{written}/" if written else '""'
