"""What a suite measured, as it is written down: every sample, and what was measured with what on what."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from lab.bench.statistics import Spread, advantage, spread
from lab.bench.suites import Metric
from lab.bench.timing import Timing


class Server(msgspec.Struct, kw_only=True):
    """Who was measured.

    Attributes:
        name: what tables call it.
        url: where it answered; None for the engine in process.
        command: how it was started; None where it ran already.
        cpus: the cores that it was held to; None is any.
        about: what it says of itself.
        fields: more fields that its requests had.
        peak_memory_bytes: the most that its largest process had resident so far; None where it is not known.
    """

    name: str
    url: str | None
    command: str | None
    cpus: list[int] | None
    about: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    peak_memory_bytes: int | None = None


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of one server. `requests` are empty for the engine in process."""

    server: str
    case: int
    turn: int
    values: dict[str, float]
    requests: list[Timing]
    peak_memory_bytes: int | None = None  # after it, since the start


class BenchResults(msgspec.Struct, kw_only=True):
    """A suite's run, whole or so far.

    Attributes:
        own: the server that is compared with the others.
        settings: sizes and rounds.
        figures: case -> server -> metric -> median and quartiles, of `samples`.
        ratios: case -> metric -> how many times better the own server is than the best of the others.
    """

    suite: str
    title: str
    axis: str
    metrics: list[Metric]
    own: str
    command: str
    started: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    servers: list[Server]
    seconds: float = 0.0
    figures: dict[int, dict[str, dict[str, Spread]]] = {}
    ratios: dict[int, dict[str, float]] = {}
    remarks: list[str] = []
    samples: list[Sample] = []

    def summarise(self) -> None:
        """Make figures and ratios of the samples."""
        self.figures = figures_of(self.samples, [metric.name for metric in self.metrics])
        self.ratios = {}
        for case, servers in self.figures.items():
            others = {name: found for name, found in servers.items() if name != self.own}
            for metric in self.metrics:
                of_others = {name: found.get(metric.name) for name, found in others.items()}
                ratio = advantage(servers.get(self.own, {}).get(metric.name), of_others, metric.better)
                if ratio is not None:
                    self.ratios.setdefault(case, {})[metric.name] = ratio

    def save(self, folder: Path) -> Path:
        """Write SUITE.json; it is whole at every moment."""
        path = folder / f"{self.suite}.json"
        part = path.with_name(path.name + ".part")
        part.write_bytes(msgspec.json.encode(self) + b"\n")
        os.replace(part, path)
        return path


def figures_of(samples: list[Sample], metrics: list[str]) -> dict[int, dict[str, dict[str, Spread]]]:
    """Medians and quartiles by case, server and metric, in the order of the samples."""
    grouped: dict[int, dict[str, dict[str, list[float]]]] = {}
    for sample in samples:
        of_server = grouped.setdefault(sample.case, {}).setdefault(sample.server, {})
        for name in metrics:
            if name in sample.values:
                of_server.setdefault(name, []).append(sample.values[name])
    return {
        case: {
            server: {
                name: found for name, values in of_server.items() if (found := spread(values)) is not None
            }
            for server, of_server in servers.items()
        }
        for case, servers in grouped.items()
    }


def load(path: Path) -> BenchResults:
    """Read a SUITE.json."""
    return msgspec.json.decode(path.read_bytes(), type=BenchResults)
