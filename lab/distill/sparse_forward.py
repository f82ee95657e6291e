"""A sequence through the main model with every layer reading only what its indexer selects."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.models.gqa.trunk import Corrections, LayerInputs, Trunk
from engine.plan.sparsity import dense_mask
from lab.distill.adapter import Adapter
from lab.distill.objective import attention_target, top_mask
from lab.distill.student import Student

Selector = Callable[[int, LayerInputs, Tensor], Tensor]
"""(layer, inputs, rows [n]) -> [n, T] bool: what the rows may read."""

ROWS_AT_ONCE = 1024
"""Query rows held at once: 1024 x 8192 x 8 heads x 4 bytes is 256 MiB."""


def attend_selected(
    trunk: Trunk, layer: int, inputs: LayerInputs, select: Selector, rows_at_once: int
) -> Tensor:
    """Attention output of all rows under `select`: [T, Hq * D]."""
    total = inputs.hidden.shape[0]
    parts = []
    for start in range(0, total, rows_at_once):
        rows = torch.arange(start, min(start + rows_at_once, total), device=inputs.hidden.device)
        parts.append(trunk.attend(inputs, slice(start, start + len(rows)), select(layer, inputs, rows)))
    return torch.cat(parts)


@torch.no_grad()
def final_rows(
    trunk: Trunk, tokens: Tensor, select: Selector | None, rows_at_once: int = ROWS_AT_ONCE,
    adapter: Adapter | None = None, index_top_k: int = 0,
) -> Tensor:  # fmt: skip
    """The last layer's output [T, E]; `select` None is dense.

    With an `adapter`, the rows that are sparse under `index_top_k` run corrected, as they do in serving.
    """
    x = trunk.embed(tokens)
    for layer in range(trunk.config.num_layers):
        fix = None if adapter is None else corrections(trunk, adapter, layer, len(tokens), index_top_k, x)
        inputs = trunk.open(layer, x, fix)
        if select is None:
            attended = trunk.attend(inputs, slice(None), None)
        else:
            attended = attend_selected(trunk, layer, inputs, select, rows_at_once)
        x = trunk.close(layer, x, attended, fix)
    return x


def corrections(
    trunk: Trunk, adapter: Adapter, layer: int, total: int, index_top_k: int, x: Tensor
) -> Corrections:
    """One layer's, for the rows of a sequence of `total` tokens that see more than `index_top_k` of them there."""
    qkv, o = adapter.of(layer, x.dtype)
    window = trunk.config.windows[layer]
    contexts = torch.arange(1, total + 1, device=x.device)
    if window is not None:
        contexts = contexts.clamp(max=window)
    return Corrections(qkv, o, ~dense_mask(contexts, index_top_k).unsqueeze(-1))


@torch.no_grad()
def losses(
    trunk: Trunk, tokens: Tensor, select: Selector | None, rows_at_once: int = ROWS_AT_ONCE,
    adapter: Adapter | None = None, index_top_k: int = 0,
) -> Tensor:  # fmt: skip
    """Cross-entropy of each next token [T - 1], nats; arguments as in `final_rows`."""
    return trunk.losses(final_rows(trunk, tokens, select, rows_at_once, adapter, index_top_k), tokens)


def by_student(student: Student, index_top_k: int) -> Selector:
    """The trained selection."""
    cached: dict[int, tuple[LayerInputs, Tensor]] = {}

    def select(layer: int, inputs: LayerInputs, rows: Tensor) -> Tensor:
        # One layer's keys serve all its row chunks.
        if layer not in cached or cached[layer][0] is not inputs:
            cached.clear()
            with torch.no_grad():
                cached[layer] = (inputs, student.keys(layer, inputs))
        return student.selection(layer, inputs, rows, cached[layer][1], index_top_k)

    return select


def by_oracle(trunk: Trunk, index_top_k: int) -> Selector:
    """The best selection there is: the positions that dense attention itself looks at most."""

    def select(layer: int, inputs: LayerInputs, rows: Tensor) -> Tensor:
        allowed = inputs.visible(rows)
        return top_mask(
            attention_target(inputs.query[rows], inputs.keys, allowed, trunk.scale), allowed, index_top_k
        )

    return select


def by_window(index_top_k: int, sinks: int = 4) -> Selector:
    """No selection at all: the last tokens and the first few, the baseline that the indexer must beat."""

    def select(layer: int, inputs: LayerInputs, rows: Tensor) -> Tensor:
        positions = torch.arange(inputs.hidden.shape[0], device=rows.device)
        near = positions > rows.unsqueeze(-1) - (index_top_k - sinks)
        return (near | (positions < sinks)) & inputs.visible(rows)

    return select
