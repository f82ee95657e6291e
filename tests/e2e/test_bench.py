"""`dsa bench` against a real server: the counts of tokens are the server's, the prefix cache is seen, the pictures are drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lab.bench.__main__ import app
from lab.bench.results import BenchResults, load
from tests.e2e.serving import Server


def bench(suite: str, out: Path, *flags: str) -> BenchResults:
    result = CliRunner().invoke(
        app, [suite, "--rounds", "1", "--out", str(out), *flags], obj=f"dsa bench {suite}"
    )
    assert result.exit_code == 0, result.output
    assert (out / f"{suite}.png").stat().st_size > 1000
    return load(out / f"{suite}.json")


@pytest.mark.parametrize(
    ("suite", "flags", "metrics"),
    [
        ("decode", ["--contexts", "16,48", "--tokens", "6"], {"decode_rate", "gap_p50", "gap_p99"}),
        ("prefill", ["--lengths", "32,64", "--text"], {"prefill_rate", "ttft"}),
        ("concurrency", ["--streams", "1,3", "--context", "24", "--tokens", "8"], {"output_rate", "starvation", "ttft"}),
        ("prefix", ["--prefixes", "192", "--tail", "16"], {"cold_ttft", "warm_ttft", "share", "cached_tokens"}),
        ("long", ["--contexts", "64,96", "--tokens", "4"], {"seconds", "ttft", "decode_rate"}),
    ],
)  # fmt: skip
def test_every_suite_measures_a_real_server(
    server: Server, tmp_path: Path, suite: str, flags: list[str], metrics: set[str]
) -> None:
    results = bench(suite, tmp_path, "--endpoint", f"dsa={server.url}", *flags)
    for case in results.figures.values():
        assert metrics <= set(case["dsa"])
        assert all(spread.median > 0 for spread in case["dsa"].values())
    for sample in results.samples:
        assert all(request.ended >= request.first > request.sent for request in sample.requests)
    if suite == "prefix":
        assert results.figures[192]["dsa"]["cached_tokens"].median == 192
    if suite == "concurrency":
        assert [len(sample.requests) for sample in results.samples] == [2, 6]


@pytest.mark.slow
def test_a_served_engine_and_the_same_in_process(default_model: Path, tmp_path: Path) -> None:
    """The command starts the server, measures its engine's memory and stops it, then also runs the engine in process."""
    dsa = (
        f"{sys.executable} -c 'from server.cli.main import main; main()' serve --ledger none --port {{port}}"
    )
    results = bench(
        "overhead", tmp_path, "--serve", f"dsa={dsa}", "--streams", "2", "--context", "64", "--tokens", "16"
    )
    both = results.figures[2]
    assert set(both) == {"dsa", "in process"}
    assert 0.2 < results.ratios[2]["output_rate"] < 2
    peaks = {sample.server: sample.peak_memory_bytes or 0 for sample in results.samples}
    assert 0.5 < peaks["dsa"] / peaks["in process"] < 2  # the engine's, not the small HTTP process's
