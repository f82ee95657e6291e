"""Vocabularies that do not fit their model, or whose first token hides its space: real servers on tiny folders."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from tests.e2e.serving import Server
from tests.engine.kit import tiny_checkpoint

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]

FLAGS = ("--kv-cache-memory", "64MiB", "--threads", "1")


def serve(folder: Path, *flags: str) -> Iterator[Callable[..., Any]]:
    """Run a server on a folder; yields a function that posts to it."""
    server = Server(str(folder), *FLAGS, *flags)
    try:
        server.wait_ready()
        yield lambda path="/v1/completions", **body: server.post(path, model=folder.name, **body)
        assert server.metrics()["dsa_engine_restarts_total"] == 0
        assert server.end(signal.SIGTERM) == 0
    finally:
        server.close()


@pytest.fixture(params=["auto", "float32"])
def one_too_many(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """The tokenizer has an id, and the embedding no row for it: <|user|> was added and nothing resized."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|user|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tiny_checkpoint(tmp_path, vocab_size=258)
    yield from serve(tmp_path, "--dtype", request.param)


def test_an_id_that_the_embedding_has_no_row_for(one_too_many: Callable[..., Any]) -> None:
    """It is refused whatever computes, nothing is read beyond the matrix, and the engine lives."""
    asked: list[dict[str, Any]] = [
        {"prompt": [5, 258], "max_tokens": 2},
        {"prompt": "hi", "max_tokens": 2, "logit_bias": {"258": 5}},
        {"prompt": [5, 258], "max_tokens": 0, "echo": True, "logprobs": 1},
        {"path": "/v1/chat/completions", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    ]
    for body in asked * 2:
        reply = one_too_many(**body)
        assert reply.status_code == 400, (body, reply.text)
        message = reply.json()["error"]["message"]
        assert "257" in message  # the last id that the model has
        assert "token" in message
    assert one_too_many(prompt=[5, 257], max_tokens=2).status_code == 200


@pytest.fixture
def spaced(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A vocabulary as sentencepiece makes it, and a model that says " hello world" after any text."""
    words = ["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a"]
    merges = [("\u2581", "a")]
    for word in ("\u2581hello", "\u2581world"):
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            words += [word[end - 1], word[:end]]
    words = [*dict.fromkeys(words)]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    says_one_thing(tmp_path, len(ids), [ids["\u2581hello"], ids["\u2581world"], ids["</s>"]])
    yield from serve(tmp_path)


def says_one_thing(folder: Path, size: int, script: list[int]) -> None:
    """Write a model whose next token depends on the last one only: the script, from its start after any other token."""
    config = LlamaConfig(
        vocab_size=size, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    following = dict.fromkeys(range(size), script[0]) | dict(itertools.pairwise(script))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        for token, after in following.items():
            model.model.embed_tokens.weight[token, token] = 1.0
            model.lm_head.weight[after, token] = 4.0
    model.save_pretrained(folder)


def test_the_space_of_the_first_new_token_is_kept(spaced: Callable[..., Any]) -> None:
    """The text is what the new tokens add to the prompt's."""
    asked: list[tuple[dict[str, Any], str]] = [
        ({}, " hello world"),
        ({"echo": True}, "a hello world"),
        ({"stop": [" hello"]}, ""),
        ({"stop": [" w"]}, " hello"),
    ]
    for fields, text in asked:
        reply = spaced(prompt="a", max_tokens=8, temperature=0, **fields)
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["text"] == text
