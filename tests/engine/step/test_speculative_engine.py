"""Speculation on a real (tiny) model: the same texts as without, and the same logits as transformers.

Random traffic, with drafts that are right, wrong, and right up to somewhere: prompt lookup on prompts that
repeat themselves, and an oracle that knows the text and errs now and then.
"""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.plan.types import StepPlan, StepResult
from engine.step.masking import TokenMasks
from engine.step.runner import AtOnce
from tests.engine.kit import VOCAB, Lab, Run, base_of, random_overlay, tiny_checkpoint

Requests = list[tuple[int, int, int | None, float, int]]


class Tiny:
    def __init__(self, folder: Path) -> None:
        self.model = tiny_checkpoint(folder)
        self.lab = Lab(folder, random_overlay(folder / "indexer.safetensors", base_of(folder)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


def prompt_of(stream: int, length: int) -> list[int]:
    """A few random tokens, over and over."""
    phrase = torch.randint(0, VOCAB, (7,), generator=torch.Generator().manual_seed(stream)).tolist()
    return [phrase[i % 7] for i in range(length)]


def play(run: Run, requests: Requests) -> Run:
    for number, (stream, length, index_top_k, temperature, pause) in enumerate(requests):
        run.submit(
            str(number), prompt_of(stream, length), 40, index_top_k,
            temperature=temperature, seed=number, presence_penalty=0.3 * (number % 2), logprobs=0,
        )  # fmt: skip
        for _ in range(pause):
            if run.core.has_work:
                run.step()
    return run.finish()


class Oracle(AtOnce):
    """A runner whose results propose what `texts` say comes next, wrong from a random place on."""

    def __init__(self, run: Run, texts: dict[str, list[int]], count: int) -> None:
        self._run, self._texts, self._count = run, texts, count
        self._random = random.Random(0)

    def run(self, plan: StepPlan, masks: TokenMasks | None = None) -> StepResult:
        sampled = []
        result = Run.run(self._run, plan, masks)
        for request, one in zip(plan.requests, result.sampled, strict=True):
            known = request.start + len(request.token_ids) - request.num_drafts + len(one.token_ids)
            drafts = self._texts[request.request_id][known : known + self._count]
            drafts = [(t + (self._random.random() < 0.25)) % VOCAB for t in drafts]
            sampled.append(msgspec.structs.replace(one, draft_token_ids=tuple(drafts)))
        return StepResult(sampled=tuple(sampled))


traffic = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from([1, 60, 63, 64, 100, 130]),
        st.sampled_from([None, 16, 64]),
        st.sampled_from([0.0, 0.0, 0.3, 1.0]),
        st.integers(0, 8),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=traffic, budget=st.integers(8, 100), pages=st.integers(6, 14), drafts=st.integers(1, 5),
    lookup=st.booleans(),
)  # fmt: skip
def test_texts_with_drafts_are_those_without(
    tiny: Tiny, requests: Requests, budget: int, pages: int, drafts: int, lookup: bool
) -> None:
    plain = play(tiny.lab.run(), requests)
    run = tiny.lab.run(pages=pages, budget=budget, running=8, draft_tokens=drafts, lookup=lookup)
    if not lookup:
        run.core._runner = Oracle(run, plain.tokens, drafts)
    play(run, requests)
    assert run.tokens == plain.tokens
    with torch.no_grad():
        for number, (_, _, index_top_k, _, _) in enumerate(requests):
            if index_top_k is None:
                name = str(number)
                reference = tiny.model(torch.tensor([run.tokens[name]])).logits[0]
                assert run.error(name, reference) < 2e-5


def test_drafts_that_hold_save_steps(tiny: Tiny) -> None:
    requests: Requests = [(0, 100, None, 0.0, 0), (1, 90, 16, 0.0, 0)]
    plain = play(tiny.lab.run(), requests)
    run = tiny.lab.run(draft_tokens=4)
    run.core._runner = Oracle(run, plain.tokens, 4)
    play(run, requests)
    assert run.tokens == plain.tokens
    lengths = run.core.stats().draft_lengths_total
    assert lengths[0] > 0  # both outcomes occurred
    assert sum(lengths[1:]) > 10
    assert run.core.stats().steps_total < 0.6 * plain.core.stats().steps_total


def test_lookup_saves_steps_where_a_text_repeats_itself(tiny: Tiny) -> None:
    run = tiny.lab.run(draft_tokens=4, lookup=True)
    run.submit("a", prompt_of(0, 20), 40, temperature=1.0, logit_bias=((5, 100.0),))
    run.finish()
    assert run.tokens["a"][20:] == [5] * 40
    assert run.core.stats().steps_total < 15
