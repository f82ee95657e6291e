"""POST /v1/completions, without a socket."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.fake_engine import FakeEngine
from tests.server.kit import BOS, client, completion_body, events, ids, make_app, say, speaking


async def post(engine: FakeEngine, body: dict[str, Any], **config: Any) -> httpx.Response:
    async with client(make_app(engine, **config)) as http:
        return await http.post("/v1/completions", json=body)


async def test_answers() -> None:
    engine = speaking("hello")
    body = (await post(engine, completion_body("hi"))).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [
        {
            "index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop", "stop_reason": None,
            "prompt_token_ids": None, "token_ids": None, "prompt_logprobs": None,
        }
    ]  # fmt: skip
    assert body["usage"]["total_tokens"] == 9
    assert engine.submitted[0].prompt_token_ids == (BOS, *ids("hi"))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [(BOS, *ids("ab"))]),
        (["a", "b"], [(BOS, *ids("a")), (BOS, *ids("b"))]),
        (["a"], [(BOS, *ids("a"))]),
        ([5, 6], [(5, 6)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
        ("<|eos|>", [(BOS, *ids("<|eos|>"))]),
    ],
)
async def test_kinds_of_prompts(prompt: Any, expected: list[tuple[int, ...]]) -> None:
    engine = speaking()
    body = (await post(engine, completion_body(prompt))).json()
    assert [submitted.prompt_token_ids for submitted in engine.submitted] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_choices_are_ordered_by_prompt() -> None:
    engine = FakeEngine(lambda submitted: say(submitted.request_id[-1]))
    body = (await post(engine, completion_body(["a", "b"], n=2, seed=3))).json()
    assert [choice["text"] for choice in body["choices"]] == ["0", "1", "2", "3"]
    prompts = [submitted.prompt_token_ids[-1:] for submitted in engine.submitted]
    assert prompts == [tuple(ids(letter)) for letter in "aabb"]
    seeds = [submitted.sampling.seed for submitted in engine.submitted]
    assert seeds[:2] == seeds[2:]  # a prompt's text does not depend on the others in its list
    assert seeds[0] == 3 != seeds[1]


async def test_logprobs() -> None:
    body = (await post(speaking("éb"), completion_body("hi", logprobs=1))).json()
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["\ufffd", "\ufffd", "b"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"\ufffd": -0.5}, {"\ufffd": -0.5}, {"b": -0.5}],
        "text_offset": [0, 0, 1],
    }


async def test_echo() -> None:
    engine = speaking("cd")
    body = (await post(engine, completion_body(["ab", "é"], echo=True))).json()
    assert [choice["text"] for choice in body["choices"]] == ["abcd", "écd"]
    assert body["choices"][0]["logprobs"] is None
    assert engine.submitted[0].sampling.prompt_logprobs is None
    body = (await post(speaking("cd"), completion_body([[BOS, *ids("ab")]], echo=True))).json()
    assert body["choices"][0]["text"] == "<|bos|>abcd"  # what was sent, spelled out


async def test_echo_with_logprobs() -> None:
    engine = speaking("c")
    body = (await post(engine, completion_body("ab", echo=True, logprobs=1))).json()
    assert engine.submitted[0].sampling.prompt_logprobs == 1
    assert body["choices"][0]["text"] == "abc"
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["<|bos|>", "a", "b", "c"],
        "token_logprobs": [None, -0.5, -0.5, -0.5],
        "top_logprobs": [None, {"a": -0.5}, {"b": -0.5}, {"c": -0.5}],
        "text_offset": [0, 0, 1, 2],
    }


async def test_echo_with_logprobs_of_a_prompts_end() -> None:
    engine = speaking("c")
    wish = completion_body("ab", echo=True, logprobs=1, logprob_start_len=2)
    body = (await post(engine, wish)).json()
    assert engine.submitted[0].sampling.prompt_logprobs_start == 2
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [None, None, -0.5, -0.5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"echo": True}, "ask for those with echo true and logprobs"),
        ({"logprobs": 1}, "ask for those with echo true and logprobs"),
        ({"echo": True, "logprobs": 1, "logprob_start_len": 4}, "is 4, but a prompt has only 3 tokens"),
    ],
)
async def test_where_logprobs_begin_needs_logprobs_and_a_place_in_the_prompt(
    fields: dict[str, Any], message: str
) -> None:
    response = await post(speaking("c"), completion_body("ab", **({"logprob_start_len": 1} | fields)))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "logprob_start_len"
    assert message in error["message"]


async def test_scoring_a_prompt() -> None:
    engine = speaking("zzz")
    body = (await post(engine, completion_body("ab", echo=True, logprobs=0, max_tokens=0))).json()
    (submitted,) = engine.submitted
    assert submitted.sampling.max_tokens == 1
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["tokens"] == ["<|bos|>", "a", "b"]
    assert body["usage"]["completion_tokens"] == 0


async def test_streams() -> None:
    body = completion_body("ab", echo=True, logprobs=1, stream=True, stream_options={"include_usage": True})
    *chunks, last, done = events(await post(speaking("cd"), body))
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["abc", "d", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert chunks[0]["choices"][0]["logprobs"]["tokens"] == ["<|bos|>", "a", "b", "c"]
    assert chunks[1]["choices"][0]["logprobs"]["text_offset"] == [3]
    assert (last["choices"], last["usage"]["prompt_tokens"]) == ([], 3)


@pytest.mark.parametrize(
    ("sent", "used"), [(1e-60, 0.0), (5e-324, 0.0), (1e-39, 0.0), (1e-37, 1e-37), (0.0, 0.0)]
)
async def test_a_temperature_that_float32_does_not_have_is_greedy(sent: float, used: float) -> None:
    engine = speaking("hello")
    assert (await post(engine, completion_body("hi", temperature=sent))).status_code == 200
    assert engine.submitted[0].sampling.temperature == used
