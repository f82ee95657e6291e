"""DeepSeek-V3 and its relatives: deepseek_v3 (dense), deepseek_v32 and glm_moe_dsa (sparse, with an indexer).

Each layer computes x = x + MLA(norm(x)); x = x + MLP(norm(x)). The MLP is dense in the first layers and a mixture of
experts in the others. All heads of a layer read the tokens that its indexer selected. A layer without an indexer reads
the tokens that the last layer with one selected (arXiv 2603.12201). `engine.attention.mla` computes attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.batch import Batch
from engine.attention.precision import IndexFormat, LatentFormat
from engine.attention.tiling import Tiling
from engine.errors import EngineError
from engine.kernels.interface.attention import Kernels
from engine.layers.linear import Parameters
from engine.layers.norm import rms_norm
from engine.layers.rope import RotaryTable
from engine.memory.blocks import Matrix
from engine.memory.planes import PagedCache, PlaneSpec
from engine.models.family import KernelCompilers
from engine.models.mla.config import MlaConfig
from engine.models.mla.layer import MlaLayer, Selections
from engine.models.mla.weights import weight_table
from engine.parallel.ranks import ALONE, Ranks
from engine.plan.cost import ModelShape
from engine.plan.tiles import LatentTileCosts, TileCosts
from engine.protocol import IndexerInfo

if TYPE_CHECKING:
    from engine.models.mla.device import LatentStep


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
        self.device_step: LatentStep | None = None  # runs the steps; None: torch runs them over tiles
        if kernels.name == "triton" and ranks.count == 1:
            self.device_step = self._device_step()
        if self.device_step is None and self._head is not None:
            # In float32 as in the published code: small differences of logits decide which token is drawn.
            self._head = self._head.float()

    def _device_step(self) -> LatentStep | None:
        from engine.models.mla.device import LatentStep  # needs Triton
        from engine.models.mla.device_layer import supports

        specs = self.plane_specs()
        return LatentStep(self) if all(supports(layer, specs) for layer in self.layers) else None

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
    def row_step(self) -> LatentStep | None:
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
