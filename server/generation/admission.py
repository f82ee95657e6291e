"""Who may start: a bound on the work that is waiting or running. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class QueueFullError(Exception):
    """There is no room now; the message says how much there is."""


class TooLargeError(Exception):
    """One request asks for more than there will ever be room for."""


class Admission:
    """Counts choices, the unit that the engine queues and runs.

    Attributes:
        limit: how many may wait or run together.
        admitted: how many do now.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.admitted = 0

    def check(self) -> None:
        """Find out early, before work goes into a request, that there is no room for any.

        Raises:
            QueueFullError: others hold all of the room.
        """
        if self.admitted >= self.limit:
            raise self._full()

    @contextmanager
    def admit(self, choices: int) -> Iterator[None]:
        """Hold room for a request's choices while it runs.

        Raises:
            QueueFullError: others hold the room.
            TooLargeError: the request alone exceeds the limit.
        """
        if choices > self.limit:
            raise TooLargeError(
                f"the request asks for {choices} choices (prompts times n), but this server holds at most "
                f"{self.limit} at a time; split it into smaller ones"
            )
        if self.admitted + choices > self.limit:
            raise self._full()
        self.admitted += choices
        try:
            yield
        finally:
            self.admitted -= choices

    def _full(self) -> QueueFullError:
        return QueueFullError(
            f"the server is full: {self.admitted} of at most {self.limit} choices are waiting or running; "
            "try again later"
        )
