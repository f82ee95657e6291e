"""Checks short contexts: while prompt and answer fit into top_k, sparse equals dense to the last digit.

Requests are sent one at a time, so that both are computed in the same steps. They ask for the prompt's
log-probabilities, because then the server takes nothing from the prefix cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from lab.evaluate.client import Client, PartProgress, each
from lab.evaluate.material import HeldOut
from lab.evaluate.verdict import Verdict, at_least

ANSWER_TOKENS = 32
CASES = 12


class EqualityCase(msgspec.Struct, frozen=True, kw_only=True):
    """The comparison of one text, cut to `prompt_tokens`."""

    top_k: int
    kind: str
    start: int
    prompt_tokens: int
    answer_tokens: int
    equal: bool
    largest_difference: float | None  # of the log-probabilities, nats; None if the tokens differ


class EqualityResult(msgspec.Struct, frozen=True, kw_only=True):
    """The entry of equality in eval.json."""

    cases: list[EqualityCase]


async def measure(
    client: Client,
    texts: Sequence[HeldOut],
    index_top_ks: Sequence[int],
    progress: PartProgress,
    *,
    cases: int = CASES,
    answer_tokens: int = ANSWER_TOKENS,
) -> EqualityResult:
    """Continue the beginnings of texts. Each top_k has `cases` of them, with lengths up to top_k."""
    todo = []
    for index_top_k in index_top_ks:
        longest = min(index_top_k, client.max_model_len) - answer_tokens
        for number in range(cases):
            length = longest * (number + 1) // cases
            usable = [text for text in texts if len(text.ids) >= length]
            if length > 0 and usable:
                todo.append((index_top_k, usable[number % len(usable)], length))

    async def one(item: tuple[int, HeldOut, int]) -> EqualityCase:
        index_top_k, text, length = item
        dense = await client.raw(text.ids[:length], "dense", answer_tokens)
        sparse = await client.raw(text.ids[:length], index_top_k, answer_tokens)
        return EqualityCase(
            top_k=index_top_k,
            kind=text.kind,
            start=text.start,
            prompt_tokens=length,
            answer_tokens=answer_tokens,
            equal=dense == sparse,
            largest_difference=difference(dense["logprobs"], sparse["logprobs"]),
        )

    return EqualityResult(cases=await each(todo, one, 1, progress))


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """Return the largest difference between two lists of log-probabilities, nats; None if the tokens differ."""
    if one["tokens"] != other["tokens"]:
        return None
    pairs = zip(one["token_logprobs"], other["token_logprobs"], strict=True)
    return max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=0.0)


def verdicts(result: EqualityResult, index_top_ks: Sequence[int]) -> list[Verdict]:
    """Judge each top_k: every case must be equal."""
    made = []
    for index_top_k in index_top_ks:
        own = [case.equal for case in result.cases if case.top_k == index_top_k]
        made.append(
            at_least(
                f"equal where all fits into top_k {index_top_k}", sum(own) / len(own) if own else None, 1.0
            )
        )
    return made
