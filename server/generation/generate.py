"""The heart: prompt ids to the engine, its deltas back as text. Knows no HTTP.

A `Job` is one choice of one request. A `Generation` runs a request's jobs side by side and gives
out what they produce in the order in which it comes. Closing it aborts what still runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import msgspec

from engine.client import Engine, Settled
from engine.errors import EngineDiedError
from engine.protocol import Delta, RequestUsage, Submit, TokenLogprob, add_work
from server.chat.answer import Answer
from server.chat.parts import Content, Part
from server.generation.mailbox import Mailbox
from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer

Finish = Literal["stop", "length", "tool_calls"]


class GenerationFailedError(Exception):
    """The engine ended one request because of a fault of that request's own."""


class GenerationAbortedError(Exception):
    """The engine ended a request that nobody here had given up: it is stopping."""


class QuietError(Exception):
    """Nothing happened for as long as the reader wanted to wait."""


@dataclass(frozen=True, slots=True)
class Job:
    """One choice to generate.

    Attributes:
        index: the choice's number in its request.
        submit: what the engine gets.
        stop: texts that end the choice.
        prompt_only: only the prompt is of interest; the engine makes one token, which is dropped.
        answer: makes the reader of a chat's answer; None is plain text.
        thinks: the answer may have reasoning, so its tokens are counted.
    """

    index: int
    submit: Submit
    stop: tuple[str, ...] = ()
    prompt_only: bool = False
    answer: Callable[[], Answer] | None = None
    thinks: bool = False


@dataclass(frozen=True, slots=True)
class ChoiceUsage:
    """What one choice used.

    Attributes:
        prompt_tokens: tokens of the prompt.
        cached_tokens: those of them that the engine reused.
        completion_tokens: tokens of the output, up to and including the one that completed a stop string;
            those that the server wrote into it (the end of reasoning) are among them.
        index_top_k: tokens that attention could read; None is all.
        queue_seconds: time between submission and first step, where known.
        reasoning_tokens: those of the output that are reasoning; None where the model has none.
        prefill_seconds: time between first step and first token, where known.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    index_top_k: int | None
    queue_seconds: float | None
    reasoning_tokens: int | None = None
    prefill_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What is new in one choice. Its last one, and only it, has a finish reason and usage.

    The text may lag behind the tokens: half characters and possible starts of stop strings are held
    back. A stop token is in neither. `stages` comes once, with the first token: seconds in the queue, and
    from there to that token.
    """

    index: int
    parts: tuple[Part, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: Finish | None = None
    usage: ChoiceUsage | None = None
    stages: tuple[float, float] | None = None

    @property
    def text(self) -> str:
        """The new content."""
        return "".join(part.text for part in self.parts if isinstance(part, Content))


async def generate_text(
    engine: Engine, tokenizer: Tokenizer, job: Job, settled: Settled | None = None
) -> AsyncGenerator[TextDelta, None]:
    """Run one job; `settled` as in `engine.client.Engine.generate`.

    Raises:
        EngineUnavailableError: the engine takes no requests now.
        EngineDiedError: the engine ended while the job ran.
        GenerationFailedError: the job failed by itself.
        GenerationAbortedError: the engine is stopping.
    """
    choice = _Choice(tokenizer, job)
    settling = _Settling(job.submit.request_id, settled)
    submit: Submit | None = job.submit
    try:
        while submit is not None:
            settling.begin()
            async with contextlib.aclosing(engine.generate(submit, settling.hear)) as deltas:
                submit = None
                async for delta in deltas:
                    if delta.finish_reason == "error":
                        raise GenerationFailedError(delta.error or "the engine could not run this request")
                    if delta.finish_reason == "abort":
                        raise GenerationAbortedError(
                            "the server is stopping and ended this request; send it again"
                        )
                    text = choice.read(delta)
                    yield text
                    if text.finish_reason is not None:
                        return  # after a stop string, leaving the block aborts the rest
                    if (submit := choice.next_submit()) is not None:
                        break  # likewise; what was computed is in the prefix cache
    finally:
        settling.end()
    raise EngineDiedError("the engine ended before this request did; send it again")


class _Settling:
    """Gathers what a job's requests to the engine used, and tells it once all are let go of."""

    def __init__(self, request_id: str, settled: Settled | None) -> None:
        self._request_id = request_id
        self._settled = settled
        self._open = 0
        self._ended = False
        self._usage: RequestUsage | None = None

    def begin(self) -> None:
        self._open += 1

    def hear(self, request_id: str, usage: RequestUsage | None) -> None:
        self._open -= 1
        if usage is not None:
            known = self._usage
            self._usage = (
                usage
                if known is None
                else msgspec.structs.replace(
                    known,
                    completion_tokens=known.completion_tokens + usage.completion_tokens,
                    work=add_work(known.work, usage.work),
                )
            )
        self._tell()

    def end(self) -> None:
        self._ended = True
        self._tell()

    def _tell(self) -> None:
        if self._ended and not self._open and self._settled is not None:
            self._settled(self._request_id, self._usage)
            self._settled = None


class _Choice:
    """The state of one choice between deltas.

    An answer may be redirected: its reasoning has used up its budget, or a call is to follow it. Then
    the request is sent again with all tokens so far, and those to go on with, as its prompt.
    """

    def __init__(self, tokenizer: Tokenizer, job: Job) -> None:
        self._job = job
        self._staged = False
        self._reader = _Plain(tokenizer, job.stop) if job.answer is None else job.answer()
        self._output: list[int] = []  # what engine and server wrote so far
        self._submits = 1
        self._known: RequestUsage | None = None  # the newest; a stop string ends a choice before the last

    def read(self, delta: Delta) -> TextDelta:
        if self._submits == 1:  # a later prompt is this choice's own output
            self._known = delta.usage or self._known
        if self._job.prompt_only:
            return self._read_prompt(delta)
        token_ids, reader = self._without_stop_token(delta), self._reader
        consumed = reader.tokens_consumed
        parts = reader.push(token_ids)
        token_ids = token_ids[: reader.tokens_consumed - consumed]
        self._output += [*token_ids, *reader.redirect]
        finish: Finish | None = None
        completion_tokens = len(self._output)
        if reader.ended:
            finish = "tool_calls" if reader.called else "stop"
        elif reader.redirect:
            finish = "length" if self._left() < 1 else None
            completion_tokens = min(completion_tokens, self._job.submit.sampling.max_tokens)
        elif delta.finish_reason is not None:
            completion_tokens += len(delta.token_ids) - len(token_ids)  # the stop token
            finish = "length" if delta.finish_reason == "length" else "stop"
        if finish is not None:
            parts += reader.finish()
            if finish == "stop" and reader.called:
                finish = "tool_calls"
        return TextDelta(
            index=self._job.index,
            parts=tuple(parts),
            token_ids=token_ids,
            logprobs=delta.logprobs[: len(token_ids)] if delta.logprobs is not None else None,
            prompt_logprobs=delta.prompt_logprobs,
            finish_reason=finish,
            usage=self._usage(completion_tokens) if finish else None,
            stages=self._stages(delta),
        )

    def next_submit(self) -> Submit | None:
        """The request to go on with, where the answer was redirected."""
        if not self._reader.redirect:
            return None
        first = self._job.submit
        self._submits += 1
        # Random numbers belong to a place in the output, so that the new request needs a seed of its own.
        seed = (first.sampling.seed + self._submits) % 2**64
        return msgspec.structs.replace(
            first,
            request_id=f"{first.request_id}.{self._submits}",
            prompt_token_ids=(*first.prompt_token_ids, *self._output),
            sampling=msgspec.structs.replace(first.sampling, seed=seed, max_tokens=self._left()),
        )

    def _left(self) -> int:
        return self._job.submit.sampling.max_tokens - len(self._output)

    def _read_prompt(self, delta: Delta) -> TextDelta:
        return TextDelta(
            index=self._job.index,
            parts=(),
            token_ids=(),
            prompt_logprobs=delta.prompt_logprobs,
            finish_reason="length" if delta.finish_reason else None,
            usage=self._usage(0) if delta.finish_reason else None,
            stages=self._stages(delta),
        )

    def _stages(self, delta: Delta) -> tuple[float, float] | None:
        if delta.usage is None or self._staged:
            return None
        self._staged = True
        return max(delta.usage.queue_seconds, 0.0), max(delta.usage.prefill_seconds, 0.0)

    def _without_stop_token(self, delta: Delta) -> tuple[int, ...]:
        ids = delta.token_ids
        if delta.finish_reason == "stop" and ids and ids[-1] in self._job.submit.sampling.stop_token_ids:
            return ids[:-1]
        return ids

    def _usage(self, completion_tokens: int) -> ChoiceUsage:
        known = self._known
        return ChoiceUsage(
            prompt_tokens=len(self._job.submit.prompt_token_ids),
            cached_tokens=known.cached_tokens if known else 0,
            completion_tokens=completion_tokens,
            index_top_k=known.index_top_k if known else self._job.submit.index_top_k,
            queue_seconds=known.queue_seconds if known else None,
            reasoning_tokens=self._reader.reasoning_tokens if self._job.thinks else None,
            prefill_seconds=known.prefill_seconds if known else None,
        )


class _Plain:
    """Reads text that is nothing but text, as `Answer` reads a chat's."""

    called = False
    redirect: tuple[int, ...] = ()
    reasoning_tokens = 0

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer, stop=stop)

    @property
    def ended(self) -> bool:
        return self._detokenizer.stopped is not None

    @property
    def tokens_consumed(self) -> int:
        return self._detokenizer.tokens_consumed

    def push(self, token_ids: Sequence[int]) -> list[Part]:
        return [Content(self._detokenizer.push(token_ids))]

    def finish(self) -> list[Part]:
        return [Content(self._detokenizer.finish())]


class Generation:
    """The jobs of one request, running side by side. Leaving the block aborts what still runs."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, jobs: Sequence[Job], settled: Settled | None = None
    ) -> None:
        """`settled` hears once of each job, in the end, that the engine has let go of it."""
        self._engine = engine
        self._settled = settled
        self._begun: set[str] = set()
        self._tokenizer = tokenizer
        self._jobs = jobs
        self._events: Mailbox[TextDelta | Exception | None] = Mailbox()
        self._tasks: list[asyncio.Task[None]] = []
        self._running = len(jobs)
        self._early: TextDelta | None = None

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._run(job)) for job in self._jobs]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for job in self._jobs:  # a task that is cancelled before it ran never told the engine
            if self._settled is not None and job.submit.request_id not in self._begun:
                self._settled(job.submit.request_id, None)

    async def settle(self, seconds: float) -> None:
        """Wait for the first sign of the engine, at most `seconds`: it refuses at once or not at all.

        Raises:
            Exception: what `next` would raise.
        """
        with contextlib.suppress(QuietError):
            self._early = await self.next(seconds)

    @property
    def ready(self) -> bool:
        """Whether `next` would not wait."""
        return self._early is not None or len(self._events) > 0

    async def next(self, seconds: float | None = None) -> TextDelta | None:
        """Return the next delta of any choice; None after the last one of every choice.

        Raises:
            QuietError: nothing came for `seconds`; call again.
            Exception: what `generate_text` raises; the request is over, for all its choices.
        """
        if self._early is not None:
            early, self._early = self._early, None
            return early
        while self._running:
            try:
                event = await self._events.get(seconds)
            except TimeoutError:
                raise QuietError from None
            if isinstance(event, Exception):
                raise event
            if event is not None:
                return event
            self._running -= 1
        return None

    async def _run(self, job: Job) -> None:
        self._begun.add(job.submit.request_id)
        try:
            deltas = generate_text(self._engine, self._tokenizer, job, self._settled)
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    self._events.put(delta)
        except Exception as error:  # handed to the reader, who knows what it means
            self._events.put(error)
        else:
            self._events.put(None)
