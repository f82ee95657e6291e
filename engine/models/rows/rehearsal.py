"""Steps that are too large for a graph, before there are any: so that their kernels are compiled at the start.

A step of many rows, or of a long context, is launched kernel by kernel (`engine.models.rows.inputs.row_inputs`). Which kernels
it takes is a function of its size, and Triton compiles each at its first launch, for a second or two. Without a rehearsal a
user would wait for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from engine.attention.batch import Batch, build_batch
from engine.config import PAGE_SIZE
from engine.models.rows.inputs import RowInputs, Sharing, row_inputs
from engine.plan.types import ScheduledRequest, StepPlan

_DECODES = (1, 2, 4, 8, 32)
"""Decodes beside a prompt, by the size of its chunk: fewer rows make smaller programs."""


def rehearsals(
    sizes: Sequence[int],
    contexts: Sequence[int],
    top_k: int,
    budget_bytes: int,
    sharing: Sharing,
    device: torch.device,
) -> Iterator[RowInputs]:
    """Steps of every kind: a prompt's chunk alone and beside decodes, sparse and dense, of these sizes.

    All rows are padding, which reads and writes nothing. Pages are page 0.

    Args:
        sizes: rows of a chunk
        contexts: where it ends
        top_k: of sparse requests; 0: every request is dense
        budget_bytes: that the scores of rows may take together
        sharing: of the model's kernels
        device: of the model
    """
    cpu = torch.device("cpu")
    for context in contexts:
        for rows, decodes in zip(sizes, itertools.cycle(_DECODES)):
            if rows > context:
                continue
            for kinds in ((top_k,), (0,), (top_k, 0)) if top_k else ((0,),):
                inputs = row_inputs(_batch(rows, decodes, context, kinds, cpu), device, budget_bytes, sharing)
                inputs.rows.positions.fill_(-1)
                if inputs.dense is not None:
                    inputs.dense.pages[..., 0] = -1
                yield replace(
                    inputs, offsets=torch.zeros_like(inputs.offsets), pages=torch.zeros_like(inputs.pages)
                )


def _batch(rows: int, decodes: int, context: int, kinds: Sequence[int], device: torch.device) -> Batch:
    """Chunks of `rows` rows in all, one a kind (its top_k; 0: dense), that end at `context`; of several kinds decodes, too."""
    pages = (0,) * (-(-context // PAGE_SIZE))
    each = rows // len(kinds)
    asked = [(each, context - each, kind) for kind in kinds]
    if len(kinds) > 1:
        asked += [(1, context - 1, kinds[number % 2]) for number in range(decodes)]
    return build_batch(
        StepPlan(
            requests=tuple(
                ScheduledRequest(
                    request_id=str(number),
                    token_ids=(0,) * count,
                    start=start,
                    page_ids=pages,
                    index_top_k=kind or None,
                    sample=None,
                )
                for number, (count, start, kind) in enumerate(asked)
            )
        ),
        device,
    )
