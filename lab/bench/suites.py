"""The suites: the requests that each suite sends to an endpoint, and the figures that it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import msgspec

from lab.bench.ask import Asker
from lab.bench.statistics import Better, Spread
from lab.bench.timing import Timing, decode_rate_of_all, gap_percentiles, output_rate

SampleValues = dict[str, float]
"""Metric -> value of one sample; a metric that cannot be computed is left out."""
Figures = Mapping[int, Mapping[str, Mapping[str, Spread]]]
"""Case -> server -> metric -> median and quartiles."""


class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """A figure of a sample.

    Attributes:
        name: its key in results.
        heading: heading of its column in tables, with the unit.
        better: whether more or less is better.
        digits: digits after the point, in tables.
        drawn: whether the picture shows it.
    """

    name: str
    heading: str
    better: Better
    digits: int = 1
    drawn: bool = False


DECODE = Metric(name="decode_rate", heading="decode tok/s", better="more", drawn=True)
OUTPUT = Metric(name="output_rate", heading="output tok/s", better="more")
RATE = Metric(name="prefill_rate", heading="prompt tok/s", better="more", drawn=True)
TTFT = Metric(name="ttft", heading="TTFT s", better="less", digits=3, drawn=True)
P50 = Metric(name="gap_p50", heading="p50 ms", better="less")
P99 = Metric(name="gap_p99", heading="p99 ms", better="less", drawn=True)
STARVATION = Metric(name="starvation", heading="p99/p50", better="less", digits=2)


class Suite(Protocol):
    """One thing to measure at several sizes.

    Attributes:
        name: name of the command and of the files.
        title: title of table and picture.
        axis: what the number of a case counts.
        metrics: the figures in the table; the first is compared with the best of the other servers.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    axis: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]

    @property
    def cases(self) -> Sequence[int]:
        """The sizes to measure."""

    async def sample(self, ask: Asker, case: int, turn: int) -> tuple[SampleValues, list[Timing]]:
        """Measure one endpoint once.

        Args:
            ask: the endpoint
            case: the size
            turn: number of the sample of this case, from 0

        Returns:
            the sample's values, and the timings of its requests
        """

    def remarks(self, figures: Figures, server: str) -> list[str]:
        """Say in words what the figures of one server show. Each remark continues "SERVER: "."""


@dataclass(frozen=True)
class Decode:
    """The decode speed of one stream after contexts of several lengths.

    All turns of a case have the same prompt. Only the time after the first token counts, so a prefix cache makes the
    run shorter and does not change the figures.
    """

    contexts: tuple[int, ...]
    tokens: int

    name: ClassVar[str] = "decode"
    title: ClassVar[str] = "decode, one stream"
    axis: ClassVar[str] = "context (tokens)"
    metrics: ClassVar[tuple[Metric, ...]] = (DECODE, P50, msgspec.structs.replace(P99, drawn=False))

    @property
    def cases(self) -> Sequence[int]:
        return self.contexts

    async def sample(self, ask: Asker, case: int, turn: int) -> tuple[SampleValues, list[Timing]]:
        timing = await ask.one(case, self.tokens, body=case, head=(self.name, case))
        return _told(decode_rate=timing.decode_rate) | _gaps([timing]), [timing]

    def remarks(self, figures: Figures, server: str) -> list[str]:
        return _against(figures, server, DECODE, min(self.contexts), max(self.contexts), "tokens of context")


@dataclass(frozen=True)
class Prefill:
    """The speed of reading prompts of several lengths. No prompt is in a prefix cache."""

    lengths: tuple[int, ...]

    name: ClassVar[str] = "prefill"
    title: ClassVar[str] = "prefill, one stream, cold"
    axis: ClassVar[str] = "prompt (tokens)"
    metrics: ClassVar[tuple[Metric, ...]] = (
        RATE,
        msgspec.structs.replace(TTFT, drawn=False),
    )

    @property
    def cases(self) -> Sequence[int]:
        return self.lengths

    async def sample(self, ask: Asker, case: int, turn: int) -> tuple[SampleValues, list[Timing]]:
        timing = await ask.one(case, 1, body=(case, turn), head=(self.name, case, turn))
        seconds = timing.first_token_seconds
        return {"prefill_rate": case / seconds, "ttft": seconds}, [timing]

    def remarks(self, figures: Figures, server: str) -> list[str]:
        return []


@dataclass(frozen=True)
class Concurrency:
    """Several streams at once: the speed of all together, and whether a stream has to wait.

    All requests are sent at the same moment, first with cold prompts. Early streams decode while other prompts are
    read, which shows in the times between tokens. A server may delay new prompts to keep these times short; then
    not all streams decode at the same time. So all requests are sent once more, now with cached prompts, and the
    decode rate comes from these.
    """

    streams: tuple[int, ...]
    context: int
    tokens: int

    name: ClassVar[str] = "concurrency"
    title: ClassVar[str] = "streams at once, all of them together"
    axis: ClassVar[str] = "streams"
    metrics: ClassVar[tuple[Metric, ...]] = (DECODE, OUTPUT, P50, P99, STARVATION, TTFT)

    @property
    def cases(self) -> Sequence[int]:
        return self.streams

    async def sample(self, ask: Asker, case: int, turn: int) -> tuple[SampleValues, list[Timing]]:
        """Send all requests cold, then cached; the timings are in this order."""
        head = (self.name, case, turn)
        cold = await ask.many(case, self.context, self.tokens, body=turn, head=head)
        cached = await ask.many(case, self.context, self.tokens, body=turn, head=head)
        ttft = sum(timing.first_token_seconds for timing in cold) / case
        values = _told(decode_rate=decode_rate_of_all(cached), output_rate=output_rate(cold), ttft=ttft)
        return values | _gaps(cold), [*cold, *cached]

    def remarks(self, figures: Figures, server: str) -> list[str]:
        most = max(self.streams)
        few = max((n for n in self.streams if n <= 8), default=most)
        return _against(figures, server, DECODE, few, most, "streams")


@dataclass(frozen=True)
class Prefix:
    """The time to the first token of a prompt whose beginning is cached, and of a cold prompt of the same length."""

    prefixes: tuple[int, ...]
    tail: int

    name: ClassVar[str] = "prefix"
    title: ClassVar[str] = "time to the first token behind a cached prefix"
    axis: ClassVar[str] = "prefix (tokens)"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(name="warm_ttft", heading="cached TTFT s", better="less", digits=3, drawn=True),
        Metric(name="cold_ttft", heading="cold TTFT s", better="less", digits=3, drawn=True),
        Metric(name="share", heading="cached/cold", better="less", digits=3),
        Metric(name="cached_tokens", heading="cached tokens", better="more", digits=0),
    )

    @property
    def cases(self) -> Sequence[int]:
        return self.prefixes

    async def sample(self, ask: Asker, case: int, turn: int) -> tuple[SampleValues, list[Timing]]:
        """Send a cold prompt, then a prompt with the same prefix and another tail."""
        shared = {"body": (case, turn), "head": (self.name, case, turn)}
        cold = await ask.with_tail(case, self.tail, tail_of=(turn, "cold"), **shared)
        warm = await ask.with_tail(case, self.tail, tail_of=(turn, "warm"), **shared)
        values = _told(
            cold_ttft=cold.first_token_seconds,
            warm_ttft=warm.first_token_seconds,
            share=warm.first_token_seconds / cold.first_token_seconds,
            cached_tokens=warm.cached_tokens,
        )
        return values, [cold, warm]

    def remarks(self, figures: Figures, server: str) -> list[str]:
        return []


@dataclass(frozen=True)
class Long:
    """One whole cold request, with contexts up to the model's limit."""

    contexts: tuple[int, ...]
    tokens: int

    name: ClassVar[str] = "long"
    title: ClassVar[str] = "a whole request, one stream, cold"
    axis: ClassVar[str] = "prompt (tokens)"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(name="seconds", heading="request s", better="less", digits=2, drawn=True),
        TTFT,
        msgspec.structs.replace(RATE, drawn=False),
        DECODE,
    )

    @property
    def cases(self) -> Sequence[int]:
        return self.contexts

    async def sample(self, ask: Asker, case: int, turn: int) -> tuple[SampleValues, list[Timing]]:
        timing = await ask.one(case, self.tokens, body=(case, turn), head=(self.name, case, turn))
        values = _told(
            seconds=timing.ended - timing.sent,
            ttft=timing.first_token_seconds,
            prefill_rate=case / timing.first_token_seconds,
            decode_rate=timing.decode_rate,
        )
        return values, [timing]

    def remarks(self, figures: Figures, server: str) -> list[str]:
        return _against(figures, server, DECODE, min(self.contexts), max(self.contexts), "tokens of context")


def _told(**values: float | None) -> SampleValues:
    return {name: value for name, value in values.items() if value is not None}


def _gaps(timings: Sequence[Timing]) -> SampleValues:
    percentiles = gap_percentiles(timings)
    if percentiles is None:
        return {}
    p50, p99 = percentiles
    return {"gap_p50": p50 * 1e3, "gap_p99": p99 * 1e3} | ({"starvation": p99 / p50} if p50 else {})


def _against(figures: Figures, server: str, metric: Metric, few: int, many: int, unit: str) -> list[str]:
    one, other = (figures.get(case, {}).get(server, {}).get(metric.name) for case in (few, many))
    if few == many or one is None or other is None:
        return []
    return [f"{other.median / one.median:.2f} × as fast with {many:,} {unit} as with {few:,}"]
