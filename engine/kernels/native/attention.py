"""Grouped-query attention and 8-bit index scores in C (`native/tiles.c`), for bfloat16 caches on the CPU.

torch does what the C code does not: other dtypes than bfloat16, and planes whose pages do not lie in one piece.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Final

import torch
from torch import Tensor

from engine.kernels import native
from engine.kernels.torchops.attention import VectorisedKernels


class _Tile(ctypes.Structure):
    """`struct dsa_tile` of tiles.h."""

    _fields_ = (
        ("requests", c_int64), ("rows", c_int64), ("pages", c_int64),
        ("block_table", c_void_p), ("positions", c_void_p),
    )  # fmt: skip


_SIGNATURES: Final = {
    "dsa_index_keys_write": (c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int, c_int),
    "dsa_index_scores": (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int, c_void_p),
    "dsa_select": (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "dsa_attend_selected": (
        c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int, c_int, c_int, c_float, c_void_p,
    ),
    "dsa_attend_dense": (
        c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int, c_int, c_int, c_float, c_void_p,
    ),
    "dsa_attend_sparse": (
        c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p,
        c_int, c_int, c_int, c_int, c_int, c_float, c_void_p, c_void_p,
    ),
}  # fmt: skip


class NativeAttention(VectorisedKernels):
    """The formulas are in `engine.kernels.interface.attention` and `engine.kernels.interface.int8`."""

    integer_keys = True
    fused = True

    def store_index_keys(self, plane: Tensor, pages: Tensor, offsets: Tensor, keys: Tensor) -> None:
        if not _bfloat16(keys) or not _in_pages(plane):
            return super().store_index_keys(plane, pages, offsets, keys)
        keys, pages, offsets = keys.contiguous(), pages.contiguous(), offsets.contiguous()
        _c().dsa_index_keys_write(
            plane.data_ptr(),
            _stride(plane),
            pages.data_ptr(),
            offsets.data_ptr(),
            keys.data_ptr(),
            *keys.shape,
        )
        return None

    def index_scores_int8(
        self, query: Tensor, head_weights: Tensor, key_plane: Tensor, block_table: Tensor, positions: Tensor
    ) -> Tensor:
        """Score a block of rows at a time."""
        if not _bfloat16(query) or not _in_pages(key_plane):
            return super().index_scores_int8(query, head_weights, key_plane, block_table, positions)
        query, head_weights = query.contiguous(), head_weights.float().contiguous()
        tile, kept = _tile(block_table, positions)
        scores = torch.empty(*positions.shape, block_table.shape[1] * key_plane.shape[1])
        _c().dsa_index_scores(
            ctypes.byref(tile), query.data_ptr(), head_weights.data_ptr(), key_plane.data_ptr(), _stride(key_plane),
            *query.shape[2:], scores.data_ptr(),
        )  # fmt: skip
        del kept
        return scores

    def select(self, scores: Tensor, index_top_k: Tensor) -> Tensor:
        """Find the worst selected score by bisection over the bits of the scores."""
        if scores.dtype is not torch.float32 or scores.device.type != "cpu":
            return super().select(scores, index_top_k)
        scores, index_top_k = scores.contiguous(), index_top_k.contiguous()
        context = scores.shape[-1]
        width = min(int(index_top_k.max()), context)
        selected = torch.empty(*index_top_k.shape, width, dtype=torch.int64)
        _c().dsa_select(
            scores.data_ptr(),
            index_top_k.data_ptr(),
            index_top_k.numel(),
            context,
            width,
            selected.data_ptr(),
        )
        return selected

    def attend_selected(
        self, query: Tensor, kv_plane: Tensor, block_table: Tensor, selected: Tensor, scale: float
    ) -> Tensor:
        """Each row reads its tokens where they lie."""
        if not _bfloat16(query, kv_plane) or not _in_pages(kv_plane):
            return super().attend_selected(query, kv_plane, block_table, selected, scale)
        query, selected = query.contiguous(), selected.contiguous()
        tile, kept = _tile(block_table, selected[..., 0])
        out = torch.empty_like(query)
        _c().dsa_attend_selected(
            ctypes.byref(tile), query.data_ptr(), kv_plane.data_ptr(), _stride(kv_plane), selected.data_ptr(),
            selected.shape[-1], *query.shape[2:], scale, out.data_ptr(),
        )  # fmt: skip
        del kept
        return out

    def attend_masked(
        self, query: Tensor, kv_plane: Tensor, block_table: Tensor, allowed: Tensor, scale: float
    ) -> Tensor:
        if not _bfloat16(query, kv_plane) or not _in_pages(kv_plane):
            return super().attend_masked(query, kv_plane, block_table, allowed, scale)
        return self._dense(query, kv_plane, block_table, None, allowed.contiguous(), scale)

    def attend_causal(
        self, query: Tensor, kv_plane: Tensor, block_table: Tensor, positions: Tensor, scale: float
    ) -> Tensor:
        """Attend with blocks of rows over pages, with a running maximum. Tokens after all rows are not read."""
        if not _bfloat16(query, kv_plane) or not _in_pages(kv_plane):
            return super().attend_causal(query, kv_plane, block_table, positions, scale)
        return self._dense(query, kv_plane, block_table, positions, None, scale)

    def _dense(
        self, query: Tensor, kv_plane: Tensor, block_table: Tensor, positions: Tensor | None, allowed: Tensor | None,
        scale: float,
    ) -> Tensor:  # fmt: skip
        query = query.contiguous()
        if positions is None:
            positions = torch.zeros(query.shape[:2], dtype=torch.int64)
        tile, kept = _tile(block_table, positions)
        out = torch.empty_like(query)
        _c().dsa_attend_dense(
            ctypes.byref(tile), query.data_ptr(), kv_plane.data_ptr(), _stride(kv_plane),
            None if allowed is None else allowed.data_ptr(), *query.shape[2:], scale, out.data_ptr(),
        )  # fmt: skip
        del kept
        return out

    def attend_sparse(
        self, query: Tensor, index_query: Tensor, head_weights: Tensor, kv_plane: Tensor, key_plane: Tensor,
        block_table: Tensor, positions: Tensor, index_top_k: Tensor, scale: float, flaws: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Score, select and attend with a block of rows at a time, if the index keys are 8-bit integers."""
        known = _bfloat16(query, kv_plane, index_query) and key_plane.dtype is torch.uint8
        if not known or not _in_pages(kv_plane) or not _in_pages(key_plane):
            return super().attend_sparse(
                query,
                index_query,
                head_weights,
                kv_plane,
                key_plane,
                block_table,
                positions,
                index_top_k,
                scale,
                flaws,
            )
        query, index_query, index_top_k = (
            query.contiguous(),
            index_query.contiguous(),
            index_top_k.contiguous(),
        )
        head_weights = head_weights.float().contiguous()
        tile, kept = _tile(block_table, positions)
        out = torch.empty_like(query)
        _c().dsa_attend_sparse(
            ctypes.byref(tile), query.data_ptr(), index_query.data_ptr(), head_weights.data_ptr(),
            kv_plane.data_ptr(), _stride(kv_plane), key_plane.data_ptr(), _stride(key_plane), index_top_k.data_ptr(),
            *index_query.shape[2:], *query.shape[2:], scale, out.data_ptr(),
            None if flaws is None else flaws.data_ptr(),
        )  # fmt: skip
        del kept
        return out


@cache
def _c() -> ctypes.CDLL:
    """Return the library, with the signatures of the functions that this module calls."""
    library = native.library()
    assert library is not None, "`NativeKernels` says so where there is none"
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def _bfloat16(*tensors: Tensor) -> bool:
    return all(tensor.dtype is torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)


def _in_pages(plane: Tensor) -> bool:
    """Whether the C code can read a plane: its pages have 64 tokens, and each page lies in one piece."""
    return plane.shape[1] == 64 and plane[0].is_contiguous()


def _stride(plane: Tensor) -> int:
    """Bytes from the start of a page to the start of the next."""
    return plane.stride(0) * plane.element_size()


def _tile(block_table: Tensor, positions: Tensor) -> tuple[_Tile, tuple[Tensor, Tensor]]:
    """Return the tile for C, and the tensors that it points to, which must outlive the call."""
    block_table, positions = block_table.contiguous(), positions.contiguous()
    tile = _Tile(*positions.shape, block_table.shape[1], block_table.data_ptr(), positions.data_ptr())
    return tile, (block_table, positions)
