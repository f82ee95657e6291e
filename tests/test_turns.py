"""What the tests' own rules hold: a turn alone is alone, and who starts a process says so."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.kit import ROOT
from tests.turns import turn


def test_who_is_alone_waits_for_those_inside_and_keeps_the_others_out(tmp_path: Path) -> None:
    door, room = tmp_path / "door", tmp_path / "room"
    door.touch()
    room.touch()
    said: list[str] = []
    waits = threading.Event()

    def alone() -> None:
        waits.set()
        with turn(door, room, alone=True):
            said.append("alone")
            waits.wait(0.2)
            said.append("alone no more")

    def one_more() -> None:
        with turn(door, room, alone=False):
            said.append("one more")

    with ExitStack() as inside:
        for _ in range(2):  # at once
            inside.enter_context(turn(door, room, alone=False))
        first = threading.Thread(target=alone)
        first.start()
        assert waits.wait(10)
        waits.clear()
        assert not waits.wait(0.2)
        second = threading.Thread(target=one_more)
        second.start()
        assert not waits.wait(0.2)
        said.append("left")
    for thread in (first, second):
        thread.join(10)
    assert said == ["left", "alone", "alone no more", "one more"]


@pytest.mark.process
def test_who_starts_a_process_says_so(tmp_path: Path) -> None:
    start = "    subprocess.run(['true'], check=True)\n"
    (tmp_path / "test_it.py").write_text(
        f"import subprocess, pytest\ndef test_silent():\n{start}"
        f"@pytest.mark.process\ndef test_said():\n{start}def test_none(): pass\n"
    )
    # This test has its turn; the run inside it must not wait for one.
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", "-c", os.devnull,
         "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert "1 failed, 2 passed" in run.stdout, run.stdout
    assert "test_silent starts a process (subprocess.Popen ('true', ['true'])): mark it with" in run.stdout
