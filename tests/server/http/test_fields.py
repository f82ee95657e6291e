"""The fields that vLLM's clients send: what they ask of the engine, and what the answers have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import msgspec
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from server.app import create_app
from server.chat.jinja import JinjaFormat
from server.text.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine, Script
from tests.server.kit import (
    BOS,
    EOS,
    PlainChat,
    chat_body,
    client,
    completion_body,
    error_of,
    events,
    ids,
    make_app,
    make_config,
    speaking,
)
from tests.server.kit import TEXT as TOKENIZER

USER = 258
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXT = "one. two."


async def post(engine: FakeEngine, path: str, **fields: Any) -> httpx.Response:
    body = chat_body("hi", **fields) if path == CHAT else completion_body("hi", **fields)
    async with client(make_app(engine)) as http:
        return await http.post(path, json=body)


def text_of(choice: Any) -> str:
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_the_stop_string_may_be_part_of_the_text(path: str) -> None:
    for included, text in ((False, "one"), (True, "one.")):
        answer = await post(speaking(TEXT), path, stop=".", include_stop_str_in_output=included)
        (choice,) = answer.json()["choices"]
        assert (text_of(choice), choice["stop_reason"]) == (text, ".")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_the_stop_tokens_text_may_be_part_of_the_text(path: str) -> None:
    (dot,) = ids(".")
    answer = await post(speaking(TEXT), path, stop_token_ids=[dot], include_stop_str_in_output=True)
    (choice,) = answer.json()["choices"]
    assert (text_of(choice), choice["stop_reason"]) == ("one.", dot)
    assert answer.json()["usage"]["completion_tokens"] == 4
    answer = await post(speaking(TEXT), path, include_stop_str_in_output=True)
    assert text_of(answer.json()["choices"][0]) == TEXT  # the end token is a control token


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_no_stop_string_before_the_least_length(path: str) -> None:
    for least, text in ((3, "one"), (4, "one. two"), (8, "one. two"), (9, TEXT)):
        engine = speaking(TEXT)
        answer = await post(engine, path, stop=["."], min_tokens=least)
        assert text_of(answer.json()["choices"][0]) == text
        assert engine.submitted[0].sampling.min_tokens == least


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_control_tokens_may_show(path: str) -> None:
    for skipped, text in ((True, "ab"), (False, "a<|user|>b")):
        engine = FakeEngine(lambda submit: Script(token_ids=[*ids("a"), USER, *ids("b"), EOS]))
        answer = await post(engine, path, skip_special_tokens=skipped)
        assert text_of(answer.json()["choices"][0]) == text


@pytest.mark.parametrize(
    ("length", "expected"),
    [(2, [*ids("fg")]), (7, [*ids("abcdefg")]), (8, [BOS, *ids("abcdefg")]), (100, [BOS, *ids("abcdefg")])],
)
async def test_prompts_are_cut_from_the_left(length: int, expected: list[int]) -> None:
    engine = speaking("x")
    async with client(make_app(engine)) as http:
        body = completion_body("abcdefg", truncate_prompt_tokens=length, echo=True)
        answer = (await http.post(COMPLETIONS, json=body)).json()
    assert engine.submitted[0].prompt_token_ids == tuple(expected)
    assert answer["choices"][0]["text"] == TOKENIZER.decode(expected) + "x"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_prompts_are_cut_to_the_context(path: str) -> None:
    engine = speaking("x")
    text = "a" * 400
    body = chat_body(text) if path == CHAT else completion_body(text)
    async with client(make_app(engine)) as http:
        error_of(await http.post(path, json=body), 400, "context_length_exceeded")
        answer = await http.post(path, json=body | {"truncate_prompt_tokens": -1, "max_tokens": 6})
    assert answer.status_code == 200
    assert len(engine.submitted[0].prompt_token_ids) == 250


async def test_token_ids_of_a_chat() -> None:
    prompt = [BOS, USER, *ids("hi")]
    answer = (await post(speaking("yes"), CHAT, return_token_ids=True)).json()
    assert answer["prompt_token_ids"] == prompt
    assert answer["choices"][0]["token_ids"] == [*ids("yes"), EOS]
    plain = (await post(speaking("yes"), CHAT)).json()
    assert "prompt_token_ids" not in plain
    assert "token_ids" not in plain["choices"][0]
    *chunks, done = events(await post(speaking("yes"), CHAT, return_token_ids=True, stream=True, n=2))
    assert done == "[DONE]"
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [prompt, *[None] * (len(chunks) - 1)]
    for index in (0, 1):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [token for choice in choices for token in choice["token_ids"]] == [*ids("yes"), EOS]


async def test_token_ids_of_completions() -> None:
    answer = (await post(speaking("yes"), COMPLETIONS, return_token_ids=True, stop="s")).json()
    (choice,) = answer["choices"]
    assert choice["prompt_token_ids"] == [BOS, *ids("hi")]
    assert choice["token_ids"] == ids("yes")  # no stop token ended it
    *chunks, _ = events(await post(speaking("é"), COMPLETIONS, return_token_ids=True, stream=True))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice.get("prompt_token_ids") for choice in choices] == [[BOS, *ids("hi")], None, None]
    assert [choice["token_ids"] for choice in choices] == [*([token] for token in ids("é")), [EOS]]
    assert "".join(choice["text"] for choice in choices) == "é"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_every_token_id_has_its_log_probability(path: str, stream: bool) -> None:
    asked: dict[str, Any] = {"logprobs": True if path == CHAT else 0, "return_tokens_as_token_ids": True}
    for shown in (True, False):
        answer = await post(speaking("yes"), path, **asked, return_token_ids=shown, stream=stream)
        objects = events(answer)[:-1] if stream else [answer.json()]
        told: list[str] = []
        for part in (one["choices"][0]["logprobs"] for one in objects):
            if part is not None:
                told += (
                    part["tokens"] if path == COMPLETIONS else [token["token"] for token in part["content"]]
                )
        assert told == [f"token_id:{token}" for token in (*ids("yes"), *((EOS,) if shown else ()))]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_usage_with_every_chunk(path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, done = events(await post(speaking("yes"), path, stream=True, n=2, stream_options=options))
    prompt = last["usage"]["prompt_tokens"]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 8
    for chunk in chunks:
        assert chunk["usage"]["prompt_tokens"] == prompt
        assert chunk["usage"]["total_tokens"] == prompt + chunk["usage"]["completion_tokens"]
    assert done == "[DONE]"
    *chunks, _, _ = events(
        await post(speaking("yes"), path, stream=True, stream_options={"include_usage": True})
    )
    assert {chunk["usage"] for chunk in chunks} == {None}


async def test_prompt_logprobs() -> None:
    engine = speaking("x")
    answer = (await post(engine, CHAT, prompt_logprobs=2)).json()
    assert engine.submitted[0].sampling.prompt_logprobs == 2
    first, _, letter, _ = answer["prompt_logprobs"]
    h = ids("h")[0]
    assert first is None
    assert letter == {
        str(h): {"logprob": -0.5, "rank": 1, "decoded_token": "h"},
        str(h + 1): {"logprob": -1.5, "rank": 2, "decoded_token": TOKENIZER.token_text(h + 1)},
    }
    engine = speaking("x")
    fields = {"prompt_logprobs": 0, "logprobs": 1, "echo": True, "logprob_start_len": 2}
    (choice,) = (await post(engine, COMPLETIONS, **fields)).json()["choices"]
    assert engine.submitted[0].sampling.prompt_logprobs == 1
    assert [entry and len(entry) for entry in choice["prompt_logprobs"]] == [None, 1, 1]
    assert len(choice["logprobs"]["tokens"]) == 4
    (choice,) = (await post(speaking("x"), COMPLETIONS, prompt_logprobs=0)).json()["choices"]
    assert choice["logprobs"] is None
    (choice,) = (await post(speaking("x"), COMPLETIONS, prompt_logprobs=0, logprobs=0)).json()["choices"]
    assert choice["logprobs"]["tokens"] == ["x"]


async def test_best_of_n_is_n() -> None:
    for fields in ({"best_of": 1}, {"best_of": 3, "n": 3}):
        assert (await post(speaking("x"), COMPLETIONS, **fields)).status_code == 200


async def test_the_salt_of_the_cache_goes_to_the_engine() -> None:
    for fields, salt in (({}, ""), ({"cache_salt": "mine"}, "/mine")):
        engine = speaking("x")
        await post(engine, CHAT, **fields)
        assert engine.submitted[0].cache_salt == salt


async def test_marks_of_the_cache_have_no_effect() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi", **mark}], **mark}]
    engine = speaking("x")
    answer = (await post(engine, CHAT, messages=messages)).json()
    assert "warnings" not in answer
    assert engine.submitted[0].prompt_token_ids == (BOS, USER, *ids("hi"))


class NamingChat(PlainChat):
    """Writes the names of speakers, too."""

    names = True

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        named = [{"role": one["role"], "content": f"{one.get('name')}: {one['content']}"} for one in messages]
        return super().render(named, **options)


async def test_names_are_in_the_prompt_or_in_the_warnings() -> None:
    messages = [{"role": "user", "content": "hi", "name": "Bo"}]
    answer = (await post(speaking("x"), CHAT, messages=messages)).json()
    (notice,) = answer["warnings"]
    assert (notice["code"], notice["param"]) == ("no_effect", "messages[0].name")
    engine = speaking("x")
    async with client(create_app(make_config(), engine, TOKENIZER, NamingChat())) as http:
        answer = (await http.post(CHAT, json=chat_body() | {"messages": messages})).json()
    assert "warnings" not in answer
    assert TOKENIZER.decode(engine.submitted[0].prompt_token_ids) == "Bo: hi"


def with_marks(*marks: str) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<|bos|>", "<|eos|>", *marks)])
    return Tokenizer(backend, eos_token_ids=[257], bos_token_id=256, adds_bos=True)


@pytest.mark.parametrize(
    "marks",
    [
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>"),
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<|endoftext|>"),
    ],
)
async def test_the_middle_is_filled_in(marks: tuple[str, ...]) -> None:
    tokenizer = with_marks(*marks)
    before, between, after, end = (tokenizer.control_tokens[mark] for mark in marks)
    engine = FakeEngine(lambda submit: Script(token_ids=[*ids("mid"), end, *ids("more")]))
    async with client(create_app(make_config(), engine, tokenizer, PlainChat())) as http:
        body = completion_body(f"a{marks[1]}", suffix=f"b{marks[2]}")
        answer = (await http.post(COMPLETIONS, json=body)).json()
        error_of(await http.post(COMPLETIONS, json=body | {"echo": True}), 400)
    prefix, suffix = ids(f"a{marks[1]}"), ids(f"b{marks[2]}")  # what a client writes is text
    assert engine.submitted[0].prompt_token_ids == (BOS, before, *prefix, between, *suffix, after)
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("mid", "stop")
    assert answer["choices"][0]["stop_reason"] is None


async def test_an_answer_may_begin_with_what_it_continues() -> None:
    said = [{"role": "user", "content": "a saying"}, {"role": "assistant", "content": "An apple"}]
    fields = {"messages": said, "continue_final_message": True, "add_generation_prompt": False}
    for echo, text in ((True, "An apple a day"), (False, " a day")):
        whole = await post(speaking(" a day"), CHAT, **fields, echo=echo)
        assert text_of(whole.json()["choices"][0]) == text
        stream = await post(speaking(" a day"), CHAT, **fields, echo=echo, stream=True)
        deltas = [choice["delta"] for event in events(stream)[:-1] for choice in event["choices"]]
        assert "".join(delta.get("content") or "" for delta in deltas) == text
    refused = error_of(await post(speaking("x"), CHAT, echo=True), 400)
    assert refused["param"] == "echo"


TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message.role }}:{{ message.content }}{% endfor %}"
    "{% if style %}[{{ style }}]{% endif %}{% if enable_thinking %}!{% endif %}"
)


async def with_template(**fields: Any) -> tuple[httpx.Response, str]:
    """The answer, and the prompt, of a model with a template of its own."""
    engine = speaking("x")
    app = create_app(make_config(), engine, TOKENIZER, JinjaFormat(TEMPLATE))
    async with client(app) as http:
        response = await http.post(CHAT, json=chat_body("hi", **fields))
    prompt = engine.submitted[0].prompt_token_ids if engine.submitted else ()
    return response, TOKENIZER.decode(list(prompt), skip_special=False)


async def test_a_templates_own_variables_can_be_set() -> None:
    response, prompt = await with_template(
        chat_template_kwargs={"style": "short", "messages": 1, "tone": True}
    )
    assert prompt.endswith("user:hi[short]")
    assert [notice["param"] for notice in response.json()["warnings"]] == [
        "chat_template_kwargs.messages",
        "chat_template_kwargs.tone",
    ]
    for value in ("<|user|>", [1], "x" * 65):
        response, _ = await with_template(chat_template_kwargs={"style": value})
        assert error_of(response, 400)["param"] == "chat_template_kwargs"
    response, prompt = await with_template(chat_template_kwargs={"enable_thinking": True})
    assert prompt.endswith("user:hi")  # the vocabulary has no tokens for reasoning
    assert response.json()["warnings"][0]["param"] == "chat_template_kwargs.enable_thinking"


async def test_a_role_that_the_template_writes() -> None:
    _, prompt = await with_template(messages=[{"role": "critic", "content": "no"}])
    assert prompt.endswith("critic:no")
    for role in ("<|user|>", "a b", "x" * 33):
        response, _ = await with_template(messages=[{"role": role, "content": "no"}])
        error_of(response, 400)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_log_probabilities_may_name_tokens_by_their_ids(path: str) -> None:
    asked = {"logprobs": True, "top_logprobs": 1} if path == CHAT else {"logprobs": 1}
    answer = await post(speaking("ab"), path, return_tokens_as_token_ids=True, **asked)
    shown = answer.json()["choices"][0]["logprobs"]
    names = [entry["token"] for entry in shown["content"]] if path == CHAT else shown["tokens"]
    assert names[:2] == [f"token_id:{token_id}" for token_id in ids("ab")]


async def test_a_completion_that_is_whole_has_null_where_nothing_was_asked() -> None:
    (choice,) = (await post(speaking("x"), COMPLETIONS)).json()["choices"]
    assert [choice[name] for name in ("prompt_token_ids", "token_ids", "prompt_logprobs")] == [None] * 3


SAID = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
EFFECTS: list[tuple[str, str, Any, dict[str, Any]]] = [
    (CHAT, "echo", True, {"messages": SAID, "add_generation_prompt": False, "continue_final_message": True}),
    (CHAT, "logprobs", True, {}),
    (CHAT, "top_logprobs", 2, {"logprobs": True}),
    (CHAT, "max_completion_tokens", 3, {}),
    (COMPLETIONS, "echo", True, {}),
    (COMPLETIONS, "logprobs", 0, {}),
    (COMPLETIONS, "logprobs", 2, {}),
    *(
        (path, name, value, base)
        for path in (CHAT, COMPLETIONS)
        for name, value, base in (
            ("cache_salt", "mine", {}),
            ("dsa", {"top_k": 8}, {}),
            ("frequency_penalty", 0.5, {}),
            ("ignore_eos", True, {}),
            ("include_stop_str_in_output", True, {"stop": "."}),
            ("logit_bias", {"5": 2.0}, {}),
            ("max_tokens", 3, {}),
            ("min_p", 0.1, {}),
            ("min_tokens", 2, {}),
            ("n", 2, {}),
            ("presence_penalty", 0.5, {}),
            ("priority", 4, {}),
            ("prompt_logprobs", 1, {}),
            ("repetition_penalty", 1.2, {}),
            ("return_token_ids", True, {}),
            ("seed", 8, {}),
            ("skip_special_tokens", False, {}),
            ("stop", ".", {}),
            ("stop_token_ids", [70], {}),
            ("stream", True, {}),
            ("stream_options", {"include_usage": True}, {"stream": True}),
            (
                "stream_options",
                {"include_usage": True, "continuous_usage_stats": True},
                {"stream": True, "stream_options": {"include_usage": True}},
            ),
            ("temperature", 0.3, {}),
            ("top_k", 3, {}),
            ("top_p", 0.4, {}),
            ("truncate_prompt_tokens", 1, {}),
        )
    ),
]


async def told(path: str, fields: Mapping[str, Any]) -> tuple[Any, str]:
    """What the engine gets, and what the client gets without what differs from answer to answer."""
    engine = FakeEngine(lambda submit: Script(token_ids=[*ids("one."), USER, *ids(" two"), EOS]))
    answer = await post(engine, path, **{"seed": 7, **fields})
    assert answer.status_code == 200, answer.text
    text = re.sub(r'"(id|system_fingerprint)":"[^"]*"|"created":[0-9]+', "", answer.text)
    return [msgspec.structs.replace(one, request_id="") for one in engine.submitted], text


@pytest.mark.parametrize(("path", "name", "value", "base"), EFFECTS)
async def test_every_field_has_an_effect(path: str, name: str, value: Any, base: dict[str, Any]) -> None:
    before, after = await told(path, base), await told(path, {**base, name: value})
    assert before == await told(path, base)
    assert before != after
    assert "warnings" not in after[1]
