"""Drafts from a draft layer: guesses of the tokens after a step, made once the step's own drafts are verified.

A draft is drawn from the draft layer's logits in the same way as the target will draw at that place: with the
request's own parameters and the random numbers of that output index (`engine.step.speculation` says why).

A page from the prefix cache was filled by another request, whose next page may begin with another token. So the
draft layer's entry in the page's last slot may come from that other token. This affects only guesses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate

import msgspec
import torch
from torch import Tensor

from engine.attention.batch import Batch, build_batch
from engine.config import PAGE_SIZE
from engine.memory.planes import PagedCache
from engine.models.family import DraftLayer
from engine.plan.tiles import TileCosts
from engine.plan.types import Sampled, SampleSpec, ScheduledRequest, StepPlan
from engine.step.sampler import Draw, sample
from engine.step.speculation import advanced


class LayerDrafter:
    """Fills the draft layer's cache for every row of a step, and guesses up to `count` tokens for each request."""

    def __init__(
        self, layer: DraftLayer, count: int, cache: PagedCache, costs: TileCosts, draw: Draw = sample
    ) -> None:
        self._draw = draw
        self._layer = layer
        self._count = count
        self._cache = cache
        self._costs = costs

    def propose(
        self, plan: StepPlan, batch: Batch, hidden: Tensor, results: Sequence[Sampled]
    ) -> list[Sampled]:
        """Return the results, each with its drafts.

        Args:
            plan: the step
            batch: the step's tensors
            hidden: [T, E], the main model's hidden states
            results: the drawn tokens, one result for each request
        """
        tokens = [_following(r, s) for r, s in zip(plan.requests, results, strict=True)]
        following = torch.tensor([t for own in tokens for t in own], device=self._layer.batch_device)
        ahead_by_one = dataclasses.replace(batch, token_ids=following)
        out = self._layer.forward(ahead_by_one, hidden, self._cache, self._costs)
        ends = accumulate(len(request.token_ids) for request in plan.requests)
        rows: list[_Row] = []
        states: list[int] = []
        for i, (request, one, end) in enumerate(zip(plan.requests, results, ends, strict=True)):
            if one.token_ids and request.sample is not None:
                last = len(request.token_ids) - request.num_drafts + len(one.token_ids) - 2
                rows.append(_Row(i, request, request.start + last, _quiet(request.sample, one.token_ids)))
                states.append(end - len(request.token_ids) + last)
        drafts: list[list[int]] = [[] for _ in plan.requests]
        hidden = out[states]
        for ahead in range(self._count):
            if not rows:
                break
            specs = [advanced(row.spec, drafts[row.index]) for row in rows]
            drawn = [one.token_id for one in self._draw(self._layer.logits(hidden), specs, None)]
            for row, token_id in zip(rows, drawn, strict=True):
                if token_id is not None:
                    drafts[row.index].append(token_id)
            # The next row's keys need a slot. If its page is not allocated yet, the request gets fewer drafts.
            on = [
                n
                for n, row in enumerate(rows)
                if drawn[n] is not None
                and (row.position + ahead + 1) // PAGE_SIZE < len(row.request.page_ids)
            ]
            rows, hidden = [rows[n] for n in on], hidden[on]
            if rows and ahead + 1 < self._count:
                further = StepPlan(
                    requests=tuple(_next(row, ahead + 1, drafts[row.index][-1]) for row in rows)
                )
                hidden = self._layer.forward(
                    build_batch(further, self._layer.batch_device), hidden, self._cache, self._costs
                )
        return [
            msgspec.structs.replace(one, draft_token_ids=tuple(own))
            for one, own in zip(results, drafts, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class _Row:
    """The last kept row of a request. It is at `position`, and predicts the token after the drawn tokens."""

    index: int  # the request's index in the plan
    request: ScheduledRequest
    position: int
    spec: SampleSpec


def _following(request: ScheduledRequest, one: Sampled) -> list[int]:
    """The token after each row's token. Rows of wrong drafts get 0; their cache entries are overwritten later."""
    known = request.token_ids[: len(request.token_ids) - request.num_drafts]
    after = one.token_ids or (() if request.next_token_id is None else (request.next_token_id,))
    tokens = [*known[1:], *after]
    return [*tokens, *([0] * (len(request.token_ids) - len(tokens)))]


def _quiet(spec: SampleSpec, token_ids: Sequence[int]) -> SampleSpec:
    """The spec after `token_ids`, without log-probabilities, which a draft does not need."""
    params = msgspec.structs.replace(spec.params, logprobs=None)
    return msgspec.structs.replace(advanced(spec, token_ids), params=params)


def _next(row: _Row, ahead: int, token_id: int) -> ScheduledRequest:
    return ScheduledRequest(
        request_id=row.request.request_id,
        token_ids=(token_id,),
        start=row.position + ahead,
        page_ids=row.request.page_ids,
        index_top_k=row.request.index_top_k,
        sample=None,
    )
