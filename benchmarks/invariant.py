"""Measures what `--batch-invariant` costs: steps of one model with it and without it, in turn, in one process.

`python -m benchmarks.invariant WEIGHTS` prints the time of decodes and of chunks of prompts at several contexts, and the
ratio of the two engines, of which each is the median of rounds. With `--threads 1` on a CPU it is the time that the process
had, so that others on the machine count less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from engine.config import PAGE_SIZE, EngineConfig
from engine.plan.types import ScheduledRequest, StepPlan
from engine.step.build import Built, build

POSITIONS = 2048
STEPS: dict[str, list[tuple[int, int]]] = {
    "1 decode at 1,000": [(1000, 1)],
    "8 decodes at 1,000": [(1000, 1)] * 8,
    "1 decode at 2,000": [(2000, 1)],
    "a prompt of 256": [(0, 256)],
    "a prompt of 512": [(0, 512)],
    "512 tokens from 512 on": [(512, 512)],
    "512 tokens from 1,536 on": [(1536, 512)],
}
"""First position and rows of each request."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights")
    parser.add_argument("--overlay")
    parser.add_argument(
        "--top-k", type=int, help="positions that a row selects; without it attention is dense"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    engines = [
        build(
            EngineConfig(
                weights=options.weights,
                overlay=options.overlay,
                device=options.device,
                dtype="bfloat16",
                threads=options.threads,
                max_model_len=POSITIONS,
                max_running=8,
                kv_cache_bytes=1 << 30,
                batch_invariant=invariant,
            )
        )
        for invariant in (False, True)
    ]
    clock = time.process_time if options.device == "cpu" and options.threads == 1 else time.perf_counter
    for built in engines:
        for start in range(0, POSITIONS, 512):
            seconds(built, [(start, 512)], options.top_k, clock)
    print("| step | usual, ms | invariant, ms | ratio |\n|---|--:|--:|--:|")
    for name, requests in STEPS.items():
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(options.rounds):
            for built, found in zip(engines, times, strict=True):
                found.append(min(seconds(built, requests, options.top_k, clock) for _ in range(2)))
        usual, invariant = map(statistics.median, times)
        ratio = statistics.median(ours / theirs for theirs, ours in zip(*times, strict=True))
        print(f"| {name} | {usual * 1e3:.1f} | {invariant * 1e3:.1f} | {ratio:.2f} |", flush=True)


def seconds(
    built: Built, requests: list[tuple[int, int]], top_k: int | None, clock: Callable[[], float]
) -> float:
    """The time of one step, its logits not counted."""
    pages = POSITIONS // PAGE_SIZE
    plan = StepPlan(
        requests=tuple(
            ScheduledRequest(
                request_id=str(number),
                token_ids=(17,) * rows,
                start=start,
                page_ids=tuple(range(number * pages, (number + 1) * pages)),
                index_top_k=top_k,
                sample=None,
            )
            for number, (start, rows) in enumerate(requests)
        )
    )
    _wait(built)
    began = clock()
    built.runner.hidden(plan)
    _wait(built)
    return clock() - began


def _wait(built: Built) -> None:
    if built.ready.model.device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
