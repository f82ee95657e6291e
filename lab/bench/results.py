"""SUITE.json: every sample of a suite, with the servers, the settings and the machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from lab.bench.statistics import Spread, advantage, spread
from lab.bench.suites import Metric
from lab.bench.timing import Timing


class Server(msgspec.Struct, kw_only=True):
    """A server that was measured.

    Attributes:
        name: its name in tables.
        url: its address; None for the engine in process.
        command: the command that started it; None if it was already running.
        cpus: the cores that it could use; None is any.
        about: the server's description of itself.
        fields: more fields that its requests had.
        peak_memory_bytes: the peak resident memory of its largest process so far; None if it is not known.
    """

    name: str
    url: str | None
    command: str | None
    cpus: list[int] | None
    about: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    peak_memory_bytes: int | None = None


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of one server. `requests` is empty for the engine in process."""

    server: str
    case: int
    turn: int
    values: dict[str, float]
    requests: list[Timing]
    peak_memory_bytes: int | None = None  # from the server's start to the end of this sample


class BenchResults(msgspec.Struct, kw_only=True):
    """The results of a suite, or of the samples taken so far.

    Attributes:
        own: the server that is compared with the others.
        settings: sizes and rounds.
        figures: case -> server -> metric -> median and quartiles of `samples`.
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
        """Compute `figures` and `ratios` from the samples."""
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
        """Write SUITE.json. The file is replaced in one step, so it is never half written."""
        path = folder / f"{self.suite}.json"
        part = path.with_name(path.name + ".part")
        part.write_bytes(msgspec.json.encode(self) + b"\n")
        os.replace(part, path)
        return path


def figures_of(samples: list[Sample], metrics: list[str]) -> dict[int, dict[str, dict[str, Spread]]]:
    """Compute medians and quartiles by case, server and metric, in the order of the samples."""
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
