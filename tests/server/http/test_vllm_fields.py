"""What vLLM's own clients and flags rely on: named tokens, reasoning that is left out, ids and usage for all, /invocations."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.http.test_fields import CHAT, COMPLETIONS, post
from tests.server.kit import TEXT as TOKENIZER
from tests.server.kit import chat_body, client, completion_body, error_of, events, ids, make_app, speaking


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_all_alternatives_of_the_prompt_are_too_many(path: str) -> None:
    """As vLLM has it, unless its flag --max-logprobs allows more."""
    assert error_of(await post(speaking("x"), path, prompt_logprobs=-1), 400)["param"] == "prompt_logprobs"


@pytest.mark.parametrize(
    ("most", "asked", "fits"),
    [(-1, -1, True), (-1, 500, True), (30, 30, True), (30, 31, False), (30, -1, False)],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_server_that_reports_more_alternatives(path: str, most: int, asked: int, fits: bool) -> None:
    engine = speaking("x")
    fields: dict[str, Any] = (
        {"logprobs": True, "top_logprobs": asked} if path == CHAT else {"logprobs": asked}
    )
    known = engine.status.model
    assert known is not None
    async with client(make_app(engine, max_logprobs=most)) as http:
        body = chat_body("hi") if path == CHAT else completion_body("hi")
        answer = await http.post(path, json=body | fields | {"prompt_logprobs": 2})
        schema = (await http.get("/openapi.json")).json()["components"]["schemas"]["CompletionBody"]
    if not fits:
        assert "at most 30" in error_of(answer, 400)["message"]
        assert engine.submitted == []
        return
    assert answer.status_code == 200
    wanted = known.vocab_size if asked == -1 else min(asked, known.vocab_size)
    assert engine.submitted[0].sampling.logprobs == wanted
    told = next(part for part in schema["properties"]["logprobs"]["anyOf"] if part["type"] == "integer")
    assert (told["minimum"], told.get("maximum")) == ((-1, None) if most == -1 else (0, 30))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_named_tokens_are_asked_for_in_place_of_the_likeliest(path: str) -> None:
    engine = speaking("x")
    answer = await post(engine, path, logprob_token_ids=[7, 3, 7])
    sampling = engine.submitted[0].sampling
    assert (sampling.logprobs, sampling.logprob_token_ids) == (0, (7, 3))
    assert answer.json()["choices"][0]["logprobs"] is not None
    many: dict[str, Any] = {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
    wrong: tuple[dict[str, Any], ...] = (
        {"logprob_token_ids": [1 << 20]},
        {"logprob_token_ids": []},
        {"logprob_token_ids": [1], **many},
    )
    for fields in wrong:
        refused = error_of(await post(speaking("x"), path, **fields), 400)
        assert refused["param"].startswith("logprob_token_ids")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_reasoning_of_a_model_without_is_left_out_and_named(name: str) -> None:
    said = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello.", name: "Hm, a greeting."},
        {"role": "user", "content": "more"},
    ]
    engine = speaking("x")
    answer = (await post(engine, CHAT, messages=said)).json()
    assert [one["param"] for one in answer["warnings"]] == [f"messages[1].{name}"]
    assert "greeting" not in TOKENIZER.decode(list(engine.submitted[0].prompt_token_ids))
    plain = await post(other := speaking("x"), CHAT, messages=[said[0], {**said[1], name: None}, said[2]])
    assert plain.json().get("warnings") is None
    assert other.submitted[0].prompt_token_ids == engine.submitted[0].prompt_token_ids


async def test_a_server_that_shows_usage_and_ids_to_all() -> None:
    app = make_app(speaking("x"), enable_force_include_usage=True, return_tokens_as_token_ids=True)
    async with client(app) as http:
        stream = await http.post(COMPLETIONS, json=completion_body("hi", stream=True))
        assert events(stream)[-2]["usage"]["completion_tokens"] >= 1
        answer = await http.post(CHAT, json=chat_body("hi", logprobs=True))
        assert answer.json()["choices"][0]["logprobs"]["content"][0]["token"].startswith("token_id:")


async def test_sagemaker_calls_either_endpoint() -> None:
    async with client(make_app(speaking("x"))) as http:
        for body, kind in ((chat_body("hi"), "chat.completion"), (completion_body("hi"), "text_completion")):
            assert (await http.post("/invocations", json=body)).json()["object"] == kind
        for content in (b"{}", b"[1]", b"no"):
            error_of(
                await http.post(
                    "/invocations", content=content, headers={"content-type": "application/json"}
                ),
                400,
            )


async def test_token_ids_in_and_out() -> None:
    engine = speaking("hello")
    sampling = {"max_tokens": 3, "temperature": 0.0, "detokenize": False, "ignore_eos": True}
    body = {"token_ids": ids("hi"), "sampling_params": sampling, "stream": False}
    async with client(make_app(engine)) as http:
        answer = (await http.post("/inference/v1/generate", json=body)).json()
        assert answer["choices"] == [{"index": 0, "token_ids": ids("hel"), "finish_reason": "length"}]
        assert answer["usage"]["completion_tokens"] == 3
        (submitted,) = engine.submitted
        assert submitted.prompt_token_ids == tuple(ids("hi"))
        assert (submitted.sampling.max_tokens, submitted.sampling.temperature) == (3, 0.0)
        assert submitted.sampling.stop_token_ids == ()
        for fields, param in (
            ({"sampling_params": sampling | {"stop": ["x"]}}, "sampling_params.stop"),
            ({"sampling_params": sampling | {"temperature": 7}}, "sampling_params.temperature"),
            ({"token_ids": []}, "token_ids"),
            ({"token_ids": [1 << 20]}, "prompt"),
            ({"stream": True}, "stream"),
        ):
            error = error_of(await http.post("/inference/v1/generate", json=body | fields), 400)
            assert (error["param"] or "").startswith(param), error
