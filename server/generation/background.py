"""Responses that are made in the background: nobody is connected, and the result is stored when it is there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Background:
    """The tasks that make them, by the ids of the responses."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, response_id: str, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`, which raises nothing, until it is over or cancelled."""
        task = self._tasks[response_id] = asyncio.create_task(work, name=f"background {response_id}")
        task.add_done_callback(lambda _: self._tasks.pop(response_id, None))

    async def cancel(self, response_id: str) -> bool:
        """End the work for a response, and wait for that. False: there is none."""
        task = self._tasks.get(response_id)
        if task is None:
            return False
        task.cancel()
        await asyncio.wait([task])
        return True
