"""Experts against the plain layer, one expert after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import EngineError
from engine.kernels.torchops.fp8 import VectorisedFp8
from engine.kernels.triton.experts import ExpertTile, run_experts
from engine.kernels.triton.wide_experts import WideTile
from engine.layers import moe
from engine.memory.blocks import BlockWeight, Matrix
from tests.engine.kernels.triton.kit import random_blocks


def alone(x: Tensor, gate_up: Matrix, down: Matrix) -> Tensor:
    """One expert, in FP8 if it is."""
    fp8 = VectorisedFp8()
    if isinstance(gate_up, BlockWeight) and isinstance(down, BlockWeight):
        gate, up = fp8.linear_fp8(x, gate_up, "ue8m0").chunk(2, dim=-1)
        return fp8.linear_fp8(F.silu(gate) * up, down, "ue8m0")
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def plain(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: Matrix, down: Matrix, first: int, shared: tuple[Matrix, Matrix] | None
) -> Tensor:  # fmt: skip
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for t in range(len(x)):
        row = x[t : t + 1]
        for j, expert in enumerate(experts[t].tolist()):
            if 0 <= expert - first < gate_up.shape[0]:
                out[t] += alone(row, gate_up[expert - first], down[expert - first])[0].float() * weights[t, j]
        if shared is not None and int(experts[t, 0]) >= 0:
            out[t] += alone(row, *shared)[0].float()
    return out


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype, quantised: bool) -> None:
    """In FP8 the inner numbers may be rounded to another side, as sums differ in the last bit."""
    tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-2 if quantised else 2e-5
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


class Case:
    """Random experts, and rows with different ones."""

    def __init__(
        self, rows: int, total: int, held: int, chosen: int, hidden: int, inner: int,
        quantised: bool, dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(rows + hidden)

        def weight(*shape: int) -> Matrix:
            if quantised:
                return random_blocks(generator, *shape, device=device)
            plain: torch.Tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            return plain.to(device, dtype)

        self.gate_up, self.down = weight(held, 2 * inner, hidden), weight(held, hidden, inner)
        self.shared = weight(2 * inner, hidden), weight(hidden, inner)
        self.x = torch.randn(rows, hidden, generator=generator).to(device, dtype)
        orders = [torch.randperm(total, generator=generator)[:chosen] for _ in range(rows)]
        self.experts = torch.stack(orders).int().to(device)
        self.weights = torch.rand(rows, chosen, generator=generator).to(device)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    ("rows", "total", "first", "held", "chosen", "hidden", "inner"),
    [(1, 4, 0, 4, 2, 256, 128), (5, 8, 2, 3, 3, 208, 128), (40, 4, 0, 4, 2, 128, 256)],
)
def test_against_the_plain_layer(
    device: torch.device, dtype: torch.dtype, rows: int, total: int, first: int, held: int, chosen: int,
    hidden: int, inner: int, share: bool, quantised: bool,
) -> None:  # fmt: skip
    case = Case(rows, total, held, chosen, hidden, inner, quantised, dtype, device)
    shared = case.shared if share else None
    operands = (case.experts, case.weights, case.gate_up, case.down, first, shared)
    ours = run_experts(case.x, *operands)
    close(ours, plain(case.x, *operands), dtype, quantised)
    assert torch.equal(run_experts(case.x, *operands), ours)
    small = run_experts(case.x, *operands, tile=ExpertTile(16))
    one = run_experts(case.x[-1:], case.experts[-1:], case.weights[-1:], *operands[2:], tile=ExpertTile(16))
    assert torch.equal(one, small[-1:])
    if quantised:
        wide = run_experts(case.x, *operands, tile=WideTile(64, 2, 2, 4))
        close(wide, plain(case.x, *operands), dtype, quantised)
        assert torch.equal(run_experts(case.x, *operands, tile=WideTile(64, 2, 2, 4)), wide)
    if not quantised and not share:
        theirs = moe.run_experts(case.x, case.experts.long(), case.weights, case.gate_up, case.down, first)
        close(ours, theirs, dtype, quantised)


@pytest.mark.parametrize("quantised", [False, True])
def test_rows_of_padding_and_odd_sizes(device: torch.device, dtype: torch.dtype, quantised: bool) -> None:
    """A row without experts is zeros, whatever stands in it; all rows may have one expert."""
    hidden, inner = (136, 128) if quantised else (72, 40)
    case = Case(6, 3, 3, 2, hidden, inner, quantised, dtype, device)
    case.experts[:] = torch.tensor([1, 2], dtype=torch.int32, device=device)
    case.experts[2] = -1
    ours = run_experts(
        case.x, case.experts, case.weights, case.gate_up, case.down, 0, case.shared, dtype=dtype
    )
    assert ours.dtype == dtype
    assert not ours[2].any()
    wanted = plain(case.x, case.experts, case.weights, case.gate_up, case.down, 0, case.shared)
    close(ours.float(), wanted, dtype, quantised)
    none = torch.full_like(case.experts, -1)
    assert not run_experts(case.x, none, case.weights, case.gate_up, case.down, 0, case.shared).any()


def test_no_rows(device: torch.device, dtype: torch.dtype) -> None:
    case = Case(1, 4, 4, 2, 128, 64, False, dtype, device)
    assert run_experts(case.x[:0], case.experts[:0], case.weights[:0], case.gate_up, case.down).shape == (
        0,
        128,
    )


def test_what_cannot_be(device: torch.device) -> None:
    case = Case(1, 4, 4, 2, 128, 128, True, torch.float32, device)
    gate_up = case.gate_up
    assert isinstance(gate_up, BlockWeight)
    odd = BlockWeight(gate_up.values[:, :192], gate_up.scales)
    with pytest.raises(EngineError, match="would hold gate and up"):
        run_experts(case.x, case.experts, case.weights, odd, case.down)
    with pytest.raises(EngineError, match="both plain"):
        run_experts(case.x, case.experts, case.weights, gate_up, torch.zeros(4, 128, 128, device=device))
    with pytest.raises(EngineError, match="shared expert"):
        run_experts(case.x, case.experts, case.weights, gate_up, case.down, 0, (gate_up, case.down))
