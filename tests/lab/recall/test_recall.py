"""Captured attention equals its definition in float64, on a tiny model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lab.distill.sequences import CorpusSplit
from lab.recall.__main__ import app
from lab.recall.run import EDGES, Recall, chosen
from lab.tool import start
from tests.engine.kit import VOCAB, random_overlay
from tests.lab.distill.kit import Bench, one_thread, write_corpus

LENGTH, K, BEYOND = 300, 24, 200


def best_of(values: Tensor, k: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda s: (-float(values[s]), -s))[:k])


def test_captured_attention_is_that_of_the_definition(tmp_path: Path) -> None:
    with one_thread(), torch.no_grad():
        bench = Bench(tmp_path)
        trunk, student = bench.trunk, bench.student()
        tokens = torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(3))
        recall = Recall(trunk, student, [K], beyond=BEYOND)
        recall.add(tokens, 30)
        result = recall.result()[str(K)]
        rows = [(i + 1) * LENGTH // 30 - 1 for i in range(30)]
        x = trunk.embed(tokens)
        for layer in range(trunk.config.num_layers):
            inputs = trunk.open(layer, x)
            query, keys = inputs.query.double(), inputs.keys.double()
            scores = student.scores(layer, inputs, torch.tensor(rows))
            sums, overlap, count = [0.0, 0.0, 0.0], 0.0, 0
            for row, index in zip(rows, scores, strict=True):
                if row < BEYOND:
                    continue
                logits = torch.einsum("hgd,thd->hgt", query[row], keys[: row + 1]) / math.sqrt(
                    trunk.config.head_dim
                )
                mass = logits.softmax(-1).flatten(0, 1).mean(0)
                oracle, indexer = best_of(mass, K), best_of(index[: row + 1], K)
                window = {*range(4), *range(row + 1 - (K - 4), row + 1)}
                for i, positions in enumerate((indexer, oracle, window)):
                    sums[i] += float(mass[list(positions)].sum())
                overlap += len(oracle & indexer) / K
                count += 1
            for way, total in zip(("indexer", "oracle", "window"), sums, strict=True):
                assert result[way]["by_layer"][layer] == pytest.approx(total / count, abs=1e-5)
            assert result["overlap"][layer] == pytest.approx(overlap / count, abs=1e-9)
            x = trunk.close(layer, x, trunk.attend(inputs, slice(None), None))
    assert count == 10
    assert recall.rows.tolist() == [25, 5, 0, 0, 0, 0]
    assert result["indexer"]["by_position"][2:] == [None] * (len(EDGES) - 2)
    own = result["indexer"]["by_layer"]
    assert result["worst_layers"] == sorted(range(3), key=lambda i: own[i])


def test_rows_that_see_no_more_than_k_lose_nothing(tmp_path: Path) -> None:
    with one_thread():
        bench = Bench(tmp_path)
        recall = Recall(bench.trunk, bench.student(), [64], beyond=10)
        recall.add(torch.arange(60) % VOCAB, 0)
    result = recall.result()["64"]
    for way in ("indexer", "oracle", "window"):
        assert result[way]["all"] == pytest.approx(1.0, abs=1e-6)
    assert result["overlap"] == pytest.approx([1.0] * 3)


def test_texts_are_long_ones_of_every_kind(tmp_path: Path) -> None:
    split = CorpusSplit.open(write_corpus(tmp_path, heldout=(2048, 2100, 900, 2048, 3000)), "heldout", VOCAB)
    assert [(text.kind, text.length) for text in chosen(split, 1)] == [("prose", 2048), ("chat", 2100)]


def test_a_model_without_room_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(tmp_path / "model")
    overlay = random_overlay(tmp_path / "indexer.safetensors", bench.source)
    corpus = write_corpus(tmp_path / "corpus", heldout=(2048,))
    flags = [f"--overlay={overlay}", f"--corpus={corpus}", f"--out={tmp_path / 'r.json'}", "--device=cpu"]
    assert start(app, "recall", [str(bench.folder), *flags]) == 1
    assert "recall takes held-out texts" in capsys.readouterr().err
