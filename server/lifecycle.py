"""Knows whether the server takes new work, and how many requests still run. Knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_BODY_SECONDS = 1.0
"""So long may the rest of a body take when a drain begins."""


class Lifecycle:
    """The state that the routes, which serve requests, share with the process, which decides when to exit."""

    def __init__(self) -> None:
        self._active = 0
        self._draining = False
        self._waits: set[asyncio.Timeout] = set()  # of requests whose body has not come whole
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def draining(self) -> bool:
        """Whether new work is refused."""
        return self._draining

    @property
    def active_requests(self) -> int:
        """How many requests have arrived and are not yet answered completely."""
        return self._active

    def begin_drain(self) -> None:
        """Refuse new work from now on; running requests continue. Idempotent."""
        self._draining = True
        for deadline in self._waits:
            deadline.reschedule(asyncio.get_running_loop().time() + _BODY_SECONDS)

    async def unless_draining(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Do `work`, which waits for a client. None if a drain begins and the work does not end soon."""
        try:
            async with asyncio.timeout(None) as deadline:
                self._waits.add(deadline)
                try:
                    return await work
                finally:
                    self._waits.discard(deadline)
        except TimeoutError:
            return None

    async def wait_idle(self, timeout: float | None) -> bool:  # noqa: ASYNC109 - a timeout is not an error here
        """Wait at most `timeout` seconds until no request is active; return whether none is. None: no limit."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    @contextmanager
    def track(self) -> Iterator[None]:
        """Count one request as active."""
        self._active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()
