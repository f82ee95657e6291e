"""Acceptance is exact: the text and the distribution are those of drawing one token at a time.

The model here is a table: the logits of the next token given the last two. So the exact probability of every
text is a product of softmaxes, and a draw costs nothing.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from engine.plan.types import Drawn, SampleSpec, ScheduledRequest
from engine.protocol import SamplingParams, TokenLogprob
from engine.step.sampler import sample
from engine.step.speculation import row_specs, verify

VOCAB = 3
LOGITS = torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(5)) * 1.2
DRAFTER = LOGITS + torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(6)) * 0.7
PROMPT = (0, 1)


def scheduled(known: tuple[int, ...], drafts: tuple[int, ...], params: SamplingParams) -> ScheduledRequest:
    return ScheduledRequest(
        request_id="r",
        token_ids=(known[-1], *drafts),
        num_drafts=len(drafts),
        start=len(known) - 1,
        page_ids=(0,),
        index_top_k=None,
        sample=SampleSpec(
            params=params, output_index=len(known) - len(PROMPT), prompt_len=len(PROMPT), history=known
        ),
    )


def rows(known: tuple[int, ...], drafts: tuple[int, ...], table: Tensor = LOGITS) -> Tensor:
    """[1 + drafts, vocab]: each row's logits, given the tokens up to it."""
    text = (*known, *drafts)
    ends = range(len(known), len(text) + 1)
    return torch.stack([table[text[end - 2], text[end - 1]] for end in ends])


def guesses(drafter: str, known: tuple[int, ...], params: SamplingParams, count: int) -> tuple[int, ...]:
    """`count` drafts: always the same, the drafter's greedy ones, or drawn in the target's own race."""
    drafts: tuple[int, ...] = ()
    for _ in range(count):
        logits = rows(known, drafts, DRAFTER)[-1:]
        if drafter == "fixed":
            drafts += (2,)
        elif drafter == "greedy":
            drafts += (int(logits.argmax()),)
        else:
            (drawn,) = sample(logits, [row_specs(scheduled(known, drafts, params))[-1]])
            assert drawn.token_id is not None
            drafts += (drawn.token_id,)
    return drafts


def generate(
    params: SamplingParams, length: int, drafter: str = "off", count: int = 2
) -> tuple[tuple[int, ...], list[int]]:
    """The first `length` tokens, and how many drafts held in each step."""
    known: tuple[int, ...] = PROMPT
    held: list[int] = []
    while len(known) < len(PROMPT) + length:
        drafts = () if drafter == "off" else guesses(drafter, known, params, count)
        request = scheduled(known, drafts, params)
        result = verify(request, sample(rows(known, drafts), row_specs(request)))
        known += result.token_ids
        held.append(len(result.token_ids) - 1)
    return known[len(PROMPT) :][:length], held


PARAMS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 2, "repetition_penalty": 1.3},
    {"temperature": 1.0, "presence_penalty": 0.7, "frequency_penalty": 0.4, "logit_bias": ((1, -0.5),)},
    {"temperature": 0.0, "frequency_penalty": 0.9},
]


@pytest.mark.parametrize("drafter", ["fixed", "greedy", "race"])
@pytest.mark.parametrize("fields", PARAMS)
def test_the_text_is_the_one_without_drafts(fields: dict[str, object], drafter: str) -> None:
    held: list[int] = []
    for seed in range(15):
        params = SamplingParams(max_tokens=30, seed=seed, **fields)  # type: ignore[arg-type]
        for count in (1, 4):
            text, lengths = generate(params, 30, drafter, count)
            assert text == generate(params, 30)[0]
            held += lengths
    if len(fields) > 1 or fields["temperature"]:  # greedy alone soon goes round in a circle here
        assert 0 in held
        assert max(held) > 0


@pytest.mark.parametrize("drafter", ["fixed", "race"])
def test_texts_follow_the_exact_distribution(drafter: str) -> None:
    """Chi-square over all 27 texts of three tokens; seeds are fixed, so this never flakes."""
    seeds = 4000
    seen = Counter(
        generate(SamplingParams(max_tokens=3, seed=seed, temperature=0.9), 3, drafter)[0]
        for seed in range(seeds)
    )
    probs = (LOGITS.double() / 0.9).softmax(-1)
    chi_square = 0.0
    for text in itertools.product(range(VOCAB), repeat=3):
        whole = (*PROMPT, *text)
        p = 1.0
        for i in range(3):
            p *= float(probs[whole[i], whole[i + 1], whole[i + 2]])
        chi_square += (seen[text] - seeds * p) ** 2 / (seeds * p)
    assert chi_square < 54.05  # p = 0.001 at 26 degrees of freedom


def test_acceptance_is_what_the_formulas_say() -> None:
    """p(d) for a fixed draft; the Gumbel coupling's for one drawn in the same race. Within 4 sigma."""
    p, q = LOGITS[PROMPT].double().softmax(-1), DRAFTER[PROMPT].double().softmax(-1)
    ratios = torch.maximum(p / p.unsqueeze(1), q / q.unsqueeze(1))  # [x, y] = max(p_y / p_x, q_y / q_x)
    coupled = float((1 / ratios.sum(1)).sum())
    distance = float((p - q).abs().sum()) / 2
    assert (1 - distance) / (1 + distance) - 1e-12 <= coupled <= 1 - distance
    for drafter, expected in (("fixed", float(p[2])), ("race", coupled)):
        seeds = 3000
        accepted = sum(
            generate(SamplingParams(max_tokens=1, seed=seed), 1, drafter, 1)[1][0] for seed in range(seeds)
        )
        assert abs(accepted / seeds - expected) < 4 * (expected * (1 - expected) / seeds) ** 0.5


def test_each_kept_token_brings_its_logprob_and_a_late_fault_waits_for_its_turn() -> None:
    params = SamplingParams(max_tokens=9, seed=0, logprobs=0)
    entries = [TokenLogprob(token_id=i, logprob=-float(i), rank=1, top=()) for i in range(3)]
    drawn = [Drawn(token_id=i, logprob=entries[i]) for i in (1, 2, 0)]
    kept = verify(scheduled(PROMPT, (1, 1), params), drawn)
    assert (kept.token_ids, kept.logprobs) == ((1, 2), (entries[1], entries[2]))
    fault = Drawn(error="not finite")
    late = verify(scheduled(PROMPT, (1, 2), params), [drawn[0], fault, drawn[2]])
    assert (late.token_ids, late.error) == ((1,), None)
    assert verify(scheduled(PROMPT, (1, 2), params), [fault, *drawn[1:]]).error == "not finite"
