"""A model's step over flat rows: decodes, prompt chunks, dense and sparse rows in the same launches, in CUDA graphs.

`engine.models.mla.device_layer` computes a layer. Rows of short chunks (speculative decoding's, or the end of a prompt) are
attended as decodes are, in the absorbed form; dense rows of longer ones in the expanded form, where it is cheaper
(`engine.plan.tiles.LatentTileCosts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.triton import latent_expanded, scores
from engine.kernels.triton.embed import embed
from engine.kernels.triton.norm import add_rms_norm
from engine.layers.rope import RotaryTable
from engine.memory.blocks import BlockWeight
from engine.memory.planes import PagedCache
from engine.models.mla.config import MlaConfig
from engine.models.mla.device_layer import DeviceLayer, Residual, head_logits
from engine.models.mla.layer import MlaLayer
from engine.models.rows.inputs import RowInputs, Sharing
from engine.models.rows.step import RowsStep
from engine.plan.tiles import LatentTileCosts
from engine.protocol import IndexerInfo

MOST_ALONE = 64
"""Rows of a chunk that may be attended as decodes are: graphs have room for few more of these beside prompts."""
GRAPH_TOKENS = 8192
"""Tokens of context that dense rows of prompts may have together, each in the expanded form, in a graph."""


class LatentModel(Protocol):
    """What the step needs of a model."""

    config: MlaConfig
    embed: Tensor
    norm: Tensor
    layers: list[MlaLayer]
    rotary: RotaryTable
    max_positions: int
    indexer: IndexerInfo | None

    @property
    def head_weight(self) -> Tensor:
        """[vocab_size, E], of the logits."""
        ...


class LatentStep(RowsStep):
    """The device form of one model."""

    def __init__(self, model: LatentModel) -> None:
        """Describe `model`. Its layers' weights become views of fused ones."""
        sharing = sharing_of(model.config, model.norm.dtype)
        super().__init__(sharing, model.norm, model.max_positions, model.indexer)
        self._model = model
        self._layers = [DeviceLayer(layer, i, model.rotary) for i, layer in enumerate(model.layers)]
        self._kinds = list({layer.kind: layer for layer in reversed(self._layers)}.values())[::-1]

    def compute(self, inputs: RowInputs, cache: PagedCache) -> Tensor:
        """Write the rows to the cache; hidden states after the last norm, [T, E]; of padding anything finite."""
        return self._through(self._layers, inputs, cache)

    def sample(self, inputs: RowInputs, cache: PagedCache) -> Tensor:
        """As `RowsStep.sample`."""
        return self._through(self._kinds, inputs, cache)

    def _through(self, layers: Sequence[DeviceLayer], inputs: RowInputs, cache: PagedCache) -> Tensor:
        m = self._model
        stream = Residual(embed(inputs.token_ids, self.drawn, m.embed), None)
        for layer in layers:
            stream = layer(stream, inputs, cache)
        return add_rms_norm(stream.x, stream.update, m.norm, m.config.rms_norm_eps)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits: [N, E] -> [N, V] float32."""
        return head_logits(hidden, self._model.head_weight)

    def computed_by(self) -> dict[str, str]:
        """As `MlaModel.computed_by`."""
        model, weight = self._model, self._model.layers[0].attention.weights.o
        fp8 = isinstance(weight, BlockWeight)
        own: tuple[str, ...] = ("attention", "norms and rotation", "experts")
        if model.indexer is not None:
            own = ("index scores", "selection", *own)
        return dict.fromkeys(own, "Triton") | {
            "products": "Triton, weights and activations in FP8; torch where weights are plain"
            if fp8
            else "torch",
            "steps": "CUDA graphs where rows are few, else kernel by kernel",
        }


def sharing_of(config: MlaConfig, dtype: torch.dtype) -> Sharing:
    """How rows of prompts share what they read, in a model of this dtype."""
    heads = 0 if config.indexer is None else config.indexer.num_heads
    costs = LatentTileCosts(
        budget_bytes=0, index_row_bytes=0, attention_row_bytes=0, token_bytes=0, streams=True,
        num_heads=config.num_heads, rank=config.kv_lora_rank, nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim, value=config.v_head_dim,
    )  # fmt: skip
    alone = next((n for n in range(1, MOST_ALONE) if costs.expands(n + 1, 1 << 20)), MOST_ALONE)
    return Sharing(latent_expanded.block_rows(dtype), scores.block_rows(heads), alone, GRAPH_TOKENS)
