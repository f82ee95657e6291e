"""Every member of the llama family, tiny and random: logits are those of transformers, and of attention over the same sets.

Norms and biases are random, so that a forgotten one shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.safetensors import SafetensorsFile
from engine.errors import ConfigError
from tests.engine.kit import VOCAB, Lab, Run, base_of, random_overlay, tiny_checkpoint
from tests.engine.models.gqa.plain import PlainLlama

DENSE = 1e-4  # of the largest logit
HEADS, DIM, ROPE = 3, 16, 8

WINDOW = 40  # shorter than most prompts
WINDOWS: dict[str, Any] = {"use_sliding_window": True, "sliding_window": WINDOW}

MEMBERS: dict[str, dict[str, Any]] = {
    "llama": {"kind": "llama"},
    "mistral": {"kind": "mistral", "sliding_window": WINDOW},
    "mistral, tied, no window": {"kind": "mistral", "sliding_window": None, "tie_word_embeddings": True},
    "qwen2": {"kind": "qwen2"},
    "qwen2, tied, windows from layer 1": {
        "kind": "qwen2",
        "tie_word_embeddings": True,
        **WINDOWS,
        "max_window_layers": 1,
    },
    "qwen3": {"kind": "qwen3", "head_dim": 16},
    "qwen3, tied, biases, windows by layer": {
        "kind": "qwen3",
        "tie_word_embeddings": True,
        "attention_bias": True,
        **WINDOWS,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "llama, biases": {"kind": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, biases of attention, tied": {
        "kind": "llama",
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
}


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 160},
    "yarn, all said": {
        "factor": 4.0, "original_max_position_embeddings": 160, "beta_fast": 16.0, "beta_slow": 2.0,
        "attention_factor": 0.9, "truncate": False,
    },
}  # fmt: skip


def tokens_of(seed: int, length: int) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def oracle(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def traffic(lab: Lab, index_top_k: int | None = None, budget: int = 50) -> Run:
    """Three requests in one batch, the longest in chunks, and a fourth that begins while they decode."""
    run = lab.run(budget=budget)
    for seed, length in enumerate((150, 20, 70)):
        run.submit(f"{seed}", tokens_of(seed, length), 5, index_top_k)
    for _ in range(4):
        run.step()
    run.submit("late", tokens_of(0, 100), 5, index_top_k)
    return run.finish()


@pytest.mark.parametrize("name", MEMBERS)
def test_dense_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, **MEMBERS[name])
    run = traffic(Lab(tmp_path))
    for request, tokens in run.tokens.items():
        assert run.error(request, oracle(model, tokens)) < DENSE


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_kind_of_rotation_is_transformers(kind: str, name: str, tmp_path: Path) -> None:
    rope = {"rope_type": name.partition(",")[0], "rope_theta": 1e4, **ROPES[name]}
    model = tiny_checkpoint(tmp_path, kind=kind, rope_parameters=rope)
    run = Lab(tmp_path).run(budget=200)
    run.submit("a", tokens_of(1, 630), 2)
    run.finish()
    assert run.error("a", oracle(model, run.tokens["a"])) < DENSE


def test_a_context_that_dynamic_rotation_would_stretch_is_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    with pytest.raises(ConfigError, match="max_model_len is 641, but this checkpoint has 640 positions"):
        Lab(tmp_path, max_model_len=641)


@pytest.mark.parametrize("form", ["gather", "mask"])
@pytest.mark.parametrize("name", MEMBERS)
def test_sparse_logits_are_those_of_attention_over_the_same_sets(
    name: str, form: str, tmp_path: Path
) -> None:
    index_top_k = 16
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
    run = traffic(lab, index_top_k)
    for request, tokens in run.tokens.items():
        masks = run.masks(request, index_top_k, layers=3)
        reference, _, scores = plain.forward(tokens, index_top_k, HEADS, ROPE, given=masks)
        assert run.error(request, reference) < DENSE
        for mask, score in zip(masks, scores, strict=True):
            for position in range(len(tokens) - 1):
                chosen = score[position, mask[position]]
                # Every window here is longer than index_top_k.
                assert len(chosen) == min(index_top_k, position + 1)
                assert chosen.min() >= score[position, ~mask[position]].max() - 1e-4


def test_packed_weights_with_biases_are_near_float32s(tmp_path: Path) -> None:
    """In the native step and layer by layer."""
    tiny_checkpoint(
        tmp_path,
        **MEMBERS["llama, biases"],
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    lab, layered = Lab(tmp_path, dtype="bfloat16"), Lab(tmp_path, dtype="bfloat16")
    layered.built.runner._model.native = None  # type: ignore[attr-defined]
    exact = Lab(tmp_path).run()
    runs = lab.run(), layered.run()
    for one in (exact, *runs):
        one.submit("a", tokens_of(0, 60), 1)
        one.finish()
    expected = torch.stack([exact.lab.logits(exact.rows["a"][i][-1]) for i in range(60)])
    for run in runs:
        assert run.error("a", expected) < 0.05


@pytest.mark.parametrize("form", ["gather", "mask"])
@pytest.mark.parametrize("layers", [0, 1])
def test_a_window_within_top_k_is_read_whole(form: str, layers: int, tmp_path: Path) -> None:
    """Windows are as long as index_top_k. So only a layer without a window selects: no layer, or only the first."""
    model = tiny_checkpoint(tmp_path, kind="qwen2", **WINDOWS, max_window_layers=layers)
    path = tmp_path / "indexer.safetensors"
    lab = Lab(tmp_path, random_overlay(path, base_of(tmp_path)), sparse_form=form)
    run = traffic(lab, WINDOW)
    for request, tokens in run.tokens.items():
        error = run.error(request, oracle(model, tokens))
        if layers == 0:
            assert error < DENSE  # no layer selects, so no row is corrected either
        elif len(tokens) > 60:
            assert error > 0.01
