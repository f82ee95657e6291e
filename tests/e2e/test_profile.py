"""`dsa serve --profile-dir`: a real engine's steps in a trace, with the answer as it is without."""

from __future__ import annotations

import gzip
import json
import signal
from collections.abc import Callable
from pathlib import Path

from tests.e2e.serving import Server, until


def test_steps_are_traced(start: Callable[..., Server], tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    server = start(
        "--profile-dir", str(folder), "--profile-after", "1", "--profile-steps", "3", "--max-model-len", "256"
    ).wait_ready()
    assert (
        server.post("/v1/completions", prompt="One two three", max_tokens=8, temperature=0).status_code == 200
    )
    until(lambda: any(folder.glob("*.json.gz")))
    (folder / "start").touch()
    assert (
        server.post("/v1/completions", prompt="One two three", max_tokens=2, temperature=0).status_code == 200
    )
    assert server.end(signal.SIGTERM) == 0  # the second trace is not full
    first, second = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    for trace, count in ((first, 3), (second, 2)):
        with gzip.open(trace, "rt") as file:
            events = json.load(file)["traceEvents"]
        steps = {event["name"] for event in events if event.get("name", "").startswith("step ")}
        assert len(steps) == count
    assert first.name.startswith("steps-2-4-")
    assert server.errors.count("profiled in") == 2
