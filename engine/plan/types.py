"""One step's work, as integers: what the scheduler decides, the runner runs and the scheduler applies.

Token-major and without phases: a request has computed `start` tokens and gets `token_ids` more, be
that a chunk of its prompt or the one token that it sampled last. Drafts may follow the last token that is
known: guesses of the tokens to come, which the step verifies (`engine.step.speculation`).
"""

from __future__ import annotations

import msgspec

from engine.protocol import IndexTopK, SamplingParams, TokenLogprob


class SampleSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Draw one token from the logits of one row: of a scheduled request's last known token, or of a draft."""

    params: SamplingParams
    output_index: int  # how many tokens this request has generated before: the random stream's position
    prompt_len: int
    history: tuple[int, ...]  # prompt and output so far; empty unless a penalty needs it


class ScheduledRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of one request in one step: positions `start` to `start + len(token_ids) - 1`."""

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    page_ids: tuple[int, ...]  # page i holds positions [64 i, 64 i + 64); covers every row of this step
    index_top_k: IndexTopK
    sample: SampleSpec | None  # None: a chunk that does not reach the end of the known tokens
    num_drafts: int = 0  # the last of `token_ids` are drafts; only where `sample` is set
    next_token_id: int | None = None  # the known token after the last row, where there is one
    prompt_targets: tuple[int, ...] = ()  # next known token of each row, where its logprob is asked for
    prompt_alternatives: int = 0  # how many alternatives to report with each of them

    @property
    def drafts(self) -> tuple[int, ...]:
        """The last `num_drafts` of `token_ids`."""
        return self.token_ids[len(self.token_ids) - self.num_drafts :]


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A step: never empty, each request in it once."""

    requests: tuple[ScheduledRequest, ...]
    wiped_pages: tuple[int, ...] = ()
    """To be zeroed first. A faulty request may have left not-a-number there, and the next owner's masked
    positions are multiplied by 0, which does not make that a 0."""

    @property
    def num_tokens(self) -> int:
        """Rows of the step's batch, over all requests."""
        return sum(len(request.token_ids) for request in self.requests)


class Drawn(msgspec.Struct, frozen=True, kw_only=True):
    """What the sampler drew from one row: a token, or an error."""

    token_id: int | None = None
    logprob: TokenLogprob | None = None  # if asked for
    error: str | None = None
    nonfinite: bool = False  # with an error: the logits were not finite


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """What a step gave one scheduled request."""

    token_ids: tuple[int, ...] = ()  # exactly where it had a `sample`: the drafts that held, and one more
    logprobs: tuple[TokenLogprob, ...] = ()  # one a token, if asked for
    draft_token_ids: tuple[int, ...] = ()  # the runner's guess of what follows them, for the next step
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # one a prompt target
    error: str | None = None  # this request alone failed (its logits are not finite, say)
    nonfinite: bool = False  # with an error: the logits were not finite


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """One `Sampled` a scheduled request, in the plan's order."""

    sampled: tuple[Sampled, ...]
