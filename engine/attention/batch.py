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
from engine.plan.sparsity import row_index_top_k
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
    flaws: Tensor  # [T] int32: layers add what is wrong with the row's selection, see `engine.kernels.interface.selection`
    segments: tuple[Segment, ...]  # [R]: the rows of each request as Python integers

    @cached_property
    def selecting(self) -> Tensor | None:
        """[T, 1] bool: True for rows that read a selection. None if no row does."""
        if all(segment.dense_rows == segment.num_rows for segment in self.segments):
            return None
        return (self.index_top_k > 0).unsqueeze(1)


class PageTables:
    """The pages of requests as arrays, kept from step to step: most steps of a request have the tuple of the last one."""

    def __init__(self) -> None:
        self._old: dict[int, tuple[tuple[int, ...], NDArray[np.int64]]] = {}
        self._new: dict[int, tuple[tuple[int, ...], NDArray[np.int64]]] = {}

    def of(self, page_ids: tuple[int, ...]) -> NDArray[np.int64]:
        """[P]. A tuple that is kept here is alive, so no other tuple has its identity."""
        known = self._new.get(id(page_ids)) or self._old.get(id(page_ids))
        if known is None:
            known = page_ids, np.array(page_ids, dtype=np.int64)
        self._new[id(page_ids)] = known
        return known[1]

    def turn(self) -> None:
        """End a step: what it did not ask for is forgotten."""
        self._old, self._new = self._new, {}


def build_batch(plan: StepPlan, device: torch.device, tables: PageTables | None = None) -> Batch:
    """Make the batch of `plan`, in the order of its requests.

    Args:
        plan: the step
        device: of the batch's tensors
        tables: keeps page tables from step to step

    Raises:
        IndexError: a request's page table does not cover its rows.
    """
    segments: list[Segment] = []
    first = width = 0
    for request in plan.requests:
        count, pages = len(request.token_ids), request.page_ids
        segments.append(Segment(first, count, request.start, pages, request.index_top_k))
        first += count
        width = max(width, len(pages))
    block_table = np.zeros((len(segments), width), dtype=np.int64)
    for line, segment in zip(block_table, segments, strict=True):
        if tables is None:
            line[: len(segment.page_ids)] = segment.page_ids
        else:
            own = tables.of(segment.page_ids)
            line[: len(own)] = own
    if first == len(segments):  # decodes alone
        token_ids = np.array([request.token_ids[0] for request in plan.requests], dtype=np.int64)
        positions = np.array([segment.start for segment in segments], dtype=np.int64)
        request_of = np.arange(first, dtype=np.int32)
        page_of = block_table[request_of, positions // PAGE_SIZE]
        index_top_k = np.array(
            [row_index_top_k(s.start + 1, s.index_top_k) for s in segments], dtype=np.int64
        )
    else:
        token_ids, positions, page_of = (np.empty(first, dtype=np.int64) for _ in range(3))
        request_of, index_top_k = np.empty(first, dtype=np.int32), np.zeros(first, dtype=np.int64)
        for number, (request, segment) in enumerate(zip(plan.requests, segments, strict=True)):
            at, end = segment.first_row, segment.first_row + segment.num_rows
            token_ids[at:end] = request.token_ids
            request_of[at:end] = number
            index_top_k[at + segment.dense_rows : end] = segment.index_top_k or 0
            own = np.arange(segment.start, segment.start + segment.num_rows)
            positions[at:end] = own
            page_of[at:end] = block_table[number][own // PAGE_SIZE]
    return Batch(
        token_ids=to_device(token_ids, device),
        positions=to_device(positions, device),
        pages=to_device(page_of, device),
        offsets=to_device(positions % PAGE_SIZE, device),
        request=to_device(request_of, device),
        index_top_k=to_device(index_top_k, device),
        block_table=to_device(block_table, device),
        flaws=torch.zeros(first, dtype=torch.int32, device=device),
        segments=tuple(segments),
    )


def to_device(numbers: NDArray[np.int32] | NDArray[np.int64], device: torch.device) -> Tensor:
    """Return `numbers` as a tensor; on the CPU it shares their memory. `torch.tensor` of a list costs much more."""
    return torch.from_numpy(numbers).to(device)
