"""The loader: fused weights, missing and misshapen ones, what is left over, what is not a number."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint.loader import LoadReport, Weight, load
from engine.checkpoint.source import LaidSource
from engine.errors import CheckpointError

CPU = torch.device("cpu")


class Held:
    """A source in memory."""

    description = "held"
    config: Mapping[str, Any] = {}

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        self.reads: list[str] = []

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        self.reads.append(name)
        return self.tensors[name].to(dtype, copy=True)


def run(table: Mapping[str, Weight], source: Any, **changed: Any) -> tuple[dict[str, Tensor], LoadReport]:
    return load(table, source, **{"dtype": torch.float32, "device": CPU, **changed})


def test_one_and_several() -> None:
    source = Held(a=torch.rand(3, 4), b=torch.rand(2, 4), c=torch.rand(5))
    table = {"ab": Weight(("a", "b"), (5, 4)), "c": Weight(("c",), (5,), dtype=torch.float64)}
    calls: list[tuple[int, int]] = []
    weights, report = run(
        table, source, dtype=torch.bfloat16, progress=lambda done, total: calls.append((done, total))
    )
    assert torch.equal(weights["ab"], torch.cat((source.tensors["a"], source.tensors["b"])).bfloat16())
    assert weights["c"].dtype == torch.float64
    assert calls == [(0, 80), (40, 80), (80, 80)]
    assert (report.num_tensors, report.num_parameters, report.num_bytes) == (3, 25, 80)
    assert report.unused == report.replaced == ()


def test_order_is_the_tables() -> None:
    source = Held(a=torch.zeros(1, 2), b=torch.ones(1, 2))
    weights, _ = run({"x": Weight(("b", "a"), (2, 2), rows=(1, 1))}, source)
    assert weights["x"].tolist() == [[1, 1], [0, 0]]


def test_missing_tensors_are_named_before_anything_is_read() -> None:
    source = Held(a=torch.rand(3))
    table = {"a": Weight(("a",), (3,)), "x": Weight(("x__y", "z"), (3,))}
    with pytest.raises(CheckpointError, match="held lacks tensor x__y and 1 more, which the model needs"):
        run(table, source)
    with pytest.raises(CheckpointError, match="held lacks tensor z, which the model needs"):
        run({"z": Weight(("z",), (3,))}, source)
    assert source.reads == []


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (Weight(("a",), (3, 5)), "held has a [3, 4], but the model's p needs shape [3, 5]"),
        (Weight(("a",), (2, 4)), "held has a [3, 4], but the model's p needs shape [2, 4]"),
        (Weight(("a",), (12,)), "held has a [3, 4], but the model's p needs shape [12]"),
        (
            Weight(("a", "b"), (6, 4)),
            "held has a [3, 4], b [2, 4], but the model's p needs together shape [6, 4]",
        ),
        (
            Weight(("a", "b"), (5, 4), rows=(2, 3)),
            "held has a [3, 4], b [2, 4], but the model's p needs together shape [5, 4] split into [2, 3] rows",
        ),
        (Weight(("s",), (1,)), "held has s [], but the model's p needs shape [1]"),
    ],
)
def test_shapes_are_checked_before_anything_is_read(weight: Weight, message: str) -> None:
    source = Held(a=torch.rand(3, 4), b=torch.rand(2, 4), s=torch.tensor(1.0))
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        run({"p": weight}, source)
    assert source.reads == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_is_named(bad: float, dtype: torch.dtype) -> None:
    tensors = torch.rand(4, 4)
    tensors[2, 1] = bad
    with pytest.raises(CheckpointError, match="held has NaN or infinite values in tensor b "):
        run({"p": Weight(("a", "b"), (8, 4))}, Held(a=torch.rand(4, 4), b=tensors), dtype=dtype)


def test_a_number_too_large_for_the_dtype_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"infinite values in tensor a \(as torch\.float16\)"):
        run({"a": Weight(("a",), (2,))}, Held(a=torch.tensor([1.0, 1e6])), dtype=torch.float16)


def test_unused_tensors_are_reported_and_benign_ones_not() -> None:
    source = Held(
        a=torch.rand(2),
        z=torch.rand(1),
        b=torch.rand(1),
        model__layers__0__rotary_emb__inv_freq=torch.rand(4),
    )
    _, report = run({"a": Weight(("a",), (2,))}, source)
    assert report.unused == ("b", "z")


def test_laid_sources_report_what_they_replace() -> None:
    base, top = Held(a=torch.zeros(2), b=torch.zeros(3)), Held(b=torch.ones(4), c=torch.ones(1))
    laid = LaidSource(base, top, "top")
    table = {name: Weight((name,), shape) for name, shape in {"a": (2,), "b": (4,), "c": (1,)}.items()}
    weights, report = run(table, laid)
    assert laid.description == "held, with top laid over it"
    assert report.replaced == ("b",)
    assert weights["a"].sum() == 0
    assert weights["b"].sum() == 4
    assert weights["c"].sum() == 1
    assert (base.reads, top.reads) == (["a"], ["b", "c"])
