"""Draws tokens from logits. The token of a request depends only on its own row, seed and position.

The random numbers of a request's n-th token come from a hash of (seed, n). So neither the batch around the request
nor a preemption with recomputation can change the token. Tokens are drawn on the CPU, because few tokens of a row
remain after its filters, and work on short arrays is cheaper there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.grammar import MaskWords
from engine.plan.types import Drawn, SampleSpec
from engine.protocol import TokenLogprob, has_penalty
from engine.step.filters import runners, weights_of
from engine.step.foresight import foresee
from engine.step.masking import TokenMasks
from engine.step.race import race

_LOGIT_ROWS = 64  # rows of prompt logits held at once: 64 x 49152 float32 is 12 MiB

Draw = Callable[[Tensor, Sequence[SampleSpec], TokenMasks | None], list[Drawn]]
"""Draws a token from each row of logits [N, vocab], as `sample` does."""

LogitRow = NDArray[np.float32]
"""[vocab]"""


def sample(logits: Tensor, specs: Sequence[SampleSpec], masks: TokenMasks | None = None) -> list[Drawn]:
    """Draw one token from each row. A row whose logits are not finite gets an error; other rows are not affected.

    Args:
        logits: [N, vocab] float32
        specs: how to draw, one for each row, in the same order
        masks: of the rows: which tokens may be drawn. Log-probabilities are those without a mask
    """
    tokens, finite = best_tokens(logits)
    unsure: list[int] = []  # rows that only a late mask tells the token of
    for row, spec in enumerate(specs):
        if not finite[row]:
            continue
        if masks is not None and (allows := masks.rule(row)) is not None:
            token = foresee(penalised(logits[row].cpu().numpy(), spec), spec, allows)
            if token is None:
                unsure.append(row)
            else:
                tokens[row] = token
            continue
        mask = None if masks is None else masks.words_of(row)
        if mask is not None or not _is_plain_greedy(spec):
            tokens[row] = _draw(logits[row].cpu().numpy(), spec, mask)
    failed: dict[int, str] = {}
    if masks is not None and unsure:
        masks, failed = masks.computed(unsure)
        for row in unsure:
            if row not in failed:
                tokens[row] = _draw(logits[row].cpu().numpy(), specs[row], masks.words_of(row))
    reported: dict[tuple[int, tuple[int, ...]], list[int]] = {}  # rows by what alternatives they report
    for row, spec in enumerate(specs):
        if finite[row] and spec.params.logprobs is not None:
            asked = (spec.params.logprobs, spec.params.logprob_token_ids)
            reported.setdefault(asked, []).append(row)
    logprobs: dict[int, TokenLogprob] = {}
    for (alternatives, given), rows in reported.items():
        own = token_logprobs(logits[rows], [tokens[row] for row in rows], alternatives, given)
        logprobs.update(zip(rows, own, strict=True))
    return [
        Drawn(error=failed[row])
        if row in failed
        else (Drawn(token_id=token, logprob=logprobs.get(row)) if good else NOT_FINITE)
        for row, (token, good) in enumerate(zip(tokens, finite, strict=True))
    ]


NOT_FINITE = Drawn(
    error="the model's logits are not finite, so no token can be drawn from them", nonfinite=True
)


def best_tokens(logits: Tensor) -> tuple[list[int], list[bool]]:
    """For each row of `logits` [N, vocab]: the first token with the largest logit, and whether all are finite.

    On a CPU this uses NumPy, whose argmax and min are vectorised. Both return a not-a-number if there is one. So if
    the largest and the smallest number are finite, all are.
    """
    if logits.device.type != "cpu":
        return best_tokens_by_sum(logits)
    tokens: list[int] = []
    finite: list[bool] = []
    for row in logits.numpy():
        token = int(row.argmax())
        tokens.append(token)
        finite.append(math.isfinite(row[token]) and math.isfinite(row.min()))
    return tokens, finite


def best_tokens_by_sum(logits: Tensor) -> tuple[list[int], list[bool]]:
    """Return the same as `best_tokens`, on any device.

    If the sum of a row is finite, all its logits are. If it is not, it may only be too large, so all are checked.
    """
    finite: list[bool] = torch.isfinite(logits.sum(-1)).tolist()
    if not all(finite):
        finite = torch.isfinite(logits).all(-1).tolist()
    tokens: list[int] = logits.argmax(-1).tolist()
    return tokens, finite


def token_logprob(logits: Tensor, token: int, alternatives: int) -> TokenLogprob:
    """The log-probability (nats) of `token` in the unmodified distribution of `logits` [vocab]."""
    return token_logprobs(logits.unsqueeze(0), [token], alternatives)[0]


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], alternatives: int, given: Sequence[int] = ()
) -> list[TokenLogprob]:
    """The log-probabilities (nats) of one token in each row. It waits once for the device, not for every token.

    Args:
        logits: [N, vocab] float32
        tokens: N token ids, one for each row
        alternatives: how many of the likeliest tokens to report with each
        given: report these token ids in place of them
    """
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device).unsqueeze(-1))
    ranks = ((logprobs > own).sum(-1, dtype=torch.int32) + 1).tolist()  # as int64 it takes twice as long
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(tokens)
    if given:
        tops = [tuple(zip(given, row, strict=True)) for row in logprobs[:, list(given)].tolist()]
    elif alternatives:
        values, ids = logprobs.topk(min(alternatives, logprobs.shape[-1]))
        tops = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    rows = zip(tokens, own.squeeze(-1).tolist(), ranks, tops, strict=True)
    return [TokenLogprob(token_id=t, logprob=value, rank=rank, top=top) for t, value, rank, top in rows]


def prompt_logprobs(
    logits_of: Callable[[Tensor], Tensor], rows: Tensor, targets: Sequence[int], alternatives: int
) -> tuple[TokenLogprob, ...]:
    """The log-probabilities (nats) of known next tokens, in parts, so that few logits are held at once.

    Args:
        logits_of: [n, E] -> [n, vocab] float32
        rows: [N, E] hidden states
        targets: N token ids, the one after each row
        alternatives: how many of the likeliest tokens to report with each
    """
    scored: list[TokenLogprob] = []
    for start in range(0, len(targets), _LOGIT_ROWS):
        end = start + _LOGIT_ROWS
        scored.extend(token_logprobs(logits_of(rows[start:end]), targets[start:end], alternatives))
    return tuple(scored)


def _is_plain_greedy(spec: SampleSpec) -> bool:
    return spec.params.temperature == 0 and not has_penalty(spec.params) and not spec.biases


def _draw(logits: LogitRow, spec: SampleSpec, mask: MaskWords | None) -> int:
    """Draw one token from one row: penalties, mask, temperature, filters, then the race."""
    params = spec.params
    logits = penalised(logits, spec)
    vocab_size, token_ids = len(logits), None
    if mask is not None:
        logits, token_ids = _allowed(logits, mask)
    if params.temperature == 0:
        best = int(logits.argmax())
        return best if token_ids is None else int(token_ids[best])
    weights = weights_of(logits, params.temperature)
    places, rest = runners(weights, params, vocab_size)
    return race(weights, places, rest, params.seed, spec.output_index, token_ids)


def _allowed(logits: LogitRow, mask: MaskWords) -> tuple[LogitRow, NDArray[np.int64] | None]:
    """The logits of the tokens that a mask allows, with their ids; if it allows many, all logits, and those of the others are -inf."""
    allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(logits)].view(np.bool_)
    if _FEW * np.count_nonzero(allowed) <= len(logits):
        token_ids = np.flatnonzero(allowed)
        return logits[token_ids], token_ids
    biases: LogitRow = np.take(_BIASES, mask.view(np.uint8), axis=0)
    return logits + biases.reshape(-1)[: len(logits)], None


_FEW = 8
"""If a mask allows no more than one in so many tokens, these are drawn from alone."""

_BIASES = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, np.float32(0), np.float32(-np.inf))
"""[256, 8]: what to add to the logits of a mask's 8 tokens, by its byte. Four times as fast as to select by the bits."""


def penalised(logits: LogitRow, spec: SampleSpec) -> LogitRow:
    """Apply the logit bias, then the penalties: repetition (prompt and output), frequency and presence (output).

    The repetition penalty divides a positive logit and multiplies a negative one (Keskar et al.,
    arXiv 1909.05858). The presence and frequency penalties are subtracted (OpenAI's API reference).
    """
    params, biases = spec.params, spec.biases
    if not biases and not has_penalty(params):
        return logits
    logits = logits.copy()
    for token, bias in biases:
        logits[token] += bias
    if params.repetition_penalty != 1:
        seen = np.unique(np.array(spec.history, dtype=np.int64))
        values, by = logits[seen], np.float32(params.repetition_penalty)
        logits[seen] = np.where(values > 0, values / by, values * by)
    generated = spec.history[spec.prompt_len :]
    if generated and (params.presence_penalty or params.frequency_penalty):
        ids, counts = np.unique(np.array(generated, dtype=np.int64), return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
    return logits
