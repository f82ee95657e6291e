"""Selection and index scores of long rows on a GPU: checked against a stable sort, then timed.

`python -m benchmarks.gpu.long_rows --out DIR` writes long_rows.json; the log is benchmarks/gpu/log.md. Variants are the
constants of `engine.kernels.triton.long_rows`, `select` and `scores`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.kernels.triton import select as forms
from engine.kernels.triton.rows import Rows
from engine.kernels.triton.scores import index_scores
from engine.kernels.triton.select import select
from lab.doctor.rows import check_selection, kinds_of_scores, selecting_rows

DEVICE = torch.device("cuda")
CONTEXT, SELECTED, HEADS, DIM, PAGE = 131_072, 2048, 64, 128, 64
SHAPES = [
    (16, 16_384), (64, 16_384), (16, 32_768), (64, 32_768), (16, 65_536), (1, CONTEXT), (16, CONTEXT), (64, CONTEXT),
    (512, CONTEXT), (16, 163_840), (4, 1_048_576),
]  # fmt: skip
ROTATED = 240 << 20
"""Bytes of scores that the calls of one graph read: four times the L2 cache."""


def graph_us(calls: Sequence[Callable[[], Tensor]], rounds: int = 15) -> float:
    """Microseconds a call: the median of replays of a graph of all calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return round(statistics.median(times), 2)


def check(context: int) -> None:
    """Rows of all kinds against a stable sort; raises `ConformanceError`."""
    scores = kinds_of_scores(context, torch.Generator().manual_seed(context))
    ends = torch.full((12,), context - 1)
    ends[0], ends[-1] = context // 2, context - 3
    check_selection(scores, ends, torch.full((12,), SELECTED), SELECTED, DEVICE)


def selection_us(count: int, context: int) -> float:
    """A selection of `count` random rows, read from memory and not from the L2 cache."""
    rows = selecting_rows(torch.full((count,), context - 1), torch.full((count,), SELECTED), DEVICE)
    copies = max(1, min(16, ROTATED // (4 * count * context)))
    scores = [torch.randn(count, context, device=DEVICE) for _ in range(copies)]
    return graph_us([lambda s=s: select(s, rows, SELECTED) for s in scores])  # type: ignore[misc]


def scores_us(count: int, requests: int) -> float:
    """Index scores of `count` rows of `requests` contexts over FP8 keys; each row is scored alone."""
    pages = CONTEXT // PAGE
    plane = torch.randint(0, 120, (requests * pages, PAGE, DIM + 4), device=DEVICE, dtype=torch.uint8)
    scales = torch.rand(requests * pages, PAGE, device=DEVICE)
    plane.view(requests * pages, -1)[:, PAGE * DIM :] = scales.view(torch.uint8).view(requests * pages, -1)
    numbers = torch.arange(count, device=DEVICE, dtype=torch.int32)
    rows = Rows(
        numbers % requests,
        torch.full_like(numbers, CONTEXT - 1),
        torch.full_like(numbers, SELECTED),
        torch.randperm(requests * pages, device=DEVICE).view(requests, pages).int(),
    )
    query = torch.randn(count, HEADS, DIM, device=DEVICE).to(torch.float8_e4m3fn)
    weights = torch.randn(count, HEADS, device=DEVICE)
    return graph_us([lambda: index_scores(query, weights, plane, rows, CONTEXT, None, False)])


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    for context in (20_000, CONTEXT, 163_840, 1_048_576):
        check(context)
    found: dict[str, float] = {}
    for count, context in SHAPES:
        found[f"select {count} x {context}"] = selection_us(count, context)
        long, many = forms.LONG, forms.LONG_MANY
        forms.LONG = forms.LONG_MANY = 1 << 30
        found[f"select {count} x {context}, not as long rows"] = selection_us(count, context)
        forms.LONG, forms.LONG_MANY = long, many
    for count, requests in ((16, 16), (64, 64), (512, 1)):
        found[f"scores {count} rows of {requests} contexts"] = scores_us(count, requests)
    print(json.dumps(found, indent=1))
    out.mkdir(parents=True, exist_ok=True)
    (out / "long_rows.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
