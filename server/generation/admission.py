"""Limits the work that waits or runs: a request that exceeds the limit is refused. Knows no HTTP.

Three bounds hold: choices, waiting or running; tokens of prompts that have not been computed; and the seconds that nearly
all who are let in wait for their first token. The engine computes prompts in the order in which they are let in, within a
class, so a new request waits for the tokens before it: their number divided by how many are computed in a second, times
what waits scatter by (`server.generation.forecast`). A refusal says when to come back: from how fast places and tokens
became free lately, and from how many were sent away before, because they come back as well.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.generation.forecast import Forecast

HALF_LIFE = 30.0
"""In seconds: how fast old measurements of the rate lose their weight."""

UNKNOWN_SECONDS = 5.0
MOST_SECONDS = 60.0
"""OpenAI's Python client takes a longer `Retry-After` for none, and comes back within seconds."""

_USUAL_SHARE = 0.1
"""The weight of the newest request in the mean size of prompts."""


class QueueFullError(Exception):
    """There is no room now; the message says what is taken.

    Attributes:
        retry_after: about when there is room, in seconds from now.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooLargeError(Exception):
    """One request alone asks for more choices than the limit."""


class Flow:
    """How fast something becomes free, and how much of it is promised to those who were sent away.

    A promise ends when its time has come: who comes back then is let in, or sent away with another one.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = clock()
        self._amount = 0.0  # what became free, and in how many busy seconds; old values fade
        self._seconds = 0.0
        self._promised: dict[int, float] = {}  # by the second in which it ends, of the clock

    def freed(self, amount: float, *, busy: bool) -> None:
        """Note that so much became free. `busy`: some of it was taken since the last note."""
        now = self._clock()
        past = now - self._at
        self._at = now
        kept = 0.5 ** (past / HALF_LIFE)
        self._amount = self._amount * kept + amount
        self._seconds = self._seconds * kept + (past if busy else 0.0)

    def mean(self, amount: float) -> float:
        """In how many seconds so much became free lately; 0 if nothing is known."""
        return amount * self._seconds / self._amount if self._amount else 0.0

    def wait(self, amount: float) -> float:
        """Send one away who wants so much. Returns in how many seconds it may be there, within bounds."""
        now = self._clock()
        for second in [second for second in self._promised if second < now]:
            del self._promised[second]
        seconds = UNKNOWN_SECONDS
        if self._amount and self._seconds:
            promised = sum(self._promised.values()) + amount
            seconds = min(max(self.mean(promised), 1.0), MOST_SECONDS)
        end = math.ceil(now + seconds)
        self._promised[end] = self._promised.get(end, 0.0) + amount
        return seconds


class QueuePlace:
    """What one request holds. Each of the two methods counts once."""

    def __init__(
        self, admission: Admission, choices: int, tokens: int, sender: str | None, mean: float
    ) -> None:
        self._admission = admission
        self._choices, self._tokens, self._sender, self._mean = choices, tokens, sender, mean
        self._since = admission.clock()

    def begun(self) -> None:
        """The first token is there, so the prompts are computed."""
        tokens, self._tokens = self._tokens, 0
        if tokens:
            self._admission.computed(tokens, self._mean, self._since)

    def leave(self) -> None:
        """The engine has done the work, or nobody wants it any more."""
        tokens, self._tokens = self._tokens, 0
        if tokens:
            self._admission.given_up(tokens)
        choices, self._choices = self._choices, 0
        if choices:
            self._admission.left(choices, self._sender)


class Admission:
    """Counts choices, the unit that the engine queues and runs, and the tokens of prompts that wait.

    Attributes:
        limit: how many choices may wait or run together.
        max_tokens: how many tokens of prompts may wait to be computed; None: any number.
        max_seconds: how long nearly all who are let in wait for their first token, their own prompt included; None: any time.
            Before the first prompt is computed nothing is known, and only the other bounds hold.
        clock: in seconds.
        admitted: how many choices wait or run now.
        tokens: how many tokens of prompts wait now.

    No sender may hold more places than are free after it, so nobody can take all of them: one alone gets half, of two each gets
    a third, and there is always room for who comes next (Choudhury and Hahne, "Dynamic queue length thresholds for
    shared-memory packet switches", 1998, with a factor of 1).
    """

    def __init__(
        self,
        limit: int,
        max_tokens: int | None = None,
        max_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit = limit
        self.max_tokens = max_tokens
        self.max_seconds = max_seconds
        self.clock = clock
        self.admitted = 0
        self.tokens = 0
        self._held: Counter[str] = Counter()
        self._usual_tokens = 0.0  # of a request's prompts, by those let in lately
        self._places, self._prompts = Flow(clock), Flow(clock)
        self._forecast = Forecast()

    def check(self) -> None:
        """Refuse a request early, before its body is read, when a limit is reached.

        Raises:
            QueueFullError: other requests use the whole limit.
        """
        if self.admitted >= self.limit:
            raise self._full(1)
        if self.max_tokens is not None and self.tokens >= self.max_tokens:
            raise self._deep(max(self._usual_tokens, 1.0))
        if self.tokens:
            self._check_wait(max(self._usual_tokens, 1.0))

    def forecast(self, tokens: float) -> float:
        """In how many seconds nearly all get their first token whose prompts have so many tokens, if let in now."""
        return self._forecast.seconds(self._prompts.mean(self.tokens + tokens))

    @contextmanager
    def admit(self, choices: int, sender: str | None = None, tokens: int = 0) -> Iterator[QueuePlace]:
        """Hold a request's place while the block runs, or until it leaves.

        It leaves when the engine has done the work, so that a client that does not read its answer holds no place.

        Args:
            choices: how many.
            sender: who asks; None: senders are not told apart.
            tokens: of the prompts. A request alone may have more than the limit: else it could never run.

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
            raise self._full(choices)
        if sender is not None:
            mine, free = self._held[sender] + choices, self.limit - self.admitted - choices
            if mine > max(free, 1):
                raise QueueFullError(
                    f"{mine - choices} choices of this key are waiting or running, and of {self.limit} places only "
                    f"{free + choices} are free for everybody; try again later",
                    self._places.wait(choices),
                )
        if self.max_tokens is not None and self.tokens and self.tokens + tokens > self.max_tokens:
            raise self._deep(tokens)
        if self.tokens:  # a request alone may take longer than the bound: else it could never run
            self._check_wait(tokens)
        mean = self._prompts.mean(self.tokens + tokens)
        if sender is not None:
            self._held[sender] += choices
        self._places.freed(0, busy=self.admitted > 0)
        self._prompts.freed(0, busy=self.tokens > 0)
        self.admitted += choices
        self.tokens += tokens
        self._usual_tokens += (tokens - self._usual_tokens) * (_USUAL_SHARE if self._usual_tokens else 1.0)
        place = QueuePlace(self, choices, tokens, sender, mean)
        try:
            yield place
        finally:
            place.leave()

    def computed(self, tokens: int, mean: float, since: float) -> None:
        """So many tokens of prompts wait no more. Places call it.

        Args:
            tokens: of one request.
            mean: how long it was to wait by the mean rate, in seconds.
            since: when it was let in.
        """
        self._prompts.freed(tokens, busy=True)
        self.tokens -= tokens
        if self.max_seconds is not None:
            self._forecast.compare(mean, self.clock() - since, self.max_seconds)

    def given_up(self, tokens: int) -> None:
        """Nobody waits for so many tokens any more. They say nothing of how fast others are computed. Places call it."""
        self._prompts.freed(0, busy=True)
        self.tokens -= tokens

    def left(self, choices: int, sender: str | None) -> None:
        """So many choices are done. Places call it."""
        self._places.freed(choices, busy=True)
        self.admitted -= choices
        if sender is not None:
            self._held[sender] -= choices
            if not self._held[sender]:
                del self._held[sender]

    def _check_wait(self, tokens: float) -> None:
        if self.max_seconds is not None and (seconds := self.forecast(tokens)) > self.max_seconds:
            raise QueueFullError(
                f"the server is full: a first token may take {seconds:.1f} s now, and at most {self.max_seconds:g} s are "
                "allowed; try again later",
                self._prompts.wait(tokens),
            )

    def _full(self, choices: int) -> QueueFullError:
        return QueueFullError(
            f"the server is full: {self.admitted} of at most {self.limit} choices are waiting or running; "
            "try again later",
            self._places.wait(choices),
        )

    def _deep(self, tokens: float) -> QueueFullError:
        return QueueFullError(
            f"the server is full: {self.tokens} tokens of prompts wait to be computed, and at most {self.max_tokens} may; "
            "try again later",
            self._prompts.wait(tokens),
        )
