"""Measures the costs of the forms `gather` and `mask`, which are constants of `engine.plan.tiles.TileCosts`.

`python -m benchmarks.forms` times sparse attention in both forms: one layer of the default model's shape, a chunk of
rows, several contexts and top_k. It prints the ratio of the two, and the ratio that the constants predict. The time of
`mask` includes making the mask from the selection.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from engine.attention.gqa import selection_mask
from engine.config import PAGE_SIZE
from engine.kernels.choice import choose_backend
from engine.kernels.interface.attention import Kernels
from engine.plan.tiles import TileCosts

KV_HEADS, GROUP, DIM = 3, 3, 64


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of `repeats` calls, after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _masked(
    kernels: Kernels, query: Tensor, plane: Tensor, block_table: Tensor, selected: Tensor, scale: float
) -> Tensor:
    allowed = selection_mask(selected, block_table.shape[1] * PAGE_SIZE)
    return kernels.attend_masked(query, plane, block_table, allowed, scale)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64, help="query rows of the chunk")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kernels", default="auto", choices=["auto", "native", "torch"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    kernels, rows = choose_backend(options.kernels, torch.device("cpu")), options.rows
    table = Table("context", "top_k", "gather ms", "mask ms", "gather / mask", "predicted", "chosen")
    fused = kernels.fused and dtype is torch.bfloat16
    costs = TileCosts(
        budget_bytes=64 << 20, index_row_bytes=32, attention_row_bytes=36, token_bytes=768, fused=fused
    )
    per_selected, per_context = [], []
    for context in (512, 1024, 2048, 4096, 8192):
        pages = context // PAGE_SIZE
        plane = torch.randn(pages, PAGE_SIZE, KV_HEADS, 2, DIM).to(dtype)
        block_table = torch.randperm(pages).unsqueeze(0)
        query = torch.randn(1, rows, KV_HEADS, GROUP, DIM).to(dtype)
        for top_k in (64, 128, 256, 512, 1024):
            if top_k >= context:
                continue
            selected = torch.rand(1, rows, context).topk(top_k, dim=-1).indices
            shared = (query, plane, block_table)
            gather = median_seconds(
                partial(kernels.attend_selected, *shared, selected, 0.125), options.repeats
            )
            mask = median_seconds(partial(_masked, kernels, *shared, selected, 0.125), options.repeats)
            per_selected.append(gather / top_k)
            per_context.append(mask / context)
            predicted = top_k * costs.gather_cost / (context * costs.mask_cost)
            chosen = costs.sparse_form(rows, context, top_k)
            table.add_row(
                str(context), str(top_k), f"{gather * 1e3:.2f}", f"{mask * 1e3:.2f}",
                f"{gather / mask:.2f}", f"{predicted:.2f}", chosen,
            )  # fmt: skip
    console = Console()
    console.print(table)
    ratio = statistics.median(per_context) / statistics.median(per_selected)
    console.print(f"gather_cost 1.0, mask_cost {ratio:.3f} would fit this machine")


if __name__ == "__main__":
    main()
