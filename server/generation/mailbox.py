"""What one task waits for and others bring: a queue with one reader that may tire of waiting.

Every token of every stream passes through here, and `asyncio.Queue` under `asyncio.timeout` takes four times as long.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Unbounded, first in, first out."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        """Items that `get` would return without waiting."""
        return len(self._items)

    def put(self, item: T) -> None:
        """Add an item."""
        self._items.append(item)
        self._wake()

    async def get(self, seconds: float | None = None) -> T:
        """Take the oldest item, waiting for one at most `seconds`. Nothing is lost if this is cancelled.

        Raises:
            TimeoutError: nothing came.
            RuntimeError: another task waits already.
        """
        if not self._items:
            await self._wait(seconds)
        if not self._items:
            raise TimeoutError
        return self._items.popleft()

    async def _wait(self, seconds: float | None) -> None:
        if self._waiter is not None:
            raise RuntimeError("a mailbox has one reader")
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        alarm = None if seconds is None else loop.call_later(seconds, self._wake)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if alarm is not None:
                alarm.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
