"""Fields of structured output over HTTP, with a fake engine: what reaches the engine, and what is refused."""

from __future__ import annotations

import errno
import json
from typing import Any

import pytest

from engine.errors import GRAMMAR_FAULT
from engine.grammar import GrammarCompiler, Matcher
from server.generation.grammars import vocabulary_of
from tests.server.kit import (
    EOS,
    TEXT,
    chat_body,
    client,
    completion_body,
    error_of,
    events,
    make_app,
    speaking,
)

pytestmark = pytest.mark.process  # the compiler of grammars

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def schema_format(schema: Any = PERSON, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, **more}}


def compiler() -> GrammarCompiler:
    vocabulary = vocabulary_of(TEXT)
    assert vocabulary is not None
    return GrammarCompiler(vocabulary, TEXT.vocab_size)


def allows(matcher: Matcher, text: str) -> bool:
    """Whether a text is one that the grammar describes, as a whole."""
    for token_id in [*TEXT.encode(text, add_bos=False), EOS]:
        if not int(matcher.mask()[token_id // 32]) >> (token_id % 32) & 1:
            return False
        if token_id != EOS:
            matcher.consume(token_id)
    return True


CASES: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"response_format": {"type": "json_object"}}, ['{"a": [1, {"b": null}]}', "{}"], ["[]", "x", " {}"]),
    (
        {"response_format": schema_format(strict=True)},
        ['{"name": "Zoë", "age": 3}', '{\n    "name": "a",\n    "age": 10\n}'],
        ['{"age": 3}', '{"name": 1, "age": 3}', '{"name": "a", "age": 3, "x": 1}'],
    ),
    ({"structured_outputs": {"json": PERSON}}, ['{"name": "a", "age": 3}'], ['{"name": "a"}']),
    ({"structured_outputs": {"json": json.dumps(PERSON)}}, ['{"name": "a", "age": 3}'], ["{}"]),
    (
        {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
        ['{"a":1}'],
        ['{"a": 1}'],
    ),
    (
        {"structured_outputs": {"json_object": True, "whitespace_pattern": "[ ]{2}"}},
        ['{"a":  1}', '{"a":1}'],
        ['{"a": 1}'],
    ),
    ({"response_format": {"type": "json_object"}}, ['{\n\t"a": 1\n}'], ['{"a":  1}', '{\n\n"a": 1}']),
    ({"structured_outputs": {"regex": r"\d{2}/\d{2}"}}, ["12/34"], ["1/34", "12/345"]),
    ({"guided_regex": "[a-c]+"}, ["abc"], ["", "d"]),
    (
        {"bad_words": ["bad", "né/", "x\ny"]},
        ["", "good ba d", "né", "x\n y"],
        ["bad", "so badly", "a né/b", "ax\nyb"],
    ),
    ({"structured_outputs": {"choice": ["yes", 'a "b"\n', "ü€😀"]}}, ["yes", 'a "b"\n', "ü€😀"], ["no", ""]),
    ({"guided_choice": ["left", "right"]}, ["left"], ["lef"]),
    ({"guided_json": {"enum": [1, "b"]}}, ["1", '"b"'], ["b"]),
    ({"guided_grammar": 'start: "a" sum\nsum: /[0-9]/ ("+" /[0-9]/)*'}, ["a1", "a1+2"], ["a", "1"]),
    (
        {"structured_outputs": {"grammar": 'root ::= "x" item+\nitem ::= [0-9] ","'}},
        ["x1,2,"],
        ["x", "x1"],
    ),
]


@pytest.mark.parametrize(("fields", "good", "bad"), CASES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_the_engine_gets_the_grammar(
    path: str, fields: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    engine = speaking(good[0])
    app = make_app(engine)
    body = (chat_body if "chat" in path else completion_body)(n=2, **fields)
    async with app.router.lifespan_context(app), client(app) as http:
        reply = await http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    grammars = [submit.grammar for submit in engine.submitted]
    assert len(grammars) == 2
    assert grammars[0] == grammars[1]
    assert grammars[0] is not None
    first = compiler().compile(grammars[0].text)
    for text in good:
        assert allows(first.copy(), text), text
    for text in bad:
        assert not allows(first.copy(), text), text


async def test_text_is_free() -> None:
    engine = speaking("hello")
    app = make_app(engine)
    async with app.router.lifespan_context(app), client(app) as http:
        reply = await http.post(
            "/v1/chat/completions", json=chat_body(response_format={"type": "text"}, structured_outputs=None)
        )
    assert reply.status_code == 200
    assert engine.submitted[0].grammar is None


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        ({"response_format": schema_format({"type": "array", "uniqueItems": True})},
         "response_format.json_schema.schema", "uniqueItems"),
        ({"response_format": schema_format({"$ref": "http://example.org/a"})},
         "response_format.json_schema.schema", "does not fetch"),
        ({"structured_outputs": {}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "both"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "both"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex", "look-around"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex", "unclosed"),
        ({"structured_outputs": {"json": "no"}}, "structured_outputs.json", "JSON schema"),
        ({"structured_outputs": {"json": "[" * 5000}}, "structured_outputs.json", "JSON schema"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar", "nothing"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "end of an answer"),
        ({"response_format": schema_format({"anyOf": [{"const": "y" * 300_000}]})},
         "response_format.json_schema.schema", "too large"),
    ],
)  # fmt: skip
async def test_what_cannot_be_enforced_is_refused(fields: dict[str, Any], param: str, said: str) -> None:
    engine = speaking()
    app = make_app(engine, max_body_bytes=1 << 20)
    async with app.router.lifespan_context(app), client(app) as http:
        error = error_of(await http.post("/v1/chat/completions", json=chat_body(**fields)), 400)
    assert error["param"] == param
    assert said in error["message"]
    assert "\n" not in error["message"]
    assert not engine.submitted


async def test_a_hostile_schema_is_a_400_and_others_go_on() -> None:
    engine = speaking('{"a": 1}')
    app = make_app(engine, max_body_bytes=1 << 23)
    choices = [f"{number}x" for number in range(4096)]
    nested: Any = {"enum": choices}
    for _ in range(5):
        nested = {"anyOf": [nested, {"type": "array", "items": nested}]}
    hostile = schema_format({"type": "object", "properties": {"a": nested}})
    async with app.router.lifespan_context(app), client(app) as http:
        error = error_of(
            await http.post("/v1/chat/completions", json=chat_body(response_format=hostile)), 400
        )
        assert error["code"] in ("unfit_grammar", "grammar_too_large", "too_many_values")
        good = await http.post(
            "/v1/chat/completions", json=chat_body(response_format={"type": "json_object"})
        )
    assert good.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_grammar_that_fails_later_says_so(stream: bool) -> None:
    engine = speaking('{"a', fault="error", fault_after=2, message=f"{GRAMMAR_FAULT}: too slow")
    app = make_app(engine)
    body = chat_body(response_format={"type": "json_object"}, stream=stream)
    async with app.router.lifespan_context(app), client(app) as http:
        reply = await http.post("/v1/chat/completions", json=body)
    error = events(reply)[-1]["error"] if stream else error_of(reply, 400)
    assert error["code"] == "grammar_failed"
    assert "too slow" in error["message"]


async def test_no_process_for_the_compiler_is_the_servers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*args: Any, **options: Any) -> Any:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("asyncio.create_subprocess_exec", refuse)
    async with client(make_app(speaking("{}"))) as http:
        body = chat_body("hi", response_format={"type": "json_object"})
        response = await http.post("/v1/chat/completions", json=body)
        assert error_of(response, 503)["code"] == "no_grammar_compiler"
        assert response.headers["retry-after"]
