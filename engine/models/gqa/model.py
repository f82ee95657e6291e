"""Llama-family decoders (SmolLM2 among them), dense or with a lightning indexer in every layer.

Per layer: x = x + Wo Attention(norm(x)); x = x + Wdown(silu(Wgate norm(x)) * Wup norm(x)).
Attention is grouped-query with half-split rotary embedding. All query heads of a layer read the tokens
that the layer's indexer selected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.batch import Batch
from engine.attention.gqa import attend
from engine.attention.indexer import IndexerWeights, LightningIndexer
from engine.attention.precision import Precision
from engine.attention.tiling import Tiling
from engine.checkpoint.loader import LoadReport, load
from engine.checkpoint.packed import can_pack, load_packed
from engine.checkpoint.source import Source
from engine.config import IndexerDtype
from engine.errors import ConfigError
from engine.kernels import native
from engine.kernels.interface.attention import Kernels
from engine.kernels.native.packed import PackedWeight
from engine.layers.linear import Held, embedding, linear, linear_float32
from engine.layers.low_rank import LowRank
from engine.layers.norm import rms_norm
from engine.layers.rope import RotaryTable, rotate
from engine.memory.layouts import Int8KeyLayout
from engine.memory.planes import PagedCache, PlaneSpec
from engine.models.gqa.config import LlamaConfig
from engine.models.gqa.native import FEW_ROWS, NativeStep
from engine.models.gqa.weights import weight_table
from engine.parallel.ranks import Ranks
from engine.plan.cost import ModelShape
from engine.plan.tiles import TileCosts
from engine.protocol import IndexerInfo


def plain(weight: Held) -> Tensor:
    """One that is never packed."""
    assert isinstance(weight, Tensor)
    return weight


@dataclass(frozen=True)
class LlamaLayer:
    """One layer's weights; E hidden, F intermediate."""

    input_norm: Tensor  # [E]
    qkv: Held  # [(Hq + 2 Hkv) * D, E]
    o: Held  # [E, Hq * D]
    post_norm: Tensor  # [E]
    gate_up: Held  # [2 F, E]
    down: Held  # [E, F]
    indexer: LightningIndexer | None
    adapter: tuple[LowRank, LowRank] | None  # to qkv and o, on rows with a selection


class Llama:
    """The model, its weights and its rotation tables."""

    architecture = "llama"

    def __init__(
        self,
        config: LlamaConfig,
        weights: Mapping[str, Held],
        indexer: IndexerInfo | None,
        kernels: Kernels,
        max_positions: int,
        *,
        integer_keys: bool = False,
    ) -> None:
        """Wire `weights` (named as in `engine.models.gqa.weights`, plain ones of one dtype and device).

        Args:
            integer_keys: whether index keys are cached as 8-bit integers
            max_positions: positions to prepare rotation tables for; at most `config.max_positions`
        """
        self.config = config
        self.indexer = indexer
        self.num_layers = config.num_layers
        self.vocab_size = config.vocab_size
        self.max_positions = max_positions
        self.num_parameters = sum(weight.numel() for weight in weights.values())
        self._weight_bytes = sum(
            weight.nbytes if isinstance(weight, Tensor) else weight.num_bytes for weight in weights.values()
        )
        self._kernels = kernels
        self._integer_keys = integer_keys
        self.embed = weights["embed"]
        self.norm = plain(weights["norm"])
        self._dtype = self.norm.dtype
        # Logits are compared with one another to the last digit, so the head runs in float32.
        head = weights["embed" if config.tied else "head"]
        self._head = head.float() if isinstance(head, Tensor) else head
        self.layers = [self._layer(weights, i) for i in range(config.num_layers)]
        device = self.norm.device
        self.rotary = RotaryTable(
            config.head_dim, config.rope_theta, max_positions, scaling=config.rope_scaling, device=device
        )
        self.index_rotary = (
            None
            if indexer is None
            else RotaryTable(
                indexer.rope_dim, config.rope_theta, max_positions, scaling=config.rope_scaling, device=device
            )
        )
        self.native = NativeStep.of(self)  # what runs steps, where it can

    def _layer(self, weights: Mapping[str, Held], i: int) -> LlamaLayer:
        def of(name: str) -> Held:
            return weights[f"layers.{i}.{name}"]

        indexer = adapter = None
        if self.indexer is not None:
            parts = IndexerWeights(
                wq=of("indexer.wq"),
                wk=of("indexer.wk"),
                k_norm_weight=plain(of("indexer.k_norm_weight")),
                k_norm_bias=plain(of("indexer.k_norm_bias")),
                weights_proj=of("indexer.weights_proj"),
            )
            indexer = LightningIndexer(parts, self.indexer.num_heads)
            if self.indexer.adapter_rank:
                adapter = (
                    LowRank(plain(of("adapter.qkv.a")), plain(of("adapter.qkv.b"))),
                    LowRank(plain(of("adapter.o.a")), plain(of("adapter.o.b"))),
                )
        return LlamaLayer(
            input_norm=plain(of("input_norm")),
            qkv=of("qkv"),
            o=of("o"),
            post_norm=plain(of("post_norm")),
            gate_up=of("gate_up"),
            down=of("down"),
            indexer=indexer,
            adapter=adapter,
        )

    def plane_specs(self) -> tuple[PlaneSpec, ...]:
        """Keys and values of every KV head, and the index key."""
        c, dtype = self.config, self._dtype
        kv = PlaneSpec("kv", (c.num_kv_heads, 2, c.head_dim), dtype)
        if self.indexer is None:
            return (kv,)
        dim = self.indexer.head_dim
        if self._integer_keys:
            return kv, Int8KeyLayout(dim).spec("index_key")
        return kv, PlaneSpec("index_key", (dim,), dtype)

    def tile_costs(self, budget_bytes: int, forced: Literal["auto", "gather", "mask"]) -> TileCosts:
        """See `TileCosts`."""
        return TileCosts(
            budget_bytes=budget_bytes,
            index_row_bytes=0 if self.indexer is None else 4 * self.indexer.num_heads,
            attention_row_bytes=4 * self.config.num_heads,
            token_bytes=self.plane_specs()[0].token_bytes,
            forced=forced,
            few_rows=1 if self.native is None else FEW_ROWS,
            fused=self._kernels.fused
            and self._dtype is torch.bfloat16
            and (self.indexer is None or self._integer_keys),
        )

    def shape(self) -> ModelShape:
        """See `ModelShape`; every weight but embeddings, norms and index queries runs for each token."""
        c, n = self.config, self.config.num_layers
        attention = 2 * c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
        rank = 0 if self.indexer is None else self.indexer.adapter_rank
        qkv_rows = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        adapter = 2 * rank * (2 * c.hidden_size + qkv_rows + c.num_heads * c.head_dim)
        mlp = 2 * 3 * c.hidden_size * c.intermediate_size
        heads, dim = (0, 0) if self.indexer is None else (self.indexer.num_heads, self.indexer.head_dim)
        specs = self.plane_specs()
        return ModelShape(
            row_flops=n * (attention + mlp + 2 * c.hidden_size * dim),
            sparse_row_flops=n * (2 * c.hidden_size * heads * (dim + 1) + adapter),
            head_flops=2 * c.hidden_size * c.vocab_size,
            pair_flops=n * 4 * c.num_heads * c.head_dim,
            index_pair_flops=n * 2 * heads * (dim + 1),
            weight_bytes=self._weight_bytes,
            kv_token_bytes=n * specs[0].token_bytes,
            index_token_bytes=n * sum(spec.token_bytes for spec in specs[1:]),
        )

    def products(self) -> str:
        """See `Model`."""
        if not isinstance(self.embed, PackedWeight):
            why = (
                native.missing()
                or "packed weights are for the native kernels, bfloat16 and rows of whole groups of 32"
            )
            return f"products: torch ({why})"
        steps = "" if self.native is None else ", a step in one call"
        return f"products: compiled for {native.level()}, weights packed as stored or in bfloat16{steps}"

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: PagedCache, costs: TileCosts) -> Tensor:
        """Run the batch's rows: [T] token ids -> [T, E] hidden states, cache written."""
        # The step scores index keys in bfloat16 plainly, which few rows can bear.
        whole = self.indexer is None or self._integer_keys or len(batch.token_ids) <= FEW_ROWS
        if self.native is not None and whole:
            return self.native.forward(batch, cache)
        tiling = Tiling(batch, costs)
        x = embedding(batch.token_ids, self.embed, self._dtype)
        rotation = self.rotary.at(batch.positions)
        index_rotation = None if self.index_rotary is None else self.index_rotary.at(batch.positions)
        eps = self.config.rms_norm_eps
        for i, layer in enumerate(self.layers):
            hidden = rms_norm(x, layer.input_norm, eps)
            x = x + self._attention(i, layer, hidden, rotation, index_rotation, tiling, cache)
            gate, up = linear(rms_norm(x, layer.post_norm, eps), layer.gate_up).chunk(2, dim=-1)
            x = x + linear(F.silu(gate) * up, layer.down)
        return rms_norm(x, self.norm, eps)

    def _attention(
        self,
        i: int,
        layer: LlamaLayer,
        hidden: Tensor,  # [T, E]
        rotation: tuple[Tensor, Tensor],
        index_rotation: tuple[Tensor, Tensor] | None,
        tiling: Tiling,
        cache: PagedCache,
    ) -> Tensor:
        c, batch = self.config, tiling.batch
        qkv = linear(hidden, layer.qkv)
        if layer.adapter is not None and batch.selecting is not None:
            qkv = qkv + layer.adapter[0](hidden, batch.selecting)
        heads = qkv.view(-1, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        query, key, value = torch.split(heads, [c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        query, key = rotate(query, rotation), rotate(key, rotation)
        cache.write(i, "kv", batch.pages, batch.offsets, torch.stack((key, value), dim=2))
        index = index_plane = None
        if layer.indexer is not None and index_rotation is not None:
            index_plane = cache.plane(i, "index_key")
            keys = layer.indexer.keys(hidden, index_rotation)
            if self._integer_keys:
                self._kernels.store_index_keys(index_plane, batch.pages, batch.offsets, keys)
            else:
                index_plane[batch.pages, batch.offsets] = keys
            if tiling.selects:
                index = layer.indexer.queries(hidden, index_rotation)
        out = attend(
            query.view(-1, c.num_kv_heads, c.group, c.head_dim),
            index,
            cache.plane(i, "kv"),
            index_plane,
            tiling,
            self._kernels,
            c.head_dim**-0.5,
        )
        out = out.flatten(1)
        attended = linear(out, layer.o)
        if layer.adapter is not None and batch.selecting is not None:
            attended = attended + layer.adapter[1](out, batch.selecting)
        return attended

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[N, E] -> [N, vocab_size] float32."""
        return linear_float32(hidden, self._head)


def build(
    source: Source,
    indexer: IndexerInfo | None,
    kernels: Kernels,
    max_positions: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None],
    precision: Precision,
    ranks: Ranks,
) -> tuple[Llama, LoadReport]:
    """Load a checkpoint of this family; arguments as in `engine.models.build_model`.

    Raises:
        CheckpointError: the config or the tensors are not what this architecture needs.
        ConfigError: weights, a cache or an indexer of another dtype than the model's was asked for.
    """
    if precision.weights == "fp8":
        raise ConfigError(
            f"weight_dtype is fp8, but {source.description} is a llama model, whose weights are held in "
            f"{str(dtype).removeprefix('torch.')}; leave it at auto"
        )
    for name, asked in (("kv_cache_dtype", str(precision.kv_cache)), ("indexer_dtype", precision.indexer)):
        if asked == "fp8" or (asked == "bf16" and dtype != torch.bfloat16):
            raise ConfigError(
                f"{name} is {asked}, but a llama model keeps its cache in its own dtype, "
                f"{str(dtype).removeprefix('torch.')}; leave it at auto"
            )
    config = LlamaConfig.read(source.config)
    integer_keys = indexer is not None and _integer_keys(precision.indexer, indexer.head_dim, dtype, kernels)
    table = weight_table(config, indexer, short_queries=integer_keys)
    weights: Mapping[str, Held]
    if kernels.name == "native" and device.type == "cpu" and dtype == torch.bfloat16 and can_pack(table):
        weights, report = load_packed(table, source, progress=progress)
    else:
        weights, report = load(table, source, dtype=dtype, device=device, progress=progress)
    return Llama(config, weights, indexer, kernels, max_positions, integer_keys=integer_keys), report


def _integer_keys(asked: IndexerDtype, dim: int, dtype: torch.dtype, kernels: Kernels) -> bool:
    """Whether index keys are cached as 8-bit integers: where that is faster and bfloat16 is the alternative.

    Raises:
        ConfigError: they were asked for, and keys of `dim` numbers do not fit.
    """
    if asked == "int8" and not Int8KeyLayout.fits(dim):
        raise ConfigError(
            f"indexer_dtype is int8, but this indexer's keys have {dim} numbers, and only a multiple of 4 up to 512 "
            "can be kept so; leave it at auto"
        )
    preferred = kernels.integer_keys and dtype is torch.bfloat16 and Int8KeyLayout.fits(dim)
    return asked == "int8" or (asked == "auto" and preferred)


def check_split(raw: Mapping[str, Any], count: int) -> None:
    """Whether a model of this family can be split over `count` ranks.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(f"llama models are served on one device, not on {count}; leave --tensor-parallel out")
