"""With `batch_invariant` a prompt has the same answer in any company, however it was cut, to the bit."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kernels import native
from engine.step.build import Built, build
from server.text.tokenizer import Tokenizer
from tests.engine.invariance import Engine, Prompt, differing
from tests.engine.kit import VOCAB, base_of, random_overlay, tiny_checkpoint
from tests.engine.models.gqa.test_native import round_weights
from tests.kit import ROOT

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ALIKE = dict.fromkeys(
    ("in company", "chunked", "on a prefix hit", "after preemptions", "with drafts"), (0, 0)
)
compiled = pytest.mark.skipif(native.library() is None, reason=str(native.missing()))


def small(folder: Path, **settings: Any) -> Built:
    """A random model with an indexer and an adapter, in bfloat16."""
    if not (folder / "model.safetensors").exists():
        tiny_checkpoint(
            folder, hidden_size=96, intermediate_size=160, num_attention_heads=6, num_key_value_heads=2, head_dim=32,
            num_hidden_layers=5, initializer_range=0.1,  # attention to many tokens, whose sums are of many numbers
        )  # fmt: skip
        round_weights(folder / "model.safetensors")
        round_weights(random_overlay(folder / "indexer.st", base_of(folder), heads=5, dim=32, rope=16))
    defaults: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "kv_cache_bytes": 32 << 20}
    return build(
        EngineConfig(weights=str(folder), overlay=str(folder / "indexer.st"), **{**defaults, **settings})
    )


def small_prompts(count: int) -> list[Prompt]:
    """Dense and sparse ones, with and without whole pages, and of few tokens, which repeat."""
    chance = random.Random(5)
    return [
        Prompt(
            tuple(chance.choices(range(0, VOCAB, 7), k=chance.choice((3, 57, 59, 61, 64, 90, 121, 150)))),
            (None, 64, 100)[number % 3],
            max_tokens=12,
            temperature=(0.0, 0.0, 1.0)[number // 3 % 3],
            seed=number,
        )
        for number in range(count)
    ]


@compiled
def test_answers_are_the_same_to_the_bit_in_every_situation(tmp_path: Path) -> None:
    engine, prompts = Engine(small(tmp_path, batch_invariant=True)), small_prompts(18)
    wanted = engine.alone(prompts)
    found = {name: differing(run(prompts), wanted) for name, run in engine.situations.items()}
    assert found == dict.fromkeys(engine.situations, (0, 0))


@compiled
def test_without_it_they_are_not(tmp_path: Path) -> None:
    """So the comparison can fail; a chunk sums dense attention in another order than a decode does."""
    engine, prompts = Engine(small(tmp_path)), small_prompts(9)
    wanted = engine.alone(prompts)
    assert differing(engine.with_drafts(prompts), wanted)[1] > 0


@compiled
def test_ready_says_it(tmp_path: Path) -> None:
    assert small(tmp_path, batch_invariant=True).ready.model.batch_invariant
    assert not small(tmp_path).ready.model.batch_invariant


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float32"}, "needs steps that run compiled"),
        ({"kernels": "torch"}, "needs steps that run compiled"),
        pytest.param({"indexer_dtype": "bf16"}, "needs index keys of 8 bits", marks=compiled),
    ],
)
def test_what_cannot_be_invariant_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"batch_invariant {message}.*leave --batch-invariant out"):
        small(tmp_path, batch_invariant=True, **settings)


@on_gpu
@pytest.mark.parametrize("indexer_dtype", ["auto", "bf16"])
def test_a_gpu_gives_the_same_too(tmp_path: Path, indexer_dtype: str) -> None:
    built = small(tmp_path, batch_invariant=True, device="cuda", max_running=16, indexer_dtype=indexer_dtype)
    assert situations(built, small_prompts(50)) == ALIKE


@on_gpu
def test_without_it_a_gpu_does_not(tmp_path: Path) -> None:
    """So the comparison can fail on a GPU, too."""
    found = situations(small(tmp_path, device="cuda", max_running=16), small_prompts(50))
    assert sum(bits for _, bits in found.values()) > 0


def situations(built: Built, prompts: list[Prompt], distinct: int = 25) -> dict[str, tuple[int, int]]:
    """How many answers differ from those alone, in each situation: in tokens, and in bits.

    More than `distinct` of them must differ from one another: they are answers to something.
    """
    engine = Engine(built)
    wanted = engine.alone(prompts)
    assert len({tuple(answer.tokens) for answer in wanted}) > distinct
    found = {
        name: differing(run(prompts), wanted)
        for name, run in engine.situations.items()
        if name != "with drafts"
    }
    # An engine with drafts takes no plans ahead, and draws elsewhere.
    engine = Engine(replace(built, ahead=None))
    return found | {"with drafts": differing(engine.with_drafts(prompts), engine.alone(prompts))}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=compiled), pytest.param("cuda", marks=on_gpu)])
def test_fifty_prompts_of_the_default_model(default_model: Path, tokenizer: Tokenizer, device: str) -> None:
    built = build(
        EngineConfig(
            weights=str(default_model),
            overlay=str(ROOT / "engine" / "overlays" / "smollm2-135m-instruct.safetensors"),
            device=device,
            dtype="bfloat16",
            kv_cache_bytes=256 << 20,
            max_running=16,
            batch_invariant=True,
        )
    )
    assert situations(built, prompts_of(tokenizer), distinct=40) == ALIKE


def prompts_of(tokenizer: Tokenizer) -> list[Prompt]:
    """Fifty pieces of the README, of 20 to 160 tokens; every second one is sparse."""
    tokens = tokenizer.encode((ROOT / "README.md").read_text("utf-8"))
    chance = random.Random(1)
    prompts = []
    for number in range(50):
        size = chance.randint(20, 160)
        start = chance.randrange(len(tokens) - size)
        prompts.append(Prompt(tuple(tokens[start : start + size]), 64 if number % 2 else None, max_tokens=16))
    return prompts
