"""Prompts of an evaluation that are asked again: which they are, and what is counted, on a tiny model."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.asked_again import chosen, read_again, table
from lab.corpus.chatml import ChatTurn
from lab.corpus.manifest import CorpusPrompt
from lab.evaluate.faithful import FaithfulResult, measure, summarise
from lab.evaluate.results import EvalResults
from lab.probe import Probe
from lab.tool import ToolError
from tests.engine.kit import VOCAB, random_overlay
from tests.lab.distill.kit import Bench, one_thread

LENGTHS = (40, 300, 120, 200)


def prompt_of(tokens: int) -> CorpusPrompt:
    return CorpusPrompt(kind="code", source="s", tokens=tokens, messages=(ChatTurn("user", "x"),))


def ids_of(count: int) -> tuple[int, ...]:
    drawn = torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(count))
    return tuple(drawn.tolist())


def shown(ids: object) -> str:
    return " ".join(f"<{i}>" for i in ids)  # type: ignore[attr-defined]


def read(text: str) -> list[int]:
    return [int(piece.strip("<>")) for piece in text.split()]


def silent(done: int, total: int) -> None:
    """Ignore progress."""


def evaluated(found: FaithfulResult | None) -> EvalResults:
    return EvalResults(settings={"corpus_sha256": "abc"}, environment={}, default_top_k=32, faithful=found)


def test_the_same_device_counts_the_same(tmp_path: Path) -> None:
    prompts = [prompt_of(n) for n in LENGTHS]
    with one_thread():
        bench = Bench(tmp_path / "model")
        overlay = random_overlay(tmp_path / "it.safetensors", bench.source, rank=0)
        probe = Probe(bench.folder, overlay, device="cpu", dtype="float32", kv_cache_bytes=8 << 20)
        found = measure(
            probe,
            [(p, ids_of(p.tokens)) for p in prompts],
            [32],
            frozenset(),
            shown,
            silent,
            answer_tokens=10,
        )
        results = evaluated(found)
        pairs = chosen(results, prompts, "abc", None, 200)
        assert [asked.prompt_tokens for asked, _ in pairs] == [40, 120, 200]
        again = [read_again(probe, asked, ids_of(p.tokens), read, (), 32) for asked, p in pairs]
        assert [one.agreed for one in again] == [asked.answers["32"].agreed for asked, _ in pairs]
        assert any(one.agreed < one.tokens for one in again)
        # With other numbers in the answer another count comes out.
        asked = pairs[0][0]
        wrong = read_again(
            probe, asked, ids_of(40), lambda text: [(i + 1) % VOCAB for i in read(text)], (), 32
        )
        assert wrong.agreed < again[0].agreed
        ended = read_again(probe, asked, ids_of(40), lambda text: [*read(text), 2], (), 32)
        assert ended.tokens == again[0].tokens + 1
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(again, "cpu"))
    assert f"{sum(one.agreed for one in again) / 30:.1%}" in console.export_text()


def test_another_evaluation_is_refused() -> None:
    prompts = [prompt_of(n) for n in LENGTHS]
    empty = FaithfulResult(
        answer_tokens=9, device="cuda:0", dtype="bfloat16", kernels="triton", prompts=[], skipped=0, rows=summarise([], [32]),
    )  # fmt: skip
    with pytest.raises(ToolError, match="--only faithful"):
        chosen(evaluated(None), prompts, "abc", None, None)
    with pytest.raises(ToolError, match="of other prompts"):
        chosen(evaluated(empty), prompts, "abc", None, None)
    with pytest.raises(ToolError, match="of other prompts"):
        chosen(evaluated(empty), [], "another", None, None)
    assert chosen(evaluated(empty), [], "abc", 8, None) == []
