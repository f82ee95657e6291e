"""Limits the work that waits or runs: a request that exceeds the limit is refused. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class QueueFullError(Exception):
    """There is no room now; the message says how many choices may run."""


class TooLargeError(Exception):
    """One request alone asks for more choices than the limit."""


class Admission:
    """Counts choices, the unit that the engine queues and runs.

    Attributes:
        limit: how many choices may wait or run together.
        admitted: how many choices wait or run now.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.admitted = 0

    def check(self) -> None:
        """Refuse a request early, before its body is read, when the limit is reached.

        Raises:
            QueueFullError: other requests use the whole limit.
        """
        if self.admitted >= self.limit:
            raise self._full()

    @contextmanager
    def admit(self, choices: int) -> Iterator[Callable[[], None]]:
        """Count a request's choices as admitted while the block runs, or until it calls what it is given.

        It calls that when the engine has done the work, so that a client that does not read its answer holds no place.

        Raises:
            QueueFullError: other requests leave too little room.
            TooLargeError: the request alone exceeds the limit.
        """
        if choices > self.limit:
            raise TooLargeError(
                f"the request asks for {choices} choices (prompts times n), but this server holds at most "
                f"{self.limit} at a time; split it into smaller ones"
            )
        if self.admitted + choices > self.limit:
            raise self._full()
        held = choices
        self.admitted += held

        def leave() -> None:
            nonlocal held
            self.admitted -= held
            held = 0

        try:
            yield leave
        finally:
            leave()

    def _full(self) -> QueueFullError:
        return QueueFullError(
            f"the server is full: {self.admitted} of at most {self.limit} choices are waiting or running; "
            "try again later"
        )
