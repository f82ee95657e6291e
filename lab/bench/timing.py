"""The times of the parts of a streamed answer, and the figures computed from them. This module reads no clock."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """The times of one request as its client saw them. Times are seconds; a sample's requests share one clock.

    Attributes:
        sent: when the request was sent.
        arrivals: when each event with text came, ascending. An event may have several tokens.
        ended: when the event with the finish reason came.
        prompt_tokens, completion_tokens: the server's own count.
        cached_tokens: prompt tokens found in the prefix cache; None if the server does not say.
    """

    sent: float
    arrivals: tuple[float, ...]
    ended: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None

    def since(self, zero: float) -> Timing:
        """Return the same timing on a clock that began at `zero`, rounded to 10 us to keep the results short."""
        return msgspec.structs.replace(
            self,
            sent=round(self.sent - zero, 5),
            arrivals=tuple(round(arrival - zero, 5) for arrival in self.arrivals),
            ended=round(self.ended - zero, 5),
        )

    @property
    def first(self) -> float:
        """When the first token came. If no token has text (control tokens), this is the end."""
        return self.arrivals[0] if self.arrivals else self.ended

    @property
    def first_token_seconds(self) -> float:
        """The time from sending to the first token (TTFT)."""
        return self.first - self.sent

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first token; None if there are fewer than two tokens."""
        seconds = self.ended - self.first
        return (self.completion_tokens - 1) / seconds if self.completion_tokens > 1 and seconds > 0 else None

    @property
    def gaps(self) -> list[float]:
        """The seconds between neighbouring events with text."""
        return [later - sooner for sooner, later in zip(self.arrivals, self.arrivals[1:], strict=False)]


def decode_rate_of_all(timings: Sequence[Timing]) -> float | None:
    """Compute the tokens a second of all requests together, while all of them decode.

    This time begins when the last request gets its first token, and ends when the first request ends; so no prompt
    is computed in it. An event counts as the mean number of tokens of its request's events.

    Returns:
        None if the requests never decoded all at once
    """
    opened, closed = max(timing.first for timing in timings), min(timing.ended for timing in timings)
    if closed <= opened:
        return None
    tokens = 0.0
    for timing in timings:
        within = sum(opened < arrival <= closed for arrival in timing.arrivals)
        tokens += within * timing.completion_tokens / max(1, len(timing.arrivals))
    return tokens / (closed - opened) if tokens else None


def output_rate(timings: Sequence[Timing]) -> float:
    """Compute the tokens a second of all requests together, from the first one sent to the last one ended.

    The time of the prompts is included; prompt tokens are not counted.
    """
    seconds = max(timing.ended for timing in timings) - min(timing.sent for timing in timings)
    return sum(timing.completion_tokens for timing in timings) / seconds


def gap_percentiles(timings: Sequence[Timing]) -> tuple[float, float] | None:
    """Compute median and 99th percentile (nearest rank) of the gaps of all requests, seconds; None without gaps."""
    gaps = [gap for timing in timings for gap in timing.gaps]
    if not gaps:
        return None
    p50, p99 = np.percentile(gaps, [50, 99], method="inverted_cdf").tolist()
    return p50, p99
