"""The meter's books: counts against plain loops over rows, and shares that sum to what was measured."""

from __future__ import annotations

import dataclasses
import random
from typing import Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.plan.cost import CostModel, ModelShape, assumed_coefficients
from engine.plan.meter import Meter
from engine.plan.scheduler import Scheduler
from engine.plan.tiles import TileCosts
from engine.plan.types import Sampled, SampleSpec, ScheduledRequest, StepPlan, StepResult
from engine.protocol import EngineStats, SamplingParams, Work, add_counters
from engine.step.core import EngineCore
from engine.step.masking import TokenMasks
from engine.step.runner import AtOnce
from tests.engine.plan.kit import make

SHAPE = ModelShape(
    row_flops=1000, sparse_row_flops=100, head_flops=500, pair_flops=10, index_pair_flops=2,
    weight_bytes=1 << 20, kv_token_bytes=64, index_token_bytes=8,
)  # fmt: skip
TILES = TileCosts(budget_bytes=1 << 16, index_row_bytes=32, attention_row_bytes=36, token_bytes=64)
SAMPLE = SampleSpec(params=SamplingParams(max_tokens=1, seed=0), output_index=0, prompt_len=1, history=())


def scheduled(name: str, start: int, rows: int, index_top_k: int | None) -> ScheduledRequest:
    return ScheduledRequest(
        request_id=name,
        token_ids=(1,) * rows,
        start=start,
        page_ids=(),
        index_top_k=index_top_k,
        sample=SAMPLE,
    )


def model() -> CostModel:
    return CostModel(SHAPE, assumed_coefficients(SHAPE, "cpu"), TILES)


@pytest.mark.parametrize(
    ("start", "rows", "index_top_k"),
    [
        (0, 1, None),
        (0, 7, 3),
        (5, 1, 5),
        (4, 1, 5),
        (100, 300, 128),
        (0, 128, 128),
        (900, 64, 16),
        (70, 9, None),
    ],
)
def test_counts_are_those_of_each_row(start: int, rows: int, index_top_k: int | None) -> None:
    counts = model().counts(scheduled("a", start, rows, index_top_k))
    seen = [position + 1 for position in range(start, start + rows)]
    sparse = [tokens for tokens in seen if index_top_k is not None and tokens > index_top_k]
    assert counts.rows == rows
    assert counts.attended == sum(min(tokens, index_top_k or tokens) for tokens in seen)
    assert counts.index_pairs == sum(sparse)
    assert counts.sparse_rows == len(sparse)
    assert counts.kv_rows_read >= max(min(tokens, index_top_k or tokens) for tokens in seen)
    assert (counts.index_rows_read > 0) == bool(sparse)


def test_every_measured_second_has_an_owner() -> None:
    random.seed(1)
    meter, works, busy = Meter(model()), [], 0.0
    index_top_k = {f"r{i}": random.choice([None, 16, 64]) for i in range(8)}
    live = dict.fromkeys(index_top_k, 0)
    for name in live:
        meter.open(name, 100)
    for step in range(60):
        chosen = random.sample(sorted(live), min(len(live), 4))
        requests = []
        for name in chosen:
            rows = random.choice([1, 1, 30])
            requests.append(scheduled(name, live[name], rows, index_top_k[name]))
            live[name] += rows
        seconds = random.random()
        busy += seconds
        meter.charge(StepPlan(requests=tuple(requests)), seconds)
        if step % 20 == 19:
            name = chosen[0]
            del live[name]
            works.append(meter.close(name))
    works.extend(meter.close(name) for name in tuple(live))
    stats = meter.add_to(EngineStats())
    assert stats.busy_seconds_total == pytest.approx(busy)
    assert sum(work.device_seconds for work in works) == pytest.approx(busy)
    assert sum(work.dense_seconds for work in works) == pytest.approx(stats.dense_seconds_total)
    for field, total in (
        ("flops", stats.flops_total), ("cache_bytes", stats.cache_bytes_total),
        ("selected_tokens", stats.selected_tokens_total), ("index_pairs", stats.index_pairs_total),
    ):  # fmt: skip
        assert sum(getattr(work, field) for work in works) == total
    assert sum(stats.batch_size_counts_total) == 60
    assert 0 < stats.index_seconds_total < busy
    assert add_counters(stats, stats).busy_seconds_total == 2 * stats.busy_seconds_total
    assert meter.close("never") == Work()


def test_dense_requests_cost_their_own_dense_equivalent() -> None:
    meter = Meter(model())
    meter.open("a", 10)
    meter.charge(StepPlan(requests=(scheduled("a", 0, 500, None),)), 2.0)
    work = meter.close("a")
    assert work.device_seconds == pytest.approx(2.0)
    assert work.dense_seconds == pytest.approx(2.0)


class _Instant(AtOnce):
    """A runner that draws token 5 for whoever wants one, and a clock that goes on half a millisecond with every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def run(self, plan: StepPlan, masks: TokenMasks | None = None) -> StepResult:
        drawn = (Sampled(token_ids=() if one.sample is None else (5,)) for one in plan.requests)
        return StepResult(sampled=tuple(drawn))

    def clock(self) -> float:
        self.now += 0.0005
        return self.now


def test_what_is_told_of_the_engine_is_what_is_told_of_its_requests() -> None:
    """They agree after every message, so also after the last one before the engine dies."""
    runner = _Instant()
    scheduler = Scheduler(64, token_budget=64, max_running=8, max_model_len=512, prefix_caching=False)
    core = EngineCore(scheduler, runner, Meter(model()), sparse=True, clock=runner.clock)
    heard: dict[str, float] = {}
    told = quiet = 0
    stats = EngineStats()  # what the server knows before the first report
    for number in range(3):
        core.submit(make(f"r{number}", 100 + 30 * number, 20 + 9 * number))
    while core.has_work:
        output = core.step()
        assert output is not None
        for name, work in output.progress:
            heard[name] = work.prefill_seconds + work.decode_seconds
        for delta in output.deltas:
            if delta.usage is not None:
                heard[delta.request_id] = delta.usage.work.prefill_seconds + delta.usage.work.decode_seconds
        stats = output.stats or stats
        assert sum(heard.values()) == pytest.approx(stats.busy_seconds_total)
        told += bool(output.progress)
        quiet += output.stats is None
    assert told > 3
    assert quiet > 3
    assert stats.busy_seconds_total == pytest.approx(core.stats().busy_seconds_total)


def test_few_rows_cost_what_lone_rows_cost() -> None:
    tiles = dataclasses.replace(TILES, fused=True, few_rows=4)
    coefficients = msgspec.structs.replace(assumed_coefficients(SHAPE, "cpu"), chunk=1.0)
    own = CostModel(SHAPE, coefficients, tiles)
    for index_top_k in (None, 64):
        alone = [own.modelled_rows(1, position, index_top_k) for position in range(100, 104)]
        together = own.modelled_rows(4, 100, index_top_k)
        for part in ("actual", "scoring", "dense"):
            assert getattr(together, part) == pytest.approx(sum(getattr(one, part) for one in alone))
        assert own.modelled_rows(5, 100, index_top_k).actual > 1


@given(
    start=st.integers(0, 3000),
    index_top_k=st.one_of(st.none(), st.integers(1, 900)),
    fused=st.booleans(),
    forced=st.sampled_from(["auto", "gather", "mask"]),
)
def test_a_decode_is_counted_as_any_chunk_of_one_row(
    start: int, index_top_k: int | None, fused: bool, forced: Literal["auto", "gather", "mask"]
) -> None:
    shape = model().shape
    tiles = TileCosts(
        budget_bytes=1 << 20, index_row_bytes=32, attention_row_bytes=36, token_bytes=1536, forced=forced, fused=fused
    )  # fmt: skip
    whole = CostModel(shape, assumed_coefficients(shape, "cpu"), tiles)
    sample = SampleSpec(params=SamplingParams(max_tokens=1, seed=0), output_index=0, prompt_len=1, history=())
    row = ScheduledRequest(
        request_id="r", token_ids=(5,), start=start, page_ids=(), index_top_k=index_top_k, sample=sample
    )
    assert row.is_decode
    counts, modelled = whole.decode(start, index_top_k)
    assert counts == whole.counts(row)
    assert modelled == pytest.approx(whole.modelled(row))
