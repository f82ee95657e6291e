"""The default model, in float32, against Hugging Face transformers loading the same GGUF file."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.checkpoint.safetensors import SafetensorsFile
from server.text.tokenizer import Tokenizer
from tests.engine.kit import Lab, base_of, random_overlay
from tests.engine.models.gqa.plain import PlainLlama

TOLERANCE = 5e-5  # of the largest logit: 30 layers of float32
LENGTHS = (1, 63, 64, 65, 2000)


class Default:
    def __init__(self, weights: Path, overlay: Path, tokenizer: Tokenizer) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            weights.parent, gguf_file=weights.name, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.overlay = random_overlay(overlay, base_of(weights), heads=4, dim=32, rope=16)
        self.lab = Lab(weights, self.overlay, kv_cache_bytes=640 << 20)
        self.text = tokenizer.encode(inspect.getsource(argparse))
        self.hidden: dict[tuple[int, ...], torch.Tensor] = {}  # the slow part, kept for the next test

    def rows(self, tokens: list[int], wanted: list[int]) -> torch.Tensor:
        """transformers' logits at some positions: [len(wanted), vocab]."""
        key = tuple(tokens)
        with torch.no_grad():
            if key not in self.hidden:
                self.hidden[key] = self.model.model(torch.tensor([tokens])).last_hidden_state[0]
            logits: torch.Tensor = self.model.lm_head(self.hidden[key][wanted])
        return logits


@pytest.fixture(scope="module")
def default(default_model: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Default:
    return Default(default_model, tmp_path_factory.mktemp("overlay") / "random.safetensors", tokenizer)


def sampled_positions(length: int, computed: list[int]) -> list[int]:
    """The interesting rows of those that were computed: the last ones, page edges, and a few between."""
    edges = {0, 62, 63, 64, 65, 127, 128, length // 2, length - 3, length - 2, length - 1}
    return sorted(edges & set(computed) | {computed[0], computed[-1]})


def worst(default: Default, run: object, name: str) -> float:
    tokens = run.tokens[name]  # type: ignore[attr-defined]
    rows = run.rows[name]  # type: ignore[attr-defined]
    wanted = sampled_positions(len(tokens), sorted(rows))
    reference = default.rows(tokens, wanted)
    error = 0.0
    for expected, position in zip(reference, wanted, strict=True):
        for hidden in rows[position]:
            row = default.lab.logits(hidden.unsqueeze(0))[0]
            error = max(error, float((row - expected).abs().max() / expected.abs().max()))
    return error


@pytest.mark.parametrize("length", LENGTHS)
def test_alone_and_unchunked(default: Default, length: int) -> None:
    run = default.lab.run(budget=4096, caching=False)
    run.submit("a", default.text[:length], 3, index_top_k=None if length % 2 else 4096)
    run.finish()
    assert worst(default, run, "a") < TOLERANCE


def test_chunked_and_batched_with_others(default: Default) -> None:
    run = default.lab.run(budget=300, caching=False)
    for length in LENGTHS:
        run.submit(str(length), default.text[:length], 3, index_top_k=8192)
    run.finish()
    for length in LENGTHS:
        assert worst(default, run, str(length)) < TOLERANCE


def test_on_a_prefix_hit(default: Default) -> None:
    run = default.lab.run(budget=2048)
    for name, length in (("cold", 700), ("warm", 700), ("longer", 900)):
        run.submit(name, default.text[:length], 3)
        run.finish()
    for name, cached in (("cold", 0), ("warm", 640), ("longer", 640)):
        usage = run.ends[name].usage
        assert usage is not None
        assert usage.cached_tokens == cached
        assert worst(default, run, name) < TOLERANCE


def test_before_and_after_a_preemption(default: Default) -> None:
    run = default.lab.run(pages=9, budget=512, caching=False)
    for name, start in (("a", 0), ("b", 500)):
        run.submit(name, default.text[start : start + 250], 9)  # both outgrow their fourth page
    run.finish()
    assert run.core.stats().preemptions_total > 0
    for name in "ab":
        assert worst(default, run, name) < TOLERANCE


def test_sparse_equals_masked_attention_over_the_same_sets(default: Default) -> None:
    """index_top_k = 64 on the real weights, with an untrained indexer: arithmetic, not quality."""
    run = default.lab.run(budget=100, caching=False)
    run.submit("a", default.text[:130], 3, index_top_k=64)
    run.finish()
    file = SafetensorsFile(default.overlay)
    indexer = {name: file.read(name, torch.float32) for name in file.names()}
    plain = PlainLlama(default.model.state_dict(), default.model.config, indexer)
    reference, _, _ = plain.forward(run.tokens["a"], 64, 4, 16, given=run.masks("a", 64, layers=30))
    assert run.error("a", reference) < TOLERANCE
    dense, _, _ = plain.forward(run.tokens["a"], 10_000, 4, 16)
    assert run.error("a", dense) > 100 * TOLERANCE
