"""What `engine.kernels.triton.latent_expanded` computes in a step: which context is expanded where, and who reads it.

The dense rows of prompts attend in blocks of rows. Keys and values of all heads are made for some thousand tokens of
context at a time: a *round*. A round holds the context of several short prompts, or a part of a long one. The plan is
integers, made once a step on the host; every layer launches with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.config import PAGE_SIZE
from engine.errors import EngineError

STEP = 128
"""Positions that a block attends to at a time. Parts of a context are multiples of it, so that the steps of a row, and
so its bits, do not depend on the rounds."""
ROUND_TOKENS = 8192
"""Tokens of context whose keys and values are made at a time: 512 MiB of DeepSeek-V3.2's in bfloat16."""
_FIELDS = 5
_ALIGNED = 4  # blocks of a round: kernels are compiled anew for addresses that are not multiples of 16 bytes


class DenseChunk(NamedTuple):
    """Dense rows of one request that follow one another in the batch, at consecutive positions."""

    request: int  # its line of the block table
    first_row: int
    rows: int
    first_position: int


@dataclass(frozen=True)
class ExpandedPlan:
    """The rounds of a step, N blocks and W tokens each.

    Attributes:
        pages: [rounds, W / 64, 2] int32, the (request, number of its page) that is expanded there; request -1: none,
            and none follows
        blocks: [rounds, N, 5] int32: a block's first row, its number of rows, where position `begin` of its request lies
            among the tokens, `begin`, and the end of the positions that it reads in this round
        size: the most rows of a block, a power of two from 16
    """

    pages: Tensor
    blocks: Tensor
    size: int

    @property
    def rounds(self) -> int:
        """How many there are."""
        return self.pages.shape[0]

    @property
    def tokens(self) -> int:
        """W."""
        return self.pages.shape[1] * PAGE_SIZE

    def to(self, device: torch.device) -> ExpandedPlan:
        """The plan on a device, by one copy."""
        flat = torch.cat((self.pages.reshape(-1), self.blocks.reshape(-1))).to(device, non_blocking=True)
        pages, blocks = torch.split(flat, [self.pages.numel(), self.blocks.numel()])
        return ExpandedPlan(pages.view(self.pages.shape), blocks.view(self.blocks.shape), self.size)

    @classmethod
    def empty(cls, blocks: int, tokens: int, size: int, device: torch.device) -> ExpandedPlan:
        """A plan of one round in which nothing is done, for a graph: `fill` says what a replay does."""
        pages = torch.full((1, _whole(tokens) // PAGE_SIZE, 2), -1, dtype=torch.int32, device=device)
        return cls(pages, torch.zeros(1, blocks, _FIELDS, dtype=torch.int32, device=device), size)

    def holds(self, other: ExpandedPlan) -> bool:
        """Whether `fill` can take another plan."""
        return (
            other.rounds <= self.rounds == 1
            and other.size == self.size
            and other.pages.shape[1] <= self.pages.shape[1]
            and other.blocks.shape[1] <= self.blocks.shape[1]
        )

    def fill(self, other: ExpandedPlan) -> None:
        """Take over another plan, from the host.

        Raises:
            EngineError: it has more rounds, tokens or blocks than this one.
        """
        if not self.holds(other):
            raise EngineError(
                f"a plan of {other.rounds} rounds, {other.tokens} tokens and {other.blocks.shape[1]} blocks is more than "
                f"one of {self.tokens} tokens and {self.blocks.shape[1]} blocks holds"
            )
        pages, blocks = (
            torch.full(self.pages.shape, -1, dtype=torch.int32),
            torch.zeros(self.blocks.shape, dtype=torch.int32),
        )
        pages[: other.rounds, : other.pages.shape[1]] = other.pages
        blocks[: other.rounds, : other.blocks.shape[1]] = other.blocks
        self.pages.copy_(pages, non_blocking=True)
        self.blocks.copy_(blocks, non_blocking=True)


def plan_expanded(chunks: Sequence[DenseChunk], size: int = 128, tokens: int = ROUND_TOKENS) -> ExpandedPlan:
    """Plan the dense rows of a step's prompts, on the host.

    Args:
        chunks: of different requests, or apart from one another
        size: the most rows of a block (`engine.kernels.triton.latent_expanded.block_rows`)
        tokens: of a round at most; fewer are kept if all fit into fewer
    """
    room = _whole(tokens)
    pages: list[list[tuple[int, int]]] = []
    blocks: list[list[tuple[int, int, int, int, int]]] = []
    used = room
    for request, first_row, rows, first_position in chunks:
        context = first_position + rows
        begin = 0
        while begin < context:
            if used == room:
                pages.append([])
                blocks.append([])
                used = 0
            taken = min(room - used, _whole(context - begin))
            end, last_page = min(begin + taken, context), (context - 1) // PAGE_SIZE
            first_page = begin // PAGE_SIZE
            # Whole steps: behind the last page it is read again, which no row sees.
            pages[-1] += [(request, min(first_page + k, last_page)) for k in range(taken // PAGE_SIZE)]
            for row in range(0, rows, size):
                count = min(size, rows - row)
                stop = min(end, first_position + row + count)
                if begin < stop:
                    blocks[-1].append((first_row + row, count, used, begin, stop))
            used += taken
            begin += taken
    # Where a round has the most to do begins first.
    for one in blocks:
        one.sort(key=lambda block: block[3] - block[4])
    width, count = max(map(len, pages), default=0), max(map(len, blocks), default=0)
    count = -(-count // _ALIGNED) * _ALIGNED
    table = [one + [(-1, 0)] * (width - len(one)) for one in pages]
    lines = [one + [(0,) * _FIELDS] * (count - len(one)) for one in blocks]
    return ExpandedPlan(
        torch.tensor(table, dtype=torch.int32).view(len(pages), width, 2),
        torch.tensor(lines, dtype=torch.int32).view(len(pages), count, _FIELDS),
        size,
    )


def _whole(tokens: int) -> int:
    """Up to a multiple of `STEP`."""
    return -(-tokens // STEP) * STEP
