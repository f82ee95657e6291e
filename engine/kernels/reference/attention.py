"""The definition of each operation, row by row in plain torch. It is slow, but easy to read: tests compare with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.kernels.interface.composed import Composed
from engine.kernels.reference.fp8 import ReferenceFp8
from engine.kernels.reference.int8 import ReferenceInt8
from engine.kernels.reference.latent import ReferenceLatent


class ReferenceKernels(ReferenceFp8, ReferenceInt8, ReferenceLatent, Composed):
    """The backend `reference`. The formulas are in `engine.kernels.interface`."""

    name = "reference"
    integer_keys = False
    fused = False

    def computed_by(self, operation: str, dtype: torch.dtype) -> str:
        return "the reference"

    def streams_latents(self, latent: torch.dtype, index: torch.dtype) -> bool:
        return False

    def index_scores(
        self, query: Tensor, head_weights: Tensor, key_plane: Tensor, block_table: Tensor, positions: Tensor
    ) -> Tensor:
        """Score one position at a time."""
        requests, rows = positions.shape
        page_size = key_plane.shape[1]
        context = block_table.shape[1] * page_size
        scores = torch.full((requests, rows, context), -math.inf, device=query.device)
        for r in range(requests):
            keys = _context(key_plane, block_table[r]).float()  # [C, d]
            for q in range(rows):
                visible = keys[: int(positions[r, q]) + 1]
                per_head = torch.relu(query[r, q].float() @ visible.T)  # [H, c]
                scores[r, q, : visible.shape[0]] = head_weights[r, q].float() @ per_head
        return scores

    def select(self, scores: Tensor, index_top_k: Tensor) -> Tensor:
        """Sort each row by (score, position), best and latest first."""
        requests, rows, context = scores.shape
        width = min(int(index_top_k.max()), context)
        selected = torch.full((requests, rows, width), -1, dtype=torch.int64, device=scores.device)
        for r in range(requests):
            for q in range(rows):
                row: list[float] = scores[r, q].tolist()
                order = sorted((c for c in range(context) if row[c] > -math.inf), key=lambda c: (-row[c], -c))
                best = order[: int(index_top_k[r, q])]
                selected[r, q, : len(best)] = torch.tensor(best, dtype=torch.int64)
        return selected

    def attend_selected(
        self, query: Tensor, kv_plane: Tensor, block_table: Tensor, selected: Tensor, scale: float
    ) -> Tensor:
        """Softmax over the selected positions of one row at a time."""
        out = torch.empty_like(query)
        for r in range(query.shape[0]):
            kv = _context(kv_plane, block_table[r]).float()  # [C, Hkv, 2, D]
            for q in range(query.shape[1]):
                chosen = selected[r, q][selected[r, q] >= 0]
                out[r, q] = _attend_row(query[r, q], kv[chosen], scale)
        return out

    def attend_masked(
        self, query: Tensor, kv_plane: Tensor, block_table: Tensor, allowed: Tensor, scale: float
    ) -> Tensor:
        """Softmax over the allowed positions of one row at a time."""
        out = torch.empty_like(query)
        for r in range(query.shape[0]):
            kv = _context(kv_plane, block_table[r]).float()
            for q in range(query.shape[1]):
                out[r, q] = _attend_row(query[r, q], kv[allowed[r, q]], scale)
        return out


def _context(plane: Tensor, pages: Tensor) -> Tensor:
    """Return one request's cached tokens in order: pages [P] of [num_pages, S, ...] -> [C, ...]."""
    return plane[pages].flatten(0, 1)


def _attend_row(query: Tensor, kv: Tensor, scale: float) -> Tensor:
    """Attend with one query row [Hkv, G, D] over keys and values [n, Hkv, 2, D], in float32."""
    keys, values = kv[:, :, 0], kv[:, :, 1]  # [n, Hkv, D]
    scores = torch.einsum("hgd,nhd->hgn", query.float(), keys) * scale
    return torch.einsum("hgn,nhd->hgd", scores.softmax(-1), values).to(query.dtype)
