"""A CUDA graph of what a function launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def captured(compute: Callable[[], T], device: torch.device, pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """Run `compute` once, which compiles what is not compiled yet, and capture it.

    Args:
        compute: launches on the current stream, and never waits for it
        device: a CUDA device
        pool: of memory, shared by graphs that run one at a time (`torch.cuda.graph_pool_handle`)

    Returns:
        the graph, and what `compute` returned in it: tensors that each replay fills
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        compute()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        made = compute()
    return graph, made
