"""A model's step over flat rows, as every family has it: CUDA graphs, the look at selections, tokens that the device drew.

A family says what its layers compute (`RowsStep.compute`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from engine.attention.batch import Batch
from engine.memory.planes import PagedCache
from engine.models.family import KernelCompilers
from engine.models.rows.audit import Audit
from engine.models.rows.graphs import StepGraphs
from engine.models.rows.inputs import RowInputs, Sharing, row_inputs
from engine.protocol import IndexerInfo


class RowsStep(ABC):
    """The part of a device step that does not know what a layer is; with `logits`, an `engine.models.family.RowStep`."""

    def __init__(self, sharing: Sharing, like: Tensor, max_context: int, indexer: IndexerInfo | None) -> None:
        """No graph is captured yet.

        Args:
            sharing: of the model's kernels
            like: [E], of the hidden states' size, dtype and device
            max_context: that a request may have
            indexer: the model's; None: attention is dense
        """
        self.sharing = sharing
        self._like, self._max_context = like, max_context
        self._top_k = 0 if indexer is None else indexer.default_index_top_k
        self._graphs: StepGraphs | None = None
        self._audit = Audit()
        self.reserve(1)

    def reserve(self, rows: int) -> None:
        """Make room for what a step of so many requests draws: `drawn` [rows] int64.

        A row whose token id is negative, -1 - i, has the token drawn[i].
        """
        self.drawn = torch.zeros(rows, dtype=torch.int64, device=self._like.device)

    def capture(
        self,
        cache: PagedCache,
        max_rows: int,
        progress: Callable[[int, int], None],
        compilers: KernelCompilers | None,
    ) -> None:
        """Capture the graphs of steps; see `engine.models.rows.graphs`."""
        self._graphs = StepGraphs(
            lambda inputs, _: self.compute(inputs, cache),
            self.sharing,
            max_rows,
            self._max_context,
            self._like.device,
            sample=lambda inputs, _: self.sample(inputs, cache),
        )
        self._graphs.capture_all(self._top_k, progress, compilers)

    def forward(self, batch: Batch, cache: PagedCache, budget_bytes: int) -> Tensor:
        """As the model's `forward`, of a batch whose tensors are on the CPU. The next step may overwrite what it returns."""
        audited = batch.selecting is not None and self._audit.due()
        flaws = batch.flaws.to(self._like.device) if audited else None
        hidden = None if self._graphs is None else self._graphs.run(batch, flaws=flaws)
        if hidden is None:
            inputs = row_inputs(batch, self._like.device, budget_bytes, self.sharing)
            hidden = self.compute(replace(inputs, flaws=flaws), cache)
        if flaws is not None:
            batch.flaws.copy_(flaws)
        return hidden

    @abstractmethod
    def compute(self, inputs: RowInputs, cache: PagedCache) -> Tensor:
        """Write the rows to the cache; hidden states after the last norm, [T, E]; of padding anything finite."""

    @abstractmethod
    def sample(self, inputs: RowInputs, cache: PagedCache) -> Tensor:
        """Launch each kernel that `compute` launches: it computes one layer of each kind."""

    def hidden_like(self) -> Tensor:
        """A tensor [1, E] of the hidden states' size, dtype and device."""
        return self._like.unsqueeze(0)
