"""Latent attention and index scores in C against their definition: sizes of DeepSeek-V3.2 and odd ones, many threads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from engine.kernels import native
from engine.kernels.native.kernels import NativeKernels
from engine.kernels.reference.attention import ReferenceKernels
from engine.kernels.torchops.attention import VectorisedKernels
from engine.memory.planes import PagedCache
from engine.models import read_model
from engine.models.family import Placement
from engine.plan.types import ScheduledRequest, StepPlan
from engine.step.runner import Runner
from lab.curve.measure import fill
from lab.curve.shape import config, random_source

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

PAGE = 64


@pytest.fixture(params=[1, 3])
def kernels(request: pytest.FixtureRequest) -> Iterator[NativeKernels]:
    made = NativeKernels()
    if not made.streams_latents(torch.bfloat16, torch.bfloat16):
        pytest.skip("this processor has no products of bfloat16")
    native.set_threads(request.param)
    yield made
    native.set_threads(torch.get_num_threads())


class Inputs(NamedTuple):
    query: Tensor
    plane: Tensor
    tables: Tensor


def inputs(requests: int, rows: int, heads: int, dim: int, pages: int) -> Inputs:
    g = torch.Generator().manual_seed(heads * dim + pages)
    total = requests * pages + 1
    # As in the engine, a plane is a part of wider pages.
    wide = torch.randn(total, PAGE * dim + 32, generator=g).bfloat16()
    plane = wide[:, : PAGE * dim].view(total, PAGE, dim)
    tables = torch.randperm(total, generator=g)[: requests * pages].view(requests, pages)
    query = torch.randn(requests, rows, heads, dim, generator=g) * 4 * dim**-0.5
    return Inputs(query.bfloat16(), plane, tables)


SHAPES = [
    # requests, rows, heads, rank, rope, pages
    (1, 1, 128, 512, 64, 3), (2, 1, 128, 512, 64, 2), (1, 3, 64, 512, 64, 2), (1, 5, 8, 128, 64, 4),
    (3, 1, 33, 32, 2, 5), (1, 2, 1, 16, 6, 1), (1, 1, 100, 48, 10, 7),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_that_of_float32_but_for_rounding(
    kernels: NativeKernels, shape: tuple[int, ...]
) -> None:
    requests, rows, heads, rank, rope, pages = shape
    made = inputs(requests, rows, heads, rank + rope, pages)
    context = pages * PAGE
    wide = (made.query.float(), made.plane.float(), made.tables)
    g = torch.Generator().manual_seed(1)
    order = torch.rand(requests, rows, context, generator=g).argsort(-1)
    for count in (1, 7, min(97, context), context):
        selected = order[..., :count].clone()
        selected[..., count // 2 + 1 :: 3] = -1
        out = kernels.latent_selected(*made, selected, rank, 0.7)
        expected = ReferenceKernels().latent_selected(*wide, selected, rank, 0.7)
        torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=1e-2)
        allowed = torch.zeros(requests, rows, context, dtype=torch.bool)
        allowed.scatter_(-1, order[..., :count], True)
        out = kernels.latent_masked(*made, allowed, rank, 0.7)
        expected = ReferenceKernels().latent_masked(*wide, allowed, rank, 0.7)
        torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(
    "shape",
    # rows, heads, rank, plain, rope, value, pages: several groups of rows and several blocks of tokens, odd ones too
    [
        (70, 3, 32, 16, 8, 16, 19),
        (64, 2, 512, 128, 64, 128, 3),
        (1, 3, 16, 6, 2, 48, 9),
        (130, 1, 48, 30, 4, 16, 5),
    ],
)
def test_expanded_attention_is_that_of_float32_but_for_rounding(
    kernels: NativeKernels, shape: tuple[int, ...]
) -> None:
    rows, heads, rank, plain, rope, value, pages = shape
    made, context = inputs(1, rows, heads, rank + rope, pages), pages * PAGE
    g = torch.Generator().manual_seed(3)
    query = (torch.randn(1, rows, heads, plain + rope, generator=g) * 2 * (plain + rope) ** -0.5).bfloat16()
    expand = (torch.randn(heads, plain + value, rank, generator=g) * rank**-0.5).bfloat16()
    own = torch.arange(context - rows, context).view(1, rows, 1)
    few = torch.zeros(1, rows, context, dtype=torch.bool)  # a row may see nothing for many blocks
    few[..., -3] = True
    sparse = torch.rand(1, rows, context, generator=g) < 0.1
    for allowed in (torch.arange(context) <= own, few, sparse | few):
        out = kernels.latent_expanded(query, *made[1:], allowed, expand, rank, 0.7)
        expected = ReferenceKernels().latent_expanded(
            query.float(), made.plane.float(), made.tables, allowed, expand.float(), rank, 0.7
        )
        torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


def test_a_softmax_over_many_blocks_keeps_the_largest(kernels: NativeKernels) -> None:
    """The largest score grows from block to block, shrinks, and outgrows the range of 2^x."""
    made = inputs(1, 1, 16, 64, 8)
    made.plane[made.tables[0], :, 0] = torch.linspace(-300, 300, 8).bfloat16().unsqueeze(1)
    made.query[..., 0] = 1.0
    allowed = torch.ones(1, 1, 8 * PAGE, dtype=torch.bool)
    for tables in (made.tables, made.tables.flip(1)):
        at = (made.plane, tables, allowed, 48, 1.0)
        expected = ReferenceKernels().latent_masked(made.query.float(), at[0].float(), *at[1:])
        torch.testing.assert_close(
            kernels.latent_masked(made.query, *at).float(), expected, rtol=2e-2, atol=1e-2
        )


@pytest.mark.parametrize(
    "shape", [(1, 1, 64, 128, 20), (2, 1, 64, 128, 17), (1, 4, 32, 128, 3), (1, 3, 80, 34, 2)]
)
def test_index_scores_are_those_of_float32(kernels: NativeKernels, shape: tuple[int, ...]) -> None:
    requests, rows, heads, dim, pages = shape
    made = inputs(requests, rows, heads, dim, pages)
    g = torch.Generator().manual_seed(2)
    weights = torch.randn(requests, rows, heads, generator=g)  # negative ones, too
    positions = torch.randint(0, pages * PAGE, (requests, rows), generator=g)
    scores = kernels.index_scores(made.query, weights, *made[1:], positions)
    expected = ReferenceKernels().index_scores(made.query, weights, *made[1:], positions)
    assert torch.equal(scores == -math.inf, expected == -math.inf)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)


def test_what_is_not_a_number_shows(kernels: NativeKernels) -> None:
    """A faulty request must be seen to be one, not get a plausible answer."""
    made = inputs(1, 2, 20, 48, 3)
    made.query[0, 1, 3, 5] = math.nan
    allowed = torch.ones(1, 2, 3 * PAGE, dtype=torch.bool)
    out = kernels.latent_masked(*made, allowed, 32, 0.5)
    assert out[0, 1, 3].isnan().all()
    assert not out[0, 0].isnan().any()
    scores = kernels.index_scores(made.query, torch.ones(1, 2, 20), *made[1:], torch.tensor([[180, 180]]))
    assert scores[0, 1, :181].isnan().all()
    assert not scores[0, 0].isnan().any()


@pytest.mark.parametrize("change", ["float32", "unpack", "odd rank", "odd dim"])
def test_what_the_c_code_does_not_do_is_torchs(kernels: NativeKernels, change: str) -> None:
    rank, dim = {"odd rank": (30, 40), "odd dim": (32, 37)}.get(change, (32, 40))
    made = inputs(1, 2, 5, dim, 2)
    if change == "float32":
        made = Inputs(made.query.float(), made.plane.float(), made.tables)
    extra = (lambda tokens: tokens * 2,) if change == "unpack" else ()
    selected = torch.tensor([[[3, 100, -1], [0, -1, 7]]])
    theirs = VectorisedKernels().latent_selected(*made, selected, rank, 0.5, *extra)
    assert torch.equal(kernels.latent_selected(*made, selected, rank, 0.5, *extra), theirs)


@pytest.mark.parametrize(
    ("start", "rows", "index_top_k"), [(0, 90, None), (700, 80, None), (700, 80, 256), (900, 1, 256)]
)
def test_a_model_of_deepseeks_family_computes_as_with_torchs_operations(
    kernels: NativeKernels, start: int, rows: int, index_top_k: int | None
) -> None:
    """Through runner, pages and tiles: one layer, so that one selection differs at most by near ties.

    Its feed-forward part is dense. A router chooses another expert where two scores are all but equal, which on some
    processors' products is the case for one token here: that token's output then tells nothing of attention.
    """
    settings = config(quick=True) | {"first_k_dense_replace": 1, "intermediate_size": 512}
    hidden = []
    for backend in (kernels, VectorisedKernels()):
        source = random_source(settings, torch.device("cpu"))
        model, _ = read_model(source).build(
            source,
            None,
            Placement(backend, 1024, torch.bfloat16, torch.device("cpu")),
            lambda done, total: None,
        )
        cache = PagedCache(17, model.plane_specs(), 1, torch.device("cpu"))
        fill(cache, [(0, "latent"), (0, "index_key")], lambda *_: None)
        runner = Runner(model, cache, model.tile_costs(1 << 24, "auto"), torch.device("cpu"))
        pages = tuple(range(16, -1, -1))
        request = ScheduledRequest(
            request_id="r",
            token_ids=tuple(range(rows)),
            start=start,
            page_ids=pages,
            index_top_k=index_top_k,
            sample=None,
        )
        hidden.append(runner.hidden(StepPlan(requests=(request,))).float())
    torch.testing.assert_close(hidden[0], hidden[1], rtol=0.05, atol=0.05)
