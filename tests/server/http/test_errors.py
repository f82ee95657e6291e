"""Every failure has OpenAI's shape, the right status and a sentence that helps."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from server.text.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine
from tests.server.kit import chat_body, client, completion_body, error_of, events, make_app, speaking

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


async def chat(fields: dict[str, Any], engine: FakeEngine | None = None, **config: Any) -> httpx.Response:
    async with client(make_app(engine or speaking(), **config)) as http:
        return await http.post(CHAT, json=chat_body() | fields)


async def completion(
    fields: dict[str, Any], engine: FakeEngine | None = None, **config: Any
) -> httpx.Response:
    async with client(make_app(engine or speaking(), **config)) as http:
        return await http.post(COMPLETIONS, json=completion_body() | fields)


USER: dict[str, Any] = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": "1"}, "temperature", "must be a valid number"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"n": True}, "n", "must be a valid integer"),
        ({"n": 9}, "n", "at most 8"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1.5}, "n", "must be a valid integer"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a", ""]}, "stop[1]", "at least 1 character"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": 7}, "stop", "string or a list of strings"),
        ({"seed": 2**63}, "seed", "less than or equal to"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "not a token id"),
        ({"max_tokens": 10**4299}, "max_tokens", "less than or equal to"),
        ({"seed": 10**4299}, "seed", "less than or equal to"),
        ({"thinking_token_budget": 10**4299}, "thinking_token_budget", "less than or equal to"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1", "must be a token id"),
        ({"logit_bias": {"01": 1}}, "logit_bias.01", "must be a token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "not a token id"),
        ({"stop_token_ids": [300]}, "stop_token_ids", "ids go from 0 to 299"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "two names of one limit"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20 on this server"),
        ({"logprobs": 1}, "logprobs", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"dsa": {"top_k": 0}}, "dsa.top_k", "greater than or equal to 1"),
        ({"dsa": {"top_k": 257}}, "dsa.top_k", "256"),
        ({"dsa": {"top_k": "sparse"}}, "dsa.top_k", "'dense'"),
        ({"dsa": {"top_k": True}}, "dsa.top_k", "valid integer"),
        ({"dsa": {"topk": 8}}, "dsa.top_k", "did you mean top_k?"),
        ({"dsa": {}}, "dsa.top_k", "is required"),
        ({"dsa": 7}, "dsa", "must be an object"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "no tool calling"),
        ({"tool_choice": "required"}, "tool_choice", "no tool calling"),
        ({"modalities": ["text", "audio"]}, "modalities", "text only"),
        ({"store": True}, "store", "stores nothing"),
        ({"store": 0}, "store", "stores nothing"),
        ({"service_tier": "flex"}, "service_tier", "one service tier"),
        ({"metadata": {"a": 1}}, "metadata.a", "valid string"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
        ({"messages": [USER | {"content": None}]}, "messages[0].content", "must be a string or a list"),
        ({"messages": [USER | {"role": "tool"}]}, "messages[0].role", "'user'"),
        (
            {"messages": [USER | {"content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "messages[0].content[0].type",
            "'text'",
        ),
        (
            {"messages": [USER | {"content": [{"type": "image", "text": "x"}]}]},
            "messages[0].content[0].type",
            "'text'",
        ),
        ({"messages": [USER | {"role": "assistant"}]}, "messages", "must not begin with the assistant"),
        ({"user": "x" * 513}, "user", "at most 512 characters"),
    ],
)
async def test_bad_fields(fields: dict[str, Any], param: str, words: str) -> None:
    error = error_of(await chat(fields), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"], error["message"]
    assert param.split("[")[0].split(".")[0] in error["message"] or param == "messages"
    assert "\x00" not in error["message"]


async def test_a_misspelling_is_named_before_what_is_missing() -> None:
    async with client(make_app(speaking())) as http:
        response = await http.post(CHAT, json={"model": "fake-model", "mesages": []})
    assert "did you mean messages?" in error_of(response, 400, "missing_field")["message"]


UNKNOWN: list[tuple[dict[str, Any], str, str]] = [
    ({"temprature": 1}, "temprature", "did you mean temperature?"),
    ({"zzzzzz": 1}, "zzzzzz", "remove it"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "include_usage"),
    ({"dsa": {"top_k": 8, "topk": 8}}, "dsa.topk", "did you mean top_k?"),
    ({"messages": [USER | {"contents": 1}]}, "messages[0].contents", "did you mean content?"),
    (
        {"messages": [USER | {"content": [{"type": "text", "text": "x", "size": 1}]}]},
        "messages[0].content[0].size",
        "remove it",
    ),
]


@pytest.mark.parametrize(("fields", "path", "hint"), UNKNOWN)
async def test_an_unknown_field_is_named_and_counted(fields: dict[str, Any], path: str, hint: str) -> None:
    async with client(make_app(speaking())) as http:
        response = await http.post(CHAT, json=chat_body() | fields)
        assert "dsa_unknown_fields_total 1.0" in (await http.get("/metrics")).text
    first = events(response)[0] if "stream" in fields else response.json()
    (notice,) = first["warnings"]
    assert (notice["code"], notice["param"]) == ("unknown_field", path)
    assert hint in notice["message"]
    if "stream" in fields:
        assert all("warnings" not in event for event in events(response)[1:-1])


@pytest.mark.parametrize(("fields", "path", "hint"), UNKNOWN)
async def test_unknown_fields_may_be_refused(fields: dict[str, Any], path: str, hint: str) -> None:
    error = error_of(await chat(fields, unknown_fields="refuse"), 400, "unknown_field")
    assert error["param"] == path
    assert hint in error["message"]


async def test_many_unknown_fields() -> None:
    response = await completion({f"x{number}": number for number in range(1000)})
    assert len(response.json()["warnings"]) == 20


@pytest.mark.parametrize(
    "fields", [{"max_tokens": 3.0}, {"n": 1.0}, {"seed": 3.0}, {"top_k": 5.0}, {"dsa": {"top_k": 4.0}}]
)
async def test_integers_may_be_written_with_a_point(fields: dict[str, Any]) -> None:
    assert (await chat(fields)).status_code == 200
    assert (await completion(fields)).status_code == 200


async def test_token_ids_may_be_written_with_a_point() -> None:
    engine = speaking()
    assert (await completion({"prompt": [5.0, 6]}, engine)).status_code == 200
    assert (await completion({"prompt": [[5.0], [6]]}, engine)).status_code == 200
    assert [submitted.prompt_token_ids for submitted in engine.submitted] == [(5, 6), (5,), (6,)]


async def test_the_model_may_be_left_out() -> None:
    async with client(make_app(speaking())) as http:
        response = await http.post(CHAT, json={"messages": [USER]})
    assert response.json()["model"] == "fake-model"


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_compressed_bodies(encoding: str) -> None:
    pack = gzip.compress if encoding == "gzip" else zlib.compress
    headers = {"content-type": "application/json", "content-encoding": encoding}
    async with client(make_app(speaking(), max_body_bytes=5000)) as http:
        packed = pack(json.dumps(chat_body()).encode())
        assert (await http.post(CHAT, content=packed, headers=headers)).status_code == 200
        response = await http.post(CHAT, content=packed[:-9], headers=headers)
        error_of(response, 400, "invalid_encoding")
        response = await http.post(CHAT, content=b"no", headers=headers)
        error_of(response, 400, "invalid_encoding")
        bomb = pack(b" " * 10**6)
        assert len(bomb) < 5000
        error_of(await http.post(CHAT, content=bomb, headers=headers), 413, "body_too_large")
        headers["content-encoding"] = "br"
        error_of(await http.post(CHAT, content=packed, headers=headers), 415, "unsupported_encoding")


NEUTRAL = {
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": None,
    "response_format": {"type": "text"},
    "store": False,
    "service_tier": "auto",
    "modalities": ["text"],
    "metadata": {"a": "b"},
    "user": "someone",
    "safety_identifier": "someone",
    "prompt_cache_key": "key",
    "audio": None,
    "prediction": None,
    "reasoning_effort": None,
    "verbosity": "medium",
    "web_search_options": None,
    "moderation": None,
    "prompt_cache_options": None,
    "prompt_cache_retention": None,
    "temperature": None,
    "n": None,
    "stop": None,
    "seed": None,
    "logprobs": False,
    "stream": False,
    "stream_options": None,
    "dsa": None,
    "top_k": -1,
}


async def test_effort_without_reasoning_is_a_warning() -> None:
    """Agents send it to every model, whether it reasons or not."""
    answer = await chat({"reasoning_effort": "high"})
    assert answer.status_code == 200
    assert [(one["code"], one["param"]) for one in answer.json()["warnings"]] == [
        ("no_effect", "reasoning_effort")
    ]


async def test_neutral_values_are_accepted() -> None:
    assert (await chat(NEUTRAL)).status_code == 200
    assert (await completion({"best_of": 1, "suffix": None, "user": "x"})).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, None, None),  # the beginning-of-sequence token is a prompt
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [[]]}, "prompt[0]", "at least 1 item"),
        ({"prompt": [1, "a"]}, "prompt[1]", "valid integer"),
        ({"prompt": ["a", 1]}, "prompt[1]", "valid string"),
        ({"prompt": [[1], "a"]}, "prompt[1]", "valid array"),
        ({"prompt": {"a": 1}}, "prompt", "must be a string"),
        ({"prompt": None}, "prompt", "must be a string"),
        ({"prompt": [True]}, "prompt[0]", "valid integer"),
        ({"prompt": [-1]}, "prompt", "prompt[0] is not a token id"),
        ({"prompt": [5, 10**30]}, "prompt", "prompt[1] is not a token id"),
        ({"prompt": [[5], [300]]}, "prompt[1]", "prompt[1][0] is not a token id"),
        ({"prompt": ["a"] * 17}, "prompt", "at most 16"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"best_of": 2}, "best_of", "use n"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "room for 8 tokens"),
        ({"min_tokens": 1, "guided_regex": "a"}, "min_tokens", "send one of them"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream to be false"),
        ({"priority": -3}, "priority", "at least 0 on this server"),
        ({"priority": 3}, None, None),
        ({"suffix": "x"}, "suffix", "no marks for filling in the middle"),
        ({"logprobs": 21}, "logprobs", "at most 20 on this server"),
    ],
)
async def test_bad_completion_fields(fields: dict[str, Any], param: str | None, words: str | None) -> None:
    response = await completion(fields)
    if words is None:
        assert response.status_code == 200
        return
    error = error_of(response, 400)
    assert error["param"] == param
    assert words in error["message"], error["message"]


async def test_too_long_a_prompt() -> None:
    error = error_of(await chat({"messages": [{"role": "user", "content": "x" * 300}]}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "302 tokens" in error["message"]
    assert "256 tokens" in error["message"]
    full = {"messages": [{"role": "user", "content": "x" * 254}]}  # 256 tokens: no room for an answer
    error_of(await chat(full), 400, "context_length_exceeded")
    error = error_of(await chat({"max_tokens": 254}), 400, "context_length_exceeded")
    for number in ("4 tokens", "254", "258", "256", "252"):
        assert number in error["message"]
    assert (await chat({"max_tokens": 252})).status_code == 200


async def test_another_model() -> None:
    error = error_of(await chat({"model": "gpt-4"}), 404, "model_not_found")
    assert "'gpt-4'" in error["message"]
    assert "'fake-model'" in error["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"temperature": NaN}',
        b'{"temperature": 1e999}',
        b'{"temperature": Infinity}',
        b'{"user": "\\ud800"}',
        b'{"\\ud800": 1}',
        b'{"n": ' + b"9" * 10_000 + b"}",
        b'{"seed": ' + b"9" * 300 + b"}",
        b"[" * 60_000,
        b'{"tools": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"messages": ' + b'[{"content":' * 3000 + b"}]" * 3000 + b"}",
        b'{"' + b"x" * 5000 + b'": 1}',
        b'{"model": "\\u0000", "messages": [{"role": "user", "content": "\\u0000"}]}',
    ],
)
async def test_bodies_that_are_no_requests(raw: bytes) -> None:
    async with client(make_app(speaking())) as http:
        response = await http.post(CHAT, content=raw, headers={"content-type": "application/json"})
        assert response.status_code in (400, 404)
        error_of(response, response.status_code)
        assert len(response.content) < 1000


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"]
)
async def test_other_content_types(content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    async with client(make_app(speaking())) as http:
        response = await http.post(CHAT, content=json.dumps(chat_body()), headers=headers)
        assert "application/json" in error_of(response, 415)["message"]
        headers = {"content-type": "Application/JSON; charset=utf-8"}
        assert (await http.post(CHAT, content=json.dumps(chat_body()), headers=headers)).status_code == 200


async def test_unknown_paths_and_methods() -> None:
    async with client(make_app(speaking())) as http:
        error_of(await http.get("/nowhere"), 404, "not_found")
        response = await http.get(CHAT)
        error_of(response, 405, "method_not_allowed")
        assert response.headers["allow"] == "POST"


async def test_large_bodies_are_refused_while_they_arrive() -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield b"x" * 1000

    async with client(make_app(speaking(), max_body_bytes=5000)) as http:
        headers = {"content-type": "application/json"}
        response = await http.post(CHAT, content=endless(), headers=headers)
        assert "5000 bytes" in error_of(response, 413, "body_too_large")["message"]
        assert taken < 10
        response = await http.post(CHAT, content=b"x" * 5001, headers=headers)
        error_of(response, 413, "body_too_large")
        assert (await http.post(CHAT, json=chat_body())).status_code == 200


async def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda *args, **options: pytest.fail("it was tokenized"))
    text = "x" * 3000  # no token of this vocabulary is longer than 8 bytes
    error = error_of(await completion({"prompt": text}), 400, "context_length_exceeded")
    assert "3000 characters" in error["message"]
    error_of(await chat({"messages": [{"role": "user", "content": text}]}), 400, "context_length_exceeded")
