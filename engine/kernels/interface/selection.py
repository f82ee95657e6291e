"""What a selection has to be, and a look at whether it is: a sentinel against kernels and indexers that go wrong.

A row at position p with index_top_k = k reads min(k, p + 1) different positions, none of them after p. If a weight of the
indexer is not a number, its scores are not either, and the row reads too few tokens or none. Its answer is then wrong
without a sign of it, so the engine ends the request (`engine.step.runner`).
"""

from __future__ import annotations

import torch
from torch import Tensor

EMPTY, SHORT, OUTSIDE, REPEATED = 1, 2, 4, 8
"""The flaws as bits, in the order of `engine.protocol.SELECTION_FLAWS`: no position; fewer than there should be; one that
the row must not read, or that does not exist; one that occurs twice. `native/select.c` has the same numbers."""


def watched(
    selected: Tensor,
    positions: Tensor,
    index_top_k: Tensor,
    context: int,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the flaws of selections, and mend what could harm other rows: reading beyond a row's own context.

    Args:
        selected: [R, Q, K] int64, -1 for none
        positions: [R, Q] int64
        index_top_k: [R, Q] int64
        context: C
        allowed: [R, Q, C] bool: what a row may select; None: all up to its own position

    Returns:
        selections that can be read, [R, Q, K]: without the positions outside, and the row's own if there is none else;
        flaws [R, Q] int32, bits as above
    """
    own = positions.unsqueeze(-1)
    taken = selected >= 0
    fits = selected <= own
    if allowed is not None:
        fits &= allowed.gather(-1, selected.clamp(0, context - 1)) | ~taken
    outside = (~fits | (selected < -1)).any(-1)
    good = taken & fits
    # The others go into one extra column. So what is read twice is counted once.
    different = torch.zeros(*selected.shape[:2], context + 1, dtype=torch.bool, device=selected.device)
    different.scatter_(-1, selected.where(good, context), True)
    found = different[..., :context].sum(-1)
    visible = positions + 1 if allowed is None else allowed.sum(-1)
    empty, short = found == 0, found < torch.minimum(index_top_k, visible)
    repeated = good.sum(-1) > found
    flaws = (
        empty.int() * EMPTY
        + (short & ~empty).int() * SHORT
        + outside.int() * OUTSIDE
        + repeated.int() * REPEATED
    )
    if selected.device.type != "cpu" or bool(flaws.any()):
        selected = selected.where(good, -1)
        selected[..., 0] = selected[..., 0].where(~empty, positions)
    return selected, flaws
