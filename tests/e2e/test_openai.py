"""What a user of OpenAI's client gets from the default model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import openai
import pytest

from server.text.tokenizer import Tokenizer
from tests.e2e.serving import MODEL, Server

FRANCE: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


def counts(usage: Any) -> dict[str, Any]:
    """A usage without its cost, because step times differ from run to run."""
    fields: dict[str, Any] = usage.model_dump()
    assert fields.pop("cost_details")["amount"] == pytest.approx(fields.pop("cost") * 1e9)
    return fields


def test_log_probabilities_of_named_tokens(server: Server, tokenizer: Tokenizer) -> None:
    (paris,), (rome,) = tokenizer.encode(" Paris"), tokenizer.encode(" Rome")
    prompt = "The capital of France is"
    with server.sdk() as sdk:
        whole = sdk.completions.create(
            model=MODEL, prompt=prompt, temperature=0, max_tokens=2,
            extra_body={"logprob_token_ids": [rome, paris], "return_tokens_as_token_ids": True},
        )  # fmt: skip
        likeliest = sdk.completions.create(
            model=MODEL, prompt=prompt, temperature=0, max_tokens=1, logprobs=1,
        )  # fmt: skip
        chat = sdk.chat.completions.create(
            model=MODEL,
            messages=FRANCE,
            temperature=0,
            max_tokens=3,
            extra_body={"logprob_token_ids": [rome, paris]},
        )
    assert whole.choices[0].logprobs is not None
    assert likeliest.choices[0].logprobs is not None
    tops = whole.choices[0].logprobs.top_logprobs
    assert tops is not None
    assert all({f"token_id:{rome}", f"token_id:{paris}"} <= top.keys() for top in tops)
    assert tops[0][f"token_id:{paris}"] > tops[0][f"token_id:{rome}"]
    first = likeliest.choices[0].logprobs
    if first.tokens == [" Paris"]:
        assert first.token_logprobs is not None
        assert first.token_logprobs[0] == pytest.approx(tops[0][f"token_id:{paris}"], abs=0.1)
    assert chat.choices[0].logprobs is not None
    for place in chat.choices[0].logprobs.content or ():
        assert [one.token for one in place.top_logprobs] == [" Rome", " Paris"]


@pytest.mark.parametrize("top_k", [None, 128, "dense"])
def test_the_capital_of_france(server: Server, top_k: int | str | None) -> None:
    extra: dict[str, Any] = {} if top_k is None else {"dsa": {"top_k": top_k}}
    with server.sdk() as sdk:
        whole = sdk.chat.completions.create(
            model=MODEL, messages=FRANCE, temperature=0, max_tokens=40, extra_body=extra
        )
        answer = whole.choices[0].message.content
        assert answer is not None
        assert "Paris" in answer
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage is not None
        assert whole.usage.completion_tokens < 40
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        effective = whole.usage.model_dump()["dsa"]["top_k"]
        assert effective == top_k if top_k is not None else isinstance(effective, int)
        # The prompt is shorter than a page, so nothing is reused and the numbers are the same again.
        stream = sdk.chat.completions.create(
            model=MODEL, messages=FRANCE, temperature=0, max_tokens=40, extra_body=extra,
            stream=True, stream_options={"include_usage": True},
        )  # fmt: skip
        *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert counts(last.usage) == counts(whole.usage)


def test_a_conversation_goes_on(server: Server) -> None:
    with server.sdk() as sdk:
        first = sdk.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=40)
        said = first.choices[0].message
        more: list[Any] = [*FRANCE, said, {"role": "user", "content": "And of Italy?"}]
        second = sdk.chat.completions.create(model=MODEL, messages=more, temperature=0, max_tokens=40)
    assert "Rome" in (second.choices[0].message.content or "")


def test_completions_take_text_and_token_ids_alike(server: Server, tokenizer: Tokenizer) -> None:
    text = "The capital of France is"
    with server.sdk() as sdk:
        one, other = (
            sdk.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=8)
            for prompt in (text, tokenizer.encode(text))
        )
        streamed = sdk.completions.create(model=MODEL, prompt=text, temperature=0, max_tokens=8, stream=True)
        parts = [chunk.choices[0].text for chunk in streamed]
    assert "Paris" in one.choices[0].text
    assert one.choices[0].text == other.choices[0].text == "".join(parts)
    assert one.choices[0].finish_reason == "length"
    assert counts(one.usage) == counts(other.usage)
    assert one.usage is not None
    assert one.usage.completion_tokens == 8


def test_echo_scores_the_prompt(server: Server, tokenizer: Tokenizer) -> None:
    text = "The capital of France is Paris. The capital of Italy is Rome."
    ids = tokenizer.encode(text)
    with server.sdk() as sdk:
        scored = sdk.completions.create(
            model=MODEL, prompt=text, echo=True, logprobs=2, max_tokens=4, temperature=0
        )
        prompt_only = sdk.completions.create(model=MODEL, prompt=text, echo=True, logprobs=2, max_tokens=0)
        end = sdk.completions.create(
            model=MODEL, prompt=text, echo=True, logprobs=2, max_tokens=0, extra_body={"logprob_start_len": 9}
        )
    choice = scored.choices[0]
    assert choice.text.startswith(text)
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    assert len(logprobs.tokens) == len(ids) + 4
    assert "".join(logprobs.tokens) == choice.text
    assert [choice.text[offset:].startswith(token) for token, offset in zip(
        logprobs.tokens, logprobs.text_offset, strict=True
    )] == [True] * len(logprobs.tokens)  # fmt: skip
    assert logprobs.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])
    # The words that the second sentence repeats are nearly certain, and greedy tokens are the likeliest.
    position = logprobs.tokens.index(" Rome")
    assert logprobs.token_logprobs[position] > -1.0
    for token, top in zip(logprobs.tokens[-4:], logprobs.top_logprobs[-4:], strict=True):
        assert max(top, key=lambda name: top[name]) == token
    assert prompt_only.choices[0].text == text
    assert end.choices[0].logprobs is not None
    assert end.choices[0].logprobs.token_logprobs is not None
    assert end.choices[0].logprobs.token_logprobs[:9] == [None] * 9
    assert end.choices[0].logprobs.token_logprobs[9:] == pytest.approx(
        logprobs.token_logprobs[9 : len(ids)], abs=1e-3
    )
    assert prompt_only.usage is not None
    assert prompt_only.usage.completion_tokens == 0
    again = prompt_only.choices[0].logprobs
    assert again is not None
    assert again.token_logprobs is not None
    assert again.token_logprobs[1:] == pytest.approx(logprobs.token_logprobs[1 : len(ids)], abs=0.1)


def test_a_stop_string_ends_the_text_before_it(server: Server) -> None:
    body: dict[str, Any] = {
        "prompt": "1, 2, 3, 4,",
        "temperature": 0,
        "max_tokens": 40,
        "stop": [", 9", "zebra"],
    }
    answer = server.post("/v1/completions", **body).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["text"] == " 5, 6, 7, 8"
    with server.sdk() as sdk:
        stream = sdk.completions.create(model=MODEL, stream=True, **body)
        assert "".join(chunk.choices[0].text for chunk in stream) == " 5, 6, 7, 8"


def test_a_prompt_beyond_the_context(server: Server) -> None:
    response = server.post("/v1/completions", prompt=[7] * 9000)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert {"9000", "8192"} <= set(re.findall(r"\d+", error["message"]))
    words = "word " * 9000
    with server.sdk() as sdk, pytest.raises(openai.BadRequestError) as refused:
        sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": words}])
    found = [int(number) for number in re.findall(r"\d+", refused.value.message)]
    assert 8192 in found
    assert any(9000 <= number < 9100 for number in found)
    together = server.post("/v1/completions", prompt=[7] * 8000, max_tokens=500)
    assert together.status_code == 400
    assert {"8000", "500", "8192"} <= set(re.findall(r"\d+", together.json()["error"]["message"]))


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"temperature": 3}, 400, "temperature"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"content": "hi"}]}, 400, "messages[0].role"),
        ({"dsa": {"top_k": 0}}, 400, "dsa.top_k"),
        ({"dsa": {"top_k": 9000}}, 400, "dsa.top_k"),
        ({"dsa": {"top_k": "sparse"}}, 400, "dsa.top_k"),
        ({"logit_bias": {"49152": 1}}, 400, "logit_bias"),
        ({"stop_token_ids": [-1]}, 400, "stop_token_ids"),
        ({"model": "other"}, 404, "model"),
    ],
)
def test_bad_bodies(server: Server, fields: dict[str, Any], status: int, param: str) -> None:
    response = server.post("/v1/chat/completions", **({"messages": FRANCE} | fields))
    assert response.status_code == status
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_the_server_process_has_no_torch(server: Server) -> None:
    def libraries(pid: int) -> str:
        return Path(f"/proc/{pid}/maps").read_text()

    assert "libtorch" in libraries(server.engine.pid)
    assert "libtorch" not in libraries(server.process.pid)
