"""Says as a grammar what an answer must be: the fields of structured output and the tools become Lark.

The text of an answer may come after reasoning. Then the grammar has the reasoning, too: any text, and the token that ends it.
So an answer under a grammar never ends inside its reasoning. Calls are written as the model's chat format has them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from server.chat import ChatFormat
from server.chat.errors import UnfitToolError
from server.chat.grammar import BEGIN, BLANKS, FREE, CallRules, ToolForm, json_value, literal, regex, without
from server.chat.parsing import THINK, THOUGHT
from server.generation.grammars import GrammarChecks, NoCompilerError, UnfitGrammarError
from server.http.protocol.errors import ApiError, bad_request, unavailable
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
        if body.bad_words:
            found.append(WantedText("bad_words", without(body.bad_words)))
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
    blanks = None if outputs.disable_any_whitespace else outputs.whitespace_pattern or BLANKS
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


@dataclass(frozen=True, slots=True)
class WantedCalls:
    """What the calls of an answer must be.

    Attributes:
        tools: the tools that may be called.
        must: the answer is a call, whose opening is in the prompt after the reasoning.
        named: the tool whose call that is; None: any.
        single: the answer ends with its first call.
    """

    tools: tuple[ToolForm, ...]
    must: bool = False
    named: str | None = None
    single: bool = False

    @property
    def strict(self) -> bool:
        """Whether the schema of a tool has to be enforced."""
        return any(tool.strict for tool in self.tools)

    def looser(self) -> WantedCalls:
        """The same, with arguments of any form where a tool is not strict."""
        tools = tuple(
            tool if tool.strict else replace(tool, schema={"type": "object"}) for tool in self.tools
        )
        return replace(self, tools=tools)


@dataclass(frozen=True, slots=True)
class Enforced:
    """The grammars of an answer.

    Attributes:
        whole: of all that the engine generates.
        rest: of what comes after the reasoning, if the server has ended it.
    """

    whole: str
    rest: str


class Structure:
    """Makes grammars and has them checked.

    Args:
        checks: compiles grammars under limits
        control_tokens: of the vocabulary, text -> id
        chat: the model's format
    """

    def __init__(self, checks: GrammarChecks, control_tokens: Mapping[str, int], chat: ChatFormat) -> None:
        self._checks, self._tokens, self._chat = checks, control_tokens, chat

    async def grammar(
        self,
        wanted: WantedText | None,
        calls: WantedCalls | None,
        vocab_size: int,
        *,
        thinking: bool = False,
        may_think: bool = False,
    ) -> Enforced | None:
        """Return the checked grammars of an answer; None: it may say anything.

        Args:
            wanted: what its text must be; None: any text
            calls: the calls that may be in it, or that it must be; None: it has none
            vocab_size: of the model
            thinking: the prompt has opened the reasoning
            may_think: the model may open it

        Raises:
            ApiError: the answer cannot be enforced; the message says why.
        """
        if wanted is not None:
            try:
                await self._checked(_written("answer", wanted), wanted.own, vocab_size)
            except UnfitGrammarError as error:
                raise _unfit(wanted.param, error) from None
        if calls is None or not (calls.must or calls.strict or wanted is not None):
            return (
                None if wanted is None else await self._whole(wanted, None, vocab_size, thinking, may_think)
            )
        try:
            return await self._whole(wanted, calls, vocab_size, thinking, may_think)
        except UnfitToolError as error:
            raise _unfit("tools", error) from None
        except UnfitGrammarError as error:
            if calls.looser() == calls:
                raise await self._unfit_tool(calls, vocab_size, error) from None
        try:
            return await self._whole(wanted, calls.looser(), vocab_size, thinking, may_think)
        except UnfitGrammarError as error:
            raise await self._unfit_tool(calls, vocab_size, error) from None

    async def _whole(
        self,
        wanted: WantedText | None,
        calls: WantedCalls | None,
        vocab_size: int,
        thinking: bool,
        may_think: bool,
    ) -> Enforced:
        rules = None
        if calls is not None:
            rules = self._chat.call_rules(
                calls.tools, named=calls.named, single=calls.single, tokens=self._tokens
            )
        must = calls is not None and calls.must
        if rules is None:
            body = "answer"
        elif must:
            body = rules.rest
        else:
            body = rules.said if wanted is None else f"answer | {rules.calls}"
        text, own = (None, "") if must or wanted is None else (wanted, wanted.own)
        rest = await self._checked(_written(body, text, rules), own, vocab_size)
        before = ""
        if thinking:
            before = f"REASONING <[{self._tokens[THOUGHT]}]>"
        elif may_think and self._chat.reasons:
            before = f"(<[{self._tokens[THINK]}]> REASONING <[{self._tokens[THOUGHT]}]>)?"
        if not before:
            return Enforced(rest, rest)
        if must:  # the server opens the call where the reasoning ends
            reasoning = FREE if rules is None else rules.reasoning
            whole = BEGIN + f"start: {before} after_it\nafter_it: {FREE}\nREASONING: {reasoning}\n"
        else:
            whole = _written(body, text, rules, before)
        return Enforced(await self._checked(whole, own, vocab_size), rest)

    async def _unfit_tool(self, calls: WantedCalls, vocab_size: int, error: UnfitGrammarError) -> ApiError:
        """Find the tool whose schema is at fault."""
        for index, tool in enumerate(calls.tools):
            if tool.strict:
                try:
                    await self._checked(f"{BEGIN}start: {tool.arguments()}", "", vocab_size)
                except UnfitGrammarError as own:
                    return _unfit(f"tools[{index}].function.parameters", own)
        return _unfit("tools", error)

    async def _checked(self, text: str, own: str, vocab_size: int) -> str:
        if len(text) > MAX_SCHEMA:
            raise UnfitGrammarError(
                f"it is too large, because it takes {len(text)} characters as a grammar, and at most {MAX_SCHEMA} may be"
            )
        try:
            return await self._checks.check(text, own, vocab_size)
        except NoCompilerError as error:
            raise unavailable(str(error), code="no_grammar_compiler") from None


def _written(body: str, wanted: WantedText | None, rules: CallRules | None = None, before: str = "") -> str:
    """A grammar of an answer's parts."""
    lines = [] if rules is None else list(rules.lines)
    if wanted is not None:
        lines.append(f"answer: {wanted.expression}")
    blank = "LEADING? " if wanted is not None and wanted.blank and before else ""
    if blank:
        lines.append(r"LEADING: /[ \n]{1,4}/")
    if before:
        lines.append(f"REASONING: {FREE if rules is None else rules.reasoning}")
    return BEGIN + "\n".join([f"start: {before} {blank}body", f"body: {body}", *lines]) + "\n"


def _unfit(param: str, error: Exception) -> ApiError:
    return bad_request(f"{param} cannot be enforced: {error}", param=param, code="unfit_grammar")
