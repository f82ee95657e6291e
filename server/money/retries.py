"""What earlier attempts of a request have paid, so that a client that tries again does not pay twice.

A client gives all attempts of one request the same `Idempotency-Key`; OpenAI's libraries do so by themselves. An attempt that
follows another one pays only what its own price has above what was paid.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MAX_ATTEMPTS = 5
"""So many attempts are one request. Clients try a few times; more would be answers for nothing."""

KEEP_SECONDS = 900.0
_MAX_REQUESTS = 10_000


def attempt_name(sender: str, endpoint: str, key: str | None, body: bytes) -> str | None:
    """Return what the attempts of one request have in common: sender, endpoint, key and body. None: there is no key."""
    if not key:
        return None
    digest = hashlib.blake2b(digest_size=16, person=b"dsa-retry")
    for part in (sender.encode(), endpoint.encode(), key.encode("utf-8", "surrogatepass"), body):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


@dataclass(slots=True)
class _Request:
    begun: float
    attempts: int = 0
    paid: int = 0


class Retries:
    """The newest requests with a key, in memory.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests: OrderedDict[str, _Request] = OrderedDict()

    def paid(self, attempt: str | None) -> int:
        """What earlier attempts have paid, in nano-dollars."""
        request = self._requests.get(attempt or "")
        if request is None or self._clock() - request.begun > KEEP_SECONDS:
            return 0
        return request.paid if request.attempts < MAX_ATTEMPTS else 0

    def pay(self, attempt: str | None, amount: int) -> None:
        """Note that an attempt has paid so many nano-dollars."""
        if attempt is None:
            return
        now = self._clock()
        request = self._requests.get(attempt)
        if request is None or now - request.begun > KEEP_SECONDS or request.attempts >= MAX_ATTEMPTS:
            self._requests.pop(attempt, None)
            request = self._requests[attempt] = _Request(now)
            if len(self._requests) > _MAX_REQUESTS:
                self._requests.popitem(last=False)
        request.attempts += 1
        request.paid += amount
