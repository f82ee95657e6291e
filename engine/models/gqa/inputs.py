"""What a step over rows reads, on the device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.kernels.triton.rows import Blocks, Rows


@dataclass(frozen=True)
class Piece:
    """Rows that are scored together, so that their scores fit the budget."""

    first: int
    rows: Rows
    blocks: Blocks | None


@dataclass(frozen=True)
class RowInputs:
    """A step's rows on the device."""

    token_ids: Tensor  # [T] integers
    pages: Tensor  # [T] integers: where each row's cache entry goes
    offsets: Tensor  # [T] integers
    rows: Rows
    max_context: int  # no row's position reaches it
    top_k: int  # no row selects more; 0: no row has a selection
    blocks: Blocks | None  # of attention; None: every row is a decode
    pieces: tuple[Piece, ...]
