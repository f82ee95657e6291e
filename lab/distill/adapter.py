"""The sparse adapters of all layers as trainable parameters.

They correct the main model on the rows that read a selection, so that it gets on with less than all; dense
rows run the model as it was. arXiv 2512.02556 (section 2.1) trains all weights for that; a correction of low
rank to attention's projections keeps the overlay small and dense attention untouched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from engine.checkpoint.overlay import adapter_shapes
from engine.layers.low_rank import LowRank
from engine.models.gqa.config import GqaConfig


class Adapter:
    """Parameters are float32 and named as in an overlay; at first they change nothing.

    Args:
        config: of the main model
        rank: of each correction
        device: of the parameters
        seed: of what they start as
    """

    def __init__(self, config: GqaConfig, rank: int, device: torch.device, seed: int) -> None:
        self.rank = rank
        self.num_layers = config.num_layers
        generator = torch.Generator().manual_seed(seed)
        self.parameters: dict[str, Tensor] = {}
        sizes = (config.num_heads, config.num_kv_heads, config.head_dim)
        for name, shape in adapter_shapes(rank, config.num_layers, config.hidden_size, *sizes).items():
            first = name.endswith(".a")
            tensor = (
                torch.randn(shape, generator=generator) / math.sqrt(shape[1]) if first else torch.zeros(shape)
            )
            self.parameters[name] = tensor.to(device).requires_grad_()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over parameters of the same names and shapes."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def of(self, layer: int, dtype: torch.dtype) -> tuple[LowRank, LowRank]:
        """One layer's corrections, in the model's dtype, with gradient: to the queries, keys and values, and to o."""
        at = f"model.layers.{layer}.self_attn.sparse_adapter."
        qkv, o = (
            LowRank(*(self.parameters[f"{at}{part}.{side}"].to(dtype) for side in "ab"))
            for part in ("qkv", "o")
        )
        return qkv, o
