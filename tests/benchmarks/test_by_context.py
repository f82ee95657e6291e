"""The picture of speed, price and agreement by context: its figures, from made-up results of `dsa bench` and `dsa eval`."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from benchmarks.by_context import agreements, main, speeds, table, usd
from lab.bench.results import BenchResults, Sample, Server
from lab.bench.suites import Long
from lab.curve.measure import Attention
from lab.evaluate.results import EvalResults
from tests.kit import ROOT

EVAL = ROOT / "docs" / "overlays" / "qwen2.5-coder-1.5b-instruct.eval.json"


NAMES: dict[Attention, str] = {"dense": "dense", "sparse": "sparse"}


def bench(*, dense_name: str = "dense") -> BenchResults:
    rates = {("sparse", 512): 40, ("sparse", 8192): 32, (dense_name, 512): 40, (dense_name, 8192): 16}
    samples = [
        Sample(
            server=server, case=case, turn=turn, requests=[],
            values={"decode_rate": rate * factor, "prefill_rate": 10.0 * rate * factor},
        )
        for (server, case), rate in rates.items()
        for turn, factor in enumerate((1.0, 1.5, 0.5))
    ]  # fmt: skip
    made = BenchResults(
        suite="long", title=Long.title, axis=Long.axis, metrics=list(Long.metrics), own="sparse",
        command="dsa bench long", started="2026-11-30T00:00:00Z", settings={"rounds": 3}, machine={"processor": "a processor"},
        servers=[
            Server(name=name, url=None, command=None, cpus=[0, 1]) for name in ("sparse", dense_name)
        ],
        samples=samples,
    )  # fmt: skip
    made.summarise()
    return made


def test_a_rate_is_that_of_the_bench() -> None:
    found = speeds(bench(), "sparse", "decode_rate")
    assert [(context, one.median, one.low, one.high) for context, one in found.items()] == [
        (512, 40, 30, 50),
        (8192, 32, 24, 40),
    ]


def test_a_price_is_the_machines_for_the_time_of_a_million_tokens() -> None:
    assert usd(100.0, 0.36) == pytest.approx(1.0), "10,000 seconds at 0.0001 USD"
    last = table(bench(), NAMES, 0.36).splitlines()[-1]
    assert last == "| 8,192 | 160.0 | 320.0 | 0.62 | 0.31 | 16.0 | 32.0 | 6.25 | 3.12 |"


def test_a_context_that_only_one_server_has_measured_is_left_out() -> None:
    results = bench()
    del results.figures[8192]["dense"]
    assert table(results, NAMES, 0.36).splitlines()[-1].startswith("| 512 |")


def test_agreement_is_that_of_the_default_top_k_by_length() -> None:
    results = msgspec.json.decode(EVAL.read_bytes(), type=EvalResults)
    found = agreements(results)
    assert results.faithful is not None
    rows = results.faithful.rows
    assert [one.share for one in found] == [
        rows[str(results.default_top_k)][name].agreement
        for name in ("from 2048", "from 4096", "from 8192", "from 16384")
        if rows["dense"][name].prompts
    ]
    assert sum(one.prompts for one in found) == len(
        [p for p in results.faithful.prompts if p.prompt_tokens >= 2048]
    )
    assert [one.mean_tokens for one in found] == sorted(one.mean_tokens for one in found)


@pytest.mark.process  # drawing looks for fonts
def test_the_command_draws_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = bench().save(tmp_path), tmp_path / "picture.png"
    arguments = [str(path), str(EVAL), "--sparse", "sparse", "--dense", "dense", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["by_context", *arguments])
    main()
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "| 512 | 400.0 | 400.0 |" in capsys.readouterr().out


def test_other_results_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SystemExit, match=r"no decode_rate of a server named 'dense'; the file has sparse, other"
    ):
        speeds(bench(dense_name="other"), "dense", "decode_rate")
    with pytest.raises(SystemExit, match="--only faithful"):
        agreements(EvalResults(settings={}, environment={}, default_top_k=512))
    monkeypatch.setattr(sys, "argv", ["by_context", str(tmp_path / "none"), str(EVAL)])
    with pytest.raises(SystemExit):
        main()
