"""`dsa serve` on a folder of the DeepSeek family: random weights, a small real tokenizer, real requests."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.e2e.serving import Server
from tests.engine.models.mla.kit import tiny_deepseek

PROMPT = "the quick brown fox jumps over the lazy dog, " * 4


def byte_tokenizer(folder: Path) -> int:
    """Write a byte-level tokenizer without merges; return its size."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"])
    tokenizer.add_special_tokens(["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}'
    )
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="module", params=["deepseek_v32", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp(request.param) / request.param
    folder.mkdir()
    size = byte_tokenizer(folder)
    tiny_deepseek(request.param, folder, vocab_size=size)
    server = Server(str(folder), "--dtype", "float32", "--kv-cache-memory", "64MiB", "--threads", "1")
    try:
        yield server.wait_ready()
        assert server.end(signal.SIGTERM) == 0
    finally:
        server.close()


def complete(server: Server, **body: object) -> dict[str, object]:
    """Eight greedy tokens after a prompt that is longer than the indexer's top_k."""
    model = httpx.get(server.url + "/v1/models", timeout=30).json()["data"][0]["id"]
    reply = server.post(
        "/v1/completions", model=model, prompt=PROMPT, max_tokens=8, temperature=0, ignore_eos=True, **body
    )
    assert reply.status_code == 200, reply.text
    answer: dict[str, object] = reply.json()
    return answer


def test_top_k_is_the_checkpoints_own_unless_a_request_says_otherwise(served: Server) -> None:
    sparse = "deepseek_v32" in served.flags[0]
    texts = {}
    for asked in (None, 24, 9, "dense"):
        answer = complete(served, **({} if asked is None else {"dsa": {"top_k": asked}}))
        usage = answer["usage"]
        assert isinstance(usage, dict)
        assert usage["completion_tokens"] == 8
        wanted = 24 if asked is None else asked
        assert usage["dsa"]["top_k"] == (wanted if sparse else "dense")
        texts[asked] = answer["choices"][0]["text"]  # type: ignore[index]
    assert texts[None] == texts[24]
    if not sparse:
        assert len(set(texts.values())) == 1


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_compute_one_model_and_end_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    folder = tmp_path / "deepseek_v32"
    folder.mkdir()
    tiny_deepseek("deepseek_v32", folder, vocab_size=byte_tokenizer(folder))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    server = Server(
        str(folder), "--device", "cpu", "--tensor-parallel", "2", "--dtype", "float32",
        "--kv-cache-memory", "64MiB", "--threads", "1",
    )  # fmt: skip
    try:
        server.wait_ready()
        before = complete(server)["choices"]
        first = server.children()
        (worker,) = (process for process in first if "engine.step.worker" in process.cmdline())
        worker.kill()
        wait_until(server, lambda: "a new one is starting" in server.errors)
        assert "rank 1 of 2 failed: it was ended by signal 9" in server.errors
        assert psutil.wait_procs(first, timeout=5)[1] == []
        if again:
            wait_until(server, lambda: server.ready)
            assert complete(server)["choices"] == before
            engine, stuck = server.children()
            stuck.suspend()  # like a worker that hangs in a device driver: it must not outlive the engine
            engine.kill()
            assert psutil.wait_procs([engine, stuck], timeout=5)[1] == []
            wait_until(server, lambda: server.ready)
        last = server.children()
        assert server.end(signal.SIGTERM) == 0
        assert psutil.wait_procs(last, timeout=5)[1] == []
        if not again:  # if the engine and its worker were both killed, no process could tidy up
            assert list(tmp_path.glob("dsa-ranks-*")) == []
    finally:
        server.close()


def wait_until(server: Server, reached: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until, server.errors
        time.sleep(0.1)
