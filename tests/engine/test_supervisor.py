"""The supervisor where the system gives it no process."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import Any

import pytest

import engine.supervisor
from engine.client import EngineState
from engine.config import EngineConfig
from engine.supervisor import SubprocessEngine


async def test_a_process_that_cannot_be_made_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    starts: list[tuple[Any, ...]] = []

    async def no_process(*command: Any, **options: Any) -> Any:
        starts.append(command)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", no_process)
    monkeypatch.setattr(engine.supervisor, "_BACKOFF_SECONDS", (0.0, 0.01))
    supervised = SubprocessEngine(EngineConfig(weights="nowhere"))
    with caplog.at_level(logging.ERROR):
        await supervised.start()
        async with asyncio.timeout(10):
            while len(starts) < 8:  # noqa: ASYNC110 - more often than a process may die before it is ready
                await asyncio.sleep(0.005)
    assert supervised.status.state is EngineState.DOWN
    assert supervised.status.message is not None
    assert "Too many open files" in supervised.status.message
    assert len(caplog.records) >= 7
    assert "trying again" in caplog.text
    await supervised.stop()
    assert supervised.status.state is EngineState.STOPPED
