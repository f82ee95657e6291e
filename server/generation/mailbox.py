"""A queue with one reader, which can wait with a time limit.

Every token of every stream passes through this queue. `asyncio.Queue` under `asyncio.timeout` takes four times as
long.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """An unbounded queue, first in, first out, for one reader."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        """How many items `get` would return without waiting."""
        return len(self._items)

    def put(self, item: T) -> None:
        """Add an item."""
        self._items.append(item)
        self._wake()

    async def get(self, seconds: float | None = None) -> T:
        """Take the oldest item; wait at most `seconds` for one. No item is lost if the call is cancelled.

        Raises:
            TimeoutError: no item came in time.
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
