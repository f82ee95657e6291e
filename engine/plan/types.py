"""One step's work, as integers. The scheduler decides a plan, the runner computes it, the scheduler applies the result.

The garbage collector need not look at these structs (`gc=False`): none of them can be part of a circle.

There are no phases: a request has computed `start` tokens and gets `token_ids` more, which are a chunk of its prompt
or the token that it sampled last. Drafts may follow the last known token: guesses of the next tokens, which the step
verifies (`engine.step.speculation`).
"""

from __future__ import annotations

import math

import msgspec

from engine.protocol import IndexTopK, SamplingParams, TokenLogprob

PENDING = -1
"""In place of a token id: the token that the step before draws for this request. The runner knows it, the plan does not."""


class SampleSpec(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How to draw a token from the logits of a row, which is a request's last known token or a draft."""

    params: SamplingParams
    output_index: int  # how many tokens the request has generated; it is the position in the random stream
    prompt_len: int
    history: tuple[int, ...]  # prompt and output as far as they are known; empty unless a penalty needs it

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """(token id, what is added to its logit); a stop token gets -inf while the answer may not end."""
        params = self.params
        if self.output_index >= params.min_tokens:
            return params.logit_bias
        return (*params.logit_bias, *((token_id, -math.inf) for token_id in params.stop_token_ids))


class ScheduledRequest(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The rows of one request in one step: positions `start` to `start + len(token_ids) - 1`."""

    request_id: str
    token_ids: tuple[int, ...]  # the last may be `PENDING`, if the step before is in flight
    start: int
    page_ids: tuple[int, ...]  # page i holds positions [64 i, 64 i + 64); they cover every row of this step
    index_top_k: IndexTopK
    sample: SampleSpec | None  # None: the rows do not reach the end of the known tokens
    num_drafts: int = 0  # so many of the last `token_ids` are drafts; above 0 only if `sample` is set
    next_token_id: int | None = None  # the known token after the last row, if there is one
    prompt_targets: tuple[int, ...] = ()  # for each row whose next token's logprob is asked for: that token
    prompt_alternatives: int = 0  # how many alternatives to report with each target's logprob

    @property
    def drafts(self) -> tuple[int, ...]:
        """The last `num_drafts` of `token_ids`."""
        return self.token_ids[len(self.token_ids) - self.num_drafts :]

    @property
    def is_decode(self) -> bool:
        """Whether it is one row, which is sampled from."""
        return len(self.token_ids) == 1 and self.sample is not None


class StepPlan(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The work of one step: at least one request, and each request once."""

    requests: tuple[ScheduledRequest, ...]
    wiped_pages: tuple[int, ...] = ()
    """The step zeroes these pages first. A faulty request may have left not-a-number in them. The next owner's masked
    positions are multiplied by 0, and 0 times not-a-number is not 0."""

    @property
    def num_tokens(self) -> int:
        """Rows of the step's batch, over all requests."""
        return sum(len(request.token_ids) for request in self.requests)


class Drawn(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the sampler drew from one row: a token, or an error."""

    token_id: int | None = None
    logprob: TokenLogprob | None = None  # if asked for
    error: str | None = None
    nonfinite: bool = False  # with an error: the logits were not finite


class Sampled(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The result of one scheduled request in a step."""

    token_ids: tuple[int, ...] = ()  # with a `sample`: the accepted drafts and one more token; else empty
    logprobs: tuple[TokenLogprob, ...] = ()  # one for each token, if asked for
    draft_token_ids: tuple[int, ...] = ()  # the runner's drafts for the next step
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # one for each prompt target
    error: str | None = None  # only this request failed, for example because its logits are not finite
    nonfinite: bool = False  # with an error: the logits were not finite
    flaws: int = 0  # with an error: bits, in the order of `engine.protocol.SELECTION_FLAWS`


class StepResult(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One `Sampled` for each scheduled request, in the plan's order."""

    sampled: tuple[Sampled, ...]
