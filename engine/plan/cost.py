"""Counts the work of a step and models its seconds. `engine.plan.meter` divides measured time by it.

Work is counted from the plan and the model's shape: which rows run, how many tokens the indexer scores for
them, how many tokens attention reads. `CostModel` turns work into modelled seconds with the coefficients of a
linear model. `dsa calibrate` measures them; without a calibration they are assumed from the shape. A step's
measured time is divided over its requests in proportion to their modelled seconds. So only ratios matter, and
every measured second belongs to a request. The same model, scaled by the same measured step, says what the rows
would have taken with dense attention.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from engine.config import PAGE_SIZE
from engine.errors import ConfigError
from engine.plan.sparsity import dense_rows, is_dense, row_index_top_k
from engine.plan.tiles import Segment, TileCosts, prefill_spans
from engine.plan.types import ScheduledRequest, StepPlan
from engine.protocol import IndexTopK


class ModelShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Arithmetic and traffic of one model, summed over its layers. A multiply-add is 2 FLOPs."""

    row_flops: int  # linear layers, one token: 2 x the active weights, index key projection included
    sparse_row_flops: int  # index query projections, one token; dense rows do without
    head_flops: int  # logits of one row
    pair_flops: int  # one row attends to one token: 4 x query heads x head dim
    index_pair_flops: int  # one row scores one token: 2 x index heads x (index dim + 1)
    weight_bytes: int  # bytes of weights, read once a step
    kv_token_bytes: int  # keys and values of one token
    index_token_bytes: int  # index key of one token; 0 without an indexer


class Coefficients(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds for one unit of each kind of work; none is negative. From `lone` on, the order of `CostModel.features`.

    Lone rows (decodes, and chunks of few rows) and the rows of longer chunks run through different code. Lone rows
    wait for memory and chunks wait for arithmetic, so each has its own coefficients.
    """

    step: float  # a step: reading the weights, launching
    head: float  # a step that computes logits

    lone: float  # a lone row
    lone_pair: float  # a context token that a dense lone row reads
    lone_sparse: float  # a lone row whose index queries are computed
    lone_gathered: float  # a selected token of a lone row
    lone_index_pair: float  # a context token that is scored and ranked for a lone row

    chunk: float  # a chunk
    row: float  # a row of a chunk, through the linear layers
    pair: float  # (row, context token) of masked attention, dense or not
    context: float  # a context token that is copied for masked attention
    sparse_row: float  # a row of a chunk whose index queries are computed
    gathered: float  # (row, selected token) of gathered attention
    index_pair: float  # (row, context token) scored and ranked

    def __post_init__(self) -> None:
        values = msgspec.structs.astuple(self)
        if not all(math.isfinite(value) and value >= 0 for value in values) or not any(values):
            raise ValueError("coefficients must be finite, at least 0, and not all 0")


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file that `dsa calibrate` writes: coefficients, what they were measured on, and their errors."""

    shape: ModelShape
    device: str  # type of the device: cpu, cuda
    dtype: str
    kernels: str  # name of the backend
    coefficients: Coefficients
    steps: int  # measured steps that were fitted
    median_error: float  # |modelled / measured - 1| of a step, median over steps that were not fitted
    worst_error: float  # the largest error of those steps
    dense_errors: dict[int, float]  # context -> estimated / measured - 1 of the dense seconds of a sparse run

    def check(self, shape: ModelShape, device: str, dtype: str, kernels: str) -> None:
        """Check that the calibration was measured for this model, device, dtype and backend.

        Raises:
            ConfigError: it was measured for another one.
        """
        # The shape counts bytes, so another dtype also changes the shape. So the shape is compared last.
        mine, asked = (
            (self.device, self.kernels, self.dtype, self.shape),
            (device, kernels, dtype, shape),
        )
        if mine != asked:
            what = next(
                name
                for name, one, two in zip(("device", "kernels", "dtype", "model"), mine, asked, strict=True)
                if one != two
            )
            other = "other kernels" if what == "kernels" else f"another {what}"
            raise ConfigError(
                f"the cost calibration was measured with {other}; run dsa calibrate for this setting"
            )


def read_calibration(path: Path) -> Calibration:
    """Read a file of `dsa calibrate`.

    Raises:
        ConfigError: the file cannot be read, or is not a calibration.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Calibration)
    except OSError as error:
        raise ConfigError(f"the cost calibration {path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(
            f"{path} is not a cost calibration: {error}; write one with dsa calibrate"
        ) from error


@dataclass(frozen=True)
class _Speeds:
    """Round numbers for a kind of machine: arithmetic in FLOP/s, memory in bytes/s. The slower of the two counts."""

    launch: float  # seconds a step
    weights: float  # bytes/s, read by a step
    chunk_step: float  # a chunk adds this factor times the time that reading the weights takes
    lone: float  # FLOP/s of linear layers, lone rows
    linear: float  # FLOP/s of linear layers, a chunk
    pair: float  # FLOP/s of attention
    gathered: float  # FLOP/s of attention over selected tokens
    index: float  # FLOP/s of index queries and scores, a chunk
    lone_index: float  # FLOP/s of index scores, lone rows
    lone_queries: float  # FLOP/s of index queries, lone rows
    cache: float  # bytes/s of keys and values that a lone row reads in order
    scattered: float  # bytes/s of selected keys and values that a lone row reads
    together: float  # bytes/s of contexts that are copied for a chunk


_SPEEDS = {
    # `native` and `cpu`: measured by `dsa calibrate` on one core of an AMD EPYC with AVX-512 and bfloat16.
    "native": _Speeds(
        launch=5e-4, weights=4e10, chunk_step=2.6, lone=1.5e11, linear=1.8e11, pair=1.45e11, gathered=7.5e10,
        index=2.8e11, lone_index=1e11, lone_queries=5e10, cache=1.7e10, scattered=1.4e10, together=math.inf,
    ),
    "cpu": _Speeds(
        launch=2e-3, weights=5e9, chunk_step=0.0, lone=1e11, linear=1.7e11, pair=5.5e10, gathered=3.8e9,
        index=2.2e10, lone_index=5e9, lone_queries=1e11, cache=1.3e9, scattered=8.5e8, together=1e9,
    ),
    # `cuda`: between what two models reach on an H200 (benchmarks/gpu/log.md), 0.1B and 1.5B parameters.
    "cuda": _Speeds(
        launch=4e-4, weights=2e12, chunk_step=0.0, lone=3e14, linear=4e14, pair=2.5e14, gathered=4e13, index=4e13,
        lone_index=4e13, lone_queries=3e14, cache=3e12, scattered=1e12, together=2e12,
    ),
}  # fmt: skip


def assumed_coefficients(shape: ModelShape, device: str, kernels: str = "torch") -> Coefficients:
    """Return coefficients from round numbers for a kind of device; measured ones are better. Only ratios are used."""
    s = _SPEEDS[
        "native" if device == "cpu" and kernels == "native" else device if device in _SPEEDS else "cpu"
    ]
    weights = shape.weight_bytes / s.weights
    return Coefficients(
        step=s.launch + weights,
        head=0.0,
        lone=shape.row_flops / s.lone,
        lone_pair=max(shape.pair_flops / s.pair, shape.kv_token_bytes / s.cache),
        lone_sparse=shape.sparse_row_flops / s.lone_queries,
        lone_gathered=max(shape.pair_flops / s.gathered, shape.kv_token_bytes / s.scattered),
        lone_index_pair=max(shape.index_pair_flops / s.lone_index, shape.index_token_bytes / s.cache),
        chunk=s.launch / 100 + s.chunk_step * weights,
        row=shape.row_flops / s.linear,
        pair=shape.pair_flops / s.pair,
        context=shape.kv_token_bytes / s.together,
        sparse_row=shape.sparse_row_flops / s.index,
        gathered=shape.pair_flops / s.gathered,
        index_pair=shape.index_pair_flops / s.index,
    )


class Counts(NamedTuple):
    """The exact work of one request in one step: counts of tokens, the same in every layer."""

    rows: int  # tokens computed
    attended: int  # (row, token) pairs that attention reads: the selected tokens, or the whole context
    index_pairs: int  # (row, token) pairs that the indexer scores
    kv_rows_read: int  # tokens whose keys and values are read; rows of a tile may share them
    index_rows_read: int  # tokens whose index key is read
    logits: int  # rows whose logits are computed
    sparse_rows: int  # rows that read less than their whole context


class Modelled(NamedTuple):
    """Modelled seconds of one request in one step, without the time that all requests of the step share."""

    actual: float
    scoring: float  # the part of `actual` that scoring and selecting take
    dense: float  # what `actual` would be if every row read its whole context


class CostModel:
    """Work and modelled seconds of one model on one device.

    Args:
        shape: the model's.
        coefficients: measured or assumed.
        tiles: how attention work is cut and which form it takes; the same as the model's.
    """

    def __init__(self, shape: ModelShape, coefficients: Coefficients, tiles: TileCosts) -> None:
        self.shape = shape
        self.coefficients = coefficients
        self._own = msgspec.structs.astuple(coefficients)[2:]
        self._lone = self._own[:5]
        self._tiles = tiles

    def replace(self, coefficients: Coefficients) -> CostModel:
        """Return a cost model of the same shape and tiles with other coefficients."""
        return CostModel(self.shape, coefficients, self._tiles)

    def counts(self, request: ScheduledRequest) -> Counts:
        """Count the work of a scheduled request."""
        start, rows = request.start, len(request.token_ids)
        end = start + rows
        seen = _triangle(end) - _triangle(start)  # sum of positions + 1
        logits = len(request.prompt_targets) + (0 if request.sample is None else 1 + request.num_drafts)
        selected = row_index_top_k(end, request.index_top_k)
        if not selected:  # the last row is dense, so all rows are
            return Counts(rows, seen, 0, end, 0, logits, 0)
        dense = dense_rows(start, rows, selected)
        edge = start + dense  # the first sparse position
        scored = _triangle(end) - _triangle(edge)
        attended = seen - scored + (rows - dense) * selected
        read = edge if dense else 0
        indexed = 0
        for form, count, context, width in self._spans(rows, start, selected):
            if form == "dense":
                continue
            indexed += context
            read += count * width if form == "gather" else context
        return Counts(rows, attended, scored, read, indexed, logits, rows - dense)

    def decode(self, start: int, index_top_k: IndexTopK) -> tuple[Counts, Modelled]:
        """`counts` and `modelled` of one row that is sampled from, at position `start`: nearly all rows that are served."""
        end = start + 1
        context = (start // PAGE_SIZE + 1) * PAGE_SIZE
        lone, pair, sparse, gathered, index_pair = self._lone
        dense = lone + pair * (end if self._tiles.fused else context)
        selected = row_index_top_k(end, index_top_k)
        if not selected:
            return Counts(1, end, 0, end, 0, 1, 0), Modelled(dense, 0.0, dense)
        masked = self._tiles.forced == "mask"
        scored = index_pair * (end if self._tiles.fused and not masked else context)
        read = pair * context if masked else gathered * selected
        return (
            Counts(1, selected, end, context if masked else selected, context, 1, 1),
            Modelled(lone + sparse + read + scored, sparse + scored, dense),
        )

    def features(self, request: ScheduledRequest) -> tuple[int, ...]:
        """Count a request's work in the units of `Coefficients` from `lone` on, the padding of tiles included."""
        return self._features(len(request.token_ids), request.start, request.index_top_k)

    def modelled(self, request: ScheduledRequest) -> Modelled:
        """Model the seconds of a scheduled request."""
        return self.modelled_rows(len(request.token_ids), request.start, request.index_top_k)

    def modelled_rows(self, rows: int, start: int, index_top_k: IndexTopK) -> Modelled:
        """Model the seconds of `rows` rows of one request, from position `start` on."""
        dense = self._seconds(self._features(rows, start, None))
        if is_dense(start + rows, index_top_k):
            return Modelled(dense, 0.0, dense)
        units = self._features(rows, start, index_top_k)
        return Modelled(self._seconds(units), self._seconds(_index_part(units)), dense)

    def shared(self, plan: StepPlan) -> float:
        """Modelled seconds that all requests of a step share, whatever they are."""
        c = self.coefficients
        return c.step + (c.head if any(_has_logits(request) for request in plan.requests) else 0.0)

    def seconds(self, plan: StepPlan) -> float:
        """Modelled seconds of a step."""
        return self.shared(plan) + sum(self.modelled(request).actual for request in plan.requests)

    def flops(self, counts: Counts) -> int:
        """FLOPs that the work needs. Work on the padding of tiles is not counted."""
        s = self.shape
        return (
            counts.rows * s.row_flops
            + counts.logits * s.head_flops
            + counts.attended * s.pair_flops
            + counts.sparse_rows * s.sparse_row_flops
            + counts.index_pairs * s.index_pair_flops
        )

    def cache_bytes(self, counts: Counts) -> int:
        """Bytes of the paged cache that are read, and written for the new rows. Weights are not counted."""
        s = self.shape
        written = counts.rows * (s.kv_token_bytes + s.index_token_bytes)
        return written + counts.kv_rows_read * s.kv_token_bytes + counts.index_rows_read * s.index_token_bytes

    def _spans(self, rows: int, start: int, index_top_k: IndexTopK) -> Iterable[tuple[str, int, int, int]]:
        """Return (form, rows, context in whole pages, index_top_k) of each tile of a request's rows."""
        if rows == 1:
            context = (start // PAGE_SIZE + 1) * PAGE_SIZE
            selected = row_index_top_k(start + 1, index_top_k)
            if not selected:
                return (("dense", 1, context, context),)
            form = "mask" if self._tiles.forced == "mask" else "gather"
            return ((form, 1, context, selected),)
        segment = Segment(first_row=0, num_rows=rows, start=start, page_ids=(), index_top_k=index_top_k)
        return prefill_spans(segment, self._tiles)

    def _features(self, rows: int, start: int, index_top_k: IndexTopK) -> tuple[int, ...]:
        pair = context = gathered = sparse = index = 0
        end = start
        for form, count, width, selected in self._spans(rows, start, index_top_k):
            end += count
            # Fused kernels stop at each row's own position, but a mask covers the tile's whole context.
            exact = self._tiles.fused and form != "mask"
            seen = _triangle(end) - _triangle(end - count) if exact else count * width
            if form == "gather":
                gathered += count * selected
            else:
                pair += seen
                context += width
            if form != "dense":
                sparse += count
                index += seen
        if rows <= self._tiles.few_rows:  # as if the step had no other rows: they are not known here
            return (rows, pair, sparse, gathered, index, *_NONE_OF_A_CHUNK)
        return (*_NONE_OF_A_LONE_ROW, 1, rows, pair, context, sparse, gathered, index)

    def _seconds(self, units: tuple[int, ...]) -> float:
        return float(sum(map(operator.mul, units, self._own)))


_NONE_OF_A_LONE_ROW = (0,) * 5
_NONE_OF_A_CHUNK = (0,) * 7


def _index_part(units: tuple[int, ...]) -> tuple[int, ...]:
    """The units of scoring and selecting; all other units are 0."""
    _, _, sparse, _, index, _, _, _, _, rows, _, pairs = units
    return (0, 0, sparse, 0, index, 0, 0, 0, 0, rows, 0, pairs)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def _has_logits(request: ScheduledRequest) -> bool:
    return request.sample is not None or bool(request.prompt_targets)


def calibration_json(calibration: Calibration) -> bytes:
    """Return a calibration as the bytes of its file."""
    plain: Any = msgspec.to_builtins(calibration)
    return msgspec.json.format(msgspec.json.encode(plain), indent=2) + b"\n"
