"""A canary: a fixed prompt that an idle server answers again and again, to notice when its answers change.

A weight that flips a bit in memory, or a cache page that comes back with other content, makes no error. So the same prompt is
computed cold, under a salt of its own, and once more on its own cached prefix. Both answers must be equal, and equal to the
first ones since the engine's start. It runs alone, because company may change the last bits of a number, and whoever runs it
pays nothing: it goes to the engine without an account, and is in no caller's metrics.

Where the two likeliest tokens of a place are nearer than `TIE` to each other, another batch shape may choose the other one
(a prefix hit computes fewer rows). From such a place on nothing is compared.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.client import Engine, EngineState
from engine.errors import EngineDiedError, EngineUnavailableError
from engine.protocol import Delta, SamplingParams, Submit, TokenLogprob
from server.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TEXT = "One, two, three, four, five, six, seven, eight, nine, ten. "
PROMPT_TOKENS = 200  # three pages, which the second run finds, and a rest
TOKENS = 16
TOP_K = 64  # so the indexer selects in every layer
TIE = 0.25
"""Nats."""
LOWEST = 2**31 - 1
"""The lowest priority: whoever comes meanwhile goes first."""
RETRY_SECONDS = 1.0
"""The time between two looks whether a busy server is idle."""

CanaryOutcome = Literal["agree", "disagree", "failed", "company"]
"""How a run ended. `company`: somebody else's request came meanwhile, so a difference would mean nothing."""


@dataclass(frozen=True, slots=True)
class Said:
    """An answer: its tokens, for each how much likelier than the next one it was in nats, and how many were cached."""

    token_ids: tuple[int, ...]
    margins: tuple[float, ...]
    cached: int


def difference(one: Said, other: Said) -> int | None:
    """The first place where two answers differ, though its token was no near tie; None: there is none."""
    for place, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=False)):
        if min(one.margins[place], other.margins[place]) < TIE:
            return None
        if a != b:
            return place
    return (
        None if len(one.token_ids) == len(other.token_ids) else min(len(one.token_ids), len(other.token_ids))
    )


class Canary:
    """Runs the canary, and keeps what came of it.

    Attributes:
        problem: one sentence for an operator; None: all answers agreed.
    """

    def __init__(
        self, engine: Engine, text: Tokenizer, interval: float, count: Callable[[CanaryOutcome], None]
    ) -> None:
        """It does nothing before `run`.

        Args:
            engine: answers.
            text: the model's tokenizer.
            interval: seconds from the end of a run to the next one.
            count: is called with the outcome of each run.
        """
        ids = text.encode(TEXT)
        self._prompt = tuple((ids * (PROMPT_TOKENS // max(len(ids), 1) + 1))[:PROMPT_TOKENS])
        self._engine, self._interval, self._count = engine, interval, count
        self._first: tuple[int | None, Said] | None = None  # of the engine process with this pid
        self.problem: str | None = None

    async def run(self) -> None:
        """Run for ever, each time after the interval, as soon as the server is idle."""
        wait = self._interval
        while True:
            await asyncio.sleep(wait)
            wait = RETRY_SECONDS
            if self._idle():
                self._count(await self.once())
                wait = self._interval

    async def once(self) -> CanaryOutcome:
        """One run: cold, then on a prefix hit. Its outcome is also in the log, unless all is well."""
        before = self._engine.status
        salt = f"canary {secrets.token_hex(8)}"
        try:
            cold = await self._answer(salt)
            hit = await self._answer(salt)
        except (EngineDiedError, EngineUnavailableError):
            return "company"  # its end has an alert of its own
        except _FaultError as error:
            self.problem = f"the canary's prompt ended with an error: {error}"
            logger.error("%s", self.problem)
            return "failed"
        after = self._engine.status
        if before.pid != after.pid:
            return "company"
        steps = after.stats.steps_total - before.stats.steps_total
        if after.stats.batch_requests_total - before.stats.batch_requests_total != steps:
            return "company"
        return self._compare(after.pid, cold, hit)

    def _compare(self, pid: int | None, cold: Said, hit: Said) -> CanaryOutcome:
        if self._first is None or self._first[0] != pid:
            self._first, self.problem = (pid, cold), None
        first = self._first[1]
        for name, one, other in (
            ("on its cached prefix", cold, hit),
            ("than at the engine's start", first, cold),
        ):
            place = difference(one, other)
            if place is not None:
                self.problem = (
                    f"the canary's prompt is answered differently {name}, from token {place} on: "
                    f"{list(other.token_ids)} in place of {list(one.token_ids)}; restart the engine, and run dsa doctor"
                )
                logger.error("%s", self.problem)
                return "disagree"
        self.problem = None
        return "agree"

    def _idle(self) -> bool:
        status = self._engine.status
        return status.state is EngineState.READY and status.stats.running == 0 and status.stats.waiting == 0

    async def _answer(self, salt: str) -> Said:
        """The answer to the prompt under a salt.

        Raises:
            _FaultError: the engine ended it with an error.
            EngineDiedError: the engine ended.
            EngineUnavailableError: the engine takes no requests.
        """
        model = self._engine.status.model
        room = TOKENS if model is None else min(TOKENS, model.max_model_len - 1)
        prompt = self._prompt if model is None else self._prompt[: model.max_model_len - room]
        sparse = model is not None and model.indexer is not None
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        tokens: list[int] = []
        told: list[TokenLogprob] = []
        cached = 0

        def hear(delta: Delta | Exception) -> None:
            nonlocal cached
            if over.done():
                return
            if isinstance(delta, Exception):
                over.set_exception(delta)
                return
            tokens.extend(delta.token_ids)
            told.extend(delta.logprobs or ())
            if delta.finish_reason is None:
                return
            cached = delta.usage.cached_tokens if delta.usage is not None else 0
            if delta.finish_reason == "error":
                over.set_exception(_FaultError(delta.error))
            elif delta.finish_reason == "abort":
                over.set_exception(EngineUnavailableError("the engine is stopping"))
            else:
                over.set_result(None)

        request_id = f"canary-{secrets.token_hex(8)}"
        submit = Submit(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=room, seed=0, temperature=0.0, logprobs=2),
            index_top_k=TOP_K if sparse else None,
            cache_salt=salt,
            priority=LOWEST,
        )
        released = asyncio.Event()
        self._engine.submit(submit, hear, lambda *_: released.set())
        try:
            await over
            await released.wait()
        except BaseException:
            self._engine.abort(request_id)
            raise
        return Said(tuple(tokens), tuple(_margin(one.top) for one in told), cached)


class _FaultError(Exception):
    """The engine ended the canary with an error."""


def _margin(top: Sequence[tuple[int, float]]) -> float:
    return top[0][1] - top[1][1] if len(top) > 1 else float("inf")
