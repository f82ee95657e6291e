"""Sparse rows by another's kernel: what it is given, when it is used, and that it is right where it is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from engine.kernels.triton import latent_attention, latent_vendor
from engine.kernels.triton.latent_vendor import Attend, FlashMla, Trials, installed, takes
from engine.memory.layouts import LatentLayout
from tests.engine.kernels.triton.batches import EDGES, PAGE, Batch
from tests.engine.kernels.triton.test_latent_attention import attend, check, operands

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
RANK, ROPE = 32, 16


class Plain(FlashMla):
    """The vendor's contract in plain torch: tokens by number, exactly -1 for none, 0 for a row without any."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def attend(self, query: Tensor, plane: Tensor, tokens: Tensor, scale: float) -> Tensor:
        self.given.append(tokens)
        assert int(tokens.min()) >= -1
        assert int(tokens.max()) < len(plane) * PAGE
        out = query.new_zeros(*query.shape[:2], RANK)
        for row, chosen in enumerate(tokens):
            own = chosen[chosen >= 0].long()
            if len(own):
                packed = plane[own // PAGE, own % PAGE]
                context = LatentLayout(RANK, ROPE).unpack(packed, torch.float32)
                weights = (query[row].float() @ context.T * scale).softmax(-1)
                out[row] = (weights @ context[:, :RANK]).to(query.dtype)
        return out


def test_a_batch_of_all_kinds_of_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse rows are the vendor's; padding is 0, and dense rows are ours, in what it returned."""
    plain = Plain()
    monkeypatch.setattr(latent_attention, "vendor_for", lambda *_: plain)
    batch = Batch(EDGES, 3, device, spare=2)
    given = operands(batch, (3, RANK, ROPE), "fp8", torch.float32, 110)
    check(batch, attend(batch, *given, RANK), *given, RANK)
    assert len(plain.given) == 1
    for row, line in enumerate(batch.lines):
        wanted = min(line.top_k, line.position + 1) if line.request >= 0 else 0
        assert int((plain.given[0][row] >= 0).sum()) == wanted, line


def both(ours: float, theirs: float) -> tuple[Attend, Attend]:
    return lambda: torch.full((2,), ours), lambda: torch.full((2,), theirs)


@pytest.mark.parametrize(
    ("numbers", "times", "used"),
    [
        ((1.0, 1.001), (100.0, 50.0), True),
        ((1.0, 1.001), (100.0, 99.0), False),  # not enough to be sure of
        ((1.0, 1.1), (100.0, 50.0), False),  # fast and wrong
        ((1.0, float("nan")), (100.0, 50.0), False),
    ],
)
def test_a_trial(
    monkeypatch: pytest.MonkeyPatch, numbers: tuple[float, float], times: tuple[float, float], used: bool
) -> None:
    taken = iter(times)
    monkeypatch.setattr(latent_vendor, "microseconds", lambda _: next(taken))
    trials = Trials()
    assert trials.passed(("cuda", 16), lambda: both(*numbers)) is used
    assert trials.passed(("cuda", 16), pytest.fail) is used  # once for each batch


def test_a_kernel_that_fails_is_not_used() -> None:
    def compared() -> tuple[Attend, Attend]:
        def fails() -> Tensor:
            raise RuntimeError("no kernel image is available")

        return fails, fails

    assert not Trials().passed(("cuda", 16), compared)


def test_what_it_does_not_take() -> None:
    query = torch.zeros(2, 64, 576, dtype=torch.bfloat16)
    plane = torch.zeros(3, PAGE, 656, dtype=torch.uint8)
    assert not takes(query, plane, 64)  # on a CPU
    assert latent_attention.vendor_for(query, plane, 512, 64) is None


def test_it_is_never_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"no {name}")

    for found in (None, "a place"):
        monkeypatch.setattr(latent_vendor, "find_spec", lambda _, found=found: found)
        monkeypatch.setattr(latent_vendor, "import_module", missing)
        installed.cache_clear()
        assert installed() is None
    installed.cache_clear()


@pytest.mark.skipif(not HOPPER or installed() is None, reason="no Hopper GPU, or FlashMLA is not installed")
def test_edges_on_a_gpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(EDGES, 3, device, spare=2)
    given = operands(batch, (64, 512, 64), "fp8", torch.bfloat16, 128)
    monkeypatch.setattr(latent_attention, "vendor_for", lambda *_: installed())
    check(batch, attend(batch, *given, 512), *given, 512)
