"""Limits the work that waits or runs: a request that exceeds the limit is refused. Knows no HTTP."""

from __future__ import annotations

from collections import Counter
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

    No sender may hold more places than are free after it, so nobody can take all of them: one alone gets half, of two each gets
    a third, and there is always room for who comes next (Choudhury and Hahne, "Dynamic queue length thresholds for
    shared-memory packet switches", 1998, with a factor of 1).
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.admitted = 0
        self._held: Counter[str] = Counter()

    def check(self) -> None:
        """Refuse a request early, before its body is read, when the limit is reached.

        Raises:
            QueueFullError: other requests use the whole limit.
        """
        if self.admitted >= self.limit:
            raise self._full()

    @contextmanager
    def admit(self, choices: int, sender: str | None = None) -> Iterator[Callable[[], None]]:
        """Count a request's choices as admitted while the block runs, or until it calls what it is given.

        Args:
            choices: how many.
            sender: who asks; None: senders are not told apart.

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
        if sender is not None and choices > max(self.limit // 2, 1):
            raise TooLargeError(
                f"the request asks for {choices} choices (prompts times n), but one key may hold at most half of the "
                f"{self.limit} that this server takes; split it into smaller ones"
            )
        if self.admitted + choices > self.limit:
            raise self._full()
        if sender is not None:
            mine, free = self._held[sender] + choices, self.limit - self.admitted - choices
            if mine > max(free, 1):
                raise QueueFullError(
                    f"{self._held[sender]} choices of this key are waiting or running, and of {self.limit} places only "
                    f"{free + choices} are free for everybody; try again later"
                )
            self._held[sender] = mine
        held = choices
        self.admitted += held

        def leave() -> None:
            nonlocal held
            self.admitted -= held
            if sender is not None and held:
                self._held[sender] -= held
                if not self._held[sender]:
                    del self._held[sender]
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
