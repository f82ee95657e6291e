"""What becomes known of one request while it is served; read once it has ended, by logs and traces."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from server.generation.generate import Finish, Job, TextDelta


@dataclass(slots=True)
class ChoiceRecord:
    """One choice, with moments in seconds on the monotonic clock.

    Attributes:
        prompt_tokens: tokens of its prompt.
        tokens: tokens given out so far.
        cached_tokens: prompt tokens that the engine reused; known at the end.
        queue_seconds: from submission to the first step; known with the first token.
        prefill_seconds: from the first step to the first token; known with it.
        ended: when its last token came.
        finish: how it ended; None if it was cut short.
    """

    prompt_tokens: int
    tokens: int = 0
    cached_tokens: int = 0
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    ended: float | None = None
    finish: Finish | None = None


@dataclass(slots=True)
class GenerationRecord:
    """One generating request.

    Attributes:
        model: what the client asked for, and what answered.
        jobs: its choices as the engine got them.
        stream: whether the answer was streamed.
        submitted: when the engine got it, on the monotonic clock.
        first_token: when the first token of any choice came.
    """

    model: str
    jobs: tuple[Job, ...]
    stream: bool
    submitted: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    choices: dict[int, ChoiceRecord] = field(init=False)

    def __post_init__(self) -> None:
        self.choices = {job.index: ChoiceRecord(len(job.submit.prompt_token_ids)) for job in self.jobs}

    def take(self, delta: TextDelta) -> None:
        """Take in what one choice produced."""
        now = time.monotonic()
        choice = self.choices[delta.index]
        choice.tokens += len(delta.token_ids)
        if delta.token_ids and self.first_token is None:
            self.first_token = now
        if delta.stages is not None:
            choice.queue_seconds, choice.prefill_seconds = delta.stages
        if delta.usage is not None:
            choice.ended, choice.finish = now, delta.finish_reason
            choice.tokens, choice.cached_tokens = delta.usage.completion_tokens, delta.usage.cached_tokens


@dataclass(frozen=True, slots=True)
class Ended:
    """One request of any endpoint, after its last byte.

    Attributes:
        request_id: made by the server.
        method: of HTTP.
        endpoint: the route's template, `other` where there is none; never what a client made up.
        status: of HTTP; None if the client hung up before there was one.
        outcome: how it ended, one of the words that `dsa_requests_total` has as label.
        started_ns: when it arrived, nanoseconds since 1970.
        started: the same moment in seconds on the monotonic clock.
        seconds: how long it took.
        traceparent: the client's W3C trace context.
        tracestate: likewise.
        generation: what was generated; None if it was refused before, or asked for nothing of the kind.
    """

    request_id: str
    method: str
    endpoint: str
    status: int | None
    outcome: str
    started_ns: int
    started: float
    seconds: float
    traceparent: str | None
    tracestate: str | None
    generation: GenerationRecord | None
