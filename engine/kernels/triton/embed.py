"""The embedding of rows whose tokens the host knows, and of rows whose tokens only the device knows yet."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.kernel import block, kernel, warps


def embed(token_ids: Tensor, drawn: Tensor, table: Tensor) -> Tensor:
    """x_t = table[token_ids[t]], or table[drawn[-1 - token_ids[t]]] where token_ids[t] is negative.

    Args:
        token_ids: [T] integers
        drawn: [N] int64, tokens that a step before has drawn
        table: [V, E], rows contiguous

    Returns:
        [T, E] in the dtype of the table
    """
    rows, size = len(token_ids), table.shape[1]
    out = torch.empty(rows, size, dtype=table.dtype, device=table.device)
    if rows:
        width = block(size)
        _embed[(rows,)](token_ids, drawn, table, out, SIZE=size, BLOCK=width, num_warps=warps(width))
    return out


@kernel
def _embed(
    token_ids: tl.tensor, drawn: tl.tensor, table: tl.tensor, out: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr
) -> None:  # fmt: skip
    """A program a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    token = tl.load(token_ids + row).to(tl.int64)
    token = tl.where(token < 0, tl.load(drawn + tl.maximum(-1 - token, 0)), token)
    tl.store(out + row * SIZE + at, tl.load(table + token * SIZE + at, mask=inside), mask=inside)
