"""The checks of `dsa doctor` pass where the kernels do, and see where one does not."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from lab.doctor import pointwise, rows
from lab.doctor.tiles import ConformanceError

CHECKS = rows.CHECKS | pointwise.CHECKS


@pytest.mark.parametrize("name", CHECKS)
def test_what_the_doctor_checks(device: torch.device, dtype: torch.dtype, name: str) -> None:
    CHECKS[name](device, dtype)


@pytest.mark.parametrize(
    ("name", "module", "kernel", "told"),
    [
        ("attention", rows, "attend", "attend, RowLine"),
        ("index scores (int8)", rows, "index_scores", "index_scores (int8), RowLine"),
        ("selection", rows, "select", "select, row 0 of 12 x 600"),
        ("gate", pointwise, "silu_times", "silu_times: "),
        ("sampling", pointwise, "sample", "draw: token"),
    ],
)
def test_a_wrong_kernel_is_seen(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, name: str, module: object, kernel: str, told: str
) -> None:
    right = getattr(module, kernel)

    def wrong(*arguments: object, **more: object) -> object:
        out = right(*arguments, **more)
        return out[1:] + out[:1] if isinstance(out, list) else out + 1

    monkeypatch.setattr(module, kernel, wrong)
    with pytest.raises(ConformanceError) as raised:
        CHECKS[name](device, torch.float32)
    assert str(raised.value).startswith(told)
