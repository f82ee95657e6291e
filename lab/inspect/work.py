"""What a step has to read, write and compute, operation by operation, from a model's config alone.

Each operation reads its inputs once and writes its outputs once. StepRows of one request share what they read. What can be
part of another operation is not counted: norms, rotation, quantisation, residual sums, softmax, sampling. So no program
that keeps the operations apart needs less.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from engine.checkpoint.loader import Weight, num_bytes, stays_fp8
from engine.models.family import AttentionShape, Shape
from engine.plan.sparsity import is_dense
from engine.protocol import IndexTopK
from lab.inspect.ceilings import Arithmetic, Ceilings

_OF_LAYER = re.compile(r"layers\.\d+\.(.+)")
_SPARSE_ROWS_ONLY = ("indexer.wq", "indexer.weights_proj", "adapter.")
"""Weights that dense rows do without, by the beginnings of their names."""
_BY_HEADS = "attn.kv_b"
"""The weight that expands cached latents for all heads, or is multiplied into queries and results head by head."""
_SCORE_BYTES = _CHOICE_BYTES = 4


@dataclass(frozen=True)
class Operation:
    """An operation, which one or more layers do alike."""

    name: str
    layers: int
    num_bytes: float  # read and written in one layer
    flops: Mapping[Arithmetic, float] = field(default_factory=dict)  # of one layer
    sent: float = 0.0  # bytes that a device sends to the others, in one layer

    def seconds(self, device: Ceilings) -> float:
        """The least time of all its layers."""
        return self.layers * device.seconds(self.num_bytes, self.flops, self.sent)

    def bound(self, device: Ceilings) -> str:
        """What the least time is spent on: memory, arithmetic or link."""
        return device.bound(self.num_bytes, self.flops, self.sent)


@dataclass(frozen=True)
class StepRows:
    """The rows of a step: equally many of each request, at equal positions."""

    requests: int
    tokens: int  # rows of each request
    start: int  # tokens of each request before the step
    index_top_k: IndexTopK  # None: attention is dense
    logits: int = 0  # rows whose logits are computed

    @property
    def count(self) -> int:
        """All rows."""
        return self.requests * self.tokens


@dataclass(frozen=True)
class HeldModel:
    """How a model is held on each of one or more devices, by tensor parallelism."""

    shape: Shape
    devices: int
    dtype: torch.dtype  # of plain weights and of activations
    cache: str  # a key of `shape.cache`
    in_blocks: Callable[[str], bool]  # whether a tensor is stored in FP8 blocks
    keep_fp8: bool = True  # whether such tensors stay so

    @property
    def plain(self) -> Arithmetic:
        """The format that products of plain numbers are computed in."""
        return "float32" if self.dtype == torch.float32 else "bf16"

    @property
    def hidden(self) -> int:
        """The hidden size."""
        return self.shape.table["embed"].shape[1]

    def table(self) -> Mapping[str, Weight]:
        """The weights of the first device, which has most."""
        return self.shape.table if self.devices == 1 else self.shape.rank_table(self.devices)

    def weight(self, weight: Weight) -> tuple[int, Arithmetic]:
        """The bytes of a weight, and the format of its products."""
        kept = self.keep_fp8 and stays_fp8(weight, self.in_blocks)
        wide = (weight.dtype or self.dtype) == torch.float32
        return num_bytes(weight, self.dtype, fp8=kept), "fp8" if kept else "float32" if wide else "bf16"


def operations(held: HeldModel, rows: StepRows) -> list[Operation]:
    """Return all operations of a step on the first device."""
    table = held.table()
    attends = [_Attention(held, table, kind, rows) for kind in held.shape.attention]
    hidden = rows.count * held.hidden * held.dtype.itemsize
    made = [Operation("embedding", 1, 2 * hidden), *_products(held, table, rows, attends)]
    made += [operation for one in attends for operation in one.operations()]
    if held.devices > 1:  # each device sends 2 (N - 1) / N of the sums, and each layer has two
        sent = 2 * (held.devices - 1) / held.devices * hidden
        made.append(Operation("all-reduce", 2 * held.shape.num_layers, 2 * hidden, sent=sent))
    if rows.logits:
        vocab, _ = held.shape.table["head" if "head" in held.shape.table else "embed"].shape
        moved = (vocab + rows.logits) * held.hidden * held.dtype.itemsize + 4 * rows.logits * vocab
        flops = 2.0 * vocab * held.hidden * rows.logits
        made.append(Operation("head", 1, moved, {held.plain: flops}))
    return made


def _products(
    held: HeldModel, table: Mapping[str, Weight], rows: StepRows, attends: Sequence[_Attention]
) -> Iterator[Operation]:
    """The products with weights of layers. What is alike in several layers is one operation."""
    alike: Counter[tuple[str, tuple[int, ...], int, Arithmetic]] = Counter()
    for name, weight in table.items():
        inside = _OF_LAYER.fullmatch(name)
        if inside and len(weight.shape) == 2:
            alike[inside[1], weight.held_shape, *held.weight(weight)] += 1
    sparse, expanded = max(one.sparse for one in attends), max(one.expanded for one in attends)
    share = held.shape.expert_share
    for (name, (outputs, inputs), size, arithmetic), layers in alike.items():
        each = rows.tokens
        if name.startswith(_SPARSE_ROWS_ONLY):
            each = sparse
        elif name == _BY_HEADS:
            each -= expanded
        count = rows.requests * each
        if not count:
            continue
        read, flops = float(size), 2.0 * outputs * inputs * count
        numbers = inputs + outputs  # of a row, read and written
        if name.startswith("moe.experts"):
            # A row visits every expert with the same chance. What lies between both products stays on the chip.
            read, flops, numbers = size * (1 - (1 - share) ** count), flops * share, held.hidden
        elif name.endswith("gate_up"):
            numbers = inputs + outputs // 2
        elif name == _BY_HEADS:  # queries of the keys' dims become latents, and latents become values
            numbers = outputs + 2 * inputs * (held.shape.attention[0].heads // held.devices)
        yield Operation(name, layers, read + count * numbers * held.dtype.itemsize, {arithmetic: flops})


class _Attention:
    """Index scores, selection, attention and cache writes of layers of one kind."""

    def __init__(
        self, held: HeldModel, table: Mapping[str, Weight], kind: AttentionShape, rows: StepRows
    ) -> None:
        self._held, self._kind, self._rows = held, kind, rows
        top_k = rows.index_top_k if kind.index_heads else None
        contexts = [rows.start + i + 1 for i in range(rows.tokens)]
        if kind.window is not None:
            contexts = [min(context, kind.window) for context in contexts]
        dense = [context for context in contexts if is_dense(context, top_k)]
        self.sparse = len(contexts) - len(dense)  # sparse rows of a request; they come last
        self._top_k = top_k or 0
        self._dense_pairs = sum(dense)
        self._sparse_pairs = sum(contexts) - self._dense_pairs
        self._dense_rows = len(dense)
        self._dense_context = self._seen(rows.start + len(dense), len(dense))
        self._sparse_context = self._seen(rows.start + rows.tokens, self.sparse)
        self._heads = kind.heads // held.devices
        self._expansion = next((weight for name, weight in table.items() if name.endswith(_BY_HEADS)), None)
        self.expanded = self._dense_rows if self._dense_flops(expanded=True) < self._dense_flops() else 0
        """StepRows of a request that attend to expanded tokens."""

    def operations(self) -> Iterator[Operation]:
        """Return what is to be done; nothing without rows for it."""
        kind, requests, held = self._kind, self._rows.requests, self._held
        kv, key = held.shape.cache[held.cache]
        item, suffix = held.dtype.itemsize, "" if kind.window is None else f", window {kind.window}"
        yield Operation(f"cache writes{suffix}", kind.layers, self._rows.count * kv)
        if kind.index_layers:
            yield Operation(f"index key writes{suffix}", kind.index_layers, self._rows.count * key)
        if self.sparse:
            fp8 = held.cache == "fp8"
            queries = self.sparse * kind.index_heads * (kind.index_dim * (1 if fp8 else item) + 4)
            scores = self._sparse_pairs * _SCORE_BYTES
            yield Operation(
                f"index scores{suffix}", kind.index_layers,
                requests * (self._sparse_context * key + queries + scores),
                {"fp8" if fp8 else held.plain: 2.0 * kind.index_heads * kind.index_dim * requests * self._sparse_pairs},
            )  # fmt: skip
            chosen = self.sparse * self._top_k
            yield Operation(
                f"selection{suffix}", kind.index_layers, requests * (scores + chosen * _CHOICE_BYTES)
            )
            moved = min(self._sparse_context, chosen) * kv + chosen * _CHOICE_BYTES
            flops = 2.0 * self._heads * (kind.key_dim + kind.value_dim) * chosen
            moved += self.sparse * self._heads * (kind.key_dim + kind.value_dim) * item
            yield Operation(
                f"sparse attention{suffix}", kind.layers, requests * moved, {held.plain: requests * flops}
            )
        if self._dense_rows:
            dims, read = (kind.key_dim, kind.value_dim), float(self._dense_context * kv)
            if self.expanded and kind.expanded is not None and self._expansion is not None:
                dims, read = kind.expanded, read + held.weight(self._expansion)[0] / requests
            read += self._dense_rows * self._heads * sum(dims) * item
            name = f"dense attention{', expanded' if self.expanded else ''}{suffix}"
            flops = self._dense_flops(expanded=bool(self.expanded))
            if not self.expanded and self._expansion is not None:
                flops -= self._by_heads(self._dense_rows)  # they are a product of their own
            yield Operation(name, kind.layers, requests * read, {held.plain: requests * flops})

    def _dense_flops(self, *, expanded: bool = False) -> float:
        """Operations of the dense rows of a request, with the products that change tokens or rows for them."""
        kind = self._kind
        if not expanded:
            pair = 2.0 * self._heads * (kind.key_dim + kind.value_dim)
            return pair * self._dense_pairs + self._by_heads(self._dense_rows)
        if kind.expanded is None:
            return math.inf
        return 2.0 * self._heads * sum(kind.expanded) * self._dense_pairs + self._by_heads(
            self._dense_context
        )

    def _by_heads(self, rows: int) -> float:
        """Operations of the products of `rows` rows or tokens with the weight of all heads."""
        return 0.0 if self._expansion is None else 2.0 * math.prod(self._expansion.held_shape) * rows

    def _seen(self, end: int, rows: int) -> int:
        """How many different tokens the `rows` rows that end at position `end` see."""
        if not rows:
            return 0
        return end if self._kind.window is None else min(end, self._kind.window + rows - 1)
