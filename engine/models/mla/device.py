"""A model's step over flat rows: decodes, prompt chunks, dense and sparse rows in the same launches, in CUDA graphs.

`engine.models.mla.device_layer` computes a layer. Rows of short chunks (speculative decoding's, or the end of a prompt) are
attended as decodes are, in the absorbed form; dense rows of longer ones in the expanded form, where it is cheaper
(`engine.plan.tiles.LatentTileCosts`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from engine.attention.batch import Batch
from engine.kernels.triton import latent_expanded, scores
from engine.kernels.triton.embed import embed
from engine.kernels.triton.norm import add_rms_norm
from engine.layers.rope import RotaryTable
from engine.memory.blocks import BlockWeight
from engine.memory.planes import PagedCache
from engine.models.family import KernelCompilers
from engine.models.mla.config import MlaConfig
from engine.models.mla.device_layer import DeviceLayer, Residual, head_logits
from engine.models.mla.layer import MlaLayer
from engine.models.rows.audit import Audit
from engine.models.rows.graphs import StepGraphs
from engine.models.rows.inputs import RowInputs, Sharing, row_inputs
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


class LatentStep:
    """The device form of one model."""

    def __init__(self, model: LatentModel) -> None:
        """Describe `model`. Its layers' weights become views of fused ones."""
        self._model = model
        self.sharing = sharing_of(model.config, model.norm.dtype)
        self._graphs: StepGraphs | None = None
        self._audit = Audit()
        self.drawn = torch.zeros(1, dtype=torch.int64, device=model.norm.device)
        self._layers = [DeviceLayer(layer, i, model.rotary) for i, layer in enumerate(model.layers)]
        self._kinds = list({layer.kind: layer for layer in reversed(self._layers)}.values())[::-1]

    def reserve(self, rows: int) -> None:
        """Make room for what a step of so many requests draws: `drawn` [rows] int64.

        A row whose token id is negative, -1 - i, has the token drawn[i].
        """
        self.drawn = torch.zeros(rows, dtype=torch.int64, device=self._model.norm.device)

    def capture(
        self,
        cache: PagedCache,
        max_rows: int,
        progress: Callable[[int, int], None],
        compilers: KernelCompilers | None,
    ) -> None:
        """Capture the graphs of steps; see `engine.models.rows.graphs`."""
        model = self._model
        self._graphs = StepGraphs(
            lambda inputs, _: self.compute(inputs, cache),
            self.sharing,
            max_rows,
            model.max_positions,
            model.norm.device,
            sample=lambda inputs, _: self._through(self._kinds, inputs, cache),
        )
        top_k = 0 if model.indexer is None else model.indexer.default_index_top_k
        self._graphs.capture_all(top_k, progress, compilers)

    def forward(self, batch: Batch, cache: PagedCache, budget_bytes: int) -> Tensor:
        """As `MlaModel.forward`, of a batch whose tensors are on the CPU. The next step may overwrite what it returns."""
        audited = batch.selecting is not None and self._audit.due()
        flaws = batch.flaws.to(self._model.norm.device) if audited else None
        hidden = None if self._graphs is None else self._graphs.run(batch, flaws=flaws)
        if hidden is None:
            inputs = row_inputs(batch, self._model.norm.device, budget_bytes, self.sharing)
            hidden = self.compute(replace(inputs, flaws=flaws), cache)
        if flaws is not None:
            batch.flaws.copy_(flaws)
        return hidden

    def compute(self, inputs: RowInputs, cache: PagedCache) -> Tensor:
        """Write the rows to the cache; hidden states after the last norm, [T, E]; of padding anything finite."""
        return self._through(self._layers, inputs, cache)

    def _through(self, layers: Sequence[DeviceLayer], inputs: RowInputs, cache: PagedCache) -> Tensor:
        m = self._model
        stream = Residual(embed(inputs.token_ids, self.drawn, m.embed), None)
        for layer in layers:
            stream = layer(stream, inputs, cache)
        return add_rms_norm(stream.x, stream.update, m.norm, m.config.rms_norm_eps)[1]

    def hidden_like(self) -> Tensor:
        """A tensor [1, E] of the hidden states' size, dtype and device."""
        return self._model.norm.unsqueeze(0)

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
