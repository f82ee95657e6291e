"""Runs a sequence through the main model; every layer reads only the tokens that a selector allows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.models.gqa.trunk import Corrections, LayerInputs, Trunk
from engine.plan.sparsity import dense_mask
from lab.distill.adapter import Adapter
from lab.distill.objective import attention_target, output_lengths, top_mask
from lab.distill.recipe import Combine
from lab.distill.student import Student

Selector = Callable[[int, LayerInputs, Tensor], Tensor]
"""(layer, inputs, rows [n]) -> [n, T] bool: the positions that the rows may read."""

ROWS_AT_ONCE = 1024
"""Query rows computed at once. Their scores take 256 MiB: 1024 rows x 8192 positions x 8 heads x 4 bytes."""


def attend_selected(
    trunk: Trunk, layer: int, inputs: LayerInputs, select: Selector, rows_at_once: int
) -> Tensor:
    """Compute the attention output of all rows under `select`: [T, Hq * D]."""
    total = inputs.hidden.shape[0]
    parts = []
    for start in range(0, total, rows_at_once):
        end = min(start + rows_at_once, total)
        rows = torch.arange(start, end, device=inputs.hidden.device)
        seen = inputs.first(end)  # no row sees what comes after it: half of the work
        parts.append(trunk.attend(seen, slice(start, end), select(layer, seen, rows)))
    return torch.cat(parts)


@torch.no_grad()
def final_rows(
    trunk: Trunk, tokens: Tensor, select: Selector | None, rows_at_once: int = ROWS_AT_ONCE,
    adapter: Adapter | None = None, index_top_k: int = 0,
) -> Tensor:  # fmt: skip
    """Compute the last layer's output [T, E]. If `select` is None, attention is dense.

    If there is an `adapter`, it corrects the rows that are sparse under `index_top_k`, as in serving.
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
    """Return a layer's corrections, for the rows that see more than `index_top_k` tokens in this layer.

    Args:
        trunk: the main model
        adapter: the adapters of all layers
        layer: the layer
        total: the number of tokens in the sequence
        index_top_k: how many tokens a row may read
        x: [T, E] the layer's input, for its device and dtype
    """
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
    """Compute the cross-entropy of each next token: [T - 1] nats. The arguments are those of `final_rows`."""
    return trunk.losses(final_rows(trunk, tokens, select, rows_at_once, adapter, index_top_k), tokens)


def by_student(student: Student, index_top_k: int) -> Selector:
    """Return the selector of the trained indexers."""
    cached: dict[int, tuple[LayerInputs, Tensor]] = {}

    def select(layer: int, inputs: LayerInputs, rows: Tensor) -> Tensor:
        # Chunks of rows with the same inputs use the same keys.
        if layer not in cached or cached[layer][0] is not inputs:
            cached.clear()
            with torch.no_grad():
                cached[layer] = (inputs, student.keys(layer, inputs))
        return student.selection(layer, inputs, rows, cached[layer][1], index_top_k)

    return select


def by_oracle(trunk: Trunk, index_top_k: int, combine: Combine = "sum") -> Selector:
    """Return the best possible selector: it selects the positions that dense attention weighs most."""

    def select(layer: int, inputs: LayerInputs, rows: Tensor) -> Tensor:
        allowed = inputs.visible(rows)
        return top_mask(target_of(trunk, layer, inputs, rows, allowed, combine), allowed, index_top_k)

    return select


def target_of(
    trunk: Trunk, layer: int, inputs: LayerInputs, rows: Tensor, allowed: Tensor, combine: Combine
) -> Tensor:
    """Compute `attention_target` of the rows [n] of a layer: [n, T]."""
    lengths = None
    if combine == "output":
        lengths = output_lengths(inputs.values, trunk.weights[f"layers.{layer}.o"])
    return attention_target(inputs.query[rows], inputs.keys, allowed, trunk.scale, combine, lengths)


def by_window(index_top_k: int, sinks: int = 4) -> Selector:
    """Return a selector of the last tokens and the first `sinks`: the baseline that the indexer must beat."""

    def select(layer: int, inputs: LayerInputs, rows: Tensor) -> Tensor:
        positions = torch.arange(inputs.hidden.shape[0], device=rows.device)
        near = positions > rows.unsqueeze(-1) - (index_top_k - sinks)
        return (near | (positions < sinks)) & inputs.visible(rows)

    return select
