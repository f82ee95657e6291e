"""Every member of the llama family, tiny and random: logits are those of transformers, and of attention over the same sets.

Norms and biases are random, so that a forgotten one shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.safetensors import SafetensorsFile
from tests.engine.kit import VOCAB, Lab, Run, base_of, random_overlay, tiny_checkpoint
from tests.engine.models.gqa.plain import PlainLlama

DENSE = 1e-4  # of the largest logit
HEADS, DIM, ROPE = 3, 16, 8

MEMBERS: dict[str, dict[str, Any]] = {
    "llama": {"kind": "llama"},
    "llama, biases": {"kind": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, biases of attention, tied": {
        "kind": "llama",
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
}


def tokens_of(seed: int, length: int) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def oracle(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def traffic(lab: Lab, top_k: int | None = None, budget: int = 50) -> Run:
    """Three requests in one batch, the longest in chunks, and a fourth that begins while they decode."""
    run = lab.run(budget=budget)
    for seed, length in enumerate((150, 20, 70)):
        run.submit(f"{seed}", tokens_of(seed, length), 5, top_k)
    for _ in range(4):
        run.step()
    run.submit("late", tokens_of(0, 100), 5, top_k)
    return run.finish()


@pytest.mark.parametrize("name", MEMBERS)
def test_dense_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, **MEMBERS[name])
    run = traffic(Lab(tmp_path))
    for request, tokens in run.tokens.items():
        assert run.error(request, oracle(model, tokens)) < DENSE


@pytest.mark.parametrize("form", ["gather", "mask"])
@pytest.mark.parametrize("name", MEMBERS)
def test_sparse_logits_are_those_of_attention_over_the_same_sets(
    name: str, form: str, tmp_path: Path
) -> None:
    top_k = 16
    model = tiny_checkpoint(tmp_path, **MEMBERS[name])
    overlay = random_overlay(
        tmp_path / "indexer.safetensors", base_of(tmp_path), heads=HEADS, dim=DIM, rope=ROPE
    )
    file = SafetensorsFile(overlay)
    plain = PlainLlama(
        model.state_dict(), model.config, {name: file.read(name, torch.float32) for name in file.names()}
    )
    lab = Lab(tmp_path, overlay, sparse_form=form)
    dense = traffic(lab)
    for request, tokens in dense.tokens.items():
        assert dense.error(request, oracle(model, tokens)) < DENSE
    run = traffic(lab, top_k)
    for request, tokens in run.tokens.items():
        masks = run.masks(request, top_k, layers=3)
        reference, _, scores = plain.forward(tokens, top_k, HEADS, ROPE, given=masks)
        assert run.error(request, reference) < DENSE
        for mask, score in zip(masks, scores, strict=True):
            for position in range(len(tokens) - 1):
                chosen = score[position, mask[position]]
                assert len(chosen) == min(top_k, position + 1)
                assert chosen.min() >= score[position, ~mask[position]].max() - 1e-4


def test_packed_weights_with_biases_are_near_float32s(tmp_path: Path) -> None:
    """The native step has no biases: such a model runs layer by layer, over packed weights where there are any."""
    tiny_checkpoint(
        tmp_path,
        **MEMBERS["llama, biases"],
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    lab = Lab(tmp_path, dtype="bfloat16")
    assert lab.built.runner._model.native is None  # type: ignore[attr-defined]
    exact = Lab(tmp_path).run()
    run = lab.run()
    for one in (exact, run):
        one.submit("a", tokens_of(0, 60), 1)
        one.finish()
    expected = torch.stack([exact.lab.logits(exact.rows["a"][i][-1]) for i in range(60)])
    assert run.error("a", expected) < 0.05
