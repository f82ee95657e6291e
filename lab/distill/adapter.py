"""The sparse adapters of all layers as trainable parameters.

An adapter corrects the main model on sparse rows, so that the model can work with the selected tokens only.
Dense rows run the model without it. arXiv 2512.02556 (section 2.1) trains all weights for this. A low-rank
correction to attention's projections keeps the overlay small and leaves dense attention as it was.
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
    """The parameters, in float32, with the names that they have in an overlay. At first they correct nothing.

    Args:
        config: the main model's
        rank: the rank of each correction
        device: where the parameters are
        seed: decides the initial parameters
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
        """Copy parameters from tensors with the same names and shapes."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def of(self, layer: int, dtype: torch.dtype) -> tuple[LowRank, LowRank]:
        """Return a layer's two corrections in `dtype`, with gradient: to the q, k and v projections, and to o."""
        at = f"model.layers.{layer}.self_attn.sparse_adapter."
        qkv, o = (
            LowRank(*(self.parameters[f"{at}{part}.{side}"].to(dtype) for side in "ab"))
            for part in ("qkv", "o")
        )
        return qkv, o
