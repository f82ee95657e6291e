"""A llama step in one native call against torch's operations, over the same weights.

Rounding may change which of two nearly equal tokens is selected, which no tolerance covers. So both bfloat16 forms are
held against float32's: the native one, which rounds less often, must be as near as torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import EngineConfig
from engine.kernels import native
from engine.models.gqa.model import GqaModel
from engine.plan.types import ScheduledRequest, StepPlan
from engine.step.build import build
from tests.engine.kit import VOCAB, base_of, random_overlay, tiny_checkpoint

pytestmark = pytest.mark.skipif(native.library() is None, reason=str(native.missing()))

PAGES = 12
Rows = tuple[int, int, int, int | None]  # request, first position, rows, index_top_k
CASES: list[list[Rows]] = [
    [(0, 0, 1, None)],
    [(0, 599, 1, None)],
    [(0, 599, 1, 100)],
    [(0, 100, 1, 200)],  # its context is shorter than that: dense
    [(0, 599, 1, 100), (1, 63, 1, 64), (2, 64, 1, 64), (3, 300, 1, None)],
    [(0, 590, 9, 100)],  # rows of one request that see each other
    [(0, 95, 10, 100), (2, 599, 1, 64)],  # dense up to the hundredth token
    [(number, 590, 8, 128) for number in range(4)],
    [(0, 0, 600, None)],  # several blocks of rows, each over what the others left in the cache
    [(0, 0, 300, 100), (1, 599, 1, 64), (2, 37, 270, 150), (3, 20, 3, 100)],
]


class Form:
    """One way to compute a checkpoint, and a cache of four requests' first 600 tokens."""

    def __init__(
        self, folder: Path, dtype: Literal["float32", "bfloat16"], *, fast: bool = False, **settings: Any
    ) -> None:
        self.built = build(
            EngineConfig(weights=str(folder), device="cpu", dtype=dtype, kv_cache_bytes=64 << 20, **settings)
        )
        model = self.built.runner._model
        assert isinstance(model, GqaModel)
        self.model, self.step = model, model.native
        if not fast:
            model.native = None
        self.tokens = torch.randint(0, VOCAB, (4, 640), generator=torch.Generator().manual_seed(3)).tolist()
        self.fill()

    def fill(self) -> None:
        """Write the first 600 tokens of each request into the cache, dense."""
        for request in range(4):
            self.hidden([(request, 0, 600, None)])

    def hidden(self, requests: list[Rows]) -> Tensor:
        """Hidden states of the rows; they are written into the cache."""
        plan = StepPlan(
            requests=tuple(
                ScheduledRequest(
                    request_id=str(number),
                    token_ids=tuple(self.tokens[number][start : start + rows]),
                    start=start,
                    page_ids=tuple(range(number * PAGES, number * PAGES + PAGES)),
                    index_top_k=index_top_k,
                    sample=None,
                )
                for number, start, rows, index_top_k in requests
            )
        )
        return self.built.runner.hidden(plan).float()

    def written(self, requests: list[Rows]) -> Tensor:
        """The rows' keys and values in the last layer, which depend on all layers before it."""
        plane = self.built.cache.plane(self.model.num_layers - 1, "kv")
        entries = [
            plane[number * PAGES + position // 64, position % 64]
            for number, start, rows, _ in requests
            for position in range(start, start + rows)
        ]
        return torch.stack(entries).float()


WINDOWS: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 150}
MEMBERS: dict[str, dict[str, Any]] = {
    "qwen2, heads of 128, six queries a key": {"kind": "qwen2", "num_key_value_heads": 1, "head_dim": 128},
    "qwen3, heads of 64": {"kind": "qwen3", "head_dim": 64},
    "llama, all biases, odd heads": {
        "kind": "llama", "attention_bias": True, "mlp_bias": True, "num_attention_heads": 8,
        "num_key_value_heads": 8, "head_dim": 12,
    },
    "mistral, windows": {"kind": "mistral", "sliding_window": 150},
    "qwen3, biases, windows from layer 1, heads of 160": {
        "kind": "qwen3", "head_dim": 160, "attention_bias": True, **WINDOWS, "max_window_layers": 1,
    },
}  # fmt: skip


class Forms:
    """Three forms of one checkpoint, whose weights are bfloat16 numbers."""

    def __init__(self, folder: Path, keys: str | None, **member: Any) -> None:
        sizes: dict[str, Any] = {
            "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2,
            "head_dim": 32, "initializer_range": 0.1, "tie_word_embeddings": keys == "bf16",
        }  # fmt: skip
        tiny_checkpoint(folder, **sizes | member)
        round_weights(folder / "model.safetensors")
        settings: dict[str, Any] = {}
        if keys is not None:
            overlay = random_overlay(folder / "indexer.st", base_of(folder), heads=5, dim=32, rope=16)
            round_weights(overlay)
            settings = {"overlay": str(overlay)}
        self.exact = Form(folder, "float32", **settings)
        # Integers are the default where there are native kernels.
        settings |= {"indexer_dtype": "bf16"} if keys == "bf16" else {}
        self.torch = Form(folder, "bfloat16", **settings)
        self.native = Form(folder, "bfloat16", fast=True, **settings)


def round_weights(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: x.bfloat16().float() for name, x in load_file(path).items()}, path, metadata)


@pytest.fixture(scope="module", params=["int8", "bf16", None])
def forms(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(tmp_path_factory.mktemp("native"), request.param)


@pytest.fixture(scope="module", params=[*MEMBERS.values()], ids=[*MEMBERS])
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(tmp_path_factory.mktemp("member"), "int8", **request.param)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    library = native.library()
    assert library is not None
    before = library.dsa_threads()
    native.set_threads(request.param)
    yield
    native.set_threads(before)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", CASES)
def test_it_is_as_near_to_float32_as_torch_is(forms: Forms, case: list[Rows]) -> None:
    for form in (forms.exact, forms.torch, forms.native):
        form.fill()  # not what sparse rows of the cases before have left, which differs by form
    if forms.exact.model.indexer is None:
        case = [(number, start, rows, None) for number, start, rows, _ in case]
    assert forms.native.model.native is not None
    compare(forms, case)


def compare(forms: Forms, case: list[Rows]) -> None:
    every = (forms.exact, forms.torch, forms.native)
    # Of few sparse rows, each token that rounding swaps shows; of many, they are as many in both forms.
    sparse = any(index_top_k is not None for _, _, _, index_top_k in case)
    factor = 1.15 if not sparse or sum(rows for _, _, rows, _ in case) > 20 else 1.7
    exact, torchs, mine = (form.hidden(case) for form in every)
    assert error(mine, exact) < factor * error(torchs, exact) + 0.004
    exact, torchs, mine = (form.written(case) for form in every)
    assert error(mine, exact) < factor * error(torchs, exact) + 0.004


@pytest.mark.usefixtures("threads")
def test_every_member_is_as_near_to_float32_as_torch_is(member: Forms) -> None:
    """Sparse rows are judged together: a member with few heads shows each token that rounding swaps even more."""
    assert member.native.model.native is not None
    squares = [0.0, 0.0]
    for case in CASES:
        compare(member, [(number, start, rows, None) for number, start, rows, _ in case])
    alone: list[list[Rows]] = [
        [(number, start, 1, 100) for number in range(4)] for start in range(110, 600, 25)
    ]
    for case in CASES + alone:
        exact, *others = (form.hidden(case) for form in (member.exact, member.torch, member.native))
        for i, found in enumerate(others):
            squares[i] += error(found, exact) ** 2
    assert squares[1] < 1.3 * squares[0]


def test_the_comparison_can_fail(forms: Forms) -> None:
    """With another index_top_k, or another page, the hidden states are far off."""
    exact = forms.exact.hidden([(0, 599, 1, None)])
    if forms.exact.model.indexer is not None:
        assert error(forms.native.hidden([(0, 599, 1, 100)]), exact) > 0.3
    assert error(forms.native.hidden([(1, 599, 1, None)]), exact) > 0.3


def test_a_faulty_row_fails_alone(forms: Forms) -> None:
    rows: list[Rows] = [(0, 599, 1, None), (1, 599, 1, None)]
    before = forms.native.hidden(rows)
    plane = forms.native.built.cache.plane(0, "kv")
    page, kept = PAGES, plane[PAGES].clone()
    plane[page] = torch.nan
    after = forms.native.hidden(rows)
    plane[page] = kept
    assert torch.equal(after[0], before[0])
    assert after[1].isnan().any()


def test_shapes_and_dtypes_that_it_does_not_do_are_torchs(forms: Forms, tmp_path: Path) -> None:
    assert forms.exact.step is None  # float32
    assert "products: compiled for" in forms.native.built.kernels
    assert "products: torch (packed weights are for the native kernels" in forms.exact.built.kernels
    tiny_checkpoint(tmp_path)  # rows of 48 are not whole groups of 32
    assert Form(tmp_path, "bfloat16").step is None
    tiny_checkpoint(tmp_path, hidden_size=96, intermediate_size=160, head_dim=32)
    assert Form(tmp_path, "bfloat16", kernels="torch").step is None
    assert Form(tmp_path, "bfloat16").step is not None


@pytest.mark.parametrize("case", [CASES[4], CASES[6], CASES[9]])
def test_the_same_step_has_the_same_bits_whichever_threads_come_in_time(
    forms: Forms, case: list[Rows]
) -> None:
    """More threads than cores: which of them join a step, and what each does, is another every time."""
    library = native.library()
    assert library is not None
    before = library.dsa_threads()
    try:
        native.set_threads(1)
        alone = forms.native.hidden(case)
        native.set_threads(3)
        assert all(
            torch.equal(forms.native.hidden(case), alone) for _ in range(500 if len(alone) < 50 else 50)
        )
    finally:
        native.set_threads(before)
