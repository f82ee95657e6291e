"""Decoders with grouped-query attention, dense or with a lightning indexer in every layer.

Each layer computes x = x + Wo Attention(norm(x)); x = x + Wdown(silu(Wgate norm(x)) * Wup norm(x)).
Attention is grouped-query with half-split rotary embedding. All query heads of a layer read the tokens that the
layer's indexer selected. `native` computes the same in C, for the models and steps that it can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.batch import Batch
from engine.attention.gqa import attend
from engine.attention.tiling import Tiling
from engine.errors import ConfigError
from engine.kernels import native
from engine.kernels.interface.attention import Kernels
from engine.kernels.native.packed import PackedWeight
from engine.kernels.toolchain import triton_missing
from engine.layers.linear import Held, embedding, linear, linear_float32
from engine.layers.norm import rms_norm
from engine.layers.rope import RotaryTable, rotate
from engine.memory.layouts import Int8KeyLayout
from engine.memory.planes import PagedCache, PlaneSpec
from engine.models.family import KernelCompilers
from engine.models.gqa.config import GqaConfig
from engine.models.gqa.layer import GqaLayer, plain
from engine.models.gqa.native import FEW_ROWS, NativeStep
from engine.plan.cost import ModelShape
from engine.plan.sparsity import is_dense
from engine.plan.tiles import TileCosts
from engine.protocol import IndexerInfo

if TYPE_CHECKING:
    from engine.models.gqa.device import DeviceStep


class GqaModel:
    """The model, its weights and its rotation tables."""

    def __init__(
        self,
        config: GqaConfig,
        weights: Mapping[str, Held],
        indexer: IndexerInfo | None,
        kernels: Kernels,
        max_positions: int,
        *,
        integer_keys: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        """Build the model from its weights.

        Args:
            config: the checkpoint's
            weights: named as in `engine.models.gqa.weights`; plain ones have one dtype and device
            indexer: the overlay's; None: all attention is dense
            kernels: the backend
            max_positions: positions to prepare rotation tables for; at most `config.max_positions`
            integer_keys: whether index keys are cached as 8-bit integers
            batch_invariant: whether a row's bits may not depend on the rows beside it

        Raises:
            ConfigError: what computes the model here cannot be batch invariant.
        """
        if batch_invariant:
            weights = {
                name: weight.for_alike_rows() if isinstance(weight, PackedWeight) else weight
                for name, weight in weights.items()
            }
        self.batch_invariant = batch_invariant
        self.config = config
        self.architecture = config.architecture
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
        self.head_weight = head = weights["embed" if config.tied else "head"]
        self.layers = [GqaLayer.of(weights, i, indexer, window) for i, window in enumerate(config.windows)]
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
        self.native = NativeStep.of(self)  # runs the steps that it can; None: torch runs all
        self.device_step = self._device_step() if kernels.name == "triton" else None  # likewise
        self._check_invariance()
        # Small differences of logits decide which token is drawn, so the head computes in float32.
        self._head = head.float() if isinstance(head, Tensor) and self.device_step is None else head

    def _device_step(self) -> DeviceStep | None:
        from engine.models.gqa.device import DeviceStep  # needs Triton

        return DeviceStep(self) if DeviceStep.supports(self) else None

    def _check_invariance(self) -> None:
        if not self.batch_invariant:
            return
        if self.device_step is not None:
            return
        if self.native is None:
            raise ConfigError(
                f"batch_invariant needs steps that run compiled, but this model's run in {self._products()}, whose sums "
                "depend on how many rows there are; serve it in bfloat16 with native kernels or Triton's, or leave "
                "--batch-invariant out"
            )
        if self.indexer is not None and not self._integer_keys:
            raise ConfigError(
                "batch_invariant needs index keys of 8 bits on a CPU, because torch scores many keys of bfloat16; leave "
                "indexer_dtype at auto, or leave --batch-invariant out"
            )

    @property
    def batch_device(self) -> torch.device:
        """The CPU where a device step takes the batch from there in one copy."""
        return torch.device("cpu") if self.device_step is not None else self.norm.device

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

    def plane_specs(self) -> tuple[PlaneSpec, ...]:
        c, dtype = self.config, self._dtype
        kv = PlaneSpec("kv", (c.num_kv_heads, 2, c.head_dim), dtype)
        if self.indexer is None:
            return (kv,)
        dim = self.indexer.head_dim
        if self._integer_keys:
            return kv, Int8KeyLayout(dim).spec("index_key")
        return kv, PlaneSpec("index_key", (dim,), dtype)

    def tile_costs(self, budget_bytes: int, forced: Literal["auto", "gather", "mask"]) -> TileCosts:
        return TileCosts(
            budget_bytes=budget_bytes,
            index_row_bytes=0 if self.indexer is None else 4 * self.indexer.num_heads,
            attention_row_bytes=4 * self.config.num_heads,
            token_bytes=self.plane_specs()[0].token_bytes,
            forced=forced,
            few_rows=1 if self.native is None else FEW_ROWS,
            fused=self.device_step is not None
            or (
                self._kernels.fused
                and not any(self.config.windows)  # a window needs a mask, and fused kernels read none
                and self._dtype is torch.bfloat16
                and (self.indexer is None or self._integer_keys)
            ),
        )

    def shape(self) -> ModelShape:
        """Count all weights except embeddings, norms and index queries for each token.

        Windows are not counted. In a model with windows the work over pairs of tokens is an upper bound.
        """
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

    @property
    def backend(self) -> str:
        """`triton` only if its rows compute the steps; beside it torch computes them."""
        if self._kernels.name == "triton" and self.device_step is None:
            return "torch"
        return self._kernels.name

    def computed_by(self) -> dict[str, str]:
        if self.device_step is not None:
            own = dict.fromkeys(("index scores", "selection", "attention", "norms and rotation"), "Triton")
            said = own | {
                "products": "torch, weights fused",
                "steps": "CUDA graphs where rows are few, else kernel by kernel",
            }
        elif self.native is not None:
            level = f"compiled for {native.level()}"
            own = dict.fromkeys(("index scores", "selection", "attention", "norms and rotation"), level)
            most = (
                ""
                if self.indexer is None or self._integer_keys
                else f", with up to {FEW_ROWS} rows, else torch's"
            )
            said = own | {
                "products": self._packed_products(),
                "steps": f"one call each{most}",
            }
        else:
            by, sparse = self._kernels.computed_by, self.indexer is not None
            said = {
                "index scores": by(
                    "index_scores_int8" if self._integer_keys else "index_scores", self._dtype
                ),
                "selection": by("select", torch.bfloat16),  # of scores, which have one dtype
                "attention": by("attend_selected" if sparse else "attend_causal", self._dtype),
                "norms and rotation": "torch",
                "products": self._products(),
                "steps": "operation by operation",
            }
        skipped = () if self.indexer is not None else ("index scores", "selection")
        return {name: what for name, what in said.items() if name not in skipped}

    def _products(self) -> str:
        """What multiplies with weights in a step that runs operation by operation, and why it is not better."""
        if self.norm.device.type == "cuda":
            why = triton_missing() or "Triton's steps were not chosen, or the model has sliding windows"
            return f"torch ({why})"
        if not isinstance(self.embed, PackedWeight):
            why = (
                native.missing()
                or "packed weights are for the native kernels, bfloat16 and rows of whole groups of 32"
            )
            return f"torch ({why})"
        return self._packed_products()

    def _packed_products(self) -> str:
        amx = ", those of many rows with AMX" if native.uses_amx() and not self.batch_invariant else ""
        return f"compiled for {native.level()}, weights packed as stored or in bfloat16{amx}"

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: PagedCache, costs: TileCosts) -> Tensor:
        # The native step scores index keys in bfloat16 by plain loops, which are fast enough for few rows only.
        whole = self.indexer is None or self._integer_keys or len(batch.token_ids) <= FEW_ROWS
        if self.native is not None and whole:
            return self.native.forward(batch, cache)
        if self.device_step is not None:
            return self.device_step.forward(batch, cache, costs.budget_bytes).clone()
        tiling = Tiling(batch, costs)
        x = embedding(batch.token_ids, self.embed, self._dtype)
        rotation = self.rotary.at(batch.positions)
        index_rotation = None if self.index_rotary is None else self.index_rotary.at(batch.positions)
        eps = self.config.rms_norm_eps
        for i, layer in enumerate(self.layers):
            hidden = rms_norm(x, layer.input_norm, eps)
            x = x + self._attention(i, layer, hidden, rotation, index_rotation, tiling, cache)
            hidden = rms_norm(x, layer.post_norm, eps)
            gate, up = linear(hidden, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
            x = x + linear(F.silu(gate) * up, layer.down, layer.down_bias)
        return rms_norm(x, self.norm, eps)

    def _attention(
        self,
        i: int,
        layer: GqaLayer,
        hidden: Tensor,  # [T, E]
        rotation: tuple[Tensor, Tensor],
        index_rotation: tuple[Tensor, Tensor] | None,
        tiling: Tiling,
        cache: PagedCache,
    ) -> Tensor:
        c, batch = self.config, tiling.batch
        selecting = None if layer.adapter is None else _selecting(batch, layer.window)
        qkv = linear(hidden, layer.qkv, layer.qkv_bias)
        if layer.adapter is not None and selecting is not None:
            qkv = qkv + layer.adapter[0](hidden, selecting)
        heads = qkv.view(-1, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        query, key, value = torch.split(heads, [c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            query, key = (
                rms_norm(query, layer.q_norm, c.rms_norm_eps),
                rms_norm(key, layer.k_norm, c.rms_norm_eps),
            )
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
            layer.window,
        )
        out = out.flatten(1)
        attended = linear(out, layer.o, layer.o_bias)
        if layer.adapter is not None and selecting is not None:
            attended = attended + layer.adapter[1](out, selecting)
        return attended

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        if self.device_step is not None:
            return self.device_step.logits(hidden)
        return linear_float32(hidden, self._head)


def _selecting(batch: Batch, window: int | None) -> Tensor | None:
    """[T, 1] bool: which rows read a selection in a layer with this window. None if no row does."""
    rows = batch.selecting
    if rows is None or window is None:
        return rows
    # A row whose window is full is dense exactly if a context of that length is.
    fewer = [not is_dense(window, s.index_top_k) for s in batch.segments for _ in range(s.num_rows)]
    return rows & torch.tensor(fewer, device=rows.device).unsqueeze(-1)
