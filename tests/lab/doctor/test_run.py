"""`dsa doctor` as a whole: on this machine, and on machines that are made up."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from engine.errors import ConfigError
from engine.kernels import native
from lab.doctor import run
from lab.doctor.__main__ import app
from lab.doctor.conformance import CheckJob, Finding
from lab.doctor.rates import rates
from lab.doctor.report import show
from lab.doctor.run import choice, healthy, plan
from lab.tool import start
from tests.server.cli.test_main import dsa

GPU = {"device": "cuda:0", "backend": "triton", "dtype": "bfloat16"}
TWO = {
    "gpu": {
        "triton_missing": None,
        "devices": [{"name": "H200", "device": "cuda:0"}, {"name": "H200", "device": "cuda:1"}, {"name": "L4", "device": "cuda:2"}],
    }
}  # fmt: skip


def verdict(backend: str, device: str, *failures: str) -> Finding:
    return Finding(backend, device, 5, 1.0, failures)


def test_every_backend_is_checked_on_the_cpu_and_on_a_gpu_of_each_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "missing", lambda: None)
    places = list(dict.fromkeys((job.backend, job.device) for job in plan(TWO)))
    assert places == [
        ("reference", "cpu"), ("torch", "cpu"), ("native", "cpu"), ("torch", "cuda:0"), ("triton", "cuda:0"),
        ("torch", "cuda:2"), ("triton", "cuda:2"),
    ]  # fmt: skip
    monkeypatch.setattr(native, "missing", lambda: "they are not made for it")
    without = {"gpu": TWO["gpu"] | {"triton_missing": "Triton is not installed"}}
    assert {job.backend for job in plan(without)} == {"reference", "torch"}


def test_what_decides_the_status() -> None:
    cpu = {"device": "cpu", "backend": "native", "dtype": "bfloat16"}
    ours = [verdict("native", "cpu"), verdict("torch", "cpu", "select: wrong")]
    assert healthy(cpu, ours)
    assert not healthy(cpu | {"backend": "torch"}, ours)
    assert healthy(GPU, [*ours, verdict("torch", "cuda:0"), verdict("triton", "cuda:0")])
    assert not healthy(GPU, [*ours, verdict("torch", "cuda:0", "wrong"), verdict("triton", "cuda:0")])
    assert not healthy(GPU, [*ours, verdict("torch", "cuda:0"), verdict("triton", "cuda:0"), verdict("triton", "cuda:2", "wrong")])  # fmt: skip
    with pytest.raises(ConfigError, match="triton was not checked on cuda:0"):
        healthy(GPU, ours)


def test_a_failure_gives_status_1_and_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(jobs: list[CheckJob], told: object) -> list[Finding]:
        names = dict.fromkeys((job.backend, job.device) for job in jobs)
        return [verdict(*name, "bfloat16: select: tokens differ") for name in names]

    monkeypatch.setattr(run, "examine", fail)
    assert start(app, "doctor", ["--no-rates"]) == 1
    told = capsys.readouterr().out
    assert "reference on cpu: bfloat16: select: tokens differ" in " ".join(told.split())
    assert f"dsa serve would compute with {choice()['backend']}" in told
    assert "FAILS" in told
    assert start(app, "doctor", ["--no-rates", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_a_gpu_machine_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    machine: dict[str, Any] = {
        "system": "Linux", "python": "3.12.3", "versions": {"torch": "2.13.0", "triton": None},
        "cpu": {"name": "Xeon", "cores": 16, "threads": 16, "memory_bytes": 128 << 30, "free_bytes": None, "multiplies_bf16": False},
        "native": {"level": None, "levels_of_this_machine": [], "missing": "they are not made for it", "compiler": None},
        "gpu": {
            "on_the_bus": 1, "driver": "595.58", "torch_cuda": "13.0", "torch_hip": None, "c_compiler": None,
            "triton_missing": "Triton is not installed", "in_container": True,
            "devices": [{
                "device": "cuda:0", "name": "NVIDIA H200", "capability": "9.0", "memory_bytes": 141 << 30,
                "free_bytes": 140 << 30, "multiprocessors": 132,
            }],
        },
    }  # fmt: skip
    found = {
        "machine": machine, "chosen": {"device": "cuda:0", "backend": "torch", "dtype": "bfloat16"}, "passed": True,
        "conformance": [
            {"backend": "torch", "device": "cuda:0", "checks": 27, "seconds": 9.0, "failures": (), "passed": True},
        ],
        "rates": {"cpu": {"copy": 1e10, "float32": 1e11}, "cuda:0": {"copy": 4e12, "read": 4.4e12, "bf16": 794e12, "fp8": 1.4e15}},
        "advice": ["Triton is not installed."], "seconds": 41.7,
    }  # fmt: skip
    show(found, Console(width=160))
    told = capsys.readouterr().out
    for part in (
        "triton missing", "none: they are not made for it", "driver 595.58; torch CUDA 13.0; Triton is not installed",
        "NVIDIA H200, compute capability 9.0, 141.0 GiB, 140.0 GiB free", "fp8 TFLOP/s", "4,000", "1,400", "794",
        "cannot run here", "- Triton is not installed.",
        "dsa serve would compute with torch on cuda:0 in bfloat16: it passes here (42 s)",
    ):  # fmt: skip
        assert part in told, part


def test_rates_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.doctor.rates.SECONDS", 0.01)
    found = rates(torch.device("cpu"))
    assert sorted(found) == ["bf16", "copy", "float32", "read"]
    assert 1e8 < found["copy"] < 1e13
    assert 1e8 < found["read"] < 1e13
    assert 1e8 < found["float32"] < 1e15


@pytest.mark.process
@pytest.mark.skipif(torch.cuda.is_available(), reason="it is about a machine without a GPU")
def test_on_this_machine(tmp_path: Path) -> None:
    result = dsa("doctor", "--json", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert found["passed"] is True
    assert found["chosen"]["device"] == "cpu"
    assert {one["backend"] for one in found["conformance"]} >= {
        "reference",
        "torch",
        found["chosen"]["backend"],
    }
    assert all(one["passed"] for one in found["conformance"])
    assert sorted(found["rates"]) == ["cpu"]
    assert any("GPU" in sentence for sentence in found["advice"])
    assert found["seconds"] < 60
    assert "checking kernels" in result.stderr


def test_without_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The program that benchmarks start writes the same, and ends with the same status."""
    for passed, status in ((True, 0), (False, 1)):
        monkeypatch.setattr(run, "examination", lambda show, passed=passed: {"passed": passed})
        assert run.main([str(tmp_path / "doctor.json")]) == status
        assert json.loads((tmp_path / "doctor.json").read_text()) == {"passed": passed}
