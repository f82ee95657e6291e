"""Selections that a step's layers found invalid end their requests: the answers would be wrong without a sign of it."""

from __future__ import annotations

from collections.abc import Sequence

from engine.attention.batch import Batch
from engine.plan.types import Sampled
from engine.protocol import SELECTION_FLAWS


def with_flaws(batch: Batch, results: Sequence[Sampled]) -> tuple[Sampled, ...]:
    """The results of a batch's requests, where one with an invalid selection in any row and layer has an error instead."""
    flaws = batch.flaws
    if not bool(flaws.any() if flaws.is_cuda else flaws.numpy().any()):
        return tuple(results)
    rows: list[int] = flaws.tolist()
    made = []
    for segment, result in zip(batch.segments, results, strict=True):
        bits = 0
        for row in rows[segment.first_row : segment.first_row + segment.num_rows]:
            bits |= row
        made.append(_ended(bits) if bits else result)
    return tuple(made)


def names_of(bits: int) -> tuple[str, ...]:
    """The flaws of `Sampled.flaws` by their names."""
    return tuple(name for i, name in enumerate(SELECTION_FLAWS) if bits >> i & 1)


def _ended(bits: int) -> Sampled:
    said = " and ".join(names_of(bits))
    return Sampled(error=f"a layer selected an invalid set of tokens to read ({said})", flaws=bits)
