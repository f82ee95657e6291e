"""A model's step over flat rows in Triton's kernels: prompt chunks, decodes, dense and sparse rows in the same launches.

The arithmetic is `GqaModel.forward`'s. What differs is order: biases of q, k and v come after the adapter, and index
queries, index keys and head weights come out of the product that makes q, k and v, so that the head weights are rounded to
the model's dtype. So do the adapter's short products, of which only the second half is left to do. Products
are torch's, but for those of very few rows where the device gives them the same bits.

Of a batch-invariant model every row is computed as a decode is, by kernels whose bits depend on the row alone, and products
are of `engine.kernels.triton.fixed_product`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.indexer import KEY_NORM_EPS, LightningIndexer
from engine.kernels.triton import attention, scores
from engine.kernels.triton.embed import embed
from engine.kernels.triton.fixed_product import ONE, fixed_linear, row_blocks
from engine.kernels.triton.gate import silu_times
from engine.kernels.triton.index_key import queries, store_keys
from engine.kernels.triton.low_rank import Correction, add_low_rank
from engine.kernels.triton.mask import masks
from engine.kernels.triton.norm import add_rms_norm
from engine.kernels.triton.prepare import IndexPart, prepare
from engine.kernels.triton.product import OUTPUTS, agrees, fits, gated_linear, holds, linear
from engine.kernels.triton.rotation import rotate_and_store
from engine.kernels.triton.select import select
from engine.memory.planes import PagedCache
from engine.models.family import KernelCompilers
from engine.models.gqa.layer import GqaLayer, plain
from engine.models.gqa.native import Wired
from engine.models.rows.audit import look
from engine.models.rows.inputs import ALL_ALONE, RowInputs, Sharing
from engine.models.rows.step import RowsStep

_ALIGNMENT = 8
"""Columns of the fused product come in multiples of so many, so that its rows begin where wide reads can."""
MOST_GROUP = 16
"""Query heads a KV head that attention can have."""
FEW_ROWS = 256
"""Up to so many rows, small operations are part of others: a launch costs more than doing them row by row."""


class FlatModel(Wired, Protocol):
    """What the step needs of a model."""

    max_positions: int


class DeviceStep(RowsStep):
    """The device form of one model."""

    def __init__(self, model: FlatModel) -> None:
        """Describe `model`, which `supports` said yes to. Its layers' weights become views of fused ones."""
        c, indexer = model.config, model.indexer
        self._heads, self._dim = (0, 0) if indexer is None else (indexer.num_heads, indexer.head_dim)
        sharing = Sharing(
            attention.block_rows(c.group),
            scores.block_rows(self._heads),
            ALL_ALONE if model.batch_invariant else 1,
        )
        super().__init__(sharing, model.norm, model.max_positions, indexer)
        self._model = model
        self._qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        self._row_blocks: tuple[int, ...] = ONE  # of products of a batch-invariant model
        self._fused = [self._fuse(i) for i in range(c.num_layers)]
        self._output = [self._fuse_output(i) for i in range(c.num_layers)]
        self._own_products = 0

    def _choose_products(self, compilers: KernelCompilers | None) -> None:
        """Find the form of our own products of few rows that has the library's bits, by one layer's weights; 0: none.

        Of a batch-invariant model, find how many rows its products may have at once.
        """
        if self._model.batch_invariant:
            self._row_blocks = row_blocks(plain(self._model.layers[0].down))
            return
        layer = self._model.layers[0]
        asked = [
            (self._fused[0], None, False),
            (plain(layer.o), layer.o_bias, False),
            (plain(layer.gate_up), layer.gate_up_bias, True),
            (plain(layer.down), layer.down_bias, False),
        ]
        fitting = [one for one in asked if fits(1, one[0])]
        forms = [each for each in OUTPUTS if all(holds(one[0], each, gated=one[2]) for one in fitting)]
        if compilers is not None:
            with compilers.together():
                for each, (weight, bias, _) in itertools.product(forms, fitting):
                    agrees(weight, bias, each)
        agreeing = (each for each in forms if all(agrees(*one[:2], each) for one in fitting))
        self._own_products = next(agreeing, 0) if fitting else 0

    def _fits(self, x: Tensor, weight: Tensor) -> bool:
        return self._own_products > 0 and fits(len(x), weight)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._model.batch_invariant:
            return fixed_linear(x, weight, bias, blocks=self._row_blocks)
        return (
            linear(x, weight, bias, self._own_products)
            if self._fits(x, weight)
            else F.linear(x, weight, bias)
        )

    @staticmethod
    def supports(model: Wired) -> bool:
        """Whether the kernels compute what the model is."""
        c = model.config
        return isinstance(model.embed, Tensor) and not any(c.windows) and c.group <= MOST_GROUP

    def _fuse(self, i: int) -> Tensor:
        """Layer i's weight of all that is made of its normalised input.

        q, k, v, index queries, index key, head weights, and the adapter's short product.
        """
        layer = self._model.layers[i]
        qkv = plain(layer.qkv)
        if layer.indexer is None:
            return qkv
        w = layer.indexer.weights
        parts = [qkv, plain(w.wq), plain(w.wk), plain(w.weights_proj)]
        if layer.adapter is not None:
            parts.append(layer.adapter[0].a)
        fused = torch.cat(parts)
        fused = F.pad(fused, (0, 0, 0, -len(fused) % _ALIGNMENT))
        views = torch.split(fused[: sum(len(part) for part in parts)], [len(part) for part in parts])
        weights = replace(w, wq=views[1], wk=views[2], weights_proj=views[3])
        layer = replace(layer, qkv=views[0], indexer=LightningIndexer(weights, layer.indexer.num_heads))
        if layer.adapter is not None:
            layer = replace(layer, adapter=(replace(layer.adapter[0], a=views[4]), layer.adapter[1]))
        self._model.layers[i] = layer
        return fused

    def _fuse_output(self, i: int) -> tuple[Tensor, Tensor | None]:
        """Layer i's weight and bias of all that is made of what attention gives: o, and the adapter's short product."""
        layer = self._model.layers[i]
        if layer.adapter is None:
            return plain(layer.o), layer.o_bias
        attn, out = layer.adapter
        fused = torch.cat((plain(layer.o), out.a))
        fused = F.pad(fused, (0, 0, 0, -len(fused) % _ALIGNMENT))
        size = len(plain(layer.o))
        self._model.layers[i] = replace(
            layer, o=fused[:size], adapter=(attn, replace(out, a=fused[size : size + out.rank]))
        )
        bias = layer.o_bias
        return fused, None if bias is None else F.pad(bias, (0, len(fused) - size))

    def capture(
        self,
        cache: PagedCache,
        max_rows: int,
        progress: Callable[[int, int], None],
        compilers: KernelCompilers | None,
    ) -> None:
        """As `RowsStep.capture`; the products' form is chosen before."""
        self._choose_products(compilers)
        super().capture(cache, max_rows, progress, compilers)

    def compute(self, inputs: RowInputs, cache: PagedCache) -> Tensor:
        """Write the rows to the cache; hidden states after the last norm, [T, E]; of padding anything finite."""
        return self._through(range(len(self._model.layers)), inputs, cache)

    def sample(self, inputs: RowInputs, cache: PagedCache) -> Tensor:
        """As `RowsStep.sample`."""
        return self._through(self._kinds(), inputs, cache)

    def _kinds(self) -> list[int]:
        """A layer of each kind: others launch the same kernels."""
        found: dict[tuple[bool, bool], int] = {}
        for i, layer in enumerate(self._model.layers):
            found.setdefault((layer.indexer is None, layer.adapter is None), i)
        return list(found.values())

    def _through(self, layers: Iterable[int], inputs: RowInputs, cache: PagedCache) -> Tensor:
        m, eps = self._model, self._model.config.rms_norm_eps
        x, update = embed(inputs.token_ids, self.drawn, plain(m.embed)).to(m.norm.dtype), None
        for i in layers:
            layer = m.layers[i]
            x, hidden = add_rms_norm(x, update, layer.input_norm, eps)
            update = self._attention(i, layer, hidden, inputs, cache)
            x, hidden = add_rms_norm(x, update, layer.post_norm, eps)
            if self._fits(hidden, plain(layer.gate_up)):
                gated = gated_linear(hidden, plain(layer.gate_up), layer.gate_up_bias, self._own_products)
            else:
                gated = silu_times(self._product(hidden, plain(layer.gate_up), layer.gate_up_bias))
            update = self._product(gated, plain(layer.down), layer.down_bias)
        return add_rms_norm(x, update, m.norm, eps)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits: [N, E] -> [N, V] float32. Products of bfloat16 numbers are exact in float32, which adds them up."""
        head = plain(self._model.head_weight)
        if self._model.batch_invariant:
            return fixed_linear(hidden, head, blocks=self._row_blocks, dtype=torch.float32)
        if hidden.device.type == "cuda" and hidden.dtype == head.dtype == torch.bfloat16:
            return torch.mm(hidden, head.t(), out_dtype=torch.float32)
        return F.linear(hidden.float(), head.float())

    def _attention(
        self, i: int, layer: GqaLayer, hidden: Tensor, inputs: RowInputs, cache: PagedCache
    ) -> Tensor:
        """What attention adds to the residual stream."""
        m, c, rows = self._model, self._model.config, inputs.rows
        plane, few = cache.plane(i, "kv"), len(rows) <= FEW_ROWS and not m.batch_invariant
        product = self._product(hidden, self._fused[i])
        qkv = product[:, : self._qkv]
        adapter = layer.adapter if inputs.top_k else None
        if adapter is not None:
            at = self._qkv + self._heads * self._dim + self._dim + self._heads
            add_low_rank(
                qkv, Correction(product[:, at : at + adapter[0].rank], adapter[0].b, rows.index_top_k)
            )
        norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        index = None if layer.indexer is None else self._index_part(i, layer.indexer, product, cache)
        selected = mask = None
        if index is not None and few and inputs.top_k:
            query, index_query, weights = prepare(
                qkv, rows.positions, inputs.pages, inputs.offsets, m.rotary.all(), plane, index,
                bias=layer.qkv_bias, head_norms=norms, eps=c.rms_norm_eps,
            )  # fmt: skip
            selected, mask = self._selected(index_query, weights, index.plane, inputs)
        else:
            query = rotate_and_store(
                qkv, rows.positions, inputs.pages, inputs.offsets, m.rotary.all(), plane,
                bias=layer.qkv_bias, head_norms=norms, eps=c.rms_norm_eps,
            )  # fmt: skip
            if index is not None:
                selected, mask = self._indexed(index, inputs)
        scale = c.head_dim**-0.5
        out = attention.attend(query, plane, rows, selected, scale, inputs.max_context, inputs.blocks, mask)
        out = out.flatten(1)
        if adapter is None:
            return self._product(out, plain(layer.o), layer.o_bias)
        weight, bias = self._output[i]
        both, size = self._product(out, weight, bias), len(plain(layer.o))
        attended = both[:, :size]
        short = both[:, size : size + adapter[1].rank]
        add_low_rank(attended, Correction(short, adapter[1].b, rows.index_top_k))
        return attended

    def _index_part(self, i: int, indexer: LightningIndexer, product: Tensor, cache: PagedCache) -> IndexPart:
        """Layer i's part of the fused product, and where its index keys go."""
        m, w, heads, dim = self._model, indexer.weights, self._heads, self._dim
        assert m.index_rotary is not None
        plane = cache.plane(i, "index_key")
        key_at = self._qkv + heads * dim
        return IndexPart(
            # Integer queries are made where they are scored.
            query=product[:, self._qkv : key_at],
            key=product[:, key_at : key_at + dim],
            head_weights=product[:, key_at + dim : key_at + dim + heads],
            norm_weight=w.k_norm_weight,
            norm_bias=w.k_norm_bias,
            eps=KEY_NORM_EPS,
            scale=heads**-0.5 * dim**-0.5,
            rotation=m.index_rotary.all(),
            plane=plane,
            form="int8" if plane.dtype is torch.uint8 else "plain",
        )

    def _indexed(self, index: IndexPart, inputs: RowInputs) -> tuple[Tensor | None, Tensor | None]:
        """Store the rows' index keys, and select as `_selected`; None where no row has a selection."""
        positions = inputs.rows.positions
        store_keys(
            index.key, index.norm_weight, index.norm_bias, index.eps, index.rotation, positions, inputs.pages,
            inputs.offsets, index.plane, index.form,
        )  # fmt: skip
        if not inputs.top_k:
            return None, None
        query, weights = queries(
            index.query, index.head_weights, index.scale, index.rotation, positions, "plain"
        )
        return self._selected(query, weights, index.plane, inputs)

    def _selected(
        self, query: Tensor, weights: Tensor, plane: Tensor, inputs: RowInputs
    ) -> tuple[Tensor, Tensor | None]:
        """Score and select, piece by piece: positions, and where there are prompts their masks."""
        chosen, masked = [], []
        for piece in inputs.pieces:
            rows, count = piece.rows, len(piece.rows)
            own = slice(piece.first, piece.first + count)
            rated = scores.index_scores(
                query[own], weights[own], plane, rows, inputs.max_context, piece.blocks, fill=False
            )
            if inputs.blocks is None:
                chosen.append(select(rated, rows, inputs.top_k))
            else:
                cuts = torch.empty(count, 2, dtype=torch.int32, device=rated.device)
                chosen.append(select(rated, rows, inputs.top_k, cuts))
                masked.append(masks(rated, rows, cuts, inputs.top_k))
        selected = _joined(chosen)
        if inputs.flaws is not None:
            look(inputs.flaws, selected, inputs.rows, inputs.max_context)
        return selected, _joined(masked) if masked else None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
