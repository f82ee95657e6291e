"""How far sparse predictions are from dense ones on sequences that are not trained on, by the trainer's own forward pass.

These quick figures choose among states of training and among recipes. Published ones come from `dsa eval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.gqa.trunk import LayerInputs, Trunk
from lab.distill.sparse_forward import Selector, final_rows


@dataclass(frozen=True)
class Distance:
    """A mean over rows."""

    kl: float  # KL(dense || sparse), nats
    agreement: float  # share of rows whose likeliest token is dense's


class Validation:
    """Sequences with rows to compare, and dense's predictions there.

    Args:
        trunk: the main model
        sequences: (tokens [T], rows [n]) each, on the trunk's device
    """

    def __init__(self, trunk: Trunk, sequences: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._trunk = trunk
        # Attention on a mask has fast kernels for such lengths only.
        cut = [(ids[: len(ids) // 8 * 8], rows) for ids, rows in sequences]
        self._sequences = [(ids, rows[rows < len(ids)]) for ids, rows in cut]
        self._dense = [self._predict(ids, rows, None) for ids, rows in self._sequences]

    @torch.no_grad()
    def _predict(self, ids: Tensor, rows: Tensor, select: Selector | None) -> Tensor:
        return self._trunk.logits(final_rows(self._trunk, ids, select)[rows], exact=True).log_softmax(-1)

    def measure(self, select: Selector) -> Distance:
        """Compare sparse attention under `select` with dense attention."""
        kl, agreed, count = 0.0, 0, 0
        for (ids, rows), dense in zip(self._sequences, self._dense, strict=True):
            sparse = self._predict(ids, rows, select)
            kl += float(F.kl_div(sparse, dense, log_target=True, reduction="sum"))
            agreed += int((sparse.argmax(-1) == dense.argmax(-1)).sum())
            count += len(rows)
        return Distance(kl / max(1, count), agreed / max(1, count))


def except_in(layers: frozenset[int], select: Selector) -> Selector:
    """Return a selector that reads everything in `layers`, and elsewhere what `select` selects."""

    def chosen(layer: int, inputs: LayerInputs, rows: Tensor) -> Tensor:
        return inputs.visible(rows) if layer in layers else select(layer, inputs, rows)

    return chosen
