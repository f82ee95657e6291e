"""An engine that hangs is noticed, dumped, killed and replaced; one that only takes long is not."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import psutil
import pytest

from engine.client import EngineState
from engine.config import EngineConfig
from engine.errors import EngineDiedError
from engine.protocol import Delta, SamplingParams, Submit
from engine.pulse import Pulse
from engine.supervisor import SubprocessEngine
from engine.watchdog import describe
from tests.engine.scripted_process import ANSWER, BUSY, DEADLOCK, LONG
from tests.kit import ROOT

pytestmark = pytest.mark.process

SECONDS = 1.0


@asynccontextmanager
async def running(
    monkeypatch: pytest.MonkeyPatch, seconds: float = SECONDS
) -> AsyncGenerator[SubprocessEngine, None]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    engine = SubprocessEngine(
        EngineConfig(weights="none"), module="tests.engine.scripted_process", hang_seconds=seconds
    )
    await engine.start()
    try:
        await until(lambda: engine.status.state is EngineState.READY)
        yield engine
    finally:
        await engine.stop()


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - the engine only offers a snapshot
            await asyncio.sleep(0.02)


def ask(engine: SubprocessEngine, kind: int, name: str = "r") -> list[Delta | Exception]:
    """Submit a request; returns the list that fills with what comes of it."""
    heard: list[Delta | Exception] = []
    engine.submit(
        Submit(
            request_id=name,
            prompt_token_ids=(kind,),
            sampling=SamplingParams(max_tokens=1, seed=0),
            index_top_k=None,
        ),
        heard.append,
    )
    return heard


async def replaced(engine: SubprocessEngine, pid: int) -> None:
    await until(lambda: engine.status.state is EngineState.READY and engine.status.pid != pid)
    assert not psutil.pid_exists(pid)
    assert engine.status.hangs == 1
    heard = ask(engine, ANSWER, "after")
    await until(lambda: bool(heard))
    assert isinstance(heard[0], Delta)


def pid_of(engine: SubprocessEngine) -> int:
    pid = engine.status.pid
    assert pid is not None
    return pid


async def test_a_deadlock_is_dumped_killed_and_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    async with running(monkeypatch) as engine:
        pid = pid_of(engine)
        one, two = ask(engine, DEADLOCK, "one"), ask(engine, ANSWER, "two")
        began = time.monotonic()
        await until(lambda: bool(one and two))
        assert SECONDS / 2 < time.monotonic() - began < 3 * SECONDS + 2
        await replaced(engine, pid)
        for heard in (one, two):
            (error,) = heard  # one error each
            assert isinstance(error, EngineDiedError)
            assert "made no progress" in str(error)
    assert "_waits_for_ever" in caplog.text  # the stacks, although no Python code could run
    assert "2 requests" in caplog.text


async def test_a_stopped_engine_is_replaced_also_when_it_has_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    async with running(monkeypatch) as engine:
        pid = pid_of(engine)
        os.kill(pid, signal.SIGSTOP)
        await replaced(engine, pid)
    assert "could not write its stacks" in caplog.text
    if sys.platform == "linux":
        assert "stopped" in caplog.text


@pytest.mark.parametrize("kind", [LONG, BUSY], ids=["many steps", "one step of a CPU"])
async def test_long_work_is_left_alone(monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    async with running(monkeypatch) as engine:
        pid = pid_of(engine)
        heard = ask(engine, kind)
        await until(lambda: bool(heard))
        assert isinstance(heard[0], Delta)
        assert (engine.status.pid, engine.status.hangs) == (pid, 0)


async def test_an_engine_that_waits_for_a_stuck_server_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch, 0.3) as engine:
        pid = pid_of(engine)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5)  # noqa: ASYNC251 - the event loop stands still on purpose
        os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(0.5)
        assert (engine.status.pid, engine.status.hangs) == (pid, 0)


async def test_a_process_that_cannot_be_started_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    async with running(monkeypatch) as engine:
        pid, spawn = pid_of(engine), engine._spawn
        failures: list[int] = []

        async def fail(pulse: Pulse | None) -> object:
            if len(failures) < 2:
                failures.append(1)
                raise OSError(24, "Too many open files")
            return await spawn(pulse)

        monkeypatch.setattr(engine, "_spawn", fail)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: len(failures) == 2)
        await until(lambda: engine.status.state is EngineState.READY)
        assert engine.status.pid != pid
    assert caplog.text.count("could not be started ([Errno 24] Too many open files)") == 2


async def test_a_first_start_that_never_works_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.supervisor._BACKOFF_SECONDS", (0.0, 0.01))
    monkeypatch.setattr(sys, "executable", "/no/such/program")
    engine = SubprocessEngine(EngineConfig(weights="none"), hang_seconds=1)
    await engine.start()
    await until(lambda: engine.status.state is EngineState.FAILED)
    assert "/no/such/program" in engine.status.message
    await engine.stop()


PARENT = """
import asyncio, sys
from engine.config import EngineConfig
from engine.client import EngineState
from engine.supervisor import SubprocessEngine

async def main():
    engine = SubprocessEngine(EngineConfig(weights="none"), module="tests.engine.scripted_process", hang_seconds=60)
    await engine.start()
    while engine.status.state is not EngineState.READY:
        await asyncio.sleep(0.01)
    print(engine.status.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a stopped process with its parent")
def test_a_stopped_engine_does_not_outlive_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with subprocess.Popen([sys.executable, "-P", "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        child.suspend()
        parent.kill()
        _, left = psutil.wait_procs([child], 5)
        assert not left


def test_threads_are_described() -> None:
    said = describe(os.getpid())
    assert said.startswith("Threads: ") if sys.platform == "linux" else said == ""
    assert describe(2**22 + 1) == ""
