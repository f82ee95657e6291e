"""Runs programs one after the other within a budget of seconds; each leaves a JSON file, also if its time runs out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

ROOT = Path(__file__).parents[2]
ECHO_SECONDS = 5.0
"""The least time between two lines of a program that are shown; its log file has all of them."""
END_SECONDS = 10.0
"""How long a program may take to end after SIGTERM."""


class Stage(NamedTuple):
    """A program of this project.

    Attributes:
        name: of the stage
        arguments: of `python -P -m`
        result: the JSON file that it writes
        least: seconds without which it is not worth a start
        most: seconds that it may take
    """

    name: str
    arguments: Sequence[str]
    result: Path
    least: float
    most: float


@dataclass(frozen=True)
class Outcome:
    """What became of a stage.

    Attributes:
        name: the stage's
        state: `done`; `failed`: it ended with an error; `stopped`: its time was over, and `result` may be a part;
            `skipped`: too little of the budget was left
        seconds: that it took
        why: a sentence, unless it is done
        result: what its JSON file has
    """

    name: str
    state: Literal["done", "failed", "stopped", "skipped"]
    seconds: float
    why: str = ""
    result: Any = None


def run_all(
    stages: Sequence[Stage], budget: float, folder: Path, say: Callable[[str], None] = print
) -> list[Outcome]:
    """Run the stages in order.

    Args:
        stages: each is worth less than those before it
        budget: seconds for all of them
        folder: where the log of each goes, NAME.log
        say: gets lines about the progress
    """
    began = time.monotonic()
    found = []
    for number, stage in enumerate(stages):
        passed = time.monotonic() - began
        left = budget - passed
        title = f"[{passed:4.0f} s] {number + 1} of {len(stages)}, {stage.name}"
        if left < stage.least:
            why = f"{max(left, 0):.0f} s of the budget are left, and it takes {stage.least:.0f} s or more"
            outcome = Outcome(stage.name, "skipped", 0.0, why)
        else:
            most = min(stage.most, left)
            say(f"{title}: started, {most:.0f} s at most")
            outcome = _run(stage, most, folder / f"{stage.name}.log", say)
        say(f"{title}: {outcome.state} after {outcome.seconds:.0f} s{outcome.why and ', ' + outcome.why}")
        found.append(outcome)
    return found


def _run(stage: Stage, most: float, log: Path, say: Callable[[str], None]) -> Outcome:
    stage.result.unlink(missing_ok=True)
    began = time.monotonic()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", *stage.arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path}, start_new_session=True,
    )  # fmt: skip
    reader = threading.Thread(target=_copy, args=(child, log, say), daemon=True)
    reader.start()
    stopped = False
    try:
        child.wait(most)
    except subprocess.TimeoutExpired:
        stopped = True
    finally:
        _end(child)
    reader.join(END_SECONDS)
    result = None
    with contextlib.suppress(OSError, ValueError):
        result = json.loads(stage.result.read_text("utf-8"))
    seconds = time.monotonic() - began
    if stopped:
        return Outcome(stage.name, "stopped", seconds, f"its {most:.0f} s were over", result)
    if child.returncode or result is None:
        why = f"its status is {child.returncode}; see {log.name}"
        return Outcome(stage.name, "failed", seconds, why, result)
    return Outcome(stage.name, "done", seconds, "", result)


def _copy(child: subprocess.Popen[str], log: Path, say: Callable[[str], None]) -> None:
    """Write what the program prints to its log, and show a line now and then. Runs in a thread."""
    shown = time.monotonic()
    assert child.stdout is not None
    with log.open("w") as file, child.stdout:
        for line in child.stdout:
            file.write(line)
            file.flush()
            if line.strip() and time.monotonic() - shown > ECHO_SECONDS:
                shown = time.monotonic()
                say(f"         {line.rstrip()[:150]}")


def _end(child: subprocess.Popen[str]) -> None:
    """End the program and all that it started, which are one process group; nothing happens if they have ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(END_SECONDS)
        if number == signal.SIGTERM and not _group_lives(child.pid):
            return


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
