"""Measures the cost of HTTP: the same streams through a server, and through the engine in its own process.

`lab.bench.steps` is the program that drives the engine without a server.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import msgspec

from lab.bench.ask import Asker
from lab.bench.errors import BenchError
from lab.bench.servers import pinned
from lab.bench.suites import DECODE, OUTPUT, P50, P99, Concurrency, Figures, Metric, SampleValues
from lab.bench.timing import Timing
from server.hub.models import ModelFiles

NAME = "in process"
"""The name in tables of the engine without a server."""


class _Gaps(msgspec.Struct, frozen=True):
    p50: float
    p99: float


class _Report(msgspec.Struct, frozen=True):
    """The fields that are read from the line of `python -m lab.bench.steps`. Times are in seconds."""

    tokens_per_second: float
    decode_tokens_per_second: float
    between_tokens: _Gaps
    peak_rss_bytes: int


@dataclass(frozen=True)
class Overhead:
    """Streams over HTTP as in `Concurrency`, and the same streams without a server."""

    streams: tuple[int, ...]
    context: int
    tokens: int

    name: ClassVar[str] = "overhead"
    title: ClassVar[str] = "through the server, and the engine driven in process"
    axis: ClassVar[str] = "streams"
    metrics: ClassVar[tuple[Metric, ...]] = (
        msgspec.structs.replace(OUTPUT, drawn=True), DECODE, P50, msgspec.structs.replace(P99, drawn=False),
    )  # fmt: skip

    @property
    def cases(self) -> Sequence[int]:
        return self.streams

    async def sample(self, ask: Asker, case: int, turn: int) -> tuple[SampleValues, list[Timing]]:
        values, timings = await Concurrency(self.streams, self.context, self.tokens).sample(ask, case, turn)
        return {metric.name: values[metric.name] for metric in self.metrics if metric.name in values}, timings

    def remarks(self, figures: Figures, server: str) -> list[str]:
        return []

    def command(self, files: ModelFiles, case: int) -> list[str]:
        """Return the command that drives the engine in process. Its default `top_k` is that of the server."""
        made = [sys.executable, "-P", "-m", "lab.bench.steps", f"--weights={files.weights}"]
        made += [f"--overlay={files.overlay}"] if files.overlay is not None else []
        return [*made, f"--streams={case}", f"--context={self.context}", f"--tokens={self.tokens}"]


async def drive(command: Sequence[str], cpus: Sequence[int] | None) -> tuple[SampleValues, int]:
    """Run the engine once; return the sample's values, and the peak memory in bytes.

    Raises:
        BenchError: the engine failed; its own error was printed before.
    """
    with pinned(cpus):
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise BenchError(
            f"the engine was not measured in process (exit status {process.returncode}); the reason stands above"
        )
    try:
        report = msgspec.json.decode(output.splitlines()[-1], type=_Report)
    except (msgspec.DecodeError, IndexError) as error:
        raise BenchError(f"what the engine printed in process is no report ({error})") from None
    values = {
        "output_rate": report.tokens_per_second,
        "decode_rate": report.decode_tokens_per_second,
        "gap_p50": report.between_tokens.p50 * 1e3,
        "gap_p99": report.between_tokens.p99 * 1e3,
    }
    return values, report.peak_rss_bytes
