"""A step with prompts beside decodes, against its decodes alone, by the same cost model."""

from __future__ import annotations

import msgspec
import pytest

from engine.plan.cost import CostModel, ModelShape, assumed_coefficients
from engine.plan.pace import LEAST, SLOWDOWN, CostPace, Place
from engine.plan.tiles import TileCosts
from engine.plan.types import SampleSpec, ScheduledRequest, StepPlan
from engine.protocol import SamplingParams

SHAPE = ModelShape(
    row_flops=200_000_000, sparse_row_flops=9_000_000, head_flops=50_000_000, pair_flops=69_000,
    index_pair_flops=31_000, weight_bytes=280 << 20, kv_token_bytes=23_040, index_token_bytes=3840,
)  # fmt: skip
TILES = TileCosts(budget_bytes=64 << 20, index_row_bytes=32, attention_row_bytes=36, token_bytes=768)
SAMPLE = SampleSpec(params=SamplingParams(max_tokens=1, seed=0), output_index=0, prompt_len=1, history=())


def model(**changes: float) -> CostModel:
    return CostModel(SHAPE, msgspec.structs.replace(assumed_coefficients(SHAPE, "cpu"), **changes), TILES)


def step(decodes: list[Place], prompt: Place | None = None, rows: int = 0) -> StepPlan:
    places = [(place, 1) for place in decodes] + ([] if prompt is None else [(prompt, rows)])
    return StepPlan(
        requests=tuple(
            ScheduledRequest(
                request_id=str(i), token_ids=(0,) * count, start=place.position, page_ids=(),
                index_top_k=place.index_top_k, sample=SAMPLE if count == 1 else None,
            )
            for i, (place, count) in enumerate(places)
        )
    )  # fmt: skip


@pytest.mark.parametrize("waiting", [1, 30])
@pytest.mark.parametrize("streams", [1, 8, 32, 200])
@pytest.mark.parametrize("prompt", [Place(0, 512), Place(1000, None), Place(7000, 512)])
def test_a_step_is_slowed_down_as_much_as_allowed_and_no_more(
    streams: int, waiting: int, prompt: Place
) -> None:
    own = model(head=0.01)
    decodes = [Place(900 + i, 512) for i in range(streams)]
    soon = [Place(prompt.position + 500, prompt.index_top_k)] * waiting
    rows = CostPace(own)(decodes, soon, prompt, 4096)
    alone = own.seconds(step([*decodes, *soon]))  # as it will be
    slowdown, one_more = (own.seconds(step(decodes, prompt, n)) / alone for n in (rows, rows + 16))
    assert LEAST <= rows <= 4096
    assert slowdown <= SLOWDOWN or rows == LEAST  # so many are always allowed
    assert one_more > SLOWDOWN or rows == 4096


def test_a_prompt_always_goes_on_and_never_beyond_what_is_left() -> None:
    slow, fast = CostPace(model(step=0.0, row=1.0)), CostPace(model(step=9.0))
    assert slow([Place(5, None)], [Place(9, None)], Place(0, None), 512) == LEAST
    assert [pace([Place(5, None)], [Place(9, None)], Place(0, None), 7) for pace in (slow, fast)] == [7, 7]
    assert fast([Place(100, None)] * 64, [], Place(0, None), 501) == 501
