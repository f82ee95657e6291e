"""/tokenize, /detokenize, and the small endpoints beside them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.fake_engine import FakeEngine
from tests.server.kit import BOS, EOS, client, error_of, ids, make_app, speaking

HI = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "hi"}, [BOS, *ids("hi")]),
        ({"prompt": "hi", "add_special_tokens": False}, ids("hi")),
        ({"prompt": "<|eos|>", "add_special_tokens": False}, ids("<|eos|>")),
        ({"messages": [HI]}, [BOS, 258, *ids("hi")]),
        (
            {"messages": [HI, {"role": "assistant", "content": "<|eos|>"}], "continue_final_message": True},
            [BOS, 258, *ids("hi"), 258, *ids("<|eos|>")],
        ),
    ],
)
async def test_tokenize(body: dict[str, Any], tokens: list[int]) -> None:
    async with client(make_app(speaking())) as http:
        answer = (await http.post("/tokenize", json=body)).json()
        assert answer == {"count": len(tokens), "max_model_len": 256, "tokens": tokens, "token_strs": None}
        answer = (await http.post("/tokenize", json=body | {"return_token_strs": True, "colour": 1})).json()
        assert "".join(answer["token_strs"]).endswith("hi" if "hi" in str(body["prompt" if "prompt" in body else "messages"])[-12:] else "<|eos|>")  # fmt: skip
        assert [notice["param"] for notice in answer["warnings"]] == ["colour"]


async def test_detokenize() -> None:
    async with client(make_app(speaking())) as http:
        answer = (await http.post("/detokenize", json={"tokens": [BOS, *ids("hé"), EOS]})).json()
        assert answer == {"prompt": "<|bos|>hé<|eos|>"}
        assert (await http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_tokenizer_info() -> None:
    async with client(make_app(speaking())) as http:
        for path in ("/tokenizer_info", "/v1/tokenizer_info/"):
            assert (await http.get(path)).json() == {
                "tokenizer_class": "PreTrainedTokenizerFast", "vocab_size": 259, "bos_token": "<|bos|>", "bos_token_id": BOS,
                "eos_token": "<|eos|>", "eos_token_id": EOS, "add_bos_token": True, "chat_template": None,
            }  # fmt: skip
        assert (await http.head("/tokenizer_info")).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": [HI]}, "either prompt or messages"),
        ("/tokenize", {"messages": [HI], "continue_final_message": True}, "role 'assistant'"),
        ("/tokenize", {"messages": []}, "at least 1 item"),
        ("/detokenize", {"tokens": [259]}, "ids go from 0 to 258"),
        ("/detokenize", {"tokens": ["a"]}, "valid integer"),
        ("/detokenize", {}, "is required"),
    ],
)
async def test_bad_bodies(path: str, body: dict[str, Any], words: str) -> None:
    async with client(make_app(speaking())) as http:
        assert words in error_of(await http.post(path, json=body), 400)["message"]
        error_of(
            await http.post(path, json={"model": "x", "prompt": "x", "tokens": []}), 404, "model_not_found"
        )


async def test_a_token_that_the_model_lacks_is_named() -> None:
    async with client(make_app(FakeEngine(vocab_size=257))) as http:  # <|user|> and <|eos|> have no row
        response = await http.post("/v1/chat/completions", json={"messages": [HI]})
        message = error_of(response, 400)["message"]
        assert "'<|user|>'" in message
        assert "from 0 to 256" in message
        response = await http.post("/v1/completions", json={"prompt": [5, 257]})
        assert "prompt[1] is not a token id" in error_of(response, 400)["message"]
        response = await http.post("/v1/completions", json={"prompt": "hi", "logit_bias": {"257": 1}})
        assert "not a token id" in error_of(response, 400)["message"]
        assert (await http.post("/v1/completions", json={"prompt": "hi"})).status_code == 200


async def test_the_small_endpoints() -> None:
    engine = speaking()
    async with client(make_app(engine)) as http:
        assert (await http.get("/version")).json()["version"]
        assert (await http.get("/load")).json() == {"server_load": 0}
        for method in (http.get, http.post):
            assert (await method("/ping")).status_code == 200
        assert (await http.get("/health")).json()["ready"] is True
    async with client(make_app(FakeEngine(ready=False))) as http:
        assert (await http.get("/health")).status_code == 503
        assert (await http.get("/ping")).status_code == 200
        assert (await http.post("/tokenize", json={"prompt": "a"})).json()["max_model_len"] is None


async def test_what_ended_a_choice() -> None:
    async with client(make_app(speaking("one two"))) as http:
        for fields, reason in (
            ({"stop": ["two"]}, "two"),
            ({"stop_token_ids": ids("w")}, ids("w")[0]),
            ({}, None),
            ({"max_tokens": 2}, None),
        ):
            for path, body in (
                ("/v1/chat/completions", {"messages": [HI]}),
                ("/v1/completions", {"prompt": "hi"}),
            ):
                answer = (await http.post(path, json=body | fields)).json()
                assert answer["choices"][0]["stop_reason"] == reason


async def test_a_text_that_is_only_counted_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.generation.prompts.MAX_COUNTED", 100)
    async with client(make_app(speaking())) as http:
        assert (await http.post("/tokenize", json={"prompt": "a" * 100})).status_code == 200
        error_of(await http.post("/tokenize", json={"prompt": "a" * 101}), 400, "text_too_long")
        long = {"max_tokens": 1, "messages": [{"role": "user", "content": "a" * 101}]}
        assert (await http.post("/v1/messages/count_tokens", json=long)).status_code == 400
