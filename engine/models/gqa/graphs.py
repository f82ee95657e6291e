"""Decode steps as CUDA graphs: a step of few rows is hundreds of short kernels, and a graph launches them at once.

A graph has a number of rows, a context and a width of selections, each rounded up; rows that only fill it are padding,
which writes nothing. Its inputs lie in one buffer, filled by one copy. All graphs share their memory: they run one at a
time, and what one returns is copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.attention.batch import Batch
from engine.config import PAGE_SIZE
from engine.kernels.triton.rows import Rows
from engine.models.gqa.inputs import Piece, RowInputs

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_LEAST_CONTEXT = 1024
_LEAST_WIDTH = 64
_COLUMNS = 6
"""Numbers of a row before its pages."""


class Bucket(NamedTuple):
    """What a graph is captured for."""

    rows: int
    context: int
    top_k: int  # 0: no row has a selection


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    buffer: Tensor  # [rows * (6 + pages)] int32, what it reads
    hidden: Tensor  # [rows, E], what it writes


class DecodeGraphs:
    """The graphs of one model over one cache."""

    def __init__(
        self, compute: Callable[[RowInputs], Tensor], max_rows: int, max_context: int, device: torch.device
    ) -> None:
        """Nothing is captured yet.

        Args:
            compute: a step's hidden states, its cache written
            max_rows: of a step of decodes
            max_context: that a request may have
            device: of the model
        """
        self._compute, self._device = compute, device
        most = min(max_rows, _SIZES[-1])
        self._sizes = [*(size for size in _SIZES if size < most), most]
        self._contexts = [_LEAST_CONTEXT]
        while self._contexts[-1] < max_context:
            self._contexts.append(2 * self._contexts[-1])
        self._captured: dict[Bucket, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._host = torch.empty(
            self._sizes[-1] * (_COLUMNS + self._contexts[-1] // PAGE_SIZE), dtype=torch.int32, pin_memory=True
        )

    def capture_all(self, top_k: int, progress: Callable[[int, int], None]) -> None:
        """Capture what steps with the model's own top_k and without a selection will want (0: without alone)."""
        widths = [0, _round_up(top_k)] if top_k else [0]
        buckets = [
            Bucket(*key) for key in itertools.product(reversed(self._sizes), reversed(self._contexts), widths)
        ]
        for number, bucket in enumerate(buckets):
            progress(number, len(buckets))
            self._capture(bucket)
        progress(len(buckets), len(buckets))

    def run(self, batch: Batch) -> Tensor | None:
        """Hidden states [T, E] of a batch whose tensors are on the CPU.

        None: it has other rows than decodes, or too many.
        """
        count = len(batch.segments)
        if count != len(batch.token_ids) or count > self._sizes[-1]:
            return None
        longest = max(segment.start for segment in batch.segments) + 1
        bucket = Bucket(
            next(size for size in self._sizes if size >= count),
            next(context for context in self._contexts if context >= longest),
            _round_up(int(batch.index_top_k.max())),
        )
        captured = self._captured.get(bucket) or self._capture(bucket)
        host = self._host[: len(captured.buffer)]
        _fill(host.numpy(), batch, bucket.rows)
        captured.buffer.copy_(host, non_blocking=True)
        captured.graph.replay()
        return captured.hidden[:count].clone()

    def _capture(self, bucket: Bucket) -> _Captured:
        rows, context, top_k = bucket
        pages = context // PAGE_SIZE
        buffer = torch.zeros(rows * (_COLUMNS + pages), dtype=torch.int32, device=self._device)
        vectors = buffer[: rows * _COLUMNS].view(_COLUMNS, rows)
        vectors[4] = -1  # until it is filled, all is padding
        token_ids, page, offset, request, positions, index_top_k = vectors.unbind()
        table = buffer[rows * _COLUMNS :].view(rows, pages)
        each = Rows(request, positions, index_top_k, table)
        inputs = RowInputs(
            token_ids=token_ids,
            pages=page,
            offsets=offset,
            rows=each,
            max_context=context,
            top_k=top_k,
            blocks=None,
            pieces=(Piece(0, each, None),),
        )
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._compute(inputs)  # compiles what is not compiled yet
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = self._compute(inputs)
        captured = self._captured[bucket] = _Captured(graph, buffer, hidden)
        return captured


def _round_up(top_k: int) -> int:
    """The width of selections that a graph has for this one."""
    return 0 if top_k == 0 else max(_LEAST_WIDTH, 1 << (top_k - 1).bit_length())


def _fill(host: np.ndarray[tuple[int], np.dtype[np.int32]], batch: Batch, rows: int) -> None:
    """Lay a batch out as a graph of so many rows reads it."""
    count, width = batch.block_table.shape
    vectors = host[: rows * _COLUMNS].reshape(_COLUMNS, rows)
    sources = (
        batch.token_ids, batch.pages, batch.offsets, batch.request, batch.positions, batch.index_top_k,
    )  # fmt: skip
    for vector, source in zip(vectors, sources, strict=True):
        vector[:count] = source.numpy()
    vectors[:, count:] = 0
    vectors[4, count:] = -1
    host[rows * _COLUMNS :].reshape(rows, -1)[:count, :width] = batch.block_table.numpy()
