"""The engine's interface for the server: start it, watch it, run requests.

`Engine` is the interface; `SubprocessEngine` in `engine.supervisor` is the engine that serves.
Imports no torch.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Protocol

import msgspec

from engine.protocol import Capacity, Delta, EngineStats, Loading, ModelInfo, RequestUsage, Submit

Hear = Callable[[Delta | Exception], None]
"""A callback for what comes of a request, called on the event loop while the engine's message is read.

It gets each delta, the last of which has a finish reason; or an exception (`EngineDiedError`) instead of that last one.
It must be quick, because all streams wait meanwhile, and must not raise.
"""

Settled = Callable[[str, RequestUsage | None], None]
"""A callback, called exactly once for each request, when the engine has released it: (request id, known usage).

The usage is None if the engine never had the request.
"""


class EngineState(enum.StrEnum):
    """The state of an engine. Only a `READY` engine takes requests."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"  # the engine died; a new process is starting
    FAILED = "failed"  # the engine cannot start, and does not try again; the message says why
    STOPPED = "stopped"  # the engine was asked to stop


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of an engine. If the state is not `READY`, `message` is one sentence for a human."""

    state: EngineState
    message: str = ""
    loading: Loading | None = None
    model: ModelInfo | None = None  # known once ready, and kept while a new process starts
    capacity: Capacity | None = None
    stats: EngineStats = EngineStats()
    restarts: int = 0
    hangs: int = 0  # engine processes that were killed because they made no progress
    quiet_seconds: float = 0.0  # how long the engine has made no progress; 0: it makes progress
    ended: EngineStats = EngineStats()  # the summed counters of engine processes that have ended
    pid: int | None = None


class Engine(Protocol):
    """An engine, in this process or in another."""

    @property
    def status(self) -> EngineStatus:
        """The newest snapshot. Reading it never blocks."""
        ...

    async def start(self) -> None:
        """Begin to load, and return at once. `status` tells how far loading is."""
        ...

    async def stop(self) -> None:
        """End the engine. Requests that still run get an `abort` delta. Idempotent."""
        ...

    def submit(self, request: Submit, hear: Hear, settled: Settled | None = None) -> None:
        """Run one request, and return at once.

        `hear` and `settled` are called later. `settled` is called exactly once: at the request's end, or when the engine
        has released a request that was aborted.

        Raises:
            EngineUnavailableError: the engine takes no requests now; `settled` was called.
        """
        ...

    def abort(self, request_id: str) -> None:
        """End a request: `hear` is not called any more, and its pages are free within one step.

        Nothing happens if the request has ended.
        """
        ...
