"""The common part of the streams of OpenAI's older endpoints: what their objects show beside the text, and a fast way for text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from engine.protocol import TokenLogprob
from server.chat.parts import Content
from server.config import ReasoningField, ServerConfig
from server.generation.choice import Job, TextDelta
from server.http.protocol import sse
from server.http.protocol.errors import ApiError
from server.http.protocol.notices import Notice
from server.http.protocol.sampling import GenerationBody
from server.http.protocol.token_ids import PromptLogprob, PromptLogprobs
from server.http.protocol.usage import RunningUsage, Usage
from server.text.tokenizer import Tokenizer

LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer has.

    Attributes:
        id: of the answer.
        created: when it arrived, in seconds since 1970.
        model: the model's name.
        fingerprint: of the server, the model and how it computes.
        notices: what of the request had no effect.
    """

    id: str
    created: int
    model: str
    fingerprint: str
    notices: Sequence[Notice] = ()


@dataclass(frozen=True, slots=True)
class Shown:
    """What an answer shows beside its text.

    Attributes:
        usage: a stream ends with the usage.
        running_usage: every chunk of a stream has the tokens so far.
        token_ids: of the prompt and of the output.
        named_by_id: log-probabilities name tokens by their ids.
        logprobs: alternatives to each token of a completion; None: no log-probabilities of a completion are shown.
        echo: those of the prompt are shown before them.
        prompt_logprobs: alternatives to each token of the prompt; None: nothing is shown of the prompt.
        reasoning: the name of the field that has a chat's reasoning.
    """

    usage: bool = False
    running_usage: bool = False
    token_ids: bool = False
    named_by_id: bool = False
    logprobs: int | None = None
    echo: bool = False
    prompt_logprobs: int | None = None
    reasoning: ReasoningField = "reasoning_content"


def shown_of(
    body: GenerationBody, config: ServerConfig, *, logprobs: int | None = None, echo: bool = False
) -> Shown:
    """Read what a body wants to see, or the server's settings show to all."""
    options = body.stream_options
    usage = config.enable_force_include_usage or bool(options and options.include_usage)
    return Shown(
        usage=usage,
        running_usage=usage and bool(options and options.continuous_usage_stats),
        token_ids=bool(body.return_token_ids),
        named_by_id=config.return_tokens_as_token_ids or bool(body.return_tokens_as_token_ids),
        logprobs=_every(logprobs),
        echo=echo,
        prompt_logprobs=_every(body.prompt_logprobs),
        reasoning=config.reasoning_field,
    )


def _every(count: int | None) -> int | None:
    """A count as the end of a slice: -1 is all alternatives."""
    return sys.maxsize if count == -1 else count


class Streamed:
    """The common part of the streams of OpenAI's older endpoints. Most events bring only text, so these have a fast way.

    Args:
        head: of every object.
        text: the model's tokenizer.
        jobs: of the choices.
        shown: what is shown beside the text.
    """

    def __init__(self, head: Head, *, text: Tokenizer, jobs: Sequence[Job], shown: Shown) -> None:
        self._head = head
        self._text = text
        self._jobs = jobs
        self._shown = shown
        self._counts = [0] * len(jobs)  # tokens of each choice so far
        self._notices: dict[str, Any] = {"warnings": list(head.notices)} if head.notices else {}
        self._first = True  # no object was made
        self._opened: set[int] = set()  # choices whose first chunk was made; that one differs from the others
        self._text_events: dict[int, sse.TextEvent] = {}

    def chunks(self, delta: TextDelta) -> Sequence[BaseModel]:
        """Return the chunks for a delta; the list is empty when the delta shows nothing.

        Call it with the deltas in the order of their arrival. Use either `chunks` or `events` for a request.
        """
        raise NotImplementedError

    def usage_chunk(self, usage: Usage) -> BaseModel:
        """The chunk without choices that ends a stream."""
        raise NotImplementedError

    def opening(self) -> bytes:
        """Nothing: the first chunk comes with the first token."""
        return b""

    def ending(self, usage: Usage) -> bytes:
        """The chunk with the usage if it is wanted, and the mark of the end."""
        return (sse.chunk(self.usage_chunk(usage)) if self._shown.usage else b"") + sse.DONE

    def failure(self, error: ApiError) -> bytes:
        """The error as an event."""
        return sse.event(error.to_json())

    def events(self, delta: TextDelta) -> bytes:
        """Return the chunks as bytes. A delta with only text is written without objects."""
        index = delta.index
        if not delta.only_text or index not in self._opened:
            self._count(delta)
            return b"".join(map(sse.chunk, self.chunks(delta)))
        if not (text := delta.text):
            return b""
        event = self._text_events.get(index)
        if event is None:
            event = self._text_events[index] = sse.TextEvent(lambda text: self._text_chunk(index, text))
        return event(text)

    def _count(self, delta: TextDelta) -> None:
        self._counts[delta.index] += len(output_ids(delta))
        if delta.usage is not None:
            self._counts[delta.index] = delta.usage.completion_tokens

    def _chunk_usage(self, usage: Usage | None) -> dict[str, Any]:
        """The usage that a chunk has. The last one has the whole; the others have null, or the tokens so far."""
        if not self._shown.usage:
            return {}
        if usage is not None or not self._shown.running_usage:
            return {"usage": usage}
        prompt = sum(len(job.submit.prompt_token_ids) for job in self._jobs if not job.shares_prompt)
        output = sum(self._counts)
        running = RunningUsage(prompt_tokens=prompt, completion_tokens=output, total_tokens=prompt + output)
        return {"usage": running}

    def _prompt_logprobs(self, index: int, deltas: Sequence[TextDelta]) -> PromptLogprobs | None:
        shown = self._shown.prompt_logprobs
        entries = next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None)
        if shown is None or entries is None:
            return None
        prompt = self._jobs[index].submit.prompt_token_ids
        return [
            None if entry is None else self._alternatives(entry, shown)
            for _, entry in zip(prompt, entries, strict=False)
        ]

    def _alternatives(self, entry: TokenLogprob, shown: int) -> dict[str, PromptLogprob]:
        ranked = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top[:shown], 1)}
        return {
            str(token_id): PromptLogprob(
                logprob=max(logprob, LEAST), rank=rank, decoded_token=self._text.token_text(token_id)
            )
            for token_id, (logprob, rank) in ({entry.token_id: (entry.logprob, entry.rank)} | ranked).items()
        }

    def _token_name(self, token_id: int) -> str:
        """What log-probabilities call a token."""
        return f"token_id:{token_id}" if self._shown.named_by_id else self._text.token_text(token_id)

    def _first_notices(self) -> dict[str, Any]:
        """The notices, for the first object of an answer only."""
        notices, self._notices = self._notices, {}
        return notices

    def _text_chunk(self, index: int, text: str) -> BaseModel:
        (chunk,) = self.chunks(TextDelta(index=index, parts=(Content(text),), token_ids=()))
        return chunk


def output_ids(delta: TextDelta) -> list[int]:
    """The tokens of a delta, with the stop token that ended the choice."""
    return [*delta.token_ids, *(() if delta.stop_token is None else (delta.stop_token,))]
