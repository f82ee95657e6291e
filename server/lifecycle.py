"""Whether the server takes new work, and how much is still going on. Knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Lifecycle:
    """Shared by the routes, which do the work, and the process, which decides when to leave."""

    def __init__(self) -> None:
        self._active = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def draining(self) -> bool:
        """Whether new work is refused."""
        return self._draining

    @property
    def active_requests(self) -> int:
        """Requests between their arrival and the last byte of their answer."""
        return self._active

    def begin_drain(self) -> None:
        """Refuse new work from now on; what runs goes on. Idempotent."""
        self._draining = True

    async def wait_idle(self, timeout: float | None) -> bool:  # noqa: ASYNC109 - the answer is no error
        """Wait until no request is active; return whether that came within `timeout` seconds."""
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
