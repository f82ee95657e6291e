"""Tokens that graphs draw from given logits, beside those of the CPU's sampler. Without CUDA a graph is what it would replay."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from engine.plan.types import SampleSpec
from engine.protocol import SamplingParams
from engine.step.masking import TokenMasks
from engine.step.sampler import sample
from tests.interpreter import prepare

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
prepare()

from engine.step import device_draws  # noqa: E402 - needs Triton
from engine.step.device_draws import DeviceDraws, GivenLogits  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 300


class Launches:
    """Stands for a graph: runs again what was captured, and counts."""

    def __init__(self, compute: Callable[[], None]) -> None:
        self.compute, self.replayed = compute, 0

    def replay(self) -> None:
        self.replayed += 1
        self.compute()


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> DeviceDraws:
    """Graphs of up to six rows, with masks and without."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(device_draws, "captured", lambda compute, device, pool: (Launches(compute), None))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    made = DeviceDraws(GivenLogits(6, DEVICE), VOCAB, DEVICE)
    made.capture(torch.zeros(1, VOCAB, device=DEVICE), None, masks=True)
    return made


def specs_of(kind: dict[str, Any], count: int) -> list[SampleSpec]:
    return [
        SampleSpec(
            params=SamplingParams(max_tokens=1, seed=row, **kind), output_index=row, prompt_len=0, history=()
        )
        for row in range(count)
    ]


def logits_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(
    ("kind", "graph"),
    [
        ({"temperature": 0.0}, True),
        ({"temperature": 0.8}, True),
        ({"temperature": 0.8, "top_p": 0.9}, True),
        ({"temperature": 0.0, "logprobs": 2}, False),
        ({"temperature": 0.0, "logit_bias": ((11, 50.0),)}, False),
    ],
)
@pytest.mark.parametrize("count", [1, 3, 6, 7])
def test_the_cpus_tokens(draws: DeviceDraws, kind: dict[str, Any], count: int, graph: bool) -> None:
    """Of as many rows as a graph has, of fewer, and of more than any has; again with others in the same places."""
    for seed in range(2):
        logits = logits_of(count, seed)
        ours = draws.at_once(logits.to(DEVICE), specs_of(kind, count))
        theirs = sample(logits, specs_of(kind, count))
        assert [one.token_id for one in ours] == [one.token_id for one in theirs]
        assert [one.logprob is None for one in ours] == [one.logprob is None for one in theirs]
    if DEVICE.type == "cpu":
        replayed = sum(made.graph.replayed for made in draws._graphs.values())  # type: ignore[attr-defined]
        assert replayed == (2 if graph and count <= 6 else 0)


def test_a_row_that_is_not_finite_harms_no_other(draws: DeviceDraws) -> None:
    logits = logits_of(3)
    logits[1, 5] = math.nan
    drawn = draws.at_once(logits.to(DEVICE), specs_of({"temperature": 1.0}, 3))
    assert [one.nonfinite for one in drawn] == [False, True, False]


def test_under_masks(draws: DeviceDraws) -> None:
    """The second row may draw 40 and 41 alone."""
    words = np.zeros((1, -(-VOCAB // 32)), dtype=np.int32)
    words[0, 1] = 0b11 << 8
    masks = TokenMasks(words, np.array([-1, 0, -1], dtype=np.int32))
    for kind in ({"temperature": 0.0}, {"temperature": 1.0}):
        logits, specs = logits_of(3, 4), specs_of(kind, 3)
        ours, theirs = draws.at_once(logits.to(DEVICE), specs, masks), sample(logits, specs, masks)
        assert [one.token_id for one in ours] == [one.token_id for one in theirs]
        assert ours[1].token_id in (40, 41)
