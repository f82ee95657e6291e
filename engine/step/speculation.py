"""Speculative decoding: decides which drafts are kept. It compares token ids; `engine.step.sampler` draws them.

A step computes the rows of a request's last known token and of its drafts d_1 .. d_k together. Row i gives
the target distribution p_i of the i-th new token, after penalties, temperature and filters, provided that
d_1 .. d_i are the tokens before it. The rule: draw a token from every row exactly as if there were no drafts,
with the random numbers of its own output index. Keep the drawn tokens up to and including the first that
differs from the draft at its place (all k + 1 if none differs).

Exactness. A kept token was drawn from a row whose context is the kept tokens before it, by the same function
of (logits, seed, output index) that draws it without speculation. So the text is the same, token for token,
and so is its distribution; greedy decoding is the special case of a point mass. The drafter may guess in any
way: its guesses change how many tokens a step keeps, never which tokens.

The price, compared with rejection sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).
Rejection sampling accepts a draft x ~ q with probability min(1, p(x) / q(x)), else draws from the residual
max(0, p - q) / (1 - sum_x min(p, q)). So it accepts with probability sum_x min(p(x), q(x)) = 1 - TV(p, q),
which is the largest possible. If the draft is a fixed token d (prompt lookup, or a greedy draft layer), q is a
point mass and this probability is p(d), the probability that our draw is d. Nothing is lost. If the drafter
draws from its own q, it uses the same exponential race with the same numbers as the target will use. This
is the Gumbel coupling of Daliri, Musco and Suresh (arXiv 2408.07978), which accepts with probability

    sum_x 1 / sum_y max(p(y) / p(x), q(y) / q(x))  >=  (1 - TV) / (1 + TV),

less than 1 - TV by at most TV (1 - TV) / (1 + TV). Rejection sampling would gain this difference. But its texts
would depend on the drafter and on the step at which a draft was cut because there was no room, and so on the
other requests in the batch. This server's texts do not, and that is worth more.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from engine.plan.types import Drawn, Sampled, SampleSpec, ScheduledRequest


def row_specs(request: ScheduledRequest) -> tuple[SampleSpec, ...]:
    """How to draw from the rows of a request: first the last known token's row, then each draft's.

    The result is empty if the request has no `sample`. Row i has the drafts before it in its history.
    """
    if request.sample is None:
        return ()
    return tuple(advanced(request.sample, request.drafts[:i]) for i in range(request.num_drafts + 1))


def advanced(spec: SampleSpec, token_ids: Sequence[int]) -> SampleSpec:
    """The spec of the next token, if `token_ids` are the tokens drawn from the place of `spec` on."""
    if not token_ids:
        return spec
    return msgspec.structs.replace(
        spec,
        output_index=spec.output_index + len(token_ids),
        history=(*spec.history, *token_ids) if spec.history else (),
    )


def verify(request: ScheduledRequest, drawn: Sequence[Drawn]) -> Sampled:
    """Keep the drawn tokens that equal the drafts, and the token after them.

    A row that failed ends the kept tokens. The request fails only if its first row failed. Otherwise the next
    step computes the failed row again.

    Args:
        request: the scheduled request
        drawn: one for each row of `row_specs`
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
