"""Writes a stream's events to the client at once, without a task, and holds them back while the client does not read.

An ASGI server's `send` is a coroutine that waits only if the client reads too slowly. So the outlet runs it up to its
first wait. Nearly always it has no wait, and the bytes are with the server when `put` returns. If it waits, a task takes
over, and what comes meanwhile is joined: a client that does not read costs the text that it has not read, and no more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any, cast

from starlette.types import Message, Send

from server.generation.choice import TextDelta, join_texts

_MANY = 256
"""So many deltas are held back before they are joined."""


class Outlet:
    """The body of one streamed answer, but for its last bytes.

    Args:
        send: the server's, after the response has started.
        events: renders a delta as the bytes of its events; it is called once for a delta, in the order of `put`.
    """

    def __init__(self, send: Send, events: Callable[[TextDelta], bytes]) -> None:
        self._send = send
        self._events = events
        self._waiting: list[TextDelta] = []
        self._many = _MANY
        self._task: asyncio.Task[None] | None = None  # runs while the client does not read
        self.last = time.monotonic()  # when bytes were last given to the server

    @property
    def slow(self) -> bool:
        """Whether the client does not read at the moment, so that deltas are held back."""
        return self._task is not None

    @property
    def held(self) -> int:
        """How many deltas are held back."""
        return len(self._waiting)

    def put(self, delta: TextDelta) -> None:
        """Write a delta's events, or hold the delta back."""
        if self._task is None:
            if data := self._events(delta):
                self.write(data)
            return
        self._waiting.append(delta)
        if len(self._waiting) >= self._many:
            self._waiting = join_texts(self._waiting)
            self._many = 2 * len(self._waiting) + _MANY

    def write(self, data: bytes) -> None:
        """Write bytes. The client must be reading: nothing is held back."""
        self.last = time.monotonic()
        sending = cast(Coroutine[Any, Any, None], self._send(_body(data)))
        try:
            wait = sending.send(None)
        except StopIteration:
            return
        self._task = asyncio.create_task(self._go_on(sending, wait), name="slow reader")

    async def drain(self) -> None:
        """Return when everything is written.

        Raises:
            Exception: an error of the renderer or of the server.
        """
        if self._task is not None:
            await self._task

    async def close(self) -> None:
        """Write no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _go_on(self, sending: Coroutine[Any, Any, None], wait: Any) -> None:
        await _Begun(sending, wait)
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            if data := b"".join(map(self._events, waiting)):
                self.last = time.monotonic()
                await self._send(_body(data))
        self._task, self._many = None, _MANY


def _body(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


class _Begun:
    """Awaits the rest of a coroutine that was run up to its first wait."""

    def __init__(self, begun: Coroutine[Any, Any, None], wait: Any) -> None:
        self._begun = begun
        self._wait = wait

    def __await__(self) -> Generator[Any, Any, None]:
        wait = self._wait
        while True:
            error: BaseException | None = None
            sent = None
            try:
                sent = yield wait
            except BaseException as thrown:
                error = thrown
            try:
                wait = self._begun.send(sent) if error is None else self._begun.throw(error)
            except StopIteration:
                return
