"""One layer of latent attention and experts over flat rows, in Triton's kernels.

The arithmetic is `engine.models.mla.model.MlaLayer`'s. What differs is where numbers are rounded: products with weights in
FP8 blocks round their activations to FP8, too (arXiv 2412.19437, section 3.3.2), and index keys come out of their product
in float32. Weights of products with the same input are one weight; the layer's own become views of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.indexer import KEY_NORM_EPS, LightningIndexer
from engine.attention.mla import LATENT_NORM_EPS
from engine.kernels.triton.experts import run_experts
from engine.kernels.triton.fp8_product import linear_fp8, stack_rows
from engine.kernels.triton.gate import silu_times
from engine.kernels.triton.head_product import absorb, expand_values
from engine.kernels.triton.index_key import KeyForm
from engine.kernels.triton.latent_attention import attend_latents
from engine.kernels.triton.latent_expanded import attend_expanded
from engine.kernels.triton.latent_rows import IndexKeyPart, IndexQueryPart, rotate_queries, store_tokens
from engine.kernels.triton.norm import add_rms_norm
from engine.kernels.triton.routing import route
from engine.kernels.triton.scores import index_scores
from engine.kernels.triton.select import select
from engine.layers.rope import RotaryTable
from engine.memory.blocks import BLOCK, BlockWeight, Matrix
from engine.memory.planes import PagedCache, PlaneSpec
from engine.models.mla.layer import MlaLayer, MlaMlp, MlaMoe
from engine.models.rows.audit import look
from engine.models.rows.inputs import RowInputs


class Residual(NamedTuple):
    """What goes from layer to layer: of the residual stream x + update, and of the selections."""

    x: Tensor  # [T, E]
    update: Tensor | None  # [T, E], still to be added to x
    selected: Tensor | None = None  # [T, K] int32, of the last layer with an indexer; None: no row selects


def supports(layer: MlaLayer, specs: Sequence[PlaneSpec]) -> bool:
    """Whether the kernels compute a layer whose cache has these planes."""
    w, indexer, mlp = layer.attention.weights, layer.indexer, layer.mlp
    narrow = {spec.name for spec in specs if spec.dtype is torch.uint8}
    if "latent" in narrow and layer.attention.rank % 4:
        return False
    if (
        indexer is not None
        and "index_key" in narrow
        and not 4 <= indexer.head_dim & -indexer.head_dim == indexer.head_dim <= BLOCK
    ):
        return False
    if w.q_a is not None and not _stack(w.q_a, w.kv_a):
        return False
    if isinstance(mlp, MlaMlp):
        return True
    fp8 = isinstance(mlp.gate_up, BlockWeight)
    return fp8 == isinstance(mlp.down, BlockWeight) and not (fp8 and mlp.config.intermediate_size % BLOCK)


class DeviceLayer:
    """The device form of one layer, of one that is supported."""

    def __init__(self, layer: MlaLayer, number: int, rotary: RotaryTable) -> None:
        """Fuse the weights of `layer`, which is layer `number` of the cache."""
        self._layer, self._number, self._rotary = layer, number, rotary
        attention, indexer = layer.attention, layer.indexer
        w = attention.weights
        self._query_size = 0 if w.q_a is None else w.q_a.shape[0]
        self._hidden_weight = w.kv_a if w.q_a is None else _stacked(w.q_a, w.kv_a)
        if w.q_a is not None:
            both = self._hidden_weight
            rows = w.q_a.shape[0]
            w = replace(w, q_a=_rows(both, 0, rows), kv_a=_rows(both, rows, both.shape[0]))
        self._index_weight: Tensor | None = None
        if indexer is not None:
            self._index_weight = _index_weight(indexer)
        attention.weights = w
        self._shares = isinstance(layer.mlp, MlaMoe) and _alike(layer.mlp)

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for layers that launch the same kernels."""
        layer, mlp = self._layer, self._layer.mlp
        w = layer.attention.weights
        weights: list[Matrix | None] = [
            self._hidden_weight,
            w.q_b,
            w.kv_b,
            w.o,
            self._index_weight,
            mlp.gate_up,
            mlp.down,
        ]
        if isinstance(mlp, MlaMoe):
            weights += [mlp.gate, mlp.shared.gate_up, mlp.shared.down]
        return tuple(
            None
            if one is None
            else (type(one), tuple(one.shape), one.dtype if isinstance(one, Tensor) else None)
            for one in weights
        )

    def __call__(self, stream: Residual, inputs: RowInputs, cache: PagedCache) -> Residual:
        """Compute the layer of T rows, and write their part of the cache."""
        layer = self._layer
        x, hidden = add_rms_norm(stream.x, stream.update, layer.input_norm, layer.eps)
        attended, selected = self._attend(hidden, inputs, cache, stream.selected)
        x, hidden = add_rms_norm(x, attended, layer.post_norm, layer.eps)
        return Residual(x, self._feed(hidden, inputs.rows.positions), selected)

    def _attend(
        self, hidden: Tensor, inputs: RowInputs, cache: PagedCache, selected: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What attention adds to the residual stream, and the selections for the next layers."""
        attention, indexer, rows = self._layer.attention, self._layer.indexer, inputs.rows
        w, rank, nope, rotation = attention.weights, attention.rank, attention.nope, self._rotary.all()
        plane = cache.plane(self._number, "latent")
        made = product(hidden, self._hidden_weight)
        split = self._query_size
        latent = (made[:, :split], w.q_a_norm, LATENT_NORM_EPS) if w.q_a_norm is not None else None
        rated = None if self._index_weight is None else _float32_product(hidden, self._index_weight)
        key = None
        if indexer is not None and rated is not None:
            index_plane = cache.plane(self._number, "index_key")
            form: KeyForm = "fp8" if index_plane.dtype is torch.uint8 else "plain"
            key = IndexKeyPart(
                key=rated[:, : indexer.head_dim],
                norm_weight=indexer.weights.k_norm_weight,
                norm_bias=indexer.weights.k_norm_bias,
                eps=KEY_NORM_EPS,
                rotation=rotation,
                plane=index_plane,
                form=form,
                interleaved=indexer.interleaved,
            )
        normed = store_tokens(
            made[:, split:], w.kv_a_norm, LATENT_NORM_EPS, rotation, rows.positions, inputs.pages, inputs.offsets, plane,
            interleaved=attention.interleaved, query_latent=latent, index=key,
        )  # fmt: skip
        source = hidden if normed is None else normed
        query = product(source, w.q_b).view(len(hidden), attention.num_heads, -1)
        absorbed = query.new_empty(*query.shape[:2], rank + query.shape[2] - nope)
        part = None
        if key is not None and indexer is not None and rated is not None and inputs.top_k:
            part = IndexQueryPart(
                query=F.linear(source, _plain(indexer.weights.wq)),
                head_weights=rated[:, indexer.head_dim :],
                scale=indexer.num_heads**-0.5 * indexer.head_dim**-0.5,
                rotation=rotation,
                form=key.form,
                interleaved=indexer.interleaved,
            )
        asked = rotate_queries(
            query, rows.positions, rotation,
            interleaved=attention.interleaved, turned=absorbed[..., rank:], index=part,
        )  # fmt: skip
        if asked is not None and key is not None:
            selected = _selected(*asked, key.plane, inputs)
        absorb(query[..., :nope], w.kv_b[:, :nope], absorbed[..., :rank])
        singles = None if inputs.blocks is None else inputs.blocks.singles
        summed = attend_latents(
            absorbed, plane, rows, selected, rank, attention.scale, inputs.max_context, singles
        )
        values = expand_values(summed, w.kv_b[:, nope:])
        if inputs.dense is not None:
            attend_expanded(query, plane, rows, inputs.dense, w.kv_b, rank, attention.scale, values)
        return product(values.flatten(1), w.o), selected

    def _feed(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """What experts, or a dense MLP, add to the residual stream."""
        mlp = self._layer.mlp
        if isinstance(mlp, MlaMlp):
            return self._plain_mlp(hidden, mlp)
        experts, weights = route(hidden, mlp.gate, mlp.bias, mlp.config, positions)
        if self._shares:
            shared = (mlp.shared.gate_up, mlp.shared.down)
            return run_experts(
                hidden, experts, weights, mlp.gate_up, mlp.down, mlp.first, shared, dtype=hidden.dtype
            )
        routed = run_experts(hidden, experts, weights, mlp.gate_up, mlp.down, mlp.first)
        return (routed + self._plain_mlp(hidden, mlp.shared).float()).to(hidden.dtype)

    @staticmethod
    def _plain_mlp(hidden: Tensor, mlp: MlaMlp) -> Tensor:
        return product(silu_times(product(hidden, mlp.gate_up)), mlp.down)


def product(x: Tensor, weight: Matrix) -> Tensor:
    """x weight^T, [T, in] -> [T, out] in the dtype of x; with a weight in FP8 blocks x is rounded to FP8."""
    return F.linear(x, weight) if isinstance(weight, Tensor) else linear_fp8(x, weight)


def head_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """Logits: [N, E] -> [N, V] float32. Products of bfloat16 numbers are exact in float32, which adds them up."""
    return _float32_product(hidden, head)


def _float32_product(x: Tensor, weight: Tensor) -> Tensor:
    if x.device.type == "cuda" and x.dtype == weight.dtype == torch.bfloat16:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return F.linear(x.float(), weight.float())


def _plain(weight: object) -> Tensor:
    assert isinstance(weight, Tensor)
    return weight


def _stacked(first: Matrix, second: Matrix) -> Matrix:
    if isinstance(first, BlockWeight) and isinstance(second, BlockWeight):
        return stack_rows((first, second))
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    return torch.cat((first, second))


def _stack(first: Matrix, second: Matrix) -> bool:
    """Whether they can be one weight: the blocks of the first must be whole."""
    fp8 = isinstance(first, BlockWeight)
    return fp8 == isinstance(second, BlockWeight) and not (fp8 and first.shape[0] % BLOCK)


def _alike(moe: MlaMoe) -> bool:
    """Whether the shared expert has the size and the numbers of a routed one, so that one launch computes both."""
    pairs = ((moe.gate_up, moe.shared.gate_up), (moe.down, moe.shared.down))
    return all(
        isinstance(a, BlockWeight) == isinstance(b, BlockWeight) and a.shape[1:] == b.shape for a, b in pairs
    )


def _rows(weight: Matrix, start: int, stop: int) -> Matrix:
    return weight[start:stop] if isinstance(weight, Tensor) else weight.rows(start, stop)


def _index_weight(indexer: LightningIndexer) -> Tensor:
    """[d + H, E]: of the index key, then of the head weights.

    Head weights are float32, because a rounded one would change the selection. Those that bfloat16 holds (a checkpoint
    stores them so) are multiplied as bfloat16, with the same products.
    """
    w = indexer.weights
    wk, heads = _plain(w.wk), _plain(w.weights_proj)
    narrow = heads.to(wk.dtype)
    return torch.cat(
        (wk, narrow) if torch.equal(narrow.to(heads.dtype), heads) else (wk.to(heads.dtype), heads)
    )


def _selected(query: Tensor, weights: Tensor, plane: Tensor, inputs: RowInputs) -> Tensor:
    """Score and select, piece by piece: [T, K] int32."""
    chosen = []
    for piece in inputs.pieces:
        own = slice(piece.first, piece.first + len(piece.rows))
        rated = index_scores(
            query[own], weights[own], plane, piece.rows, inputs.max_context, piece.blocks, fill=False
        )
        chosen.append(select(rated, piece.rows, inputs.top_k))
    selected = chosen[0] if len(chosen) == 1 else torch.cat(chosen)
    if inputs.flaws is not None:
        look(inputs.flaws, selected, inputs.rows, inputs.max_context)
    return selected
