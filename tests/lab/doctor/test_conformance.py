"""Checks in processes of their own: what passes, what fails, and what crashes or hangs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from engine.kernels import native
from engine.kernels.choice import BACKENDS
from engine.kernels.torchops.attention import VectorisedKernels
from lab.doctor import conformance
from lab.doctor.conformance import GROUPS, CheckJob, Finding, check, examine, jobs_of

THE_TILE_BACKENDS = [
    name for name in sorted(BACKENDS) if name != "triton" and (name != "native" or native.missing() is None)
]


@pytest.mark.parametrize("backend", THE_TILE_BACKENDS)
def test_every_backend_of_the_cpu_passes(backend: str) -> None:
    threads = torch.get_num_threads()
    said = check(CheckJob(backend, "cpu"))
    native.set_threads(threads)
    assert said == {"checks": 3 if backend == "reference" else 27, "failures": []}


def test_every_check_of_a_wrong_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_scores(*arguments: object) -> torch.Tensor:
        raise RuntimeError("no kernel image\nis available")

    select = VectorisedKernels.select
    monkeypatch.setattr(VectorisedKernels, "index_scores", no_scores)
    monkeypatch.setattr(VectorisedKernels, "select", lambda *given: select(*given).flip(-1)[..., 1:])
    failures = check(CheckJob("torch", "cpu"))["failures"]
    assert isinstance(failures, list)
    assert "known answer: RuntimeError: no kernel image" in failures
    assert any(failure.startswith("known answer: select: ") for failure in failures)
    assert len(failures) == 3 + 8  # the known answers, and `check_tile` of each case and dtype


def test_triton_has_jobs_for_every_check() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from lab.doctor import pointwise, rows

    assert [job.group for job in jobs_of("triton", "cuda:0")] == list(GROUPS)
    grouped = [name for group in GROUPS.values() for name in group]
    assert sorted(grouped) == sorted([*rows.CHECKS, *pointwise.CHECKS])


@pytest.mark.process
def test_verdicts_of_processes() -> None:
    """Also of one that cannot start what it checks."""
    told: list[tuple[CheckJob, Finding]] = []
    jobs = [CheckJob("reference", "cpu"), CheckJob("torch", "cuda:99")]
    good, bad = examine(jobs, lambda job, verdict: told.append((job, verdict)))
    assert (good.backend, good.device, good.checks, good.failures) == ("reference", "cpu", 3, ())
    assert good.passed
    assert (bad.checks, bad.passed) == (0, False)
    assert bad.failures
    assert sorted(job for job, _ in told) == sorted(jobs)


@pytest.mark.process
@pytest.mark.parametrize(
    ("code", "seconds", "failure"),
    [
        ("import os; os.kill(os.getpid(), 4)", 30.0, "the process was ended by SIGILL"),
        ("import time; time.sleep(60)", 0.5, "the checks did not end within 0 s"),
        ("raise SystemExit('no such file')", 30.0, "the process ended with status 1: no such file"),
        ("print('{}')", 30.0, "the process ended with status 0: it said nothing"),
    ],
)
def test_processes_without_a_result(
    monkeypatch: pytest.MonkeyPatch, code: str, seconds: float, failure: str
) -> None:
    run = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **more: run([sys.executable, "-P", "-c", code], **more)
    )
    (verdict,) = examine([CheckJob("triton", "cuda:0", "rows")], lambda job, verdict: None, seconds)
    assert verdict.failures == (f"rows: {failure}",)
    assert not verdict.passed


def test_parts_of_a_backend_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: CheckJob, seconds: float) -> Finding:
        return Finding(job.backend, job.device, 2, 3.0 + len(job.group), ("wrong",) * (job.group == "scores"))

    monkeypatch.setattr(conformance, "_run", run)
    triton, reference = examine(
        [*jobs_of("triton", "cuda:0"), CheckJob("reference", "cpu")], lambda job, verdict: None
    )
    assert triton == Finding("triton", "cuda:0", 2 * len(GROUPS), 3.0 + len("pointwise"), ("wrong",))
    assert not triton.passed
    assert reference.passed


def test_a_process_prints_its_result_last(capsys: pytest.CaptureFixture[str]) -> None:
    conformance.main([json.dumps(CheckJob("reference", "cpu"))])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"checks": 3, "failures": []}
