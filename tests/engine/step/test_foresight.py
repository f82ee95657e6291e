"""A token that is told without a mask is the one that the draw under the mask gives."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.plan.types import SampleSpec
from engine.protocol import SamplingParams
from engine.step import sampler
from engine.step.foresight import foresee
from engine.step.masking import TokenMasks
from engine.step.sampler import sample

SIZE = 320
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_k": 5},
    {"top_k": 40, "top_p": 0.8},
    {"min_p": 0.1},
    {"min_p": 1e-6},
    {"top_k": 3, "top_p": 0.5, "min_p": 0.05},
    {"top_k": 1000, "top_p": 1 - 1e-6},
    {"temperature": 0.05, "top_p": 0.9},
    {"temperature": 3.0},
]
NEVER_SURE = ({"min_p": 1e-6}, {"top_k": 1000, "top_p": 1 - 1e-6})
"""Unlikely tokens may pass these."""


def masks_of(allowed: NDArray[np.bool_]) -> TokenMasks:
    return TokenMasks(
        np.packbits(allowed, bitorder="little").view(np.int32)[None], np.zeros(1, dtype=np.int32)
    )


def told_and_drawn(
    logits: NDArray[np.float32], allowed: NDArray[np.bool_], seed: int, wishes: dict[str, Any]
) -> tuple[int | None, int | None]:
    params = SamplingParams(**{"max_tokens": 1, "seed": seed, **wishes})
    spec = SampleSpec(params=params, output_index=seed % 7, history=(), prompt_len=0)
    before = logits.copy()
    told = foresee(logits, spec, lambda token: bool(allowed[token]))
    assert (logits == before).all(), "the caller's row is left alone"
    (drawn,) = sample(torch.from_numpy(logits)[None], [spec], masks_of(allowed))
    return told, drawn.token_id


@pytest.mark.parametrize("wishes", FILTERS, ids=repr)
def test_it_is_the_token_under_the_mask(wishes: dict[str, Any]) -> None:
    random = np.random.default_rng(3)
    sure = 0
    cases = list(itertools.product([0.5, 2.0, 6.0], [0.02, 0.5, 0.95], range(40)))
    for seed, (spread, share, _) in enumerate(cases):
        logits = (spread * random.standard_normal(SIZE)).astype(np.float32)
        allowed = random.random(SIZE) < share
        allowed[random.integers(SIZE)] = True
        if seed % 2:  # a model that knows the format
            allowed[int(logits.argmax())] = True
        told, drawn = told_and_drawn(logits, allowed, seed, wishes)
        assert told in (None, drawn)
        assert drawn is not None
        assert allowed[drawn]
        sure += told is not None
    assert sure > len(cases) / 5 or wishes in NEVER_SURE


def test_a_model_that_is_sure_of_the_format_needs_hardly_any_mask() -> None:
    random = np.random.default_rng(4)
    sure = 0
    for seed in range(300):
        logits = random.standard_normal(SIZE).astype(np.float32)
        logits[random.integers(SIZE, size=4)] += 12
        allowed = random.random(SIZE) < 0.3
        allowed[logits > 8] = True
        told, drawn = told_and_drawn(logits, allowed, seed, {"temperature": 0.7, "top_k": 20, "top_p": 0.8})
        assert told in (None, drawn)
        sure += told is not None
    assert sure > 290


def test_equal_logits() -> None:
    """The first of equal ones is the greedy token, and equal ones at an edge all pass."""
    allowed = np.arange(SIZE) % 3 != 0
    for seed, wishes in enumerate(FILTERS * 5):
        told, drawn = told_and_drawn(np.zeros(SIZE, dtype=np.float32), allowed, seed, wishes)
        assert told in (None, drawn)
        if wishes.get("temperature") == 0:
            assert told == 1


def test_unlikely_tokens_that_race_too_are_not_forgotten() -> None:
    """Without a filter, or with one that they pass, one of thousands may win."""
    logits = np.full(1 << 16, -9.2, dtype=np.float32)  # each 1e-4 of the best, together more than six of it
    logits[5] = 0.0
    allowed = np.ones(1 << 16, dtype=bool)
    told: dict[str, set[bool]] = {}
    for wishes in ({}, {"top_p": 0.999}, {"top_k": 50}, {"min_p": 1e-5}, {"top_p": 0.1}):
        for seed in range(20):
            one, drawn = told_and_drawn(logits, allowed, seed, wishes)
            assert one in (None, drawn)
            told.setdefault(repr(wishes), set()).add(one is not None)
    assert told[repr({"top_p": 0.999})] == told[repr({"min_p": 1e-5})] == {False}


def test_a_grammar_that_bars_all_that_is_likely_needs_its_mask() -> None:
    logits = np.linspace(9, -9, SIZE, dtype=np.float32)
    allowed = np.zeros(SIZE, dtype=bool)
    allowed[SIZE - 2] = True
    assert told_and_drawn(logits, allowed, 0, {}) == (None, SIZE - 2)
    assert told_and_drawn(logits, allowed, 0, {"temperature": 0.0}) == (None, SIZE - 2)


@pytest.mark.parametrize("wishes", FILTERS, ids=repr)
def test_few_allowed_tokens_alone_are_drawn_from_as_among_all(
    wishes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[int, list[int | None]] = {}
    for few in (1, 10**6):  # every mask, and none
        monkeypatch.setattr(sampler, "_FEW", few)
        random = np.random.default_rng(5)
        for seed in range(200):
            logits = (3 * random.standard_normal(SIZE)).astype(np.float32)
            allowed = random.random(SIZE) < 0.1
            allowed[random.integers(SIZE)] = True
            spec = SampleSpec(
                params=SamplingParams(**{"max_tokens": 1, "seed": seed, **wishes}),
                output_index=seed % 7,
                history=(),
                prompt_len=0,
            )
            (one,) = sample(torch.from_numpy(logits)[None], [spec], masks_of(allowed))
            drawn.setdefault(few, []).append(one.token_id)
    assert drawn[1] == drawn[10**6]
