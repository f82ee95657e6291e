"""Cuts one step's rows into tiles of attention work. Integers only; `engine.attention.tiling` makes tensors of them.

A tile is either many rows of one request (a prefill chunk) or one row of each of several requests (decodes). All its
rows are attended in the same form:

- `dense`: attend over the whole context, without the indexer. For the rows that `engine.plan.sparsity` says are dense.
- `gather`: score, select, gather the selected tokens, attend over them.
- `mask`: score, select, attend over the whole context with the other tokens masked out. The result is that of
  `gather`; it is cheaper if many rows share a context that is hardly longer than index_top_k.

Tiles bound memory: the arrays that a tile needs stay under the byte budget, however long the context and the chunk
are. A single row that needs more than the budget cannot be cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from engine.config import PAGE_SIZE
from engine.plan.sparsity import dense_rows
from engine.protocol import IndexTopK

Form = Literal["dense", "gather", "mask"]


class Segment(NamedTuple):
    """Consecutive rows of one request in the batch."""

    first_row: int  # index into the batch
    num_rows: int
    start: int  # position of the first row
    page_ids: tuple[int, ...]
    index_top_k: IndexTopK

    @property
    def dense_rows(self) -> int:
        """How many leading rows read their whole context."""
        return dense_rows(self.start, self.num_rows, self.index_top_k)


@dataclass(frozen=True)
class Tile:
    """R requests x Q rows; R = 1 or Q = 1."""

    form: Form
    rows: tuple[tuple[int, ...], ...]  # [R][Q] indices into the batch
    positions: tuple[tuple[int, ...], ...]  # [R][Q]
    page_ids: tuple[tuple[int, ...], ...]  # [R], each as long as its own context needs
    index_top_k: tuple[int, ...]  # [R]; for a dense request the context
    expanded: bool = False  # latent attention makes each head's keys and values first

    @property
    def context_pages(self) -> int:
        """Pages of the longest context in the tile."""
        return max(len(pages) for pages in self.page_ids)


@dataclass(frozen=True)
class TileCosts:
    """The numbers that decide the size and the form of a tile, for one model on one device.

    Only the ratio of `gather_cost` and `mask_cost` matters. `python -m benchmarks.forms` measures them, and only
    `sparse_form` uses them.
    """

    budget_bytes: int
    index_row_bytes: int  # per (row, context position) of scoring: index heads x 4
    attention_row_bytes: int  # per (row, context position) of masked attention: query heads x 4
    token_bytes: int  # keys and values of one token, one layer
    gather_cost: float = 1.0  # per (row, selected token) of `gather`
    mask_cost: float = 0.075  # per (row, context position) of `mask`
    forced: Literal["auto", "gather", "mask"] = "auto"
    fused: bool = False  # the kernels work row by row: dense and gathered tiles need no arrays of their own
    few_rows: int = (
        1  # steps of at most so many rows run through code of their own; only `engine.plan.cost` uses it
    )

    def sparse_form(self, rows: int, context: int, index_top_k: int) -> Form:
        """Return the cheaper sparse form for `rows` rows of one request. A single row always gathers."""
        if self.forced != "auto":
            return self.forced
        if rows == 1 or self.fused:  # fused kernels gather as fast as they read in order, and need no mask
            return "gather"
        return "gather" if index_top_k * self.gather_cost < context * self.mask_cost else "mask"

    def expands(self, rows: int, context: int) -> bool:
        """Whether a dense or masked tile of latent attention makes the keys and values of its context first."""
        return False

    def row_bytes(self, form: Form, context: int, index_top_k: int) -> int:
        """Bytes of arrays that one more row of a tile needs at its peak."""
        if self.fused and form != "mask":
            return 1
        scores = 0 if form == "dense" else context * (self.index_row_bytes + 4)
        if form == "gather":
            return max(scores, min(index_top_k, context) * self.token_bytes)
        return max(scores, context * self.attention_row_bytes)


@dataclass(frozen=True)
class LatentTileCosts(TileCosts):
    """The costs of multi-head latent attention, in multiply-adds.

    A head has n plain, p rotated and v value dims; r is the rank. Absorbed, a row reads r + p numbers of each token
    and head, and sums r. Expanded, it reads n + p numbers and sums v. But first each token is expanded once for all
    rows of the tile, to n + v numbers of r terms a head. To absorb a row costs as much as to expand a token.

    `gather_cost` is an estimate; the one of `TileCosts` was measured. Kernels that stream (`Kernels.streams_latents`)
    read tokens where they lie, so gathering is the same work as masking. A multiply-add of the expanded form took 1.2
    times as long as an absorbed one on an AMD EPYC with bfloat16 products.
    """

    num_heads: int = 1
    rank: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128
    item_bytes: int = 4  # bytes of one number of an expanded key or value
    streams: bool = False  # the kernels never hold all per-head scores, nor a copy of a context
    expanded_unit: float = 1.0  # cost of a multiply-add of the expanded form; an absorbed one costs 1
    gather_cost: float = 2.0  # cost of a gathered multiply-add; one over the whole context costs 1

    def row_bytes(self, form: Form, context: int, index_top_k: int) -> int:
        """Count also a row's sums of values, which are the larger part if the kernels stream."""
        sums = 4 * self.num_heads * max(self.value, self.rank if form == "gather" else 0)
        return max(super().row_bytes(form, context, index_top_k), sums if self.streams else 0)

    def absorbed_cost(self, rows: int, tokens: float) -> float:
        """Multiply-adds of `rows` rows over `tokens` tokens each in the absorbed form."""
        per_pair = 2 * self.rank + self.rope
        return self.num_heads * rows * (tokens * per_pair + self.rank * (self.nope + self.value))

    def expanded_cost(self, rows: int, context: int) -> float:
        """Multiply-adds of `rows` rows over one context of `context` tokens in the expanded form."""
        per_pair = self.nope + self.rope + self.value
        made = self.rank * (self.nope + self.value)
        return self.num_heads * context * (rows * per_pair + made) * self.expanded_unit

    def expands(self, rows: int, context: int) -> bool:
        """Expand if it costs less, and if the expanded context fits into half the budget or is never held whole."""
        per_token = self.num_heads * (2 * self.nope + self.rope + self.value) * self.item_bytes
        fits = self.streams or context * per_token * 2 <= self.budget_bytes
        return fits and self.expanded_cost(rows, context) < self.absorbed_cost(rows, context)

    def sparse_form(self, rows: int, context: int, index_top_k: int) -> Form:
        """Return the form of the cheapest: gathering, masking in the absorbed form, masking in the expanded form."""
        if self.forced != "auto":
            return self.forced
        if rows == 1:
            return "gather"
        mask = self.absorbed_cost(rows, context)
        if self.expands(rows, context):
            mask = self.expanded_cost(rows, context)
        return "gather" if self.absorbed_cost(rows, index_top_k * self.gather_cost) < mask else "mask"


def cut(segments: Sequence[Segment], costs: TileCosts) -> tuple[Tile, ...]:
    """Cut `segments` into tiles that cover each row exactly once."""
    lone_dense = [s for s in segments if s.num_rows == 1 and s.dense_rows == 1]
    lone_sparse = [s for s in segments if s.num_rows == 1 and s.dense_rows == 0]
    tiles = [*_decode_tiles("dense", lone_dense, costs), *_decode_tiles("gather", lone_sparse, costs)]
    for segment in segments:
        if segment.num_rows > 1:
            tiles.extend(_prefill_tiles(segment, costs))
    return tuple(tiles)


def _pages_for(position: int) -> int:
    return position // PAGE_SIZE + 1


def _decode_tiles(form: Form, segments: Iterable[Segment], costs: TileCosts) -> Iterator[Tile]:
    """Group single rows with similar contexts, so that padding to the longest wastes at most about half."""
    if form == "gather" and costs.forced == "mask":
        form = "mask"
    group: list[Segment] = []
    used = 0
    for segment in sorted(segments, key=lambda s: -s.start):
        context = _pages_for(group[0].start if group else segment.start) * PAGE_SIZE
        need = context * costs.token_bytes + costs.row_bytes(form, context, segment.index_top_k or context)
        short = _pages_for(segment.start) * 2 * PAGE_SIZE < context and context > 4 * PAGE_SIZE
        if group and (used + need > costs.budget_bytes or short):
            yield _decode_tile(form, group)
            group, used = [], 0
        group.append(segment)
        used += need
    if group:
        yield _decode_tile(form, group)


def _decode_tile(form: Form, group: Sequence[Segment]) -> Tile:
    return Tile(
        form=form,
        rows=tuple((s.first_row,) for s in group),
        positions=tuple((s.start,) for s in group),
        page_ids=tuple(s.page_ids[: _pages_for(s.start)] for s in group),
        index_top_k=tuple(s.start + 1 if s.index_top_k is None else s.index_top_k for s in group),
    )


def prefill_spans(segment: Segment, costs: TileCosts) -> Iterator[tuple[Form, int, int, int]]:
    """Cut one request's rows at the first sparse row, and wherever the budget is full.

    Yields (form, number of rows, tokens of context in whole pages, index_top_k) of each tile, in the order of the rows.
    """
    row = 0
    while row < segment.num_rows:
        dense = row < segment.dense_rows
        end = segment.dense_rows if dense else segment.num_rows
        context = _pages_for(segment.start + end - 1) * PAGE_SIZE
        index_top_k = context if segment.index_top_k is None else segment.index_top_k
        form: Form = "dense" if dense else costs.sparse_form(end - row, context, index_top_k)
        count = max(1, min(end - row, costs.budget_bytes // costs.row_bytes(form, context, index_top_k)))
        row += count
        yield form, count, _pages_for(segment.start + row - 1) * PAGE_SIZE, index_top_k


def _prefill_tiles(segment: Segment, costs: TileCosts) -> Iterator[Tile]:
    row = 0
    for form, count, context, index_top_k in prefill_spans(segment, costs):
        first, position = segment.first_row + row, segment.start + row
        yield Tile(
            form=form,
            rows=(tuple(range(first, first + count)),),
            positions=(tuple(range(position, position + count)),),
            page_ids=(segment.page_ids[: context // PAGE_SIZE],),
            index_top_k=(index_top_k,),
            expanded=form != "gather" and costs.expands(count, context),
        )
        row += count
