"""What a batch is here: flat rows, each with its own end, page table and number of selected positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.errors import EngineError


@dataclass(frozen=True)
class Rows:
    """T query rows of any mix of prompt chunks and decodes, dense and sparse.

    Shapes are static, so a captured graph can be replayed after these tensors are written anew. R requests, P pages each.

    Attributes:
        request: [T] int32, a row's request: its line of `block_table`
        positions: [T] int32, a row's own position, the last that it sees; negative in a row that only fills a bucket,
            which reads nothing and whose output is 0
        index_top_k: [T] int32, how many positions are selected for a row; 0 is a dense row, which attends to all;
            `engine.plan.sparsity.row_index_top_k` says it
        block_table: [R, P] int32, a request's position c lies in page block_table[r, c // 64]; padded with page 0
    """

    request: Tensor
    positions: Tensor
    index_top_k: Tensor
    block_table: Tensor

    def __post_init__(self) -> None:
        vectors = (self.request, self.positions, self.index_top_k)
        if any(one.shape != self.request.shape or one.dim() != 1 for one in vectors):
            raise EngineError(f"rows disagree about their number: {[tuple(one.shape) for one in vectors]}")
        if any(one.dtype != torch.int32 for one in (*vectors, self.block_table)):
            raise EngineError("rows are int32")

    def __len__(self) -> int:
        return len(self.request)


class Span(NamedTuple):
    """Rows of one request that follow one another in the batch, at consecutive positions: a chunk of its prompt."""

    first_row: int
    rows: int
    first_position: int


@dataclass(frozen=True)
class Blocks:
    """A batch's rows as blocks that share what they read, and the rows that are in none.

    Attributes:
        table: [N, 2] int32, a block's first row and its number of rows: rows of one request at consecutive positions
        singles: [M] int32, the rows in no block, decodes
        size: the most rows that a block has
    """

    table: Tensor
    singles: Tensor
    size: int


def cut(spans: Sequence[Span], size: int, align: int = 1 << 13) -> list[tuple[int, int]]:
    """Spans as blocks of at most `size` rows: each one's first row, and how many it has.

    No block crosses a position that is a multiple of `align`, so that all of its rows have the same splits (see
    `engine.kernels.triton.attention`).
    """
    table: list[tuple[int, int]] = []
    for first_row, count, first_position in spans:
        row, position, left = first_row, first_position, count
        while left:
            taken = min(left, size, align - position % align)
            table.append((row, taken))
            row, position, left = row + taken, position + taken, left - taken
    return table


def blocks_of(
    spans: Sequence[Span], rows: int, size: int, device: torch.device, align: int = 1 << 13
) -> Blocks:
    """The blocks of a batch, on the device.

    Args:
        spans: chunks of prompts, apart from one another; rows in none of them are decodes
        rows: T
        size: the most rows a block
        device: where the tensors go
        align: see `cut`
    """
    table = cut(spans, size, align)
    single = [True] * rows
    for first_row, count, _ in spans:
        single[first_row : first_row + count] = [False] * count
    singles = [row for row, alone in enumerate(single) if alone]
    return Blocks(
        torch.tensor(table, dtype=torch.int32).view(-1, 2).to(device, non_blocking=True),
        torch.tensor(singles, dtype=torch.int32).to(device, non_blocking=True),
        size,
    )
