"""Traces of steps: which steps are in them, when they begin, and what happens to errors."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.step.profiler import TRIGGER, StepProfiler


def events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        found: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return found


def steps_in(path: Path) -> list[str]:
    named = {
        event["name"]: event["ts"] for event in events(path) if event.get("name", "").startswith("step ")
    }
    return sorted(named, key=named.__getitem__)


def traces(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json.gz"))


def product() -> int:
    return int(torch.ones(4, 4).mm(torch.ones(4, 4)).sum())


def test_a_trace_has_the_asked_steps_and_what_they_compute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "new" / "traces"
    step = StepProfiler(folder, after=2, steps=3).around(product)
    assert [step() for _ in range(8)] == [64] * 8
    (trace,) = traces(folder)
    assert trace.name.startswith("steps-3-5-")
    assert steps_in(trace) == ["step 3", "step 4", "step 5"]
    assert sum(event.get("name") == "aten::mm" for event in events(trace)) == 3
    assert str(trace) in caplog.text


def test_a_file_begins_another_trace(tmp_path: Path) -> None:
    step = StepProfiler(tmp_path, after=10**9, steps=2).around(product)
    step()
    (tmp_path / TRIGGER).touch()
    for _ in range(3):
        step()
    assert not (tmp_path / TRIGGER).exists()
    (trace,) = traces(tmp_path)
    assert steps_in(trace) == ["step 2", "step 3"]
    (tmp_path / TRIGGER).touch()
    for _ in range(2):
        step()
    assert [steps_in(one) for one in traces(tmp_path)] == [["step 2", "step 3"], ["step 5", "step 6"]]


def test_an_error_passes_through_and_the_trace_goes_on(tmp_path: Path) -> None:
    numbers = iter(range(3))

    def fail() -> None:
        if next(numbers) == 1:
            raise ValueError("the second step")

    step = StepProfiler(tmp_path, after=0, steps=3).around(fail)
    step()
    with pytest.raises(ValueError, match="the second step"):
        step()
    step()
    assert steps_in(traces(tmp_path)[0]) == ["step 1", "step 2", "step 3"]


def test_a_trace_that_is_not_full_is_written_at_the_end(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, after=1, steps=50)
    step = profiler.around(product)
    for _ in range(3):
        step()
    assert traces(tmp_path) == []
    profiler.close()
    profiler.close()
    (trace,) = traces(tmp_path)
    assert trace.name.startswith("steps-2-3-")


def test_a_trace_that_cannot_be_written_is_told_and_serving_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "traces"
    step = StepProfiler(folder, after=0, steps=2).around(product)
    step()
    folder.rmdir()
    folder.write_text("in the way")
    assert step() == 64
    assert "the trace of steps 1 to 2 was not written" in caplog.text
    assert step() == 64


def test_settings(tmp_path: Path) -> None:
    assert StepProfiler.of(EngineConfig(weights="x")) is None
    assert StepProfiler.of(EngineConfig(weights="x", profile_dir=str(tmp_path / "a"))) is not None
    assert (tmp_path / "a").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"profile_dir is .*/file, which cannot be written to"):
        StepProfiler.of(EngineConfig(weights="x", profile_dir=str(tmp_path / "file")))
    with pytest.raises(ValueError, match="profile_steps must be at least 1"):
        EngineConfig(weights="x", profile_steps=0)
    with pytest.raises(ValueError, match="profile_after must be at least 0"):
        EngineConfig(weights="x", profile_after=-1)
