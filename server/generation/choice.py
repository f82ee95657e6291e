"""One choice of a request: what it asks the engine for, and how the engine's tokens become its text. Knows no engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from engine.protocol import Delta, Grammar, RequestUsage, Submit, TokenLogprob
from server.chat.answer import Answer
from server.chat.parts import Content, Part
from server.generation.loops import repeated_tokens
from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer

Finish = Literal["stop", "length", "tool_calls"]


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
        stop_tokens: the stop tokens that the client named; the others end the model's turn.
        rest: the grammar of the answer after its reasoning; None: it has none.
        shares_prompt: an earlier choice of the request has the same prompt, which counts once.
        include_stop: the text has the stop string, or the stop token's text, that ended it.
        skip_special: control tokens do not show in plain text.
        shows_tokens: the client sees how many tokens each piece of text has, or which.
        shows_stop: the client sees the id of the stop token, so it sees that token's log-probability, too.
    """

    index: int
    submit: Submit
    stop: tuple[str, ...] = ()
    prompt_only: bool = False
    answer: Callable[[], Answer] | None = None
    thinks: bool = False
    stop_tokens: frozenset[int] = frozenset()
    rest: Grammar | None = None
    shares_prompt: bool = False
    include_stop: bool = False
    skip_special: bool = True
    shows_tokens: bool = False
    shows_stop: bool = False


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
        repeated_tokens: the answer ends in a loop of so many tokens; None: it does not.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    index_top_k: int | None
    queue_seconds: float | None
    reasoning_tokens: int | None = None
    prefill_seconds: float | None = None
    repeated_tokens: int | None = None


class TextDelta(msgspec.Struct, frozen=True):
    """What is new in one choice. Only the last delta of a choice has a finish reason and usage.

    The text may lag behind the tokens: half characters and possible starts of stop strings are held
    back. A stop token is neither in `parts` nor in `token_ids`. `stages` comes once, with the first token:
    (seconds in the queue, seconds from the first step to the first token). `stop_token` is the token that ended the
    choice, if one did and it is not in `token_ids`.
    """

    index: int
    parts: tuple[Part, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: Finish | None = None
    stop_reason: str | int | None = None  # the stop string, or the client's stop token, that ended the choice
    usage: ChoiceUsage | None = None
    stages: tuple[float, float] | None = None
    stop_token: int | None = None
    shows_tokens: bool = False  # the delta may not be joined with others

    @property
    def text(self) -> str:
        """The new content."""
        if len(self.parts) == 1 and isinstance(part := self.parts[0], Content):
            return part.text
        return "".join(part.text for part in self.parts if isinstance(part, Content))

    @property
    def only_text(self) -> bool:
        """Whether nothing but content is new. Almost every delta is so."""
        if self.finish_reason is not None or self.logprobs is not None or self.prompt_logprobs is not None:
            return False
        if self.shows_tokens:
            return False
        for part in self.parts:  # noqa: SIM110 - a generator takes four times as long
            if type(part) is not Content:
                return False
        return True


def join_texts(deltas: Sequence[TextDelta]) -> list[TextDelta]:
    """Join neighbouring deltas of one choice that have only text. The order of each choice's deltas stays.

    The joined deltas have no token ids.
    """
    joined: list[TextDelta] = []
    texts: dict[int, list[str]] = {}  # of each choice, after its last delta in `joined`

    def close(index: int) -> None:
        if parts := texts.pop(index, None):
            joined.append(TextDelta(index, (Content("".join(parts)),), ()))

    for delta in deltas:
        if delta.only_text:
            texts.setdefault(delta.index, []).append(delta.text)
        else:
            close(delta.index)
            joined.append(delta)
    for index in tuple(texts):
        close(index)
    return joined


class Choice:
    """The state of one choice between deltas.

    An answer may be redirected: its reasoning has used up its budget, or a tool call must follow. Then
    the choice goes to the engine again. The new prompt is the old one, all tokens so far, and the tokens
    that the answer must continue with.
    """

    def __init__(self, tokenizer: Tokenizer, job: Job) -> None:
        self._job = job
        self._staged = False
        self._reader = _Plain(tokenizer, job) if job.answer is None else job.answer()
        self._endless = job.answer is None and not job.stop and not job.prompt_only
        self._output: list[int] = []  # tokens that the engine and the server wrote so far
        self._submits = 1
        self._known: RequestUsage | None = None  # the newest; a stop string ends before the final one

    def read(self, delta: Delta) -> TextDelta:
        """Read a delta of the engine."""
        if self._endless and delta.finish_reason is None and delta.usage is None:
            # Almost every delta of plain text. The rest of this method would give the same.
            token_ids = delta.token_ids
            self._output += token_ids
            text = tuple(self._reader.push(token_ids))
            return TextDelta(
                self._job.index,
                text,
                token_ids,
                delta.logprobs,
                delta.prompt_logprobs,
                shows_tokens=self._job.shows_tokens,
            )
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
        stop_token = None
        if delta.finish_reason == "stop" and not reader.ended and len(token_ids) < len(delta.token_ids):
            stop_token = delta.token_ids[-1]
        scored = len(token_ids) + (self._job.shows_stop and stop_token is not None)
        return TextDelta(
            index=self._job.index,
            parts=tuple(parts),
            token_ids=token_ids,
            stop_reason=None if finish is None else self._stop_reason(delta),
            logprobs=delta.logprobs[:scored] if delta.logprobs is not None else None,
            prompt_logprobs=delta.prompt_logprobs,
            finish_reason=finish,
            usage=self._usage(completion_tokens) if finish else None,
            stages=self._stages(delta),
            stop_token=stop_token,
            shows_tokens=self._job.shows_tokens,
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
            sampling=msgspec.structs.replace(
                first.sampling,
                seed=seed,
                max_tokens=self._left(),
                min_tokens=max(first.sampling.min_tokens - len(self._output), 0),
            ),
            grammar=self._job.rest,  # an answer is redirected to the end of its reasoning, or past it
        )

    def _stop_reason(self, delta: Delta) -> str | int | None:
        if self._reader.ended:
            return self._reader.stopped
        last = delta.token_ids[-1] if delta.finish_reason == "stop" and delta.token_ids else None
        return last if last in self._job.stop_tokens else None

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
        if self._job.include_stop:
            return ids
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
            repeated_tokens=repeated_tokens(self._output),
        )


class _Plain:
    """Reads plain text. It has the same interface as `Answer`, which reads a chat answer."""

    called = False
    redirect: tuple[int, ...] = ()
    reasoning_tokens = 0

    def __init__(self, tokenizer: Tokenizer, job: Job) -> None:
        self._detokenizer = Detokenizer(
            tokenizer,
            stop=job.stop,
            include_stop=job.include_stop,
            skip_special=job.skip_special,
            after=job.submit.prompt_token_ids,
            min_tokens=job.submit.sampling.min_tokens,
        )

    @property
    def ended(self) -> bool:
        return self._detokenizer.stopped is not None

    @property
    def stopped(self) -> str | None:
        return self._detokenizer.stopped

    @property
    def tokens_consumed(self) -> int:
        return self._detokenizer.tokens_consumed

    def push(self, token_ids: Sequence[int]) -> list[Part]:
        return [Content(self._detokenizer.push(token_ids))]

    def finish(self) -> list[Part]:
        return [Content(self._detokenizer.finish())]
