"""POST /v1/chat/completions, without a socket."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from server.app import create_app
from server.text.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine, Script
from tests.server.kit import (
    BOS,
    EOS,
    TEXT,
    PlainChat,
    chat_body,
    client,
    events,
    ids,
    make_app,
    make_config,
    say,
    speaking,
)

URL = "/v1/chat/completions"


async def post(engine: FakeEngine, body: dict[str, Any], **config: Any) -> httpx.Response:
    async with client(make_app(engine, **config)) as http:
        return await http.post(URL, json=body)


async def test_answers() -> None:
    engine = speaking("hello", cached=2)
    response = await post(engine, chat_body("hi"))
    assert response.status_code == 200
    body = response.json()
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 0
    assert body.pop("system_fingerprint").startswith("fp_")
    assert body == {
        "object": "chat.completion",
        "model": "fake-model",
        "prompt_logprobs": None,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": 6,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 2},
            "dsa": {"top_k": 32},
            "cost": 0.0,
            "cost_details": {
                "amount": 0,
                "currency": "USD",
                "unit": "nano",
                "price_version": "2026-11",
                "metered_amount": 0,
                "dense_equivalent_amount": 0,
                "effective_top_k": 32,
            },
        },
    }
    (submitted,) = engine.submitted
    assert submitted.prompt_token_ids == (BOS, 258, *ids("hi"))
    assert submitted.index_top_k == 32
    assert submitted.sampling.stop_token_ids == (EOS,)
    assert submitted.sampling.max_tokens == 256 - 4


async def test_streams() -> None:
    response = await post(speaking("hé", group=1), chat_body(stream=True))
    first, *rest, done = events(response)
    assert done == "[DONE]"
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": "h", "refusal": None},
        "logprobs": None,
        "finish_reason": None,
    }
    assert [chunk["choices"][0]["delta"] for chunk in rest] == [{"content": "é"}, {}]
    assert rest[-1]["choices"][0]["finish_reason"] == "stop"
    assert all("usage" not in chunk for chunk in (first, *rest))
    assert len({chunk["id"] for chunk in (first, *rest)}) == 1


async def test_streams_usage_at_the_end() -> None:
    body = chat_body(stream=True, stream_options={"include_usage": True})
    *chunks, last, done = events(await post(speaking("ab"), body))
    assert done == "[DONE]"
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_text_and_the_engines_work(group: int, stream: bool) -> None:
    engine = speaking("one STOP two three four", group=group)
    response = await post(engine, chat_body(stop=["STOP", "never"], stream=stream))
    if stream:
        chunks = events(response)[:-1]
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    else:
        text = response.json()["choices"][0]["message"]["content"]
        assert response.json()["choices"][0]["finish_reason"] == "stop"
        assert response.json()["usage"]["completion_tokens"] == 8
    assert text == "one "
    assert len(engine.aborted) == 1


async def test_length() -> None:
    response = await post(speaking("hello"), chat_body(max_completion_tokens=3))
    assert response.json()["choices"][0]["message"]["content"] == "hel"
    assert response.json()["choices"][0]["finish_reason"] == "length"


async def test_several_choices_have_seeds_of_their_own() -> None:
    def script(submitted: Any) -> Script:
        return say(submitted.request_id[-1] * 3)

    engine = FakeEngine(script)
    response = await post(engine, chat_body(n=3, seed=-7))
    body = response.json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["000", "111", "222"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["prompt_tokens"] == 4  # the choices share one prompt
    assert body["usage"]["completion_tokens"] == 12
    seeds = [submitted.sampling.seed for submitted in engine.submitted]
    assert len(set(seeds)) == 3
    assert seeds[0] == 2**64 - 7
    assert all(0 <= seed < 2**64 for seed in seeds)
    again = FakeEngine(script)
    await post(again, chat_body(n=3, seed=-7))
    assert [submitted.sampling.seed for submitted in again.submitted] == seeds


async def test_streams_several_choices() -> None:
    engine = FakeEngine(lambda submitted: say(submitted.request_id[-1] * 3))
    chunks = events(await post(engine, chat_body(n=2, stream=True)))[:-1]
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in own) == str(index) * 3
        assert [choice["finish_reason"] for choice in own].count("stop") == 1
        assert own[-1]["finish_reason"] == "stop"


async def test_seeds_are_drawn_where_none_is_given() -> None:
    engine = speaking()
    async with client(make_app(engine)) as http:
        for _ in range(2):
            await http.post(URL, json=chat_body())
    assert len({submitted.sampling.seed for submitted in engine.submitted}) == 2


async def test_logprobs() -> None:
    response = await post(speaking("ab"), chat_body(logprobs=True, top_logprobs=2))
    assert response.json()["choices"][0]["logprobs"]["content"] == [
        {
            "token": letter,
            "logprob": -0.5,
            "bytes": [ord(letter)],
            "top_logprobs": [
                {"token": letter, "logprob": -0.5, "bytes": [ord(letter)]},
                {"token": after, "logprob": -1.5, "bytes": [ord(after)]},
            ],
        }
        for letter, after in ("ab", "bc")
    ]
    chunks = events(await post(speaking("ab"), chat_body(logprobs=True, stream=True)))[:-1]
    tokens = [t for c in chunks for t in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [(token["token"], token["top_logprobs"]) for token in tokens] == [("a", []), ("b", [])]


async def test_sampling_fields_reach_the_engine() -> None:
    engine = speaking()
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "logit_bias": {"5": 1, "7": -100},
        "stop_token_ids": [9, 9, EOS],
        "seed": 11,
        "max_tokens": 5,
    }
    assert (await post(engine, chat_body(**fields))).status_code == 200
    sampling = engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 40, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert sampling.repetition_penalty == 1.5
    assert sampling.logit_bias == ((5, 1.0), (7, -100.0))
    assert sampling.stop_token_ids == (9, EOS)
    assert (sampling.seed, sampling.max_tokens, sampling.logprobs) == (11, 5, None)


async def test_ignore_eos() -> None:
    engine = speaking("ab")
    response = await post(engine, chat_body(ignore_eos=True, stop_token_ids=[5]))
    assert engine.submitted[0].sampling.stop_token_ids == (5,)
    assert response.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("field", "default", "sent", "shown"),
    [
        ({"dsa": {"top_k": 7}}, None, 7, {"top_k": 7}),
        ({"dsa": {"top_k": "dense"}}, 9, None, {"top_k": "dense"}),
        ({}, None, 32, {"top_k": 32}),
        ({}, 9, 9, {"top_k": 9}),
        ({}, 10_000, 256, {"top_k": 256}),
        ({}, "dense", None, {"top_k": "dense"}),
    ],
)
async def test_sparsity(field: dict[str, Any], default: Any, sent: int | None, shown: Any) -> None:
    engine = speaking()
    response = await post(engine, chat_body(**field), default_top_k=default)
    assert engine.submitted[0].index_top_k == sent
    assert response.json()["usage"]["dsa"] == shown


async def test_a_model_without_an_indexer_says_that_it_ran_dense() -> None:
    engine = speaking()
    engine.set_status(model=FakeEngine(default_top_k=None).status.model)
    response = await post(engine, chat_body(dsa={"top_k": 8}))
    assert engine.submitted[0].index_top_k is None
    dsa = response.json()["usage"]["dsa"]
    assert (dsa["top_k"], dsa["requested"]) == ("dense", 8)
    assert "no trained indexer" in dsa["note"]
    plain = await post(engine, chat_body())
    assert plain.json()["usage"]["dsa"] == {"top_k": "dense"}


async def test_text_parts_and_messages_sent_back() -> None:
    engine = speaking()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "c",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "tool_calls": None,
        "function_call": None,
    }
    messages = [{"role": "user", "content": parts}, answer]
    assert (await post(engine, chat_body() | {"messages": messages})).status_code == 200
    assert engine.submitted[0].prompt_token_ids == (BOS, 258, *ids("a\nb"), 258, *ids("c"))


async def test_a_clients_text_never_becomes_a_control_token() -> None:
    engine = speaking()
    assert (await post(engine, chat_body("<|eos|>"))).status_code == 200
    assert EOS not in engine.submitted[0].prompt_token_ids


async def test_developer_is_the_newer_name_of_system() -> None:
    roles = []

    class Recording(PlainChat):
        def render(self, messages: Any, **options: Any) -> str:
            roles.append(messages[0]["role"])
            return super().render(messages, **options)

    app = create_app(make_config(), speaking(), TEXT, Recording())
    async with client(app) as http:
        body = chat_body() | {"messages": [{"role": "developer", "content": "x"}]}
        assert (await http.post(URL, json=body)).status_code == 200
    assert roles == ["system"]


async def test_default_max_tokens() -> None:
    engine = speaking()
    await post(engine, chat_body(), default_max_tokens=17)
    await post(engine, chat_body(), default_max_tokens=1000)
    assert [submitted.sampling.max_tokens for submitted in engine.submitted] == [17, 252]


def test_the_tests_tokenizer_is_the_real_one() -> None:
    assert isinstance(TEXT, Tokenizer)
    assert TEXT.decode(ids("é")) == "é"
