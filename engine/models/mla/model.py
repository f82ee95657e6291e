"""DeepSeek-V3 and its relatives: deepseek_v3 (dense), deepseek_v32 and glm_moe_dsa (sparse, with an indexer).

Each layer computes x = x + MLA(norm(x)); x = x + MLP(norm(x)). The MLP is dense in the first layers and a mixture of
experts in the others. All heads of a layer read the tokens that its indexer selected. A layer without an indexer reads
the tokens that the last layer with one selected (arXiv 2603.12201). `engine.attention.mla` computes attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.batch import Batch
from engine.attention.gqa import select
from engine.attention.indexer import IndexerWeights, LightningIndexer
from engine.attention.mla import LatentAttention, MLAWeights
from engine.attention.precision import IndexFormat, LatentFormat
from engine.attention.tiling import Tiling
from engine.errors import EngineError
from engine.kernels.interface.attention import Kernels
from engine.layers.linear import Matrix, Parameters, linear
from engine.layers.moe import MoEConfig, route, run_experts
from engine.layers.norm import rms_norm
from engine.layers.rope import RotaryTable, softmax_correction
from engine.memory.planes import PagedCache, PlaneSpec
from engine.models.family import KernelCompilers
from engine.models.mla.config import MlaConfig
from engine.models.mla.weights import weight_table
from engine.parallel.ranks import ALONE, Ranks
from engine.plan.cost import ModelShape
from engine.plan.tiles import LatentTileCosts, TileCosts
from engine.protocol import IndexerInfo

if TYPE_CHECKING:
    from engine.models.mla.device import DeviceStep

Rotation = tuple[Tensor, Tensor]
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
        rotation: Rotation,
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


class MlaModel:
    """The model, its weights and its rotation table."""

    def __init__(
        self,
        config: MlaConfig,
        weights: Mapping[str, Matrix],
        kernels: Kernels,
        max_positions: int,
        latent_format: LatentFormat,
        index_format: IndexFormat | None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Build the model from its weights.

        Args:
            config: the checkpoint's
            weights: named as in `weight_table`
            kernels: the backend
            max_positions: positions to prepare the rotation table for; at most `config.max_positions`
            latent_format: how latents are cached
            index_format: how index keys are cached; None without an indexer
            ranks: which part of the model `weights` are
        """
        self._ranks = ranks
        self.config = config
        self.architecture = config.architecture
        self.num_layers = config.num_layers
        self.vocab_size = config.vocab_size
        self.max_positions = max_positions
        self.num_parameters = sum(math.prod(weight.shape) for weight in weight_table(config).values())
        index = config.indexer
        self.indexer = (
            None
            if index is None
            else IndexerInfo(
                num_heads=index.num_heads,
                head_dim=index.head_dim,
                rope_dim=index.rope_dim,
                default_index_top_k=index.index_top_k,
                source="checkpoint",
            )
        )
        self._kernels = kernels
        self._latent_format, self._index_format = latent_format, index_format
        of = Parameters(weights)
        self.embed, self.norm = of("embed"), of("norm")
        self._head: Tensor | None = of("embed" if config.tied else "head") if ranks.rank == 0 else None
        self.layers = [
            MlaLayer(
                Parameters(weights, f"layers.{i}."),
                config,
                moe=config.moe_layers[i],
                indexer=config.index_layers[i],
                latent_format=latent_format,
                index_format=index_format,
                ranks=ranks,
            )
            for i in range(config.num_layers)
        ]
        self.rotary = RotaryTable(
            config.qk_rope_head_dim,
            config.rope_theta,
            max_positions,
            scaling=config.rope_scaling,
            device=self.embed.device,
        )
        self.device_step: DeviceStep | None = None  # runs the steps; None: torch runs them over tiles
        if kernels.name == "triton" and ranks.count == 1:
            self.device_step = self._device_step()
        elif self._head is not None:
            # In float32 as in the published code: small differences of logits decide which token is drawn.
            self._head = self._head.float()

    def _device_step(self) -> DeviceStep:
        from engine.models.mla.device import DeviceStep  # needs Triton

        return DeviceStep(self)

    @property
    def head_weight(self) -> Tensor:
        """[vocab_size, E], of the logits.

        Raises:
            EngineError: this is not rank 0, and only rank 0 has the head.
        """
        if self._head is None:
            raise EngineError("only rank 0 computes logits")
        return self._head

    @property
    def batch_device(self) -> torch.device:
        """The CPU where a device step takes the batch from there in one copy."""
        return torch.device("cpu") if self.device_step is not None else self.embed.device

    @property
    def row_step(self) -> DeviceStep | None:
        """The device step."""
        return self.device_step

    def prepare(
        self,
        cache: PagedCache,
        max_rows: int,
        progress: Callable[[int, int], None],
        compilers: KernelCompilers | None = None,
    ) -> None:
        """Make room for the steps' tokens, and capture graphs, on CUDA."""
        if self.device_step is None:
            return
        self.device_step.reserve(max_rows)
        if self.norm.device.type == "cuda":
            self.device_step.capture(cache, max_rows, progress, compilers)

    @property
    def backend(self) -> str:
        """`triton` only if its rows compute the steps; beside it torch computes them."""
        if self._kernels.name == "triton" and self.device_step is None:
            return "torch"
        return self._kernels.name

    def computed_by(self) -> dict[str, str]:
        by, dtype, index = self._kernels.computed_by, self.embed.dtype, self._index_format
        if self.device_step is not None:
            return self.device_step.computed_by()
        latents = self._latent_format.spec.dtype
        streams = self._kernels.streams_latents(latents, latents if index is None else index.spec_dtype)
        said = {
            "attention": by("latent_selected", dtype) if streams or self.backend == "reference" else "torch",
            "products": "torch",
            "norms and rotation": "torch",
            "experts": "torch",
            "steps": "operation by operation",
        }
        if index is None:
            return said
        scores = "index_scores_fp8" if index.spec_dtype is torch.uint8 else "index_scores"
        return {"index scores": by(scores, dtype), "selection": by("select", torch.bfloat16)} | said

    def plane_specs(self) -> tuple[PlaneSpec, ...]:
        """The latent with the rotated shared key, and the index key in the layers that have an indexer."""
        latent, index = self._latent_format.spec, self._index_format
        if index is None:
            return (latent,)
        return latent, index.spec(frozenset(i for i, own in enumerate(self.config.index_layers) if own))

    def tile_costs(self, budget_bytes: int, forced: Literal["auto", "gather", "mask"]) -> LatentTileCosts:
        c, dtype, index = self.config, self.embed.dtype, self._index_format
        heads = c.num_heads // self._ranks.count
        latents = self._latent_format.spec.dtype
        streams = self._kernels.streams_latents(latents, latents if index is None else index.spec_dtype)
        return LatentTileCosts(
            budget_bytes=budget_bytes,
            # Kernels that stream need only a row's positions: a bool for each it may see, 8 bytes for each selected.
            index_row_bytes=0 if streams or c.indexer is None else 4 * c.indexer.num_heads,
            attention_row_bytes=1 if streams else 4 * heads,
            token_bytes=8 if streams else c.latent_dim * dtype.itemsize,
            streams=streams,
            gather_cost=1.0 if streams else LatentTileCosts.gather_cost,
            expanded_unit=1.2 if streams else 1.0,
            forced=forced,
            num_heads=heads,
            rank=c.kv_lora_rank,
            nope=c.qk_nope_head_dim,
            rope=c.qk_rope_head_dim,
            value=c.v_head_dim,
            item_bytes=dtype.itemsize,
        )

    def shape(self) -> ModelShape:
        """Count attention in the absorbed form, and only the experts that a token visits."""
        c, e = self.config, self.config.hidden_size
        head = c.qk_nope_head_dim + c.qk_rope_head_dim
        queries = c.num_heads * head
        q = e * queries if c.q_lora_rank is None else c.q_lora_rank * (e + queries)
        kv = e * c.latent_dim + c.kv_lora_rank * c.num_heads * (c.qk_nope_head_dim + c.v_head_dim)
        attention = q + kv + c.num_heads * c.v_head_dim * e
        sparse_layers = sum(c.moe_layers)
        moe = c.moe.num_experts + 3 * c.moe.intermediate_size * (
            c.moe.experts_per_token + c.moe.num_shared_experts
        )
        weights = self.num_layers * attention + e * (
            sparse_layers * moe + (self.num_layers - sparse_layers) * 3 * c.intermediate_size
        )
        heads = dim = layers = 0
        if c.indexer is not None:
            heads, dim, layers = c.indexer.num_heads, c.indexer.head_dim, sum(c.index_layers)
        item = self.embed.dtype.itemsize
        return ModelShape(
            row_flops=2 * (weights + layers * e * dim),
            sparse_row_flops=2 * layers * heads * ((c.q_lora_rank or e) * dim + e),
            head_flops=2 * e * c.vocab_size,
            pair_flops=2 * self.num_layers * c.num_heads * (c.latent_dim + c.kv_lora_rank),
            index_pair_flops=2 * layers * heads * (dim + 1),
            weight_bytes=weights * item,
            kv_token_bytes=self.num_layers * c.latent_dim * item,
            index_token_bytes=layers * dim * item,
        )

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: PagedCache, costs: TileCosts) -> Tensor:
        if self.device_step is not None:
            return self.device_step.forward(batch, cache, costs.budget_bytes).clone()
        x = F.embedding(batch.token_ids, self.embed)
        rotation = self.rotary.at(batch.positions)
        tiling = Tiling(batch, costs)
        selections: Selections = [None] * len(tiling.tiles)
        for i, layer in enumerate(self.layers):
            x, selections = layer(i, x, rotation, tiling, cache, self._kernels, selections)
        return rms_norm(x, self.norm, self.config.rms_norm_eps)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits: [N, E] -> [N, vocab_size] float32.

        Raises:
            EngineError: this is not rank 0, and only rank 0 has the head.
        """
        if self.device_step is not None:
            return self.device_step.logits(hidden)
        return F.linear(hidden.float(), self.head_weight)
