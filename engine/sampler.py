"""From logits to tokens. Each request's choice is a function of its own row, seed and position only.

The random numbers of a request's n-th token come from a hash of (seed, n), so neither the batch around it nor
a preemption and recomputation can change it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.plan import Drawn, SampleSpec
from engine.protocol import SamplingParams, TokenLogprob

_FIRST_GUESS = 256  # how many of the best tokens are looked at before a full sort


def sample(logits: Tensor, specs: Sequence[SampleSpec]) -> list[Drawn]:
    """Draw one token a row; a row whose logits are not finite gets an error and harms no other.

    Args:
        logits: [N, vocab] float32
        specs: N of them, in the rows' order
    """
    finite = torch.isfinite(logits).all(-1).tolist()
    drawn: list[Drawn] = []
    greedy = logits.argmax(-1).tolist()
    for row, spec in enumerate(specs):
        if not finite[row]:
            drawn.append(
                Drawn(
                    error="the model's logits are not finite, so no token can be drawn from them",
                    nonfinite=True,
                )
            )
            continue
        token = greedy[row] if _is_plain_greedy(spec.params) else _draw(logits[row], spec)
        report = spec.params.logprobs
        logprob = None if report is None else token_logprob(logits[row], token, report)
        drawn.append(Drawn(token_id=token, logprob=logprob))
    return drawn


def token_logprob(logits: Tensor, token: int, alternatives: int) -> TokenLogprob:
    """Natural log-probability of `token` under the unmodified distribution of `logits` [vocab]."""
    return token_logprobs(logits.unsqueeze(0), [token], alternatives)[0]


def token_logprobs(logits: Tensor, tokens: Sequence[int], alternatives: int) -> list[TokenLogprob]:
    """The same of many rows at once, which waits for the device once and not at every token.

    Args:
        logits: [N, vocab] float32
        tokens: N token ids, one a row
        alternatives: how many of the likeliest tokens to report with each
    """
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device).unsqueeze(-1))
    ranks = ((logprobs > own).sum(-1) + 1).tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(tokens)
    if alternatives:
        values, ids = logprobs.topk(min(alternatives, logprobs.shape[-1]))
        tops = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    rows = zip(tokens, own.squeeze(-1).tolist(), ranks, tops, strict=True)
    return [TokenLogprob(token_id=t, logprob=value, rank=rank, top=top) for t, value, rank, top in rows]


def exponential_noise(seed: int, index: int, count: int) -> Tensor:
    """The request's random numbers for its `index`-th token: [count] float64 on the CPU, Exp(1)."""
    digest = hashlib.sha256(seed.to_bytes(8, "little") + index.to_bytes(8, "little")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, dtype=torch.float64, generator=generator).log_().neg_()


def _is_plain_greedy(params: SamplingParams) -> bool:
    return params.temperature == 0 and not _has_penalty(params) and not params.logit_bias


def _has_penalty(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)


def _draw(logits: Tensor, spec: SampleSpec) -> int:
    """One token from one row [vocab]: penalties, temperature, filters, then the race."""
    params = spec.params
    logits = penalised(logits, spec)
    if params.temperature == 0:
        return int(logits.argmax())
    probs = (logits / params.temperature).double().softmax(-1)
    keep = kept(probs, params)
    if keep is not None:
        probs = probs.where(keep, 0.0)
    # The exponential race (Gumbel-max): token i wins with probability p_i. Unlike the inverse of the CDF,
    # it hardly notices the last digits of the logits, which change with the batch around the row: only a
    # near tie for the win can flip, not each of the many edges between tokens.
    noise = exponential_noise(params.seed, spec.output_index, probs.shape[0])
    return int((probs / noise.to(probs.device)).argmax())


def penalised(logits: Tensor, spec: SampleSpec) -> Tensor:
    """Logit bias, then repetition (prompt and output), frequency and presence (output) penalties.

    Repetition penalty divides a positive logit and multiplies a negative one (Keskar et al.,
    arXiv 1909.05858); presence and frequency subtract (OpenAI's API reference).
    """
    params = spec.params
    if not params.logit_bias and not _has_penalty(params):
        return logits
    logits = logits.clone()
    for token, bias in params.logit_bias:
        logits[token] += bias
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(spec.history)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    generated = spec.history[spec.prompt_len :]
    if generated and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.unique(torch.tensor(generated, device=logits.device), return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts.float()
    return logits


def kept(probs: Tensor, params: SamplingParams) -> Tensor | None:
    """Which tokens top_k, top_p and min_p leave: [vocab] bool, or None for all.

    Applied one after the other, as vLLM does: top_k on all, top_p on the renormalised rest; min_p is
    relative to the best token, so its order does not matter. Equal probabilities at an edge all stay.
    """
    keep: Tensor | None = None
    if 0 < params.top_k < probs.shape[0]:
        keep = probs >= probs.topk(params.top_k).values[-1]
    if params.top_p < 1:
        left = probs if keep is None else probs.where(keep, 0.0)
        edge = _nucleus_edge(left, params.top_p * float(left.sum()))
        keep = (left >= edge) & (left > 0)
    if params.min_p > 0:
        enough = probs >= params.min_p * float(probs.max())
        keep = enough if keep is None else keep & enough
    return keep


def _nucleus_edge(probs: Tensor, mass: float) -> float:
    """The smallest probability in the smallest set of best tokens whose sum reaches `mass`."""
    count = min(_FIRST_GUESS, probs.shape[0])
    while True:
        best = probs.topk(count).values
        reached = (best.cumsum(-1) >= mass).nonzero()
        if reached.numel():
            return float(best[int(reached[0])])
        if count == probs.shape[0]:
            return -math.inf
        count = min(count * 16, probs.shape[0])
