"""Steps that are too large for a graph, before there are any: so that their kernels are compiled at the start.

A step of many rows, or of a long context, is launched kernel by kernel (`engine.models.rows.inputs.row_inputs`). Which kernels
it takes is a function of its size, and Triton compiles each at its first launch, for a second or two. Without a rehearsal a
user would wait for it. Kernels change with powers of two, mostly: so there is a step for each of them, and some between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import torch

from engine.attention.batch import Batch, build_batch
from engine.config import PAGE_SIZE
from engine.models.rows.inputs import CONTEXT_STEP, RowInputs, Sharing, row_inputs
from engine.plan.types import ScheduledRequest, StepPlan

_CHUNKS = (65, 128, 256, 512, 1024, 2048)
"""Rows of chunks in a step."""
_MOST_ALONE = 2048
"""Rows of a step that are computed one by one."""
_BESIDE = 65
"""Rows of a chunk beside these."""
_LEAST_CONTEXT = 1024


def rehearsals(
    max_rows: int,
    contexts: Sequence[int],
    top_k: int,
    budget_bytes: int,
    sharing: Sharing,
    device: torch.device,
) -> Iterator[RowInputs]:
    """Steps of every kind: chunks of prompts and rows alone, together and apart, sparse and dense, short and long.

    All rows are padding, which reads and writes nothing. Pages are page 0.

    Args:
        max_rows: requests of a step
        contexts: where requests end
        top_k: of sparse requests; 0: every request is dense
        budget_bytes: that the scores of rows may take together
        sharing: of the model's kernels
        device: of the model
    """
    kinds: list[tuple[int, ...]] = [(top_k,), (0,), (top_k, 0)] if top_k else [(0,)]
    most_alone = min(_MOST_ALONE, max_rows * sharing.alone)
    counts = [0, *(1 << n for n in range(most_alone.bit_length())), most_alone]
    shapes = {
        (rows, alone)
        for rows, alone in product((0, *_CHUNKS), counts)
        if rows + alone and (rows in (0, _BESIDE) or alone in (0, 1))
    }
    for context in contexts:
        for (rows, alone), kind in product(sorted(shapes), kinds):
            if len(kind) > 1 and (alone == 1 or rows > _BESIDE):
                continue
            if max(rows, 1) > context or min(alone, sharing.alone) > context:
                continue
            batch = _batch(rows, alone, context, kind, sharing)
            inputs = row_inputs(batch, device, budget_bytes, sharing)
            inputs.rows.positions.fill_(-1)
            if inputs.dense is not None:
                inputs.dense.pages[..., 0] = -1
            zeros = torch.zeros_like(inputs.rows.request)
            yield replace(inputs, offsets=zeros, pages=zeros)


def contexts_of(longest: int) -> list[int]:
    """The longest one, powers of two below it, and what is just above these."""
    found, context = [longest], _LEAST_CONTEXT
    while context < longest:
        found += [one for one in (context, context + CONTEXT_STEP) if one < longest]
        context *= 2
    return found


def _batch(rows: int, alone: int, context: int, kinds: tuple[int, ...], sharing: Sharing) -> Batch:
    """Requests that end at `context`, of these kinds in turn (a top_k; 0: dense): a chunk of `rows` rows, and `alone` rows."""
    pages = (0,) * (-(-context // PAGE_SIZE))
    counts = [rows] if rows else []
    counts += [min(sharing.alone, alone - first) for first in range(0, alone, sharing.alone)]
    return build_batch(
        StepPlan(
            requests=tuple(
                ScheduledRequest(
                    request_id=str(number),
                    token_ids=(0,) * count,
                    start=context - count,
                    page_ids=pages,
                    index_top_k=kinds[number % len(kinds)] or None,
                    sample=None,
                )
                for number, count in enumerate(counts)
            )
        ),
        torch.device("cpu"),
    )
