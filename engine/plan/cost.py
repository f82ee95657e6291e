"""What a step costs, and whose cost it is. Integers and a few coefficients: no tensors here.

Work is counted from the plan and the model's shape: which rows run, how many earlier tokens the indexer
scores for them, how many attention reads. `CostModel` turns work into modelled seconds with the
coefficients of a small linear model (measured by `dsa calibrate`, assumed from the shape otherwise). A
step's measured time is divided over its requests in proportion to their modelled seconds, so only ratios
matter and every measured second has an owner. What the same rows would have taken with dense attention
comes from the same model, scaled by the same measured step.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    sparse_row_flops: int  # index query projections, one token; nothing where a row is dense
    head_flops: int  # logits of one row
    pair_flops: int  # one row attends to one token: 4 x query heads x head dim
    index_pair_flops: int  # one row scores one token: 2 x index heads x (index dim + 1)
    weight_bytes: int  # read once a step
    kv_token_bytes: int  # keys and values of one token
    index_token_bytes: int  # index key of one token; 0 without an indexer


class Coefficients(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds a unit, none negative. The units of `CostModel.features`, in this order.

    A lone row (a decode, or one of few) and the rows of a chunk (of a prompt) run through other code, whose speeds
    have nothing to do with one another: the former waits for memory, the latter computes.
    """

    step: float  # a step: reading the weights, launching
    head: float  # a step that computes logits

    lone: float  # a lone row
    lone_pair: float  # context token of one that is dense
    lone_sparse: float  # one whose index queries are computed
    lone_gathered: float  # selected token of one
    lone_index_pair: float  # context token scored and ranked for one

    chunk: float  # a chunk
    row: float  # a row of a chunk, through the linear layers
    pair: float  # (row, context token) of masked attention, dense or not
    context: float  # context token brought together for masked attention
    sparse_row: float  # row whose index queries are computed
    gathered: float  # (row, selected token) of gathered attention
    index_pair: float  # (row, context token) scored and ranked

    def __post_init__(self) -> None:
        values = msgspec.structs.astuple(self)
        if not all(math.isfinite(value) and value >= 0 for value in values) or not any(values):
            raise ValueError("coefficients must be finite, at least 0, and not all 0")


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `dsa calibrate` writes: coefficients, for what they hold, and how well."""

    shape: ModelShape
    device: str  # type of the device: cpu, cuda
    dtype: str
    kernels: str  # name of the backend
    coefficients: Coefficients
    steps: int  # measured steps that were fitted
    median_error: float  # |modelled / measured - 1| of a step, median over steps that were not fitted
    worst_error: float  # the worst of those
    dense_errors: dict[int, float]  # context: estimated / measured - 1 of dense seconds told by a sparse run

    def check(self, shape: ModelShape, device: str, dtype: str, kernels: str) -> None:
        """Refuse to be used for something else.

        Raises:
            ConfigError: another model, device, number format or backend was measured.
        """
        # The shape counts bytes, so another dtype is another shape, too: it comes last.
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
        ConfigError: it cannot be read or is not one.
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
    """Round numbers for a kind of machine. FLOP/s of arithmetic, bytes/s of memory; whichever is slower counts."""

    launch: float  # seconds a step
    weights: float  # bytes/s, read by a step
    chunk_step: float  # how many times more where a chunk is in it
    lone: float  # FLOP/s of linear layers, lone rows
    linear: float  # of a chunk
    pair: float  # FLOP/s of attention, a chunk
    gathered: float  # over selected tokens
    index: float  # of scoring
    lone_index: float
    lone_queries: float  # of index queries
    cache: float  # bytes/s of keys and values that a lone row reads one after the other
    scattered: float  # and where they are selected
    together: float  # of contexts that are copied for a chunk


_SPEEDS = {
    # On one core of an AMD EPYC with AVX-512 and bfloat16, by `dsa calibrate`: native kernels, and torch's.
    "native": _Speeds(
        launch=5e-4, weights=4e10, chunk_step=2.6, lone=1.5e11, linear=1.8e11, pair=1.45e11, gathered=7.5e10,
        index=2.8e11, lone_index=1e11, lone_queries=5e10, cache=1.7e10, scattered=1.4e10, together=math.inf,
    ),
    "cpu": _Speeds(
        launch=2e-3, weights=5e9, chunk_step=0.0, lone=1e11, linear=1.7e11, pair=5.5e10, gathered=3.8e9,
        index=2.2e10, lone_index=5e9, lone_queries=1e11, cache=1.3e9, scattered=8.5e8, together=1e9,
    ),
    # Guessed.
    "cuda": _Speeds(
        launch=2e-3, weights=2e12, chunk_step=0.0, lone=3e14, linear=3e14, pair=1e14, gathered=5e13, index=1e14,
        lone_index=1e14, lone_queries=3e14, cache=2e12, scattered=1e12, together=2e12,
    ),
}  # fmt: skip


def assumed_coefficients(shape: ModelShape, device: str, kernels: str = "torch") -> Coefficients:
    """Coefficients from round numbers for a kind of device. Only their ratios are used; measure for better."""
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


@dataclass(frozen=True, slots=True)
class Counts:
    """The exact work of one request in one step: counts of tokens, the same in every layer."""

    rows: int  # tokens computed
    attended: int  # (row, token) pairs that attention reads: the selected tokens, or all earlier ones
    index_pairs: int  # (row, token) pairs that the indexer scores
    kv_rows_read: int  # tokens whose keys and values are read; once a tile where its rows share them
    index_rows_read: int  # tokens whose index key is read
    logits: int  # rows whose logits are computed
    sparse_rows: int  # rows that read less than their whole context


@dataclass(frozen=True, slots=True)
class Modelled:
    """Seconds of one request in one step by the model, its part of what requests share left out."""

    actual: float
    index: float  # the part of `actual` that scoring and selecting take
    dense: float  # what it would be if every row read its whole context


class CostModel:
    """Work and modelled seconds of one model on one device.

    Args:
        shape: the model's.
        coefficients: measured or assumed.
        tiles: how attention work is cut and which form it takes, as the batch does it.
    """

    def __init__(self, shape: ModelShape, coefficients: Coefficients, tiles: TileCosts) -> None:
        self.shape = shape
        self.coefficients = coefficients
        self._own = msgspec.structs.astuple(coefficients)[2:]
        self._tiles = tiles

    def replace(self, coefficients: Coefficients) -> CostModel:
        """The same model with other coefficients."""
        return CostModel(self.shape, coefficients, self._tiles)

    def counts(self, request: ScheduledRequest) -> Counts:
        """The work of a request's rows, from the plan."""
        start, rows = request.start, len(request.token_ids)
        end = start + rows
        seen = _triangle(end) - _triangle(start)  # sum of positions + 1
        logits = len(request.prompt_targets) + (0 if request.sample is None else 1 + request.num_drafts)
        selected = row_index_top_k(end, request.index_top_k)
        if not selected:  # the last row is dense, and so are all
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

    def features(self, request: ScheduledRequest) -> tuple[int, ...]:
        """Units of a request's work as they are run, tiles padded: those of `Coefficients` from `lone` on."""
        return self._features(len(request.token_ids), request.start, request.index_top_k)

    def modelled(self, request: ScheduledRequest) -> Modelled:
        """The request's own seconds, actual and dense."""
        return self.modelled_rows(len(request.token_ids), request.start, request.index_top_k)

    def modelled_rows(self, rows: int, start: int, index_top_k: IndexTopK) -> Modelled:
        """The same of `rows` rows of a request, from position `start` on."""
        dense = self._seconds(self._features(rows, start, None))
        if is_dense(start + rows, index_top_k):
            return Modelled(dense, 0.0, dense)
        units = self._features(rows, start, index_top_k)
        return Modelled(self._seconds(units), self._seconds(_index_part(units)), dense)

    def shared(self, plan: StepPlan) -> float:
        """Modelled seconds that a step takes whatever is in it."""
        c = self.coefficients
        return c.step + (c.head if any(_has_logits(request) for request in plan.requests) else 0.0)

    def seconds(self, plan: StepPlan) -> float:
        """Modelled seconds of a step."""
        return self.shared(plan) + sum(self.modelled(request).actual for request in plan.requests)

    def flops(self, counts: Counts) -> int:
        """Arithmetic that the work needs; what padded tiles add is not counted."""
        s = self.shape
        return (
            counts.rows * s.row_flops
            + counts.logits * s.head_flops
            + counts.attended * s.pair_flops
            + counts.sparse_rows * s.sparse_row_flops
            + counts.index_pairs * s.index_pair_flops
        )

    def cache_bytes(self, counts: Counts) -> int:
        """Bytes of the paged cache read, and written for the new rows. Weights are a step's, not a request's."""
        s = self.shape
        written = counts.rows * (s.kv_token_bytes + s.index_token_bytes)
        return written + counts.kv_rows_read * s.kv_token_bytes + counts.index_rows_read * s.index_token_bytes

    def _spans(self, rows: int, start: int, index_top_k: IndexTopK) -> Iterable[tuple[str, int, int, int]]:
        """(form, rows, context of whole pages, index_top_k) of each tile of a request's rows."""
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
            # Fused kernels stop at each row's own position; a mask is over the tile's whole context.
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
        if rows <= self._tiles.few_rows:  # as if alone: what else is in the step is not known here
            return (rows, pair, sparse, gathered, index, *_NONE_OF_A_CHUNK)
        return (*_NONE_OF_A_LONE_ROW, 1, rows, pair, context, sparse, gathered, index)

    def _seconds(self, units: tuple[int, ...]) -> float:
        return float(sum(map(operator.mul, units, self._own)))


_NONE_OF_A_LONE_ROW = (0,) * 5
_NONE_OF_A_CHUNK = (0,) * 7


def _index_part(units: tuple[int, ...]) -> tuple[int, ...]:
    """Units of scoring and selecting, the others set to 0."""
    _, _, sparse, _, index, _, _, _, _, rows, _, pairs = units
    return (0, 0, sparse, 0, index, 0, 0, 0, 0, rows, 0, pairs)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def _has_logits(request: ScheduledRequest) -> bool:
    return request.sample is not None or bool(request.prompt_targets)


def calibration_json(calibration: Calibration) -> bytes:
    """A calibration as it is written to disk."""
    plain: Any = msgspec.to_builtins(calibration)
    return msgspec.json.format(msgspec.json.encode(plain), indent=2) + b"\n"
