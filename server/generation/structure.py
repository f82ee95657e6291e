"""Says as a grammar what an answer must be: the fields of structured output become Lark.

The text of an answer may come after reasoning. Then the grammar has the reasoning, too: any text, and the token that ends it.
So an answer under a grammar never ends inside its reasoning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.chat.grammar import BEGIN, FREE, json_value, literal, regex
from server.chat.parsing import THINK, THOUGHT
from server.generation.grammars import GrammarChecks, UnfitGrammarError
from server.http.protocol.errors import bad_request
from server.http.protocol.sampling import GenerationBody
from server.http.protocol.structured import JsonFormat, SchemaFormat, StructuredOutputs

MAX_SCHEMA = 1 << 18
"""Characters of a grammar."""


@dataclass(frozen=True, slots=True)
class WantedText:
    """What the text of an answer must be.

    Attributes:
        param: the field that says so.
        expression: in Lark.
        own: a client's grammar in Lark, to which the expression refers as `@own`.
        blank: blank text may come before it, as models write it after their reasoning.
    """

    param: str
    expression: str
    own: str = ""
    blank: bool = False


def wanted_of(body: GenerationBody) -> WantedText | None:
    """Read what a body says about its answer's text; None: any text.

    Raises:
        ApiError: the fields contradict each other.
    """
    try:
        found = [*_formats(body), *_guided(body)]
        if body.structured_outputs is not None:
            found += _outputs(body.structured_outputs)
    except RecursionError:
        raise bad_request("the JSON schema is nested too deeply", code="unfit_grammar") from None
    if len(found) > 1:
        raise bad_request(
            f"{found[0].param} and {found[1].param} both say what the answer must be; send one of them",
            param=found[1].param,
        )
    return found[0] if found else None


def _formats(body: GenerationBody) -> list[WantedText]:
    match body.response_format:
        case JsonFormat():
            return [WantedText("response_format", json_value({"type": "object"}), blank=True)]
        case SchemaFormat(json_schema=named):
            schema = json_value(named.json_schema)
            return [WantedText("response_format.json_schema.schema", schema, blank=True)]
        case _:
            return []


def _guided(body: GenerationBody) -> list[WantedText]:
    """The older names of vLLM."""
    outputs = StructuredOutputs.model_construct(
        regex=body.guided_regex, choice=body.guided_choice, grammar=body.guided_grammar
    )
    return _read(outputs.model_copy(update={"json_schema": body.guided_json}), "guided_")


def _outputs(outputs: StructuredOutputs) -> list[WantedText]:
    found = _read(outputs, "structured_outputs.")
    if not found:
        raise bad_request(
            "structured_outputs must have one of json, regex, choice, grammar and json_object",
            param="structured_outputs",
        )
    return found


def _read(outputs: StructuredOutputs, prefix: str) -> list[WantedText]:
    blanks = not outputs.disable_any_whitespace
    found: list[WantedText] = []
    if (schema := outputs.json_schema) is not None:
        read = _parsed(schema, f"{prefix}json") if isinstance(schema, str) else schema
        found.append(WantedText(f"{prefix}json", json_value(read, blanks=blanks), blank=True))
    if outputs.json_object:
        found.append(
            WantedText(f"{prefix}json_object", json_value({"type": "object"}, blanks=blanks), blank=True)
        )
    if outputs.regex is not None:
        found.append(WantedText(f"{prefix}regex", regex(outputs.regex)))
    if outputs.choice is not None:
        found.append(WantedText(f"{prefix}choice", " | ".join(map(literal, outputs.choice))))
    if outputs.grammar is not None:
        found.append(WantedText(f"{prefix}grammar", "@own", own=outputs.grammar))
    return found


def _parsed(text: str, param: str) -> Mapping[str, Any] | bool:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict | bool):
        raise bad_request(f"{param} must be a JSON schema, but its text is not a JSON object", param=param)
    return schema


class Structure:
    """Makes grammars and has them checked.

    Args:
        checks: compiles grammars under limits
        control_tokens: of the vocabulary, text -> id
        reasons: answers may have reasoning
    """

    def __init__(self, checks: GrammarChecks, control_tokens: Mapping[str, int], *, reasons: bool) -> None:
        self._checks, self._tokens, self._reasons = checks, control_tokens, reasons

    async def grammar(
        self, wanted: WantedText, vocab_size: int, *, thinking: bool = False, may_think: bool = False
    ) -> Enforced:
        """Return the checked grammars of an answer.

        Args:
            wanted: what its text must be
            vocab_size: of the model
            thinking: the prompt has opened the reasoning
            may_think: the model may open it

        Raises:
            ApiError: the text cannot be enforced; the message says why.
        """
        text = await self._checked(wanted.param, self._written(wanted, "own"), wanted.own, vocab_size)
        before = ""
        if thinking:
            before = f"reasoning <[{self._tokens[THOUGHT]}]> "
        elif may_think and self._reasons:
            before = f"(<[{self._tokens[THINK]}]> reasoning <[{self._tokens[THOUGHT]}]>)? "
        if not before:
            return Enforced(text, text)
        whole = self._written(wanted, "own", before)
        return Enforced(await self._checked(wanted.param, whole, wanted.own, vocab_size), text)

    @staticmethod
    def _written(wanted: WantedText, own: str, before: str = "") -> str:
        blank = "BLANK? " if wanted.blank and before else ""
        lines = [f"start: {before}{blank}answer", f"answer: {wanted.expression}"]
        if blank:
            lines.append(r"BLANK: /[ \n]{1,4}/")
        if before:
            lines.append(f"reasoning: {FREE}")
        return BEGIN + "\n".join(lines) + "\n"

    async def _checked(self, param: str, text: str, own: str, vocab_size: int) -> str:
        if len(text) > MAX_SCHEMA:
            raise bad_request(
                f"{param} is too large to be enforced: {len(text)} characters, and at most {MAX_SCHEMA} are",
                param=param,
                code="grammar_too_large",
            )
        try:
            return await self._checks.check(text, own, vocab_size)
        except UnfitGrammarError as error:
            raise bad_request(
                f"{param} cannot be enforced: {error}", param=param, code="unfit_grammar"
            ) from None


@dataclass(frozen=True, slots=True)
class Enforced:
    """The grammars of an answer.

    Attributes:
        whole: of all that the engine generates.
        rest: of what comes after the reasoning, if the server has ended it.
    """

    whole: str
    rest: str
