"""Speculative decoding: which drafts hold. Plain integers; the numbers are the sampler's.

A step computes the rows of a request's last known token and of its drafts d_1 .. d_k together. Row i gives
the target distribution p_i, after penalties, temperature and filters, of the i-th new token, provided that
d_1 .. d_i are the tokens before it. The rule: draw a token from every row exactly as if there were no drafts,
with the random numbers of its own output index, and keep the drawn tokens up to and including the first that
is not the draft at its place (all k + 1 if none is).

Exactness. A kept token was drawn from a row whose context is the kept tokens before it, by the same function
of (logits, seed, output index) that draws it without speculation. So the text is the same, token for token,
and with it its distribution; greedy is the special case of a point mass. Nothing is asked of the drafter:
how it guesses can change how many tokens a step keeps, never which.

The price, against rejection sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).
That accepts a draft x ~ q with probability min(1, p(x) / q(x)), else draws from the residual
max(0, p - q) / (1 - sum_x min(p, q)), and so accepts with probability sum_x min(p(x), q(x)) = 1 - TV(p, q),
the most that is possible. Where the draft is a fixed token d (prompt lookup, or a greedy draft layer), q is a
point mass and that is p(d): the probability that our draw is d. Nothing is lost. Where the drafter
draws from its own q, it does so in the same exponential race, with the same numbers as the target will: this
is the Gumbel coupling of Daliri, Musco and Suresh (arXiv 2408.07978), which accepts with probability

    sum_x 1 / sum_y max(p(y) / p(x), q(y) / q(x))  >=  (1 - TV) / (1 + TV),

less than 1 - TV by at most TV (1 - TV) / (1 + TV). Rejection sampling would take back that difference, and
pay with texts that depend on the drafter, on the step at which a draft was cut for want of room, and so on
the company: the property that this server keeps is worth more.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from engine.plan.types import Drawn, Sampled, SampleSpec, ScheduledRequest


def row_specs(request: ScheduledRequest) -> tuple[SampleSpec, ...]:
    """How to draw from each row that is drawn from: the last known token's, then each draft's.

    None if the request has no `sample`. Row i sees the drafts before it as history.
    """
    if request.sample is None:
        return ()
    return tuple(advanced(request.sample, request.drafts[:i]) for i in range(request.num_drafts + 1))


def advanced(spec: SampleSpec, token_ids: Sequence[int]) -> SampleSpec:
    """The spec of the token that comes after `token_ids` more."""
    if not token_ids:
        return spec
    return msgspec.structs.replace(
        spec,
        output_index=spec.output_index + len(token_ids),
        history=(*spec.history, *token_ids) if spec.history else (),
    )


def verify(request: ScheduledRequest, drawn: Sequence[Drawn]) -> Sampled:
    """Keep the drafts that equal what was drawn, and the token after them.

    Args:
        request: what was scheduled
        drawn: one a row of `row_specs`

    A row that failed ends what is kept. Only if it is the first does the request fail: otherwise its token
    is kept, and computing it again in the next step will tell.
    """
    kept: list[Drawn] = []
    for i, one in enumerate(drawn):
        if one.token_id is None:
            break
        kept.append(one)
        if i == request.num_drafts or one.token_id != request.drafts[i]:
            break
    if drawn and not kept:
        return Sampled(error=drawn[0].error, nonfinite=drawn[0].nonfinite)
    return Sampled(
        token_ids=tuple(one.token_id for one in kept if one.token_id is not None),
        logprobs=tuple(one.logprob for one in kept if one.logprob is not None),
    )
