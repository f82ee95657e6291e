"""Steps as CUDA graphs: a step of few rows is hundreds of short kernels, and a graph launches them at once.

A graph has a number of rows, a context and a width of selections, each rounded up (`engine.models.rows.padded`); rows that
only fill it are padding, which writes nothing. Its inputs lie in one buffer, filled by one copy. All graphs share their
memory: they run one at a time, and what one returns lasts until the next one runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from engine.attention.batch import Batch
from engine.kernels.capture import captured
from engine.kernels.triton.expanded_plan import ExpandedPlan
from engine.memory.staging import Staging
from engine.models.family import STEP_SCORE_BYTES, KernelCompilers
from engine.models.rows.inputs import (
    ALL_ALONE,
    CONTEXT_STEP,
    RowInputs,
    Sharing,
    expanded_plan,
    longest_context,
)
from engine.models.rows.padded import Padded
from engine.models.rows.rehearsal import contexts_of, rehearsals

_DECODES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Rows of graphs without prompts."""
_MIXED = (96, 160, 288, 544, 1056, 2080)
"""Rows of graphs with prompts: a power of two, some decodes, and a row of padding."""
_SINGLES = (32, 256)
"""Decodes beside prompts: most steps with prompts have few, and programs for more cost time."""
_LEAST_CONTEXT = 2048
_CONTEXT_FACTOR = 4
"""From one context of graphs to the next. A graph of a longer context has programs that end at once; they cost little."""
_LEAST_WIDTH = 64


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    buffer: Tensor  # [Padded.size] int32, what it reads
    dense: ExpandedPlan | None  # what it reads, too
    hidden: Tensor  # [rows, E], what it writes


class StepGraphs:
    """The graphs of one model over one cache."""

    def __init__(
        self,
        compute: Callable[[RowInputs, Tensor | None], Tensor],
        sharing: Sharing,
        max_rows: int,
        max_context: int,
        device: torch.device,
        given: Tensor | None = None,
        sample: Callable[[RowInputs, Tensor | None], object] | None = None,
    ) -> None:
        """Nothing is captured yet.

        Args:
            compute: a step's hidden states, its cache written, of its rows and what is given with them
            sharing: of the model's kernels
            max_rows: of a step of decodes
            max_context: that a request may have
            device: of the model
            given: [1, E], of the size and dtype of what is given with each row; None: nothing is
            sample: launches each kernel that `compute` launches, and fewer times; None: `compute` does
        """
        self._sample = sample or compute
        self._compute, self._device, self._sharing = compute, device, sharing
        most = min(max_rows, _DECODES[-1])
        self._decodes = [*(size for size in _DECODES if size < most), most]
        self._singles = sorted({*(size for size in _SINGLES if size < most), min(most, _SINGLES[-1])})
        self._width = 0
        self._contexts = [_LEAST_CONTEXT]
        while self._contexts[-1] < max_context:
            longest = -(-max_context // CONTEXT_STEP) * CONTEXT_STEP
            self._contexts.append(min(_CONTEXT_FACTOR * self._contexts[-1], longest))
        # All graphs read what is given from one place.
        self._given = None if given is None else given.new_zeros(max(_MIXED[-1], most), given.shape[1])
        self._captured: dict[Padded, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._staging = Staging(torch.int32, device)

    def capture_all(
        self, top_k: int, progress: Callable[[int, int], None], compilers: KernelCompilers | None
    ) -> None:
        """Capture what steps with the model's own top_k and without a selection will want (0: without alone)."""
        self._width = _round_up(top_k)
        widths = [0, self._width] if top_k else [0]
        shapes = [
            self._shape(rows, context, width, singles, expanded=expanded)
            for sizes, all_singles in (*self._mixed, (self._decodes, [0]))
            for singles in all_singles
            for rows, context, width in itertools.product(
                reversed(sizes), reversed(self._contexts), reversed(widths)
            )
            for expanded in self._expanded(width, singles)
            if rows > singles and 4 * rows * context <= STEP_SCORE_BYTES
        ]
        if compilers is not None:
            with compilers.together():
                for shape in shapes:
                    self._sample(shape.inputs(self._padding(shape)), self._given_to(shape))
                self._rehearse(top_k, contexts_of(self._contexts[-1]))
        for number, shape in enumerate(shapes):
            progress(number, len(shapes))
            self._capture(shape)
        # Kernels are loaded, too.
        self._rehearse(top_k, [self._contexts[-1]])
        progress(len(shapes), len(shapes))

    def _rehearse(self, top_k: int, contexts: list[int]) -> None:
        """Launch, or compile, what steps want that no graph holds."""
        for inputs in rehearsals(
            self._decodes[-1], contexts, top_k, STEP_SCORE_BYTES, self._sharing, self._device
        ):
            rows = len(inputs.rows)
            given = None if self._given is None else self._given.new_zeros(rows, self._given.shape[1])
            self._sample(inputs, given)

    def run(self, batch: Batch, given: Tensor | None = None, flaws: Tensor | None = None) -> Tensor | None:
        """Hidden states [T, E] of a batch whose tensors are on the CPU; None: no graph is so large.

        The next graph may overwrite them.

        Args:
            batch: T rows
            given: [T, E] on the device, where something is given with each row
            flaws: [T] int32 on the device; if given, the kernels of the graph are launched one by one, and selections are looked
                at (`engine.models.rows.audit`). So the step gives the same bits
        """
        plan = expanded_plan(batch, self._sharing)
        shape = self._shape_of(batch, expanded=plan is not None)
        if shape is None:
            return None
        step = self._captured.get(shape) or self._capture(shape)
        if step.dense is not None and plan is not None:
            if not step.dense.holds(plan):
                return None
            step.dense.fill(plan)
        if self._given is not None and given is not None:
            self._given[: len(given)].copy_(given)
        shape.fill(self._staging.take(shape.size).numpy(), batch)
        self._staging.send(step.buffer)
        if flaws is not None:
            inputs = replace(shape.inputs(step.buffer), dense=step.dense, flaws=flaws)
            return self._compute(inputs, self._given_to(shape))[: len(batch.token_ids)]
        step.graph.replay()
        return step.hidden[: len(batch.token_ids)]

    def _shape_of(self, batch: Batch, *, expanded: bool) -> Padded | None:
        """The smallest shape that holds a batch."""
        count, singles = len(batch.token_ids), 0
        sizes = self._decodes
        if any(map(self._sharing.is_chunk, batch.segments)):
            sizes = list(_MIXED)
            decodes = sum(s.num_rows for s in batch.segments if not self._sharing.is_chunk(s))
            singles = next((size for size in self._singles if size >= decodes), 0)
            if not singles:
                return None
        longest = longest_context(batch)
        context = next((one for one in self._contexts if one >= longest), 0)
        width = _round_up(int(batch.index_top_k.max()))
        if 0 < width < self._width:
            width = self._width  # its graphs are there, and hold smaller selections too
        # The last row of a step with prompts is padding.
        rows = next((size for size in sizes if size >= count + (singles > 0) and size > singles), 0)
        if not rows or not context or 4 * rows * context > STEP_SCORE_BYTES:
            return None
        shape = self._shape(rows, context, width, singles, expanded=expanded)
        return shape if shape.holds(batch) else None

    def _shape(self, rows: int, context: int, top_k: int, singles: int, *, expanded: bool) -> Padded:
        return Padded(rows, context, top_k, singles > 0, singles, self._sharing, expanded)

    def _expanded(self, top_k: int, singles: int) -> tuple[bool, ...]:
        """Whether rows of chunks may be dense ones that are expanded: if none is sparse, they are."""
        if not self._sharing.tokens or not singles:
            return (False,)
        return (True, False) if top_k else (True,)

    @property
    def _mixed(self) -> list[tuple[Sequence[int], list[int]]]:
        """Rows of graphs with prompts, and the decodes beside them; none if all rows are computed as decodes are."""
        return [] if self._sharing.alone == ALL_ALONE else [(_MIXED, self._singles)]

    def _given_to(self, shape: Padded) -> Tensor | None:
        return None if self._given is None else self._given[: shape.rows]

    def _padding(self, shape: Padded) -> Tensor:
        """A buffer of rows that only fill it."""
        shape.fill(self._staging.take(shape.size).numpy(), None)
        buffer = torch.empty(shape.size, dtype=torch.int32, device=self._device)
        self._staging.send(buffer)
        return buffer

    def _capture(self, shape: Padded) -> _Captured:
        buffer = self._padding(shape)
        inputs = shape.inputs(buffer)
        graph, hidden = captured(
            partial(self._compute, inputs, self._given_to(shape)), self._device, self._pool
        )
        made = self._captured[shape] = _Captured(graph, buffer, inputs.dense, hidden)
        return made


def _round_up(top_k: int) -> int:
    """The width of selections that a graph has for this one."""
    return 0 if top_k == 0 else max(_LEAST_WIDTH, 1 << (top_k - 1).bit_length())
