"""Fits a recipe's steps into a time: it times a few steps of each stage, and says how many there can be."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from lab.distill.recipe import Recipe
from lab.distill.train import StepLog, Trainer

TRIAL_STEPS = 4
"""Steps of a trial. The first one is not timed: it also loads kernels."""


def fitted(recipe: Recipe, seconds: float, trainer: Callable[[Recipe, Path], Trainer]) -> Recipe:
    """Return the recipe with as many dense and sparse steps as take `seconds`, in the same proportion of time.

    The proportion is that of the recipe's own steps, each weighed with what it takes: if they would take twice
    `seconds`, both stages get half of their steps.

    Args:
        recipe: without a third stage
        seconds: that the steps may take
        trainer: makes a trainer of its own indexers for a recipe and a folder; the trial trains them
    """
    times = {"dense": 0.0, "sparse": 0.0}
    for stage in times:
        if not (recipe.warmup_steps if stage == "dense" else recipe.sparse_steps):
            continue
        trial = msgspec.structs.replace(
            recipe,
            warmup_steps=TRIAL_STEPS if stage == "dense" else 0,
            sparse_steps=TRIAL_STEPS if stage == "sparse" else 0,
            adapt_steps=0,
        )
        logs: list[StepLog] = []
        with tempfile.TemporaryDirectory() as folder:
            trainer(trial, Path(folder)).run(logs.append, save_every=TRIAL_STEPS + 1)
        times[stage] = sum(log.seconds for log in logs[1:]) / (TRIAL_STEPS - 1)
    whole = times["dense"] * recipe.warmup_steps + times["sparse"] * recipe.sparse_steps
    scale = seconds / whole
    return msgspec.structs.replace(
        recipe,
        warmup_steps=_scaled(recipe.warmup_steps, scale),
        sparse_steps=_scaled(recipe.sparse_steps, scale),
    )


def _scaled(steps: int, scale: float) -> int:
    """Scale a number of steps; a stage that there is keeps one step."""
    return max(1, round(steps * scale)) if steps else 0
