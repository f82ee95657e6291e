"""The clients of a soak: of every kind, good and bad, and what each of them has got."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.e2e.serving import MODEL
from tests.e2e.wire import Answer, HungUpError, ask, encoded

COMPLETIONS = "/v1/completions"


@dataclass
class Tally:
    """What clients have got."""

    ends: Counter[str] = field(default_factory=Counter)  # by kind of client and how the request ended
    wrong: list[str] = field(default_factory=list)  # requests without an end, or with several
    gaps: list[float] = field(default_factory=list)  # between events of a stream, seconds

    @property
    def requests(self) -> int:
        """How many requests have ended."""
        return self.ends.total()

    def add(self, kind: str, answer: Answer, *, left: bool = False) -> None:
        """Count one request. `left`: the client did not wait for the end."""
        how = "left" if left else str(answer.error or answer.status or answer.lost)
        self.ends[f"{kind}: {how}"] += 1
        if not left and answer.terminal != 1:
            self.wrong.append(f"{kind}: {answer}")


class Clients:
    """Clients of every kind, until they are told to stop."""

    def __init__(self, url: str, seed: int) -> None:
        self.url = url
        self.tally = Tally()
        self.over = False
        self._chance = random.Random(seed)
        self._kinds: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (30, self.stream), (15, self.whole), (5, self.choices), (10, self.hang_up), (5, self.hang_up_at_once),
            (5, self.deadline), (4, self.slow), (15, self.nonsense), (3, self.large_nonsense), (3, self.half),
        ]  # fmt: skip

    async def run(self) -> None:
        """One client, that is of another kind for each request."""
        weights, kinds = [weight for weight, _ in self._kinds], [kind for _, kind in self._kinds]
        while not self.over:
            await self._chance.choices(kinds, weights)[0]()
            await asyncio.sleep(self._chance.expovariate(5.0))

    async def each(self) -> None:
        """Two of every kind at once, so that pools of threads and caches are there."""
        await asyncio.gather(*(kind() for _, kind in self._kinds * 2))

    def body(self, **fields: Any) -> dict[str, Any]:
        """Short and long prompts and answers; some begin alike."""
        length = min(int(self._chance.lognormvariate(3.5, 1.2)) + 1, 1500)
        first = [self._chance.randrange(1000, 1004)] * (length // 2)
        return {
            "model": MODEL, "prompt": first + [self._chance.randrange(1000, 20000) for _ in range(length - len(first))],
            "max_tokens": min(int(self._chance.lognormvariate(2.0, 1.0)) + 1, 100), "ignore_eos": True,
            "temperature": self._chance.choice([0, 1]), "dsa": {"top_k": self._chance.choice([64, 512, "dense"])},
        } | fields  # fmt: skip

    async def stream(self) -> None:
        """A stream, read to its end."""
        answer = await ask(self.url, encoded(COMPLETIONS, self.body(stream=True)))
        self.tally.add("stream", answer)
        self.tally.gaps += [b - a for a, b in zip(answer.events, answer.events[1:], strict=False)]

    async def whole(self) -> None:
        """An answer in one piece."""
        self.tally.add("whole", await ask(self.url, encoded(COMPLETIONS, self.body())))

    async def choices(self) -> None:
        """Two answers to two prompts."""
        prompts = [self.body()["prompt"][:50] for _ in range(2)]
        stream = self._chance.random() < 0.5
        answer = await ask(self.url, encoded(COMPLETIONS, self.body(prompt=prompts, n=2, stream=stream)))
        self.tally.add("choices", answer)

    async def hang_up(self) -> None:
        """Leaves in the middle of a stream."""
        patience, left = self._chance.randrange(1, 10), False

        def count(answer: Answer) -> None:
            nonlocal left
            if len(answer.events) >= patience and not answer.ends:
                left = True
                raise HungUpError

        answer = await ask(self.url, encoded(COMPLETIONS, self.body(stream=True)), count)
        self.tally.add("hang up", answer, left=left)

    async def hang_up_at_once(self) -> None:
        """Sends a request and leaves."""
        with suppress(OSError):
            _, writer = await self._connect()
            writer.write(encoded(COMPLETIONS, self.body(stream=self._chance.random() < 0.5)))
            await asyncio.sleep(self._chance.choice([0.0, 0.05, 1.0]))
            await self._close(writer)
        self.tally.ends["hang up at once: left"] += 1

    async def deadline(self) -> None:
        """Has less time than it needs, perhaps."""
        fields = {"stream": self._chance.random() < 0.5, "timeout": self._chance.uniform(0.1, 3.0)}
        self.tally.add("deadline", await ask(self.url, encoded(COMPLETIONS, self.body(**fields))))

    async def slow(self) -> None:
        """Reads a few bytes at a time."""
        request = encoded(COMPLETIONS, self.body(stream=True, logprobs=5))
        answer = await ask(self.url, request, pause=0.1, read_bytes=2000)
        self.tally.add("slow", answer)

    async def nonsense(self) -> None:
        """A request that cannot be answered, or only with an error."""
        path, body = self._chance.choice(
            [
                (COMPLETIONS, b"{"), (COMPLETIONS, b"\xff\xfe"), (COMPLETIONS, b""), (COMPLETIONS, []),
                (COMPLETIONS, {"model": "other", "prompt": "x"}), (COMPLETIONS, {"model": MODEL}),
                (COMPLETIONS, self.body(prompt=[10**9])), (COMPLETIONS, self.body(prompt=[1] * 9000)),
                (COMPLETIONS, self.body(max_tokens=-1)), (COMPLETIONS, self.body(temperature="hot")),
                (COMPLETIONS, self.body(logit_bias={"x": 1})), (COMPLETIONS, self.body(n=10_000)),
                ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": 5}]}),
                ("/v1/chat/completions", {"model": MODEL, "messages": [[[]]]}), ("/nowhere", {}),
                ("/v1/responses", {"model": MODEL, "input": [{}]}), ("/v1/messages", {"messages": None}),
                (COMPLETIONS, self.body(response_format={"type": "json_schema", "json_schema": {}})),
            ]
        )  # fmt: skip
        self.tally.add("nonsense", await ask(self.url, encoded(path, body)))

    async def large_nonsense(self) -> None:
        """Some hundred kilobytes that cannot be answered."""
        body = self._chance.choice(
            [
                self.body(prompt="1" * 500_000), self.body(prompt=[1] + [""] * 100_000),
                b"[" * 200_000, self.body(prompt=[[]] * 100_000), self.body(junk={str(i): i for i in range(20_000)}),
            ]
        )  # fmt: skip
        self.tally.add("large nonsense", await ask(self.url, encoded(COMPLETIONS, body)))

    async def half(self) -> None:
        """Half a request, and then the end of the connection."""
        with suppress(OSError):
            _, writer = await self._connect()
            request = encoded(COMPLETIONS, self.body())
            writer.write(request[: self._chance.randrange(1, len(request))])
            await asyncio.sleep(self._chance.choice([0.0, 0.5, 2.0]))
            await self._close(writer)
        self.tally.ends["half: left"] += 1

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        url = httpx.URL(self.url)
        return await asyncio.open_connection(url.host, url.port)

    @staticmethod
    async def _close(writer: asyncio.StreamWriter) -> None:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
