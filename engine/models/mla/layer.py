"""One decoder layer of the DeepSeek-V3 family: latent attention with or without an indexer, then an MLP or experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from engine.attention.gqa import select
from engine.attention.indexer import IndexerWeights, LightningIndexer
from engine.attention.mla import LatentAttention, MLAWeights
from engine.attention.precision import IndexFormat, LatentFormat
from engine.attention.tiling import Tiling
from engine.kernels.interface.attention import Kernels
from engine.layers.linear import Parameters, linear
from engine.layers.moe import MoEConfig, route, run_experts
from engine.layers.norm import rms_norm
from engine.layers.rope import softmax_correction
from engine.memory.blocks import Matrix
from engine.memory.planes import PagedCache
from engine.models.mla.config import MlaConfig
from engine.parallel.ranks import ALONE, Ranks

Selections = Sequence[Tensor | None]
"""For each tile the positions that its rows selected, or None if the tile is dense."""


class MlaMlp:
    """Computes down(silu(gate x) * up x): [T, E] -> [T, E]. `total` sums the parts of all ranks."""

    def __init__(self, gate_up: Matrix, down: Matrix, total: Callable[[Tensor], Tensor]) -> None:
        self.gate_up, self.down, self._total = gate_up, down, total

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = linear(x, self.gate_up).chunk(2, dim=-1)
        return self._total(linear(F.silu(gate) * up, self.down))


class MlaMoe:
    """Sums the routed experts, the shared expert, and the parts of all ranks, in float32: [T, E] -> [T, E]."""

    def __init__(self, of: Parameters, config: MoEConfig, ranks: Ranks) -> None:
        self.config, self._total = config, ranks.sum
        self.first = ranks.share(config.num_experts).start
        self.gate, self.bias = of("moe.gate"), of("moe.bias")
        self.gate_up = of.matrix("moe.experts_gate_up").view(
            -1, 2 * config.intermediate_size, self.gate.shape[1]
        )
        self.down = of.matrix("moe.experts_down").view(-1, self.gate.shape[1], config.intermediate_size)
        self.shared = MlaMlp(of.matrix("moe.shared_gate_up"), of.matrix("moe.shared_down"), ALONE.sum)

    def __call__(self, x: Tensor) -> Tensor:
        experts, weights = route(x, self.gate, self.bias, self.config)
        routed = run_experts(x, experts, weights, self.gate_up, self.down, self.first)
        return self._total(routed + self.shared(x).float()).to(x.dtype)


class MlaLayer:
    """One decoder layer. Its parameters are named as in `engine.models.mla.weights.layer_table`."""

    def __init__(
        self,
        of: Parameters,
        config: MlaConfig,
        *,
        moe: bool,
        indexer: bool,
        latent_format: LatentFormat,
        index_format: IndexFormat | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._latent_format, self._index_format = latent_format, index_format
        self._total = ranks.sum
        c = config
        self.eps = c.rms_norm_eps
        self.input_norm, self.post_norm = of("input_norm"), of("post_norm")
        latent = c.q_lora_rank is not None
        weights = MLAWeights(
            q_a=of.matrix("attn.q_a") if latent else None,
            q_a_norm=of("attn.q_a_norm") if latent else None,
            q_b=of.matrix("attn.q_b" if latent else "attn.q"),
            kv_a=of.matrix("attn.kv_a"),
            kv_a_norm=of("attn.kv_a_norm"),
            kv_b=of("attn.kv_b").view(-1, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank),
            o=of.matrix("attn.o"),
        )
        self.attention = LatentAttention(
            weights,
            nope=c.qk_nope_head_dim,
            scale=c.qk_head_dim**-0.5 * softmax_correction(c.rope_scaling),
            interleaved=c.rope_interleaved,
        )
        self.indexer: LightningIndexer | None = None
        if indexer and c.indexer is not None:
            parts = IndexerWeights(
                wq=of("indexer.wq"),
                wk=of("indexer.wk"),
                k_norm_weight=of("indexer.k_norm_weight"),
                k_norm_bias=of("indexer.k_norm_bias"),
                weights_proj=of("indexer.weights_proj"),
            )
            self.indexer = LightningIndexer(
                parts, c.indexer.num_heads, interleaved=c.indexer.rope_interleaved
            )
        self.mlp = (
            MlaMoe(of, c.moe, ranks)
            if moe
            else MlaMlp(of.matrix("mlp.gate_up"), of.matrix("mlp.down"), ranks.sum)
        )

    def __call__(
        self,
        i: int,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        tiling: Tiling,
        cache: PagedCache,
        kernels: Kernels,
        selections: Selections,
    ) -> tuple[Tensor, Selections]:
        """Compute rows x [T, E] -> [T, E], and write them to layer `i` of the cache.

        Returns also the selections, for the layers that share them.
        """
        batch, hidden = tiling.batch, rms_norm(x, self.input_norm, self.eps)
        rows = self.attention.project(hidden, rotation)
        packed = self._latent_format.pack(rows.cached, kernels)
        cache.write(i, "latent", batch.pages, batch.offsets, packed)
        if self.indexer is not None and self._index_format is not None:
            # Dense rows write a key too, because a later sparse row may score their token.
            plane = cache.plane(i, "index_key")
            keys = self.indexer.keys(hidden, rotation)
            self._index_format.write(plane, batch.pages, batch.offsets, keys, kernels)
            if tiling.selects:
                queries = self.indexer.queries(hidden, rotation, rows.query_latent)
                queries = self._index_format.queries(queries, kernels)
                selections = [
                    None if tile.form == "dense" else select(queries, plane, tile, kernels)
                    for tile in tiling.tiles
                ]
        attended = self.attention.attend(
            rows.query, selections, cache.plane(i, "latent"), tiling, kernels, self._latent_format.unpack
        )
        x = x + self._total(attended)
        return x + self.mlp(rms_norm(x, self.post_norm, self.eps)), selections
