"""Structured output from `dsa serve`: a tiny DeepSeek with random weights, whose answers and calls are valid all the same."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pytest

from tests.e2e.serving import Server
from tests.e2e.test_deepseek import byte_tokenizer
from tests.engine.models.mla.kit import tiny_deepseek
from tests.schemas import random_schema

pytestmark = [pytest.mark.process, pytest.mark.model]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("structured") / "deepseek_v32"
    folder.mkdir()
    size = byte_tokenizer(folder)
    tiny_deepseek(
        "deepseek_v32",
        folder,
        vocab_size=size,
        bos_token_id=256,
        eos_token_id=257,
        max_position_embeddings=4096,
    )
    server = Server(
        str(folder), "--dtype", "float32", "--kv-cache-memory", "64MiB", "--threads", "1",
        "--served-model-name", "tiny",
    )  # fmt: skip
    try:
        yield server.wait_ready()
        assert server.end(signal.SIGTERM) == 0
    finally:
        server.close()


def end_bias(server: Server) -> dict[str, float]:
    """A random model seldom ends a text by itself, and likes whitespace no less than any other text."""

    def ids(text: str) -> list[int]:
        reply = server.post("/tokenize", model="tiny", prompt=text, add_special_tokens=False)
        return list(reply.json()["tokens"])

    return dict.fromkeys(map(str, [*ids('"}]'), 257]), 4.0) | dict.fromkeys(map(str, ids(" \t\n\r")), -4.0)


def said(message: dict[str, Any]) -> str:
    """The content of an answer, or its calls as JSON."""
    return json.dumps(message["tool_calls"]) if message.get("tool_calls") else message["content"] or ""


def reason_of(choice: dict[str, Any]) -> str:
    """The finish reason; `cut` where a stop string was it."""
    return "cut" if isinstance(choice.get("stop_reason"), str) else choice["finish_reason"] or ""


def ask(server: Server, **body: Any) -> list[tuple[str, str]]:
    """(text, reason) of each choice."""
    fields = {"max_tokens": 400, "seed": 1, "logit_bias": end_bias(server), **body}
    messages = [{"role": "user", "content": "Say it."}]
    reply = server.post("/v1/chat/completions", model="tiny", messages=messages, **fields)
    assert reply.status_code == 200, reply.text
    if not fields.get("stream"):
        choices = reply.json()["choices"]
        return [(said(choice["message"]), reason_of(choice)) for choice in choices]
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    for line in reply.text.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            for choice in event["choices"]:
                index = choice["index"]
                texts[index] = texts.get(index, "") + (choice["delta"].get("content") or "")
                ends[index] = reason_of(choice) or ends.get(index, "")
    return [(texts[index], ends[index]) for index in sorted(texts)]


def test_every_finished_answer_validates(served: Server) -> None:
    """Streamed or not, two choices, thinking or not, many at once."""

    def one(seed: int) -> int:
        schema = random_schema(seed)
        response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        thinking = {"type": "enabled", "budget_tokens": 8} if seed % 3 == 0 else {"type": "disabled"}
        answers = ask(
            served, response_format=response_format, n=2, stream=seed % 2 == 0, seed=seed, thinking=thinking
        )
        assert len(answers) == 2
        for text, reason in answers:
            assert reason in ("stop", "length")
            if reason == "stop":
                jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        return sum(reason == "stop" for _, reason in answers)

    with ThreadPoolExecutor(4) as threads:
        finished = sum(threads.map(one, range(24)))
    assert finished >= 30


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_hundred_schemas(served: Server) -> None:
    """Two choices each, streamed or not; a third has stop strings, a fifth a short limit. What is finished is valid."""

    def one(seed: int) -> Counter[str]:
        schema = random_schema(seed)
        response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        fields: dict[str, Any] = {"stream": seed % 2 == 0, "max_tokens": 12 if seed % 5 == 0 else 100}
        if seed % 3 == 0:
            fields["stop"] = [",", "\n"]
        body = {"response_format": response_format, "n": 2, "seed": seed, "thinking": {"type": "disabled"}}
        try:
            answers = ask(served, **body, **fields)
        except (
            AssertionError
        ) as error:  # a draw may leave no value, which is said before anything is computed
            if "nsatisfiable" not in str(error):
                raise
            return Counter(refused=1)
        assert len(answers) == 2
        for text, reason in answers:
            assert reason in ("stop", "length", "cut"), seed
            assert reason != "cut" or "stop" in fields
            if reason == "stop":
                jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        return Counter(reason for _, reason in answers)

    with ThreadPoolExecutor(8) as threads:
        found = sum(threads.map(one, range(500)), Counter[str]())
    assert found["refused"] <= 20, found
    assert found["stop"] >= 200, found
    assert found["length"] >= 50, found
    assert found["cut"] >= 50, found


def test_every_finished_call_validates(served: Server) -> None:
    """Strict tools, any or named, after reasoning or without it."""

    def one(seed: int) -> int:
        schema = random_schema(seed)
        if schema.get("type") != "object" or any('"' in name for name in schema["properties"]):
            return 0  # DSML cannot write such parameters
        function = {"name": "plan", "parameters": schema, "strict": True}
        tools = [
            {"type": "function", "function": function},
            {"type": "function", "function": {"name": "see", "strict": True}},
        ]
        called = {"type": "function", "function": {"name": "plan"}}
        answers = ask(
            served, tools=tools, tool_choice=called if seed % 2 else "required", seed=seed, n=2,
            thinking={"type": "enabled", "budget_tokens": 8} if seed % 3 == 0 else {"type": "disabled"},
            parallel_tool_calls=False, max_tokens=600,
        )  # fmt: skip
        for text, reason in answers:
            assert reason in ("tool_calls", "length")
            if reason == "tool_calls":
                (call,) = json.loads(text)
                values = json.loads(call["function"]["arguments"])
                if call["function"]["name"] == "see":
                    assert values == {}
                else:
                    jsonschema.Draft202012Validator(schema).validate(values)
        return sum(reason == "tool_calls" for _, reason in answers)

    with ThreadPoolExecutor(4) as threads:
        finished = sum(threads.map(one, range(24)))
    assert finished >= 20


def test_other_kinds_of_text(served: Server) -> None:
    def whole(**fields: Any) -> str:
        ((text, reason),) = ask(served, **fields)
        assert reason == "stop"
        return text

    assert re.fullmatch(r"[a-f]{2,5}/\d{3}", whole(structured_outputs={"regex": r"[a-f]{2,5}/\d{3}"}))
    assert whole(structured_outputs={"choice": ["yes", "no", "vielleicht"]}) in ("yes", "no", "vielleicht")
    assert re.fullmatch(r"\d(\+\d)*", whole(guided_grammar='root ::= d ("+" d)*\nd ::= [0-9]'))
    assert isinstance(json.loads(whole(response_format={"type": "json_object"})), dict)


def test_an_answer_that_is_cut_says_so(served: Server) -> None:
    ((text, reason),) = ask(served, structured_outputs={"regex": "[a-z]{50}"}, max_tokens=9)
    assert (len(text), reason) == (9, "length")


def test_a_hostile_schema_harms_no_stream(served: Server) -> None:
    nested = '{"items":' * 200 + "{}" + "}" * 200
    hostile = {"structured_outputs": {"json": nested}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "max_tokens": 40}
    with ThreadPoolExecutor(3) as threads:
        bad = [threads.submit(httpx.post, f"{served.url}/v1/chat/completions", json=body | hostile, timeout=60)
               for _ in range(2)]  # fmt: skip
        good = threads.submit(ask, served, max_tokens=60)
        for reply in bad:
            assert reply.result().status_code == 400, reply.result().text
            assert reply.result().json()["error"]["code"] == "unfit_grammar"
        assert good.result()
    assert served.ready
