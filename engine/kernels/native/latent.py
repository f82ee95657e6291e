"""Latent attention and bfloat16 index scores in C (`native/latent.c`), for processors that multiply bfloat16.

torch does what the C code does not: other dtypes than bfloat16, latents in another layout, odd sizes.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from engine.kernels import native
from engine.kernels.interface.latent import Unpack, as_stored
from engine.kernels.torchops.attention import VectorisedKernels

_LANES = 16
_ROWS = 64  # rows of a group in the expanded form
_PAGES = 8  # pages expanded at once: keys and values take 32 MiB at 128 heads of 128 + 128 numbers


class NativeLatent(VectorisedKernels):
    """The formulas are in `engine.kernels.interface.attention` and `engine.kernels.interface.latent`."""

    def streams_latents(self, latent: torch.dtype, index: torch.dtype) -> bool:
        """True if the C code can read both dtypes."""
        return latent is index is torch.bfloat16 and _multiplies_bfloat16()

    def index_scores(
        self, query: Tensor, head_weights: Tensor, key_plane: Tensor, block_table: Tensor, positions: Tensor
    ) -> Tensor:
        """Read keys where they lie. Products of bfloat16 numbers are exact, and sums are in float32."""
        requests, rows, heads, dim = query.shape
        if not (_plain(query, key_plane) and dim % 2 == 0):
            return super().index_scores(query, head_weights, key_plane, block_table, positions)
        query, weights = query.contiguous(), head_weights.float().contiguous()
        tables, at = block_table.contiguous(), positions.contiguous()
        out = query.new_empty(requests, rows, block_table.shape[1] * key_plane.shape[1], dtype=torch.float32)
        _call(
            "dsa_latent_index_scores", query, weights, key_plane, _long(key_plane.stride(0)), tables,
            _long(tables.shape[1]), at, _long(requests * rows), _long(rows), heads, dim, out,
        )  # fmt: skip
        return out

    def latent_selected(
        self, query: Tensor, plane: Tensor, block_table: Tensor, selected: Tensor, rank: int, scale: float,
        unpack: Unpack = as_stored,
    ) -> Tensor:  # fmt: skip
        """Read tokens where they lie."""
        if not _fits(query, plane, rank, unpack):
            return super().latent_selected(query, plane, block_table, selected, rank, scale, unpack)
        return _attend(query, plane, block_table, selected, None, rank, scale)

    def latent_masked(
        self, query: Tensor, plane: Tensor, block_table: Tensor, allowed: Tensor, rank: int, scale: float,
        unpack: Unpack = as_stored,
    ) -> Tensor:  # fmt: skip
        """Read only the tokens that a row may see, where they lie."""
        if not _fits(query, plane, rank, unpack):
            return super().latent_masked(query, plane, block_table, allowed, rank, scale, unpack)
        return _attend(query, plane, block_table, None, allowed, rank, scale)

    def latent_expanded(
        self, query: Tensor, plane: Tensor, block_table: Tensor, allowed: Tensor, expand: Tensor, rank: int,
        scale: float, unpack: Unpack = as_stored,
    ) -> Tensor:  # fmt: skip
        """Expand some hundred tokens at a time, and add each part to a running softmax."""
        if not (_fits(query, plane, rank, unpack) and _expandable(query, plane, expand, rank)):
            return super().latent_expanded(query, plane, block_table, allowed, expand, rank, scale, unpack)
        return torch.stack(
            [
                _expanded(query[r], plane, block_table[r], allowed[r], expand, rank, scale)
                for r in range(len(query))
            ]
        )


def _expanded(
    query: Tensor, plane: Tensor, table: Tensor, allowed: Tensor, expand: Tensor, rank: int, scale: float
) -> Tensor:
    """Attend for one request in the expanded form: query [Q, H, n + p], allowed [Q, C] -> [Q, H, v]."""
    rows, heads, dim = query.shape
    rope = plane.shape[-1] - rank
    plain, groups = dim - rope, -(-rows // _ROWS)
    value = expand.shape[1] - plain
    padded = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, groups * _ROWS - rows)).view(torch.int32)
    packed = padded.view(groups, _ROWS, heads, dim // 2).permute(2, 0, 3, 1).contiguous()
    most = torch.full((heads, groups, _ROWS), -1e30)
    total = torch.zeros(heads, groups, _ROWS)
    out = torch.zeros(heads, groups, value, _ROWS)
    weight, bits = expand.reshape(-1, rank), 1 << torch.arange(_ROWS)
    for first in range(0, len(table), _PAGES):
        tokens = plane[table[first : first + _PAGES]].flatten(0, 1)  # [c, r + p]
        part = allowed[:, first * plane.shape[1] :][:, : len(tokens)]
        if not bool(part.any()):
            continue
        made = torch.nn.functional.linear(tokens[:, :rank], weight)  # [c, H * (n + v)]
        part = torch.nn.functional.pad(part, (0, 0, 0, groups * _ROWS - rows)).view(groups, _ROWS, -1)
        seen = (part * bits.unsqueeze(1)).sum(1)  # [groups, c], a bit for each row
        _call(
            "dsa_latent_expanded", packed, tokens, made, seen, heads, groups, len(tokens), plane.shape[-1], rank,
            plain, rope, value, ctypes.c_float(scale), most, total, out,
        )  # fmt: skip
    done = (out / total.unsqueeze(2)).permute(1, 3, 0, 2)  # [groups, 64, H, v]
    return done.reshape(groups * _ROWS, heads, value)[:rows].to(query.dtype)


def _expandable(query: Tensor, plane: Tensor, expand: Tensor, rank: int) -> bool:
    rope = plane.shape[-1] - rank
    value = expand.shape[1] - (query.shape[-1] - rope)
    return expand.dtype is torch.bfloat16 and rope % 2 == 0 and value % _LANES == 0


def _attend(
    query: Tensor, plane: Tensor, tables: Tensor, selected: Tensor | None, allowed: Tensor | None, rank: int, scale: float
) -> Tensor:  # fmt: skip
    requests, rows, heads, dim = query.shape
    query, tables = query.contiguous(), tables.contiguous()
    chosen = None if selected is None else selected.contiguous()
    seen = None if allowed is None else allowed.contiguous()
    width = 0 if chosen is None else chosen.shape[-1]
    width = width if seen is None else seen.shape[-1]
    out = query.new_empty(requests, rows, heads, rank)
    _call(
        "dsa_latent_attend", query, plane, _long(plane.stride(0)), tables, _long(tables.shape[1]), chosen, seen,
        _long(width), _long(requests * rows), _long(rows), heads, dim, rank, ctypes.c_float(scale), out,
    )  # fmt: skip
    return out


@cache
def _multiplies_bfloat16() -> bool:
    library = native.library()
    return library is not None and bool(library.dsa_latent_ready())


def _plain(query: Tensor, plane: Tensor) -> bool:
    """Whether both are bfloat16 on the CPU, contiguous within a token and a page, with aligned pairs."""
    return (
        _multiplies_bfloat16()
        and query.dtype is plane.dtype is torch.bfloat16
        and query.device.type == plane.device.type == "cpu"
        and plane.stride()[1:] == (plane.shape[2], 1)
        and plane.stride(0) % 2 == 0
        and plane.data_ptr() % 4 == 0
    )


def _fits(query: Tensor, plane: Tensor, rank: int, unpack: Unpack) -> bool:
    return unpack is as_stored and _plain(query, plane) and query.shape[-1] % 2 == 0 and rank % _LANES == 0


_long = ctypes.c_int64


def _call(name: str, *arguments: Tensor | int | ctypes.c_int64 | ctypes.c_float | None) -> None:
    library = native.library()
    assert library is not None, "`_plain` says whether there is one"
    getattr(library, name)(
        *(ctypes.c_void_p(one.data_ptr()) if isinstance(one, Tensor) else one for one in arguments)
    )
