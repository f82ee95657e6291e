"""Masks that are computed only when a draw needs them: the same answers, and who takes too long ends alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from engine.grammar import MaskWords
from engine.plan.types import SampleSpec
from engine.protocol import Delta, Grammar, SamplingParams, Submit
from engine.step import masking
from engine.step.grammars import Grammars
from engine.step.masking import Masking
from engine.step.sampler import sample
from tests.engine.grammars import SIZE, THOUGHT, VOCABULARY, schema_grammar
from tests.engine.kit import Lab
from tests.engine.step.test_masking import BIAS, Slow, ask, lab, plan_of, run_of
from tests.schemas import random_schema

__all__ = ["lab"]


def test_masks_that_are_late_say_the_same(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner on a CPU asks for few masks, and draws what it draws if all are computed before."""
    computed: list[int] = []
    compute = Masking.compute

    def counted(self: Masking, answers: Sequence[Any]) -> list[MaskWords | str]:
        computed.append(len(answers))
        return compute(self, answers)

    monkeypatch.setattr(Masking, "compute", counted)
    early, late = run_of(lab, running=12), run_of(lab, running=12, late_masks=True)
    for run in (early, late):
        for n in range(60):
            wishes: dict[str, Any] = [
                {},
                {"temperature": 0.0},
                {"top_k": 20, "top_p": 0.9},
                {"frequency_penalty": 0.5, "logprobs": 1},
                {"min_tokens": 5, "top_p": 0.8},
            ][n % 5]
            after = (THOUGHT,) if n % 7 == 0 else ()
            grammar = None if n % 11 == 0 else schema_grammar(random_schema(n), after=after)
            bias = (*BIAS, (THOUGHT, 6.0))
            ask(run, str(n), grammar, seed=n, max_tokens=60, logit_bias=bias, **wishes)
        run.finish()
    assert late.tokens == early.tokens
    assert {name: end.finish_reason for name, end in late.ends.items()} == {
        name: end.finish_reason for name, end in early.ends.items()
    }
    drawn = sum(len(tokens) - 3 for tokens in late.tokens.values())
    assert 0 < sum(computed) < 0.9 * drawn, "a random model wants what may not come"


def test_a_late_mask_that_takes_too_long_fails_its_request_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(masking, "DEADLINE_SECONDS", 1.0)
    live = Masking()
    spec = SampleSpec(params=SamplingParams(max_tokens=9, seed=0), output_index=0, prompt_len=1, history=())
    quick = Grammars(VOCABULARY, SIZE)
    grammar = schema_grammar({"enum": [1]})
    submit = Submit(
        request_id="r", prompt_token_ids=(1,), sampling=spec.params, index_top_k=None, grammar=grammar
    )
    for name in ("slow", "quick"):
        matcher = quick.compile(submit).matcher
        assert matcher is not None
        live.open(name, grammar, Slow(sleep=4.0) if name == "slow" else matcher)
    masks, failed = live.masks(plan_of("slow", "free", "quick"), late=True)
    assert not failed
    assert masks is not None
    logits = torch.zeros(3, SIZE)
    logits[:, 200:240] = 9.0
    slow, free, fast = sample(logits, [spec] * 3, masks)
    assert "takes too long" in str(slow.error)
    assert free.token_id is not None
    assert free.token_id >= 200
    assert fast.token_id == ord("1")
    alone = masks.part([2])
    assert alone is not None
    assert sample(logits[:1], [spec], alone)[0].token_id == ord("1")
    assert masks.part([1]) is None


def test_questions_that_take_long_end_their_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "SPARE_SECONDS", 0.02)

    class Asked(Slow):
        def allows(self, token_id: int) -> bool:
            end = time.thread_time() + 0.02
            while time.thread_time() < end:
                pass
            return True

        def consume(self, token_id: int) -> None:
            pass

    live = Masking()
    live.open("slow", Grammar(text=""), Asked())
    for _ in range(9):
        masks, failed = live.masks(plan_of("slow"), late=True)
        if failed:
            break
        assert masks is not None
        rule = masks.rule(0)
        assert rule is not None
        rule(5)
        live.accept([Delta(request_id="slow", token_ids=(5,))])
    assert "too long" in failed["slow"]
