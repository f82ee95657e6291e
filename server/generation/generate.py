"""Sends prompt ids to the engine and turns its deltas into text. Knows no HTTP.

A `Job` is one choice of one request. A `Generation` runs the jobs of one request at the same time and returns
their deltas in the order of arrival. Closing a `Generation` aborts the jobs that still run.
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
    """The engine ended one request because of a fault in that request."""


class GenerationAbortedError(Exception):
    """The engine ended a request that the server did not abort: the engine is stopping."""


class QuietError(Exception):
    """Nothing came within the time that the reader wanted to wait."""


@dataclass(frozen=True, slots=True)
class Job:
    """One choice to generate.

    Attributes:
        index: the choice's number in its request.
        submit: what the engine gets.
        stop: texts that end the choice.
        prompt_only: only the prompt is scored; the engine generates one token, which is dropped.
        answer: makes the reader of a chat answer; None: the output is plain text.
        thinks: the answer may have reasoning, so reasoning tokens are counted.
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
        cached_tokens: prompt tokens that the engine reused.
        completion_tokens: tokens of the output, up to and including the one that completed a stop string;
            tokens that the server wrote into the output (the end of reasoning) count too.
        index_top_k: tokens that attention could read; None is all.
        queue_seconds: time between submission and first step, None if not known.
        reasoning_tokens: output tokens that are reasoning; None if the model has no reasoning.
        prefill_seconds: time between first step and first token, None if not known.
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
    """What is new in one choice. Only the last delta of a choice has a finish reason and usage.

    The text may lag behind the tokens: half characters and possible starts of stop strings are held
    back. A stop token is neither in `parts` nor in `token_ids`. `stages` comes once, with the first token:
    (seconds in the queue, seconds from the first step to the first token).
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
    """Run one job. `settled` is called as `engine.client.Engine.generate` describes, once for the whole job.

    Raises:
        EngineUnavailableError: the engine takes no requests now.
        EngineDiedError: the engine ended while the job ran.
        GenerationFailedError: the job failed through its own fault.
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
                        break  # aborts the rest too; the computed part is in the prefix cache
    finally:
        settling.end()
    raise EngineDiedError("the engine ended before this request did; send it again")


class _Settling:
    """Sums the usage of all engine requests of one job. Calls `settled` once the engine has released all of them."""

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

    An answer may be redirected: its reasoning has used up its budget, or a tool call must follow. Then
    the choice goes to the engine again. The new prompt is the old one, all tokens so far, and the tokens
    that the answer must continue with.
    """

    def __init__(self, tokenizer: Tokenizer, job: Job) -> None:
        self._job = job
        self._staged = False
        self._reader = _Plain(tokenizer, job.stop) if job.answer is None else job.answer()
        self._output: list[int] = []  # tokens that the engine and the server wrote so far
        self._submits = 1
        self._known: RequestUsage | None = None  # the newest; a stop string ends before the final one

    def read(self, delta: Delta) -> TextDelta:
        if self._submits == 1:  # the prompt of a later submit contains this choice's own output
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
        """The request that continues a redirected answer; None if the answer was not redirected."""
        if not self._reader.redirect:
            return None
        first = self._job.submit
        self._submits += 1
        # Random numbers depend on the seed and the position in the output, which begins at 0 again in the new
        # request. So the new request needs its own seed.
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
    """Reads plain text. It has the same interface as `Answer`, which reads a chat answer."""

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
    """The jobs of one request, which run at the same time. Leaving the block aborts the jobs that still run."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, jobs: Sequence[Job], settled: Settled | None = None
    ) -> None:
        """`settled` is called once for each job, at the end, when the engine has released it."""
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
        for job in self._jobs:  # a task that was cancelled before it ran has sent nothing to the engine
            if self._settled is not None and job.submit.request_id not in self._begun:
                self._settled(job.submit.request_id, None)

    async def settle(self, seconds: float) -> None:
        """Wait at most `seconds` for the engine's first delta or refusal. The engine refuses at once or never.

        Raises:
            Exception: any error that `next` raises.
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
            Exception: any error that `generate_text` raises; it ends all choices of the request.
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
