"""Measures a decode step without the model: scheduling, batch, sampling, accounting, the frame to the server.

`python -m benchmarks.step` runs the engine's loop with a model that does nothing, and prints the CPU time of a step by
streams, context and sampling. The processor's caches are warm here. A real model drives this code out of the caches
between two steps, and then a step of one stream costs about three times as much (`outside` in `python -m lab.bench.steps`).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from engine.attention.batch import Batch
from engine.channel import frame
from engine.config import PAGE_SIZE
from engine.plan.cost import CostModel, ModelShape, assumed_coefficients
from engine.plan.meter import Meter
from engine.plan.pace import CostPace
from engine.plan.scheduler import Scheduler
from engine.plan.tiles import TileCosts
from engine.protocol import SamplingParams, Submit
from engine.step.core import EngineCore
from engine.step.runner import Runner

VOCAB = 49152
MOST = 4096
"""The most tokens of a stream. No stream reaches it before all streams have decoded together."""

SHAPE = ModelShape(
    row_flops=200_000_000, sparse_row_flops=9_000_000, head_flops=57_000_000, pair_flops=69_000,
    index_pair_flops=31_000, weight_bytes=98 << 20, kv_token_bytes=23_040, index_token_bytes=3840,
)  # fmt: skip
"""About the default model's shape. No result depends on it."""

TILES = TileCosts(budget_bytes=64 << 20, index_row_bytes=32, attention_row_bytes=36, token_bytes=768)

SAMPLING: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 40": {"top_k": 40},
    "5 logprobs": {"temperature": 0.0, "logprobs": 5},
    "presence penalty": {"temperature": 0.0, "presence_penalty": 0.5},
}


class Nothing:
    """A model without arithmetic; its logits are as peaked as a language model's."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._hidden = torch.zeros(512, 1)
        self._logits = torch.randn(rows, VOCAB, generator=generator) * 2
        self._logits[:, ::5000] += 12
        self.batch_device = torch.device("cpu")

    def forward(self, batch: Batch, cache: object, costs: TileCosts) -> Tensor:
        return self._hidden[: batch.token_ids.shape[0]]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the same logits every time."""
        return self._logits[: hidden.shape[0]]


class Cost(NamedTuple):
    """The result of one case; times are medians in seconds of CPU time."""

    streams: int
    context: int
    sampling: str
    step: float
    frame: float  # the time to encode the step's message to the server


def measure(streams: int, context: int, sampling: str, steps: int = 100) -> Cost:
    """Run `steps` decode steps of `streams` streams, and return their cost."""
    model = CostModel(SHAPE, assumed_coefficients(SHAPE, "cpu"), TILES)
    scheduler = Scheduler(
        streams * ((context + MOST) // PAGE_SIZE + 1), token_budget=512, max_running=streams, max_model_len=1 << 17,
        prefix_caching=True, pace=CostPace(model),
    )  # fmt: skip
    runner = Runner(Nothing(streams), None, TILES, torch.device("cpu"))  # type: ignore[arg-type]
    core = EngineCore(scheduler, runner, Meter(model), sparse=True)
    draw = random.Random(0)
    for i in range(streams):
        params = SamplingParams(**{"max_tokens": MOST, "seed": i, **SAMPLING[sampling]})
        prompt = (i, *draw.choices(range(VOCAB), k=context - 1))
        core.submit(
            Submit(request_id=f"chatcmpl-{i:032x}", prompt_token_ids=prompt, sampling=params, index_top_k=512)
        )
    while (output := core.step()) is not None and len(output.deltas) < streams:
        pass
    taken: list[float] = []
    framed: list[float] = []
    for _ in range(steps):
        began = time.thread_time()
        output = core.step()
        between = time.thread_time()
        assert output is not None
        assert len(output.deltas) == streams
        frame(output)
        taken.append(between - began)
        framed.append(time.thread_time() - between)
    return Cost(streams, context, sampling, statistics.median(taken), statistics.median(framed))


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    table = Table("streams", "context", "sampling", "step us", "us a stream", "frame us")
    cases = [
        (n, context, "greedy") for n, context in ((1, 128), (1, 7000), (8, 1024), (32, 1024), (64, 1024))
    ]
    cases += [(n, 1024, sampling) for sampling in SAMPLING for n in (1, 8) if sampling != "greedy"]
    for case in cases:
        one = measure(*case)
        table.add_row(
            str(one.streams), str(one.context), one.sampling, f"{one.step * 1e6:.0f}",
            f"{one.step / one.streams * 1e6:.0f}", f"{one.frame * 1e6:.0f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
