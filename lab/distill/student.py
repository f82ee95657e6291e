"""The indexers of all layers as trainable parameters, with their keys, scores and selection on a whole sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from engine.attention.indexer import IndexerWeights, IndexQueries, LightningIndexer
from engine.checkpoint.overlay import indexer_shapes
from engine.layers.rope import RotaryTable
from engine.models.gqa.config import GqaConfig
from engine.models.gqa.trunk import LayerInputs
from engine.protocol import IndexerInfo
from lab.distill.objective import index_logits, top_mask

_PARTS = ("wq.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")


class Student:
    """One indexer for each layer. Parameters are float32 and have the names that they have in an overlay."""

    def __init__(
        self, config: GqaConfig, info: IndexerInfo, max_positions: int, device: torch.device, seed: int
    ) -> None:
        self.info = info
        self._rotary = RotaryTable(
            info.rope_dim, config.rope_theta, max_positions, scaling=config.rope_scaling, device=device
        )
        generator = torch.Generator().manual_seed(seed)
        self.parameters: dict[str, Tensor] = {}
        for name, shape in indexer_shapes(info, config.num_layers, config.hidden_size).items():
            tensor = _initial(name, shape, generator).to(device)
            self.parameters[name] = tensor.requires_grad_()
        self._layers = [self._indexer(i) for i in range(config.num_layers)]

    def _indexer(self, layer: int) -> LightningIndexer:
        at = f"model.layers.{layer}.self_attn.indexer."
        wq, wk, norm_weight, norm_bias, weights_proj = (self.parameters[at + part] for part in _PARTS)
        weights = IndexerWeights(
            wq=wq, wk=wk, k_norm_weight=norm_weight, k_norm_bias=norm_bias, weights_proj=weights_proj
        )
        return LightningIndexer(weights, self.info.num_heads)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy parameters from tensors with the same names and shapes."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def keys(self, layer: int, inputs: LayerInputs) -> Tensor:
        """Compute the index keys of the whole sequence: [T, d]."""
        positions = torch.arange(inputs.hidden.shape[0], device=inputs.hidden.device)
        # The input is detached: the indexer's loss does not train the main model (arXiv 2512.02556, section 2.1).
        return self._layers[layer].keys(inputs.hidden.detach().float(), self._rotary.at(positions))

    def queries(self, layer: int, inputs: LayerInputs, rows: Tensor) -> IndexQueries:
        """Compute the index queries of the rows [n]."""
        return self._layers[layer].queries(inputs.hidden[rows].detach().float(), self._rotary.at(rows))

    def scores(self, layer: int, inputs: LayerInputs, rows: Tensor) -> Tensor:
        """Compute the index scores of the rows [n] over the sequence, unmasked: [n, T]."""
        queries = self.queries(layer, inputs, rows)
        return index_logits(queries.query, queries.head_weights, self.keys(layer, inputs))

    @torch.no_grad()
    def selection(
        self, layer: int, inputs: LayerInputs, rows: Tensor, keys: Tensor, index_top_k: int
    ) -> Tensor:
        """Select positions for each row: [n, T] bool. `keys` are those of the whole sequence."""
        queries = self.queries(layer, inputs, rows)
        scores = index_logits(queries.query, queries.head_weights, keys)
        return top_mask(scores, inputs.visible(rows), index_top_k)


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith("k_norm.weight"):
        return torch.ones(shape)
    if name.endswith("k_norm.bias"):
        return torch.zeros(shape)
    return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
