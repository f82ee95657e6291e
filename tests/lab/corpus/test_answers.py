"""The model's own answers: a server is asked once, and the answers are added to the training split once."""

from __future__ import annotations

import json
import random
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest

from lab.corpus.answers import KIND, AnswersError, ask, converse, extend
from lab.corpus.chatml import ChatTurn
from lab.corpus.manifest import (
    FILE_NAME,
    CorpusPrompt,
    Manifest,
    SequenceInfo,
    SourceInfo,
    SplitInfo,
    load_manifest,
    load_tokens,
    sha256,
)
from lab.corpus.packing import SHORTEST
from tests.lab.corpus.test_build import CHAT, CONTROL

PROMPTS = [
    CorpusPrompt(kind="text", source="book", tokens=5, messages=(ChatTurn("user", f"What of {i}?"),))
    for i in range(40)
]


def serve(refuse: int | None = None) -> httpx.MockTransport:
    """A server that repeats the question as its answer, so that each answer shows its prompt."""

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny"}]})
        body = json.loads(request.content)
        assert body["model"] == "tiny"
        number = int(body["messages"][0]["content"][8:-1])
        assert body["seed"] == 7 + number
        if number == refuse:
            return httpx.Response(400, json={"error": {"message": "no such thing"}})
        return httpx.Response(200, json={"choices": [{"message": {"content": f"Of {number}: much. " * 30}}]})

    return httpx.MockTransport(handle)


async def answers(transport: httpx.MockTransport) -> list[str]:
    return await ask("http://it", PROMPTS, max_tokens=9, seed=7, concurrency=3, transport=transport)


async def test_answers_come_in_the_prompts_order() -> None:
    assert [text[:8] for text in await answers(serve())] == [f"Of {i}: much. "[:8] for i in range(40)]


async def test_a_refusal_ends_it_with_the_servers_words() -> None:
    with pytest.raises(AnswersError, match="400.*no such thing"):
        await answers(serve(refuse=5))


def corpus(folder: Path) -> Manifest:
    ids = np.arange(100, 1124, dtype=np.uint16)
    np.save(folder / "train.npy", ids)
    info = SequenceInfo(start=0, length=1024, kind="books", sources=("book",), licences=("MIT",), focus=())
    split = SplitInfo(
        file="train.npy", sha256=sha256(folder / "train.npy"), tokens=1024, tokens_by_kind={"books": 1024}, sequences=(info,)
    )  # fmt: skip
    source = SourceInfo(
        name="book", package="book", version="1", fetch="apt", kind="books", split="train", licence="MIT", documents=1,
        chars=9, tokens=1024,
    )  # fmt: skip
    manifest = Manifest(
        version=1,
        seed=0,
        target_tokens=1024,
        separator=0,
        removed={},
        sources=(source,),
        splits={"train": split},
        files={},
    )
    (folder / FILE_NAME).write_bytes(msgspec.json.encode(manifest))
    return manifest


def test_conversations_join_the_training_split_with_their_answers_in_focus(tmp_path: Path) -> None:
    corpus(tmp_path)
    texts = [f"Of {i}: much. " * 30 for i in range(40)]
    texts[3] = " "  # an empty answer teaches nothing
    made = list(converse(PROMPTS, texts, CHAT, random.Random(0)))
    assert all(len(packed.ids) >= SHORTEST for packed in made)
    assert sum(len(packed.focus) for packed in made) == 39
    for packed in made:
        for start, end in packed.focus:
            assert packed.ids[start] == CONTROL["<|im_start|>"]
            assert packed.ids[end - 1] == CONTROL["<|im_end|>"]
            assert packed.ids[start + 1 : end - 1].tolist() != []
    extend(tmp_path, made)
    grown = load_manifest(tmp_path).splits["train"]
    tokens = load_tokens(tmp_path, grown)
    assert tokens[:1024].tolist() == list(range(100, 1124))
    assert sha256(tmp_path / grown.file) == grown.sha256
    assert grown.tokens == len(tokens) == sum(grown.tokens_by_kind.values())
    for packed, info in zip(made, grown.sequences[1:], strict=True):
        assert info.kind == KIND
        assert info.licences == ("MIT",)
        assert tokens[info.start : info.start + info.length].tolist() == packed.ids.tolist()


def test_a_corpus_takes_answers_once(tmp_path: Path) -> None:
    corpus(tmp_path)
    made = list(converse(PROMPTS, ["Of it: much. " * 30] * 40, CHAT, random.Random(0)))
    extend(tmp_path, made)
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(AnswersError, match="answers already"):
        extend(tmp_path, made)
    assert (tmp_path / FILE_NAME).read_bytes() == before
