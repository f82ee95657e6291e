"""Sends prompt ids to the engine and turns its deltas into text as they come. Knows no HTTP.

A `Generation` runs the jobs of one request at the same time and passes their deltas on in the order of arrival. Leaving
its block aborts the jobs that still run. No task waits for the engine: the engine's message calls each stream, which
reads its tokens and calls the listener. A task that wakes for each token of each stream would cost more than all of this.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import msgspec

from engine.client import Engine, Settled
from engine.errors import GRAMMAR_FAULT
from engine.protocol import Delta, RequestUsage, Submit, add_work
from server.generation.choice import Choice, Job, TextDelta
from server.text.tokenizer import Tokenizer

Listener = Callable[[TextDelta], None]
"""Gets every delta, in the order of arrival, while the engine's message is read. It must be quick."""


class GenerationFailedError(Exception):
    """The engine ended one request because of a fault in that request."""


class GrammarFailedError(GenerationFailedError):
    """The engine could not go on in the request's grammar, which compiled before."""


class GenerationAbortedError(Exception):
    """The engine ended a request that the server did not abort: the engine is stopping."""


class QuietError(Exception):
    """The generation did not end within the time that its owner wanted to wait."""


class Generation:
    """The jobs of one request, which run at the same time. Leaving the block aborts the jobs that still run."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, jobs: Sequence[Job], settled: Settled | None = None
    ) -> None:
        """`settled` is called once for each job, when it has ended and the engine has released it."""
        self._streams = [_Stream(engine, tokenizer, job, self, settled) for job in jobs]
        self._running = len(jobs)
        self._early: list[TextDelta] = []  # what came before there was a listener
        self._listener: Listener | None = None
        self._error: Exception | None = None
        self._first = asyncio.Event()  # the first delta came, or the end
        self._over = asyncio.Event()

    async def __aenter__(self) -> Self:
        for stream in self._streams:
            stream.begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def settle(self, seconds: float) -> None:
        """Wait at most `seconds` for the engine's first delta or refusal. The engine refuses at once or never.

        Raises:
            Exception: any error that `over` raises.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._first.wait()
        if self._error is not None:
            raise self._error

    def listen(self, listener: Listener) -> None:
        """Call `listener` with the deltas so far, and with each later one when it comes.

        An error of the listener ends the generation, as one of the engine does.
        """
        early, self._early = self._early, []
        for delta in early:
            listener(delta)
        self._listener = listener

    async def over(self, seconds: float | None = None) -> None:
        """Return after the last delta of every choice.

        Raises:
            QuietError: they did not end within `seconds`; call again.
            EngineUnavailableError: the engine takes no requests now.
            EngineDiedError: the engine ended while the request ran.
            GenerationFailedError: a job failed through its own fault.
            GenerationAbortedError: the engine is stopping.
            Exception: an error of the listener. Each error ends all choices of the request.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._over.wait()
        except TimeoutError:
            raise QuietError from None
        if self._error is not None:
            raise self._error

    def put(self, delta: TextDelta) -> None:
        """Pass a delta on. The streams call it."""
        if self._listener is not None:
            self._listener(delta)
        else:
            self._early.append(delta)
            self._first.set()

    def ended(self, error: Exception | None) -> None:
        """Note that a stream has ended. The streams call it, each once."""
        self._running -= 1
        if error is not None and self._error is None:
            self._error = error
            self.stop()  # the request has one answer, so one failure ends it
        if error is not None or not self._running:
            self._first.set()
            self._over.set()

    def stop(self) -> None:
        """Want no more: abort the jobs that still run. Idempotent."""
        for stream in self._streams:
            stream.close()


class _Stream:
    """One job that runs, as one or several requests of the engine."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, job: Job, owner: Generation, settled: Settled | None
    ) -> None:
        self._engine = engine
        self._job = job
        self._owner = owner
        self._choice = Choice(tokenizer, job)
        self._settling = _Settling(job.submit.request_id, settled)
        self._request_id = job.submit.request_id
        self._closed = False

    def begin(self) -> None:
        """Send the job to the engine."""
        if self._closed:
            return  # another job of the request was refused
        try:
            self._submit(self._job.submit)
        except Exception as error:
            self._end(error)

    def close(self) -> None:
        """Want no more of the job: abort it if it still runs. Idempotent."""
        if not self._closed:
            self._closed = True
            self._engine.abort(self._request_id)
            self._settling.end()

    def _submit(self, submit: Submit) -> None:
        self._request_id = submit.request_id
        self._settling.begin()
        self._engine.submit(submit, self._hear, self._settling.hear)

    def _hear(self, delta: Delta | Exception) -> None:
        if self._closed:
            return
        try:
            if isinstance(delta, Exception):
                raise delta
            if delta.finish_reason is not None:
                _raise_fault(delta)
            text = self._choice.read(delta)
            self._owner.put(text)
            if text.finish_reason is not None:
                self._end(None)
            elif (submit := self._choice.next_submit()) is not None:
                self._engine.abort(self._request_id)  # the computed part is in the prefix cache
                self._submit(submit)
        except Exception as error:  # handed to the owner, who knows what it means
            self._end(error)

    def _end(self, error: Exception | None) -> None:
        if not self._closed:
            self.close()  # after a stop string the engine is not at the end yet
            self._owner.ended(error)


def _raise_fault(last: Delta) -> None:
    if last.finish_reason == "error":
        if last.error is not None and last.error.startswith(GRAMMAR_FAULT):
            raise GrammarFailedError(f"{last.error}; simplify it, or send the request again")
        raise GenerationFailedError(last.error or "the engine could not run this request")
    if last.finish_reason == "abort":
        raise GenerationAbortedError("the server is stopping and ended this request; send it again")


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
