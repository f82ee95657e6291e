"""Measures the cost of accounting as a share of the time of decode steps.

`python -m benchmarks.accounting` runs decode steps of the default model at several batch sizes. As shares of their time
it prints the time of the meter for each step (in the engine) and of an account for each request (in the server: prices, a
row in a SQLite ledger, counters). The server is a process of its own, so comparing its time with the engine's is the
worst case: one core for both.

All times are CPU time, so that other work on the machine does not make the shares look smaller.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from engine.client import EngineState, EngineStatus
from engine.config import EngineConfig
from engine.plan.meter import Meter
from engine.protocol import EngineStats, RequestUsage, SamplingParams, Submit, Work
from engine.step.build import Built, build
from engine.step.core import PROGRESS_SECONDS
from lab.calibrate.steps import Bench, StepCase
from server.generation.choice import ChoiceUsage, Job
from server.hub.models import resolve
from server.money.accounting import Account, Books
from server.money.ledger import Ledger
from server.money.pricing import DEFAULT_TABLE, PriceBook
from server.telemetry.metrics import Metrics

CONTEXT = 1024
OUTPUT = 32
"""Tokens of an answer. It is short, so that the fixed cost of a request has weight."""


class Share(NamedTuple):
    """The result for one batch size, in seconds of CPU time."""

    requests: int
    step: float  # divided by the number of threads
    meter: float  # for each step
    account: float  # for each request

    @property
    def engine_share(self) -> float:
        """The meter's share of a step's time."""
        return self.meter / self.step

    @property
    def server_share(self) -> float:
        """An account's share of the time that one request takes of its steps."""
        return self.account / (OUTPUT * self.step / self.requests)


def measure(sizes: tuple[int, ...], repeats: int = 3) -> list[Share]:
    """Measure the default model's decode steps and their accounting, for each batch size."""
    files = resolve()
    built = build(EngineConfig(weights=str(files.weights), overlay=str(files.overlay), device="cpu"))
    account = asyncio.run(_account_seconds(400))
    return [_share(built, requests, account, repeats) for requests in sizes]


def _share(built: Built, requests: int, account: float, repeats: int) -> Share:
    bench = Bench(
        built.runner, built.cache, built.ready.model.vocab_size, 512, time.process_time
    )  # fmt: skip
    case = StepCase("decode", CONTEXT - 1, 1, requests, 512, sampled=True, held_out=False)
    step = statistics.median(bench.seconds(case) for _ in range(repeats)) / torch.get_num_threads()
    meter, plan = Meter(built.costs), bench.plan(case)
    for request in plan.requests:
        meter.open(request.request_id, CONTEXT - 1)
    charge = _seconds(lambda: meter.charge(plan, 0.1))
    stats = _seconds(lambda: meter.add_to(EngineStats()))
    progress = _seconds(meter.progress) * min(1.0, step / PROGRESS_SECONDS)
    return Share(requests, step, charge + stats + progress, account)


def _seconds(call: Callable[[], object], count: int = 100) -> float:
    began = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - began) / count


async def _account_seconds(count: int, at_once: int = 8) -> float:
    """Measure the CPU seconds of a request's account, from its opening to the row in the ledger and the counters."""
    with tempfile.TemporaryDirectory() as folder:
        prices = PriceBook(DEFAULT_TABLE, "model")
        metrics = Metrics("model", lambda: EngineStatus(state=EngineState.READY), prices)
        ledger = Ledger(str(Path(folder) / "usage.sqlite"))
        books = Books(prices, ledger, "model", metrics.closed, metrics.ledger_failed)
        began = time.process_time()
        for start in range(0, count, at_once):
            await asyncio.gather(*(_one(books, f"r{i}") for i in range(start, start + at_once)))
        seconds = (time.process_time() - began) / count
        ledger.close()
    return seconds


async def _one(books: Books, name: str) -> None:
    params = SamplingParams(max_tokens=OUTPUT, seed=0)
    job = Job(
        index=0, submit=Submit(request_id=name, prompt_token_ids=(1,), sampling=params, index_top_k=512)
    )
    account = Account(books, request_id=name, endpoint="/v1/completions", key="anonymous", jobs=[job])
    work = Work(rows=CONTEXT, flops=10**12, cache_bytes=10**9, prefill_seconds=1.0, decode_seconds=2.0)
    account.settle(
        name,
        RequestUsage(
            prompt_tokens=CONTEXT - OUTPUT, cached_tokens=0, completion_tokens=OUTPUT, preemptions=0, index_top_k=512,
            queue_seconds=0.0, prefill_seconds=1.0, decode_seconds=2.0, work=work,
        ),
    )  # fmt: skip
    await account.finish([ChoiceUsage(CONTEXT - OUTPUT, 0, OUTPUT, 512, 0.0)], "length")


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    table = Table("requests", "step ms", "meter us a step", "account us a request", "of the step", "of the request", "sum")  # fmt: skip
    for one in measure((1, 8, 32)):
        table.add_row(
            str(one.requests), f"{one.step * 1e3:.1f}", f"{one.meter * 1e6:.0f}", f"{one.account * 1e6:.0f}",
            f"{one.engine_share:.3%}", f"{one.server_share:.3%}", f"{one.engine_share + one.server_share:.3%}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
