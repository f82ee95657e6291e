"""Records of one request, which are filled while it is served. Logs and traces read them when it has ended."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from server.generation.choice import Finish, Job, TextDelta


@dataclass(slots=True)
class ChoiceRecord:
    """One choice, with moments in seconds on the monotonic clock.

    Attributes:
        prompt_tokens: tokens of its prompt; 0 if an earlier choice has the same prompt, which counts once.
        tokens: tokens given out so far.
        cached_tokens: prompt tokens that the engine reused; known at the end.
        queue_seconds: from submission to the first step; known with the first token.
        prefill_seconds: from the first step to the first token; known with the first token.
        ended: when its last token came.
        finish: how it ended; None if it was cut short.
        repeated_tokens: it ends in a loop of so many tokens; None: it does not.
    """

    prompt_tokens: int
    tokens: int = 0
    cached_tokens: int = 0
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    ended: float | None = None
    finish: Finish | None = None
    repeated_tokens: int | None = None


@dataclass(slots=True)
class GenerationRecord:
    """One generating request.

    Attributes:
        model: the name of the model that the client asked for, which is the one that answered.
        jobs: its choices as the engine got them.
        stream: whether the answer was streamed.
        submitted: when the engine got the request, in seconds on the monotonic clock.
        first_token: when the first token of any choice came, on the same clock.
    """

    model: str
    jobs: tuple[Job, ...]
    stream: bool
    submitted: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    choices: dict[int, ChoiceRecord] = field(init=False)

    def __post_init__(self) -> None:
        self.choices = {
            job.index: ChoiceRecord(0 if job.shares_prompt else len(job.submit.prompt_token_ids))
            for job in self.jobs
        }

    def take(self, delta: TextDelta, now: float) -> None:
        """Record a delta of one choice, which arrived at `now`."""
        choice = self.choices[delta.index]
        choice.tokens += len(delta.token_ids)
        if self.first_token is None and delta.token_ids:
            self.first_token = now
        if delta.stages is not None:
            choice.queue_seconds, choice.prefill_seconds = delta.stages
        if delta.usage is not None:
            choice.ended, choice.finish = now, delta.finish_reason
            choice.tokens = delta.usage.completion_tokens
            choice.repeated_tokens = delta.usage.repeated_tokens
            choice.cached_tokens = delta.usage.cached_tokens if choice.prompt_tokens else 0


@dataclass(frozen=True, slots=True)
class Ended:
    """One request of any endpoint, after its last byte.

    Attributes:
        request_id: made by the server.
        method: the HTTP method; `other` for one that is not standard.
        endpoint: the route's template; `other` if no route fits. It is never text that a client made up.
        status: the HTTP status; None if the client hung up before a response began.
        outcome: how it ended: a value of the label `outcome` of `dsa_requests_total`.
        started_ns: when it arrived, in nanoseconds since 1970.
        started: the same moment in seconds on the monotonic clock.
        seconds: how long it took.
        traceparent: the client's W3C trace context.
        tracestate: the second header of the same trace context.
        generation: what was generated; None if nothing was generated.
        key: the name of the caller's key; None if it was not let in.
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
    key: str | None = None
