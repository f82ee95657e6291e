"""Grammars of calls: whatever they allow, the format's own parser reads as calls with valid arguments."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

from engine.grammar import GrammarCompiler
from engine.protocol import Vocabulary
from server.chat.deepseek_v31 import DeepSeekV31
from server.chat.deepseek_v32 import CALLS, DSML, PARAMETER_END, DeepSeekV32
from server.chat.errors import UnfitToolError
from server.chat.format import ChatFormat
from server.chat.grammar import BEGIN, ToolForm
from server.chat.hermes import CALL, CALL_END
from server.chat.llama_json import LlamaJsonFormat
from server.chat.mistral import MistralFormat
from server.chat.parts import Content, Parser, Part, Warn, merge
from server.chat.pythonic import PythonicFormat
from server.chat.tagged import GlmFormat, QwenCoderFormat
from server.generation.grammars import vocabulary_of
from tests.schemas import random_schema
from tests.server.chat.kit import VOCABULARY, calls
from tests.server.chat.templates import GLM, LLAMA, MISTRAL, MISTRAL_LIST, PYTHONIC, QWEN_CODER
from tests.server.chat.test_hermes import FORMAT as HERMES

FORMATS: dict[str, ChatFormat] = {
    "hermes": HERMES,
    "llama-json": LlamaJsonFormat(LLAMA),
    "pythonic": PythonicFormat(PYTHONIC),
    "mistral": MistralFormat(MISTRAL),
    "mistral-list": MistralFormat(MISTRAL_LIST),
    "qwen-coder": QwenCoderFormat(QWEN_CODER),
    "glm": GlmFormat(GLM),
    "deepseek-v3.1": DeepSeekV31(),
    "deepseek-v3.2": DeepSeekV32(),
}
EXTRA = [
    *(CALL, f"\n{CALL}", CALL_END, "\n{", '{"name": "', '{"name": "plan", "arguments": ', "```json\n", "```"),
    *(
        CALLS,
        "\n\n",
        "function_calls>",
        f"<{DSML}",
        f"</{DSML}",
        PARAMETER_END,
        'string="true">',
        "plan",
        "see",
    ),
    *(
        "[TOOL_CALLS]",
        ' [{"name": "',
        "[ARGS]",
        '"parameters": ',
        "[plan(",
        "[see(",
        "[ plan (",
        ")]",
        '{"name": "plan", "parameters": ',
        "=",
    ),
]
TAGGED = [
    "\n<function=",
    "</function>\n",
    "<parameter=",
    "\n</parameter>",
    "<arg_key>",
    "</arg_key>\n<arg_value>",
    "</arg_value>",
]
"""Texts that a random walk would not find; the second list is for two formats only."""

TEXTS = [
    *(VOCABULARY.raw(token_id) for token_id in range(VOCABULARY.vocab_size)),
    *(text.encode() for text in (*EXTRA, *TAGGED)),
]
NAMES = {token_id: text for text, token_id in VOCABULARY.control_tokens.items()}
END = 257
HARMLESS = ("stray_marker", "malformed_tool_call", "truncated_tool_call")
"""Marks in text, and calls without their tags or without the last of them."""


def make_compiler() -> GrammarCompiler:
    own = vocabulary_of(VOCABULARY)
    assert own is not None
    return GrammarCompiler(Vocabulary(tokens=tuple(TEXTS), special=own.special, ends=own.ends), len(TEXTS))


COMPILER = make_compiler()


def weight(token_id: int) -> float:
    text = TEXTS[token_id]
    if token_id >= 256 or text in (b'"', b"}", b"]"):
        return 30.0
    return 1.0 if text.isalnum() else 0.1


WEIGHTS = np.array([weight(token_id) for token_id in range(len(TEXTS))])
PLAIN_WEIGHTS = np.array([*WEIGHTS[: -len(TAGGED)], *[0.0] * len(TAGGED)])


def walk(grammar: str, seed: int, name: str, most: int = 1500) -> list[int] | None:
    """The tokens of an answer that a grammar allows; None: it does not end soon."""
    random = np.random.default_rng(seed)
    weights = WEIGHTS if name in ("qwen-coder", "glm") else PLAIN_WEIGHTS
    matcher = COMPILER.compile(grammar)
    out: list[int] = []
    for _ in range(most):
        bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[: len(TEXTS)]
        chances = weights * bits
        token_id = int(random.choice(len(TEXTS), p=chances / chances.sum()))
        if token_id == END:
            return out
        out.append(token_id)
        matcher.consume(token_id)
    return None


def pieces(token_ids: list[int]) -> Iterator[tuple[bool, str]]:
    text = b""
    for token_id in token_ids:
        if token_id in NAMES:
            yield False, text.decode()
            yield True, NAMES[token_id]
            text = b""
        else:
            text += TEXTS[token_id]
    yield False, text.decode()


def parse(parser: Parser, opening: str, token_ids: list[int]) -> list[Part]:
    parts: list[Part] = []
    first = [VOCABULARY.encode(opening, add_bos=False, parse_special=True)] if opening else []
    for is_control, text in pieces([*(first[0] if first else []), *token_ids]):
        parts += parser.marker(text) if is_control else parser.text(text)
    return merge([*parts, *parser.finish()])


def forms(seed: int) -> list[ToolForm]:
    """Two strict tools."""
    found: list[ToolForm] = []
    number = seed * 100
    while len(found) < 2:
        schema = random_schema(number)
        number += 1
        if schema.get("type") == "object" and 'quo"te' not in schema["properties"]:
            found.append(ToolForm(("plan", "see")[len(found)], schema, strict=True))
    return found


def schemas_of(tools: list[ToolForm]) -> dict[str, Any]:
    return {tool.name: tool.schema for tool in tools}


def check(parts: list[Part], tools: list[ToolForm], *, single: bool = False) -> int:
    """Every call is valid; how many there are."""
    schemas = schemas_of(tools)
    faults = [part for part in parts if isinstance(part, Warn) and part.code not in HARMLESS]
    assert not faults
    found = calls(parts)
    for call in found:
        function = call["function"]
        jsonschema.Draft202012Validator(schemas[function["name"]]).validate(json.loads(function["arguments"]))
    assert len(found) <= 1 or not single
    return len(found)


@pytest.mark.parametrize("name", FORMATS)
def test_calls_that_must_come(name: str) -> None:
    chat, found = FORMATS[name], Counter[bool]()
    for seed in range(40):
        tools, named, single = forms(seed), (None, "plan")[seed % 2], seed % 3 == 0
        rules = chat.call_rules(tools, named=named, single=single, tokens=VOCABULARY.control_tokens)
        answer = walk(BEGIN + "\n".join([f"start: {rules.rest}", *rules.lines]), seed, name)
        if answer is not None:
            parser = chat.parser(tools=schemas_of(tools), single=single)
            parts = parse(parser, chat.opening(named), answer)
            assert not any(isinstance(part, Content) for part in parts)
            assert check(parts, tools, single=single) >= 1
            assert named is None or calls(parts)[0]["function"]["name"] == named
        found[answer is not None] += 1
    assert found[True] >= 20


@pytest.mark.parametrize("name", FORMATS)
def test_text_with_calls_or_without(name: str) -> None:
    chat, found = FORMATS[name], Counter[int]()
    for seed in range(60):
        tools = forms(seed)
        rules = chat.call_rules(tools, named=None, single=False, tokens=VOCABULARY.control_tokens)
        answer = walk(BEGIN + "\n".join([f"start: {rules.said}", *rules.lines]), seed, name)
        if answer is not None:
            parts = parse(chat.parser(tools=schemas_of(tools)), "", answer)
            found[min(check(parts, tools), 1)] += 1
    assert found[0] >= 5
    assert found[1] >= 5


@pytest.mark.parametrize("name", FORMATS)
def test_a_tool_that_is_not_strict_may_have_any_schema(name: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "minProperties": 1, "not": {}}
    rules = FORMATS[name].call_rules(
        [ToolForm("plan", schema, strict=False)], named="plan", single=True, tokens=VOCABULARY.control_tokens
    )
    answer = walk(BEGIN + "\n".join([f"start: {rules.rest}", *rules.lines]), 2, name)
    assert answer is not None
    parts = parse(FORMATS[name].parser(tools=["plan"], single=True), FORMATS[name].opening("plan"), answer)
    assert len(calls(parts)) == 1


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {}}, "minProperties": 1},
        {"anyOf": [{"type": "object"}]},
        {"type": "object", "properties": {'a"b': {}}},
    ],
)
def test_parameters_that_dsml_cannot_write_one_by_one(schema: dict[str, Any]) -> None:
    with pytest.raises(UnfitToolError, match="'plan'"):
        DeepSeekV32().call_rules([ToolForm("plan", schema, strict=True)], named=None, single=False, tokens={})


@pytest.mark.parametrize(
    ("answer", "allowed"),
    [
        ("I write about <tool_call", True),
        ('{"name": "other", "arguments": {"x": 1}}', True),
        ('{"name": "plan", "arguments": {"a": 1}}', True),
        ('```json\n{"name": "plan", "arguments": {"a": 1}}\n```', True),
        ('{"name": "plan", "arguments": {"a": "x"}}', False),
        ('{ "name":"plan" ,\n"arguments" : {}}', False),
        ('Yes.\n<tool_call>\n{"name": "plan", "arguments": {"a": 1}}\n</tool_call>', True),
        ('Yes.\n<tool_call>\n{"name": "plan", "arguments": {"a": null}}\n</tool_call>', False),
        ("Yes.\n<tool_call>\nno", False),
    ],
)
def test_calls_of_hermes_with_tags_and_without(answer: str, allowed: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    rules = HERMES.call_rules([ToolForm("plan", schema, strict=True)], named=None, single=False, tokens={})
    matcher = COMPILER.compile(BEGIN + "\n".join([f"start: {rules.said}", *rules.lines]))

    def fits(token_id: int) -> bool:
        return bool(int(matcher.mask()[token_id // 32]) >> (token_id % 32) & 1)

    for token_id in VOCABULARY.encode(answer, add_bos=False):
        if not fits(token_id):
            assert not allowed
            return
        matcher.consume(token_id)
    assert fits(END) == allowed
