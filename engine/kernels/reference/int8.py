"""The definition of each operation on 8-bit index keys, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.memory.layouts import Int8KeyLayout


class ReferenceInt8:
    """The operations on 8-bit index keys, in float32. The formulas are in `engine.kernels.interface.int8`."""

    def store_index_keys(self, plane: Tensor, pages: Tensor, offsets: Tensor, keys: Tensor) -> None:
        """Quantise and store one key after the other."""
        layout = Int8KeyLayout(keys.shape[-1])
        for t in range(len(keys)):
            numbers, scale = _quantised(keys[t])
            layout.write(plane, pages[t : t + 1], offsets[t : t + 1], numbers.unsqueeze(0), scale.view(1))

    def index_scores_int8(
        self, query: Tensor, head_weights: Tensor, key_plane: Tensor, block_table: Tensor, positions: Tensor
    ) -> Tensor:
        """Dequantise queries and keys, then compute `index_scores`."""
        requests, rows, heads, dim = query.shape
        context = block_table.shape[1] * key_plane.shape[1]
        scores = torch.full((requests, rows, context), -math.inf, device=query.device)
        for r in range(requests):
            numbers, scales = Int8KeyLayout(dim).read(key_plane, block_table[r])
            keys = (numbers * scales.unsqueeze(-1)).flatten(0, 1)  # [C, d]
            for q in range(rows):
                visible = keys[: int(positions[r, q]) + 1]
                for h in range(heads):
                    own, scale = _quantised(query[r, q, h])
                    term = head_weights[r, q, h] * torch.relu(visible @ (own * scale))
                    scores[r, q, : len(visible)] = term + (scores[r, q, : len(visible)] if h else 0.0)
        return scores


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise one vector: [d] -> integers [d] and scale [], both float32."""
    wide = x.float()
    scale = wide.abs().max() / 127
    return (torch.zeros_like(wide) if scale == 0 else (wide / scale).round()), scale
