"""What a look at every selection costs a step on a CPU: decodes with and without, in turns, in one process.

    python -m benchmarks.sentinels PATH [--overlay FILE]     # a checkpoint that the compiled kernels compute

Prints the ratio of the shortest times (other programs only make a step longer) for 1 and 8 requests at a context of 4,096 tokens, of which each row reads 256.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

from engine.attention.batch import Batch, build_batch
from engine.config import EngineConfig
from engine.models.gqa.model import GqaModel
from engine.plan.types import ScheduledRequest, StepPlan
from engine.step.build import build

CONTEXT, TOP_K, TURNS = 4096, 256, 60


def decodes(requests: int) -> Batch:
    """A step of one row each, over pages that hold nothing yet."""
    pages = CONTEXT // 64
    plan = StepPlan(
        requests=tuple(
            ScheduledRequest(
                request_id=str(i),
                token_ids=(100 + i,),
                start=CONTEXT - 1,
                page_ids=tuple(range(i * pages, (i + 1) * pages)),
                index_top_k=TOP_K,
                sample=None,
            )
            for i in range(requests)
        )
    )
    return build_batch(plan, torch.device("cpu"))


def main() -> None:
    """Measure, and print a line for each number of requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--overlay")
    args = parser.parse_args()
    built = build(EngineConfig(weights=args.path, overlay=args.overlay, device="cpu", kv_cache_bytes=2 << 30))
    model = built.runner._model
    assert isinstance(model, GqaModel)
    assert model.native is not None, "the compiled kernels do not compute this model"
    for requests in (1, 8):
        watched = decodes(requests)
        unwatched = replace(
            watched, flaws=torch.empty(0, dtype=torch.int32)
        )  # its address is 0: nobody looks
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(2 * TURNS):
            look = turn % 2 == 0
            began = time.perf_counter()
            model.native.forward(watched if look else unwatched, built.cache)
            seconds[look].append(time.perf_counter() - began)
        with_look, without = min(seconds[True]), min(seconds[False])
        print(
            f"{requests} requests: {with_look * 1e3:.2f} ms with, {without * 1e3:.2f} ms without, ratio {with_look / without:.4f}"
        )


if __name__ == "__main__":
    main()
