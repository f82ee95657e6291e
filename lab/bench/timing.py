"""When the parts of a streamed answer came, and what follows from it. No clock is read here."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """One request as its client saw it. Times are seconds of one clock that a sample's requests share.

    Attributes:
        sent: when it was sent.
        arrivals: when each event with text came, ascending; a server may put several tokens into one.
        ended: when the event with the finish reason came.
        prompt_tokens, completion_tokens: the server's own count.
        cached_tokens: of the prompt, found in the prefix cache; None where the server does not say.
    """

    sent: float
    arrivals: tuple[float, ...]
    ended: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None

    def since(self, zero: float) -> Timing:
        """The same on a clock that began at `zero`, in steps of 10 us: enough, and short to write down."""
        return msgspec.structs.replace(
            self,
            sent=round(self.sent - zero, 5),
            arrivals=tuple(round(arrival - zero, 5) for arrival in self.arrivals),
            ended=round(self.ended - zero, 5),
        )

    @property
    def first(self) -> float:
        """When the first token came. A token without text (a control token) shows at the end only."""
        return self.arrivals[0] if self.arrivals else self.ended

    @property
    def first_token_seconds(self) -> float:
        """TTFT: from sending to the first token."""
        return self.first - self.sent

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first; None where there are fewer than two."""
        seconds = self.ended - self.first
        return (self.completion_tokens - 1) / seconds if self.completion_tokens > 1 and seconds > 0 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring events with text: what a reader waits for."""
        return [later - sooner for sooner, later in zip(self.arrivals, self.arrivals[1:], strict=False)]


def decode_rate_of_all(timings: Sequence[Timing]) -> float | None:
    """Tokens a second of all requests together, while every one of them decodes.

    That is from when the last of them got its first token until the first of them ended, so that no
    prompt is computed in it. An event counts as the mean number of tokens of its request's events.

    Returns:
        None where they never decoded all at once.
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
    """Tokens a second of all requests together, from the first sent to the last ended, prompts included."""
    seconds = max(timing.ended for timing in timings) - min(timing.sent for timing in timings)
    return sum(timing.completion_tokens for timing in timings) / seconds


def gap_percentiles(timings: Sequence[Timing]) -> tuple[float, float] | None:
    """Median and 99th percentile (nearest rank) of the gaps of all requests, seconds; None without gaps."""
    gaps = [gap for timing in timings for gap in timing.gaps]
    if not gaps:
        return None
    p50, p99 = np.percentile(gaps, [50, 99], method="inverted_cdf").tolist()
    return p50, p99
