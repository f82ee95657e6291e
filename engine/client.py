"""What the server holds of an engine: start it, watch it, ask it to generate.

`Engine` is the face; `SubprocessEngine` (in `engine.supervisor`) is the engine that serves.
Imports no torch.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

import msgspec

from engine.protocol import Capacity, Delta, EngineStats, Loading, ModelInfo, RequestUsage, Submit

Settled = Callable[[str, RequestUsage | None], None]
"""Hears, exactly once a request, that the engine let go of it: its id, and what it used as far as is known."""


class EngineState(enum.StrEnum):
    """Where an engine is in its life. Only `READY` takes requests."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"  # died; a fresh one is on its way
    FAILED = "failed"  # cannot start: the message says why; nothing will change by itself
    STOPPED = "stopped"  # asked to stop


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot; `message` is one sentence for a human whenever the state is not `READY`."""

    state: EngineState
    message: str = ""
    loading: Loading | None = None
    model: ModelInfo | None = None  # known once ready, kept while a fresh engine starts
    capacity: Capacity | None = None
    stats: EngineStats = EngineStats()
    restarts: int = 0
    ended: EngineStats = EngineStats()  # the counters of engine processes that are gone, summed
    pid: int | None = None


class Engine(Protocol):
    """An engine that runs somewhere."""

    @property
    def status(self) -> EngineStatus:
        """The newest snapshot; never blocks."""
        ...

    async def start(self) -> None:
        """Begin to load. Returns at once; `status` tells how far it is."""
        ...

    async def stop(self) -> None:
        """End the engine; requests still running get their `abort` delta. Idempotent."""
        ...

    def generate(self, request: Submit, settled: Settled | None = None) -> AsyncGenerator[Delta, None]:
        """Run one request; the last delta, and only it, has a finish reason.

        Closing the generator early, or cancelling the task that reads it, aborts the request: its
        pages are free within one step. `settled` is called once the generator was asked for its first
        delta: at the end, or, for a request that was given up or refused, when the engine has let go of it.

        Raises:
            EngineUnavailableError: the engine takes no requests now.
            EngineDiedError: the engine ended while this request ran.
        """
        ...
