"""Tokens drawn by the sampling kernels beside those of the CPU's sampler, through the face that the runner sees."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch

from engine.plan.types import SampleSpec
from engine.protocol import SamplingParams
from engine.step.sampler import sample
from tests.interpreter import prepare

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
prepare()

from engine.step.device_sampler import sample_on_device  # noqa: E402 - needs Triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def spec(*history: int, **params: Any) -> SampleSpec:
    return SampleSpec(
        params=SamplingParams(**{"max_tokens": 1, "seed": 7, **params}),
        output_index=len(history),
        prompt_len=0,
        history=history,
    )


def test_rows_of_every_kind() -> None:
    """Greedy, drawn, biased, with log-probabilities; penalties, whose histories are on the host; and one not finite."""
    specs = [
        spec(temperature=0.0),
        spec(temperature=0.8, top_p=0.9, logprobs=2),
        spec(3, 3, 5, temperature=0.0, frequency_penalty=1.5, logprobs=0),
        spec(temperature=0.0, logit_bias=((11, 50.0),)),
        spec(temperature=0.5),
        spec(9, temperature=0.7, repetition_penalty=1.3),
        spec(temperature=0.0, logprobs=0, logprob_token_ids=(499, 3)),
    ]
    logits = torch.randn(7, 500, generator=torch.Generator().manual_seed(0)) * 3
    logits[4, 17] = math.nan
    ours, theirs = sample_on_device(logits.to(DEVICE), specs), sample(logits, specs)
    assert [one.token_id for one in ours] == [one.token_id for one in theirs]
    assert [one.nonfinite for one in ours] == [False, False, False, False, True, False, False]
    for own, other in zip(ours, theirs, strict=True):
        assert (own.logprob is None) == (other.logprob is None)
        if own.logprob is not None and other.logprob is not None:
            assert own.logprob.rank == other.logprob.rank
            assert [token for token, _ in own.logprob.top] == [token for token, _ in other.logprob.top]
            assert own.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-5)


def test_stop_tokens_wait_for_the_least_length() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(2)) * 3
    logits[:, 7] = 40.0
    params: dict[str, Any] = {"stop_token_ids": (7,), "min_tokens": 2}
    specs = [
        spec(temperature=0.0, **params),
        spec(1, temperature=0.9, logprobs=1, **params),
        spec(1, 2, temperature=0.9, **params),
        spec(1, temperature=0.9, frequency_penalty=0.5, **params),
    ]
    ours = [one.token_id for one in sample_on_device(logits.to(DEVICE), specs)]
    assert ours == [one.token_id for one in sample(logits, specs)]
    assert [token == 7 for token in ours] == [False, False, True, False]


def test_only_penalties() -> None:
    specs = [spec(3, temperature=0.0, presence_penalty=0.5), spec(4, temperature=0.9, presence_penalty=0.5)]
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    assert sample_on_device(logits.to(DEVICE), specs) == sample(logits, specs)
