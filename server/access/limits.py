"""How much a caller may do at a time: requests and tokens a minute, and requests at once.

Each limit a minute is a bucket that holds as much as a minute allows and is refilled all the time (a token bucket, as RFC
2697 has it), so a caller may use a minute's worth at once, and then as much as flows in. Tokens are taken for the worst case
when a request begins, and what it did not use is given back at its end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from server.access.keys import KeyRecord


class LimitError(Exception):
    """A caller wants more than its key allows now; the message says what.

    Attributes:
        code: a word for programs.
        retry_after: in so many seconds the same request may be taken.
    """

    def __init__(self, message: str, *, code: str, retry_after: float) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


class NeverError(Exception):
    """One request alone is more than its key ever allows; the message says what to change."""


class Bucket:
    """As much as a minute allows, refilled all the time.

    Args:
        capacity: what it holds, which is what flows in within a minute.
        now: in seconds.
    """

    def __init__(self, capacity: int, now: float) -> None:
        self.capacity = capacity
        self._level = float(capacity)
        self._at = now

    def level(self, now: float) -> float:
        """What it holds. Below 0 if more was used than taken."""
        self._level = min(self._level + (now - self._at) * self.capacity / 60, self.capacity)
        self._at = now
        return self._level

    def wait(self, amount: float, now: float) -> float:
        """In how many seconds it holds `amount`; 0: it does now. At most a minute, if `amount` is within the capacity."""
        return max(amount - self.level(now), 0.0) * 60 / self.capacity

    def add(self, amount: float, now: float) -> None:
        """Give back, or take a negative amount."""
        self._level = min(self.level(now) + amount, self.capacity)

    def resize(self, capacity: int, now: float) -> None:
        """Change the limit."""
        self.level(now)
        self.capacity = capacity
        self._level = min(self._level, capacity)


@dataclass(frozen=True, slots=True)
class Standing:
    """One limit of a caller now.

    Attributes:
        kind: `requests` or `tokens`.
        limit: a minute.
        remaining: what is left now.
        reset: in so many seconds all of it is there again.
    """

    kind: str
    limit: int
    remaining: int
    reset: float


@dataclass(slots=True)
class _State:
    buckets: dict[str, Bucket] = field(default_factory=dict)
    running: int = 0


class Limits:
    """What all callers have used lately. In memory: a restart fills every bucket.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._states: dict[str, _State] = {}

    @contextmanager
    def enter(self, record: KeyRecord) -> Iterator[None]:
        """Count one request, and hold its place while the block runs.

        Raises:
            LimitError: the caller has no request left.
        """
        state, now = self._state(record.name), self._clock()
        if record.concurrent is not None and state.running >= record.concurrent:
            raise LimitError(
                f"the key {record.name} may have {record.concurrent} requests at once, and has them; wait for one to end",
                code="concurrency_limit",
                retry_after=1.0,
            )
        bucket = self._bucket(record, "requests", now)
        if bucket is not None:
            if wait := bucket.wait(1, now):
                raise _too_fast(record.name, bucket, "requests", wait)
            bucket.add(-1, now)
        state.running += 1
        try:
            yield
        finally:
            state.running -= 1

    def take_tokens(self, record: KeyRecord, tokens: int) -> Callable[[int], None]:
        """Take the most tokens that a request can use. Returns a function that gives back what it did not use.

        Call that with the tokens that the request used.

        Raises:
            LimitError: the caller has too few left.
            NeverError: a minute has too few.
        """
        now = self._clock()
        bucket = self._bucket(record, "tokens", now)
        if bucket is None:
            return lambda used: None
        if tokens > bucket.capacity:
            raise NeverError(
                f"the request may use {tokens} tokens (prompt and max_tokens, of all choices), but the key {record.name} "
                f"has {bucket.capacity} a minute; shorten the prompt or lower max_tokens"
            )
        if wait := bucket.wait(tokens, now):
            raise _too_fast(record.name, bucket, "tokens", wait)
        bucket.add(-tokens, now)
        return lambda used: bucket.add(tokens - used, self._clock())

    def standings(self, record: KeyRecord) -> list[Standing]:
        """The limits that a caller has."""
        now = self._clock()
        found = ((kind, self._bucket(record, kind, now)) for kind in ("requests", "tokens"))
        return [
            Standing(
                kind,
                bucket.capacity,
                max(math.floor(bucket.level(now)), 0),
                bucket.wait(bucket.capacity, now),
            )
            for kind, bucket in found
            if bucket is not None
        ]

    def _state(self, name: str) -> _State:
        return self._states.setdefault(name, _State())

    def _bucket(self, record: KeyRecord, kind: str, now: float) -> Bucket | None:
        limit = record.requests_per_minute if kind == "requests" else record.tokens_per_minute
        buckets = self._state(record.name).buckets
        if limit is None:
            buckets.pop(kind, None)
            return None
        bucket = buckets.get(kind)
        if bucket is None:
            bucket = buckets[kind] = Bucket(limit, now)
        elif bucket.capacity != limit:  # the file of keys has changed
            bucket.resize(limit, now)
        return bucket


def _too_fast(name: str, bucket: Bucket, kind: str, wait: float) -> LimitError:
    return LimitError(
        f"the key {name} has {bucket.capacity} {kind} a minute, and too few are left; try again in {math.ceil(wait)} s",
        code="rate_limit_exceeded",
        retry_after=wait,
    )
