"""A step plan as tensors: one flat batch of T rows of R requests, built once and read by every layer.

A row has its token, its place in the cache, its request and its sparsity; a request has its pages. Kernels that take
rows need nothing else. For kernels that take tiles, `engine.attention.tiling` cuts the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config import PAGE_SIZE
from engine.plan.tiles import Segment
from engine.plan.types import StepPlan


@dataclass(frozen=True)
class Batch:
    """T rows. The rows of one request are neighbours, in the order of their positions."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    pages: Tensor  # [T] int64: where each row's cache entry goes
    offsets: Tensor  # [T] int64
    request: Tensor  # [T] int32: the row's request, an index into `block_table`
    index_top_k: (
        Tensor  # [T] int64: how many tokens the row selects; 0: it is dense and reads its whole context
    )
    block_table: Tensor  # [R, P] int64: the pages of each request, padded with page 0
    segments: tuple[Segment, ...]  # [R]: the rows of each request as Python integers

    @cached_property
    def selecting(self) -> Tensor | None:
        """[T, 1] bool: True for rows that read a selection. None if no row does."""
        if all(segment.dense_rows == segment.num_rows for segment in self.segments):
            return None
        return (self.index_top_k > 0).unsqueeze(1)


def build_batch(plan: StepPlan, device: torch.device) -> Batch:
    """Make the batch of `plan`, in the order of its requests.

    Raises:
        IndexError: a request's page table does not cover its rows.
    """
    segments: list[Segment] = []
    first = width = 0
    for request in plan.requests:
        count = len(request.token_ids)
        segments.append(
            Segment(
                first_row=first,
                num_rows=count,
                start=request.start,
                page_ids=request.page_ids,
                index_top_k=request.index_top_k,
            )
        )
        first += count
        width = max(width, len(request.page_ids))
    token_ids, positions, pages = (np.empty(first, dtype=np.int64) for _ in range(3))
    request_of, index_top_k = np.empty(first, dtype=np.int32), np.zeros(first, dtype=np.int64)
    block_table = np.zeros((len(segments), width), dtype=np.int64)
    for number, (request, segment) in enumerate(zip(plan.requests, segments, strict=True)):
        at, end = segment.first_row, segment.first_row + segment.num_rows
        token_ids[at:end] = request.token_ids
        request_of[at:end] = number
        index_top_k[at + segment.dense_rows : end] = segment.index_top_k or 0
        table = block_table[number, : len(request.page_ids)]
        table[:] = request.page_ids
        if segment.num_rows == 1:
            positions[at] = segment.start
            pages[at] = request.page_ids[segment.start // PAGE_SIZE]
        else:
            own = np.arange(segment.start, segment.start + segment.num_rows)
            positions[at:end] = own
            pages[at:end] = table[own // PAGE_SIZE]
    return Batch(
        token_ids=to_device(token_ids, device),
        positions=to_device(positions, device),
        pages=to_device(pages, device),
        offsets=to_device(positions % PAGE_SIZE, device),
        request=to_device(request_of, device),
        index_top_k=to_device(index_top_k, device),
        block_table=to_device(block_table, device),
        segments=tuple(segments),
    )


def to_device(numbers: NDArray[np.int32] | NDArray[np.int64], device: torch.device) -> Tensor:
    """Return `numbers` as a tensor; on the CPU it shares their memory. `torch.tensor` of a list costs much more."""
    return torch.from_numpy(numbers).to(device)
