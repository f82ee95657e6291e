"""`python -m benchmarks.gpu`: stages within a budget, and their figures as tables and a picture."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import stages as module
from benchmarks.gpu.__main__ import main, stages
from benchmarks.gpu.report import draw, table, tables
from benchmarks.gpu.stages import Outcome, Stage, run_all
from tests.kit import ROOT

KEPT = {
    name: json.loads((ROOT / "benchmarks" / "gpu" / f"{name}.json").read_text())
    for name in ("kernels", "step")
}
DOCTOR = {
    "conformance": [{"backend": "triton", "device": "cuda:0", "passed": True, "checks": 12, "seconds": 9.0, "failures": []}],
    "rates": {"cuda:0": {"copy": 4.1e12, "read": 4.46e12, "bf16": 794e12}},
}  # fmt: skip
ABOUT = {"device": "NVIDIA H200", "torch": "2.11.0", "cuda": "13.0", "triton": "3.6.0", "python": "3.12.3"}


def report(**results: Any) -> dict[str, Any]:
    done = [
        {"name": name, "state": "done", "seconds": 12.3, "why": "", "result": result}
        for name, result in results.items()
    ]
    skipped = {
        "name": "pointwise",
        "state": "skipped",
        "seconds": 0.0,
        "why": "3 s of the budget are left",
        "result": None,
    }
    return {"about": ABOUT, "budget": 570.0, "stages": [*done, skipped]}


PROGRAM = """
import json, sys, time, pathlib, subprocess
kind, path = sys.argv[1:]
print("working", flush=True)
if kind != "silent":
    pathlib.Path(path).write_text(json.dumps({"kind": kind}))
if kind == "stuck":
    child = subprocess.Popen([sys.executable, "-P", "-c", "import time; time.sleep(60)"])
    pathlib.Path(path).write_text(json.dumps({"kind": kind, "child": child.pid}))
    time.sleep(60)
sys.exit(3 if kind == "wrong" else 0)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with the program `stage_program`."""
    (tmp_path / "stage_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def stage(folder: Path, kind: str, least: float = 1, most: float = 20) -> Stage:
    path = folder / f"{kind}.json"
    return Stage(kind, ["stage_program", kind, str(path)], path, least, most)


@pytest.mark.process
def test_what_becomes_of_stages(program: Path) -> None:
    said: list[str] = []
    chosen = [
        stage(program, "well"), stage(program, "wrong"), stage(program, "silent"), stage(program, "stuck", most=2.0),
        stage(program, "long", least=900),
    ]  # fmt: skip
    well, wrong, silent, stuck, long = run_all(chosen, 100, program, said.append)
    assert (well.state, well.result, well.why) == ("done", {"kind": "well"}, "")
    assert (wrong.state, wrong.result, wrong.why) == (
        "failed",
        {"kind": "wrong"},
        "its status is 3; see wrong.log",
    )
    assert (silent.state, silent.result) == ("failed", None)
    assert (stuck.state, stuck.why) == ("stopped", "its 2 s were over")
    assert stuck.result["kind"] == "stuck"
    assert stuck.seconds < 15
    until = time.monotonic() + 5
    while _lives(stuck.result["child"]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _lives(stuck.result["child"]), "what a stage started ends with it"
    assert (long.state, long.seconds) == ("skipped", 0.0)
    assert long.why.endswith("s of the budget are left, and it takes 900 s or more")
    assert (program / "well.log").read_text() == "working\n"
    assert any("1 of 5, well: started, 20 s at most" in line for line in said)
    assert any("5 of 5, long: skipped after 0 s, " in line for line in said)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_budget_is_never_passed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By a clock that only the stages move."""
    now = [0.0]
    given: list[float] = []

    def run(one: Stage, most: float, log: Path, say: object) -> Outcome:
        given.append(most)
        now[0] += most
        return Outcome(one.name, "stopped", most)

    monkeypatch.setattr(module, "_run", run)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    chosen = [Stage(str(n), [], tmp_path, 60, 200) for n in range(5)]
    outcomes = run_all(chosen, 470, tmp_path, lambda line: None)
    assert given == [200, 200, 70]
    assert [one.state for one in outcomes] == ["stopped"] * 3 + ["skipped"] * 2


def test_stages_and_what_they_need(tmp_path: Path) -> None:
    assert [one.name for one in stages(None, None, tmp_path)] == ["doctor", "kernels", "pointwise", "shape"]
    http = (ROOT / "benchmarks" / "gpu" / "http.py").exists()
    chosen = stages(Path("/m.gguf"), Path("/i.safetensors"), tmp_path)
    assert [one.name for one in chosen] == [
        "doctor",
        "kernels",
        "step",
        *(["http"] if http else []),
        "pointwise",
        "shape",
    ]
    for one in chosen:
        assert one.result.parent == tmp_path
        assert one.least <= one.most
        assert ("/i.safetensors" in one.arguments) == (one.name in ("step", "http"))
    assert sum(one.least for one in chosen) < 570


def test_tables_of_the_figures_that_are_kept() -> None:
    text = tables(report(doctor=DOCTOR, **KEPT))
    first = KEPT["kernels"]["figures"][0]
    assert text.startswith("# NVIDIA H200: torch 2.11.0, CUDA 13.0, Triton 3.6.0")
    assert f"| {first['name']} | {first['us']:.3g} |" in text
    assert "| pointwise | skipped | 0 | 3 s of the budget are left |" in text
    assert "| triton | cuda:0 | True | 12 |" in text
    assert "| cuda:0 | 4,100 | 4,460 | 794 |" in text
    decode = KEPT["step"]["decode"][0]
    assert f"| {decode['streams']} | {decode['context']} | {decode['attention']} |" in text
    assert "| in chunks of 64 | 50 | 50 |" in text
    assert text.count("| us | floor | torch | x floor | torch / ours |") == 1
    for line in text.splitlines():
        assert not line.startswith("| ---") or set(line) <= set("| -")


def test_pointwise_and_http_tables() -> None:
    operations = [
        {"model": "M", "rows": 64, "operation": "norm", "us": 4.0, "torch_us": 8.0, "floor_us": 2.0}
    ]
    http = {
        "model": "m", "decode": [{"streams": 1, "tok_s": 700.5}, {"streams": 64, "tok_s": 15000.0, "gap": 2.5}],
        "start": {"seconds": 31.0}, "by_case": {"a": {"x": 1}},
    }  # fmt: skip
    text = tables(report(pointwise={"operations": operations}, http=http))
    assert "| M norm 64 rows | 4 | 2 | 8 | 2 | 2 |" in text
    assert (
        "### decode\n\n| streams | tok_s | gap |\n| --- | --- | --- |\n| 1 | 700 |  |\n| 64 | 15,000 | 2.5 |"
        in text
    )
    assert "### start\n\n| seconds |\n| --- |\n| 31 |" in text
    assert "|  | x |\n| --- | --- |\n| a | 1 |" in text


def test_a_cell_keeps_its_column() -> None:
    assert table([{"a": "x|y\nz", "b": None}]) == ["| a | b |", "| --- | --- |", "| x\\|y z |  |"]


def test_the_picture(tmp_path: Path) -> None:
    assert draw(report(**KEPT), tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert draw(report(step=KEPT["step"]), tmp_path / "one.png")
    assert not draw(report(doctor=DOCTOR), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_report_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.json").write_text(json.dumps(report(doctor=DOCTOR, **KEPT)))
    assert main(["--from", str(tmp_path / "in.json"), "--out", str(tmp_path / "new")]) == 0
    assert sorted(os.listdir(tmp_path / "new")) == ["report.md", "report.png"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["--only", "doctor,nothing"], 2, "--only has nothing; there are doctor, kernels, pointwise, shape"),
        (["/no/such.gguf"], 2, "/no/such.gguf does not exist"),
        pytest.param(
            [], 1, "error: torch finds no CUDA device here; `dsa doctor` says what is missing",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it is about a machine without a GPU"),
        ),
    ],
)  # fmt: skip
def test_errors(
    arguments: list[str], status: int, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*arguments, "--out", str(tmp_path / "x")]
    if status == 1:
        assert main(given) == status
    else:
        with pytest.raises(SystemExit, match=str(status)):
            main(given)
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
