"""The scorers of `dsa eval` on cases made by hand, and its client against the real app over a scripted engine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import typer

from engine.protocol import Submit
from lab.evaluate import equality, loss, needles
from lab.evaluate.client import Client, EvaluationError
from lab.evaluate.local_server import serve_arguments
from lab.evaluate.loss import TextLoss, buckets
from lab.evaluate.material import HeldOut, spread
from lab.evaluate.needles import Found, grid, is_right
from lab.evaluate.results import EvalResults, RecallResult, load
from lab.evaluate.statistics import bootstrap, wilson
from lab.evaluate.verdict import at_least, at_most
from server.cli.main import app
from server.settings import load_settings
from tests.server.fake_engine import FakeEngine, Script
from tests.server.kit import EOS, MODEL, client, ids, make_app


def silent(done: int, total: int) -> None:
    """Ignore progress."""


def test_a_server_of_its_own_writes_no_ledger() -> None:
    command, *rest = serve_arguments(["some-model", "--device", "cpu"])
    serve = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    flags = {
        name: value for name, value in serve.make_context(command, rest).params.items() if name != "config"
    }
    config = load_settings(flags, {"DSA_LEDGER": "usage.sqlite"}).server("any")
    assert (config.ledger, config.port) == (None, 0)


def test_loss_counts_from_the_position_on_and_by_bucket() -> None:
    logprobs = [None, *([-1.0] * 1023), *([-2.0] * 1024), -5.0]
    tokens, nats = buckets(logprobs, 1024)
    assert (tokens, nats) == ([1024, 1, 0], [2048.0, 5.0, 0.0])
    assert buckets([None, -1.0, -3.0], 1) == ([2, 0, 0], [4.0, 0.0, 0.0])


def test_loss_weighs_tokens_alike_and_pairs_the_texts() -> None:
    texts = [
        TextLoss(kind="code", start=0, length=9, tokens=[1, 0, 0], nats={"dense": [1.0, 0, 0], "256": [2.0, 0, 0]}),
        TextLoss(kind="chat", start=9, length=9, tokens=[2, 1, 0], nats={"dense": [2.0, 3, 0], "256": [2.0, 3.3, 0]}),
    ]  # fmt: skip
    rows = loss.summarise(texts, [256])
    assert rows["dense"]["all"].loss == pytest.approx(6 / 4)
    assert rows["256"]["all"].above_dense == pytest.approx(1.3 / 4)
    assert rows["256"]["code"].above_dense == pytest.approx(1.0)
    assert rows["256"]["from 2048"].above_dense == pytest.approx(0.3)
    assert "from 4096" not in rows["256"]
    assert rows["256"]["all"].interval is None  # the variation is not known from one text of each kind
    result = loss.LossResult(beyond=1024, texts=texts, rows=rows)
    (verdict,) = loss.verdicts(result, [256])
    assert (verdict.outcome, verdict.bar) == ("missed", 0.05)


def test_the_bootstrap_holds_the_mean_and_is_as_wide_as_the_texts_differ() -> None:
    alike = bootstrap([[(1.0, 10)] * 5])
    assert alike is not None
    assert alike == pytest.approx((0.1, 0.1))
    varied = bootstrap([[(0.0, 10), (1.0, 10), (2.0, 10), (3.0, 10)]])
    assert varied is not None
    assert 0 <= varied.low < 0.15 < varied.high <= 0.3


def test_wilsons_interval() -> None:
    interval = wilson(8, 10)  # the textbook's 0.4902 to 0.9433
    assert interval == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 0) is None


@pytest.mark.parametrize(
    ("value", "outcome"),
    [(0.01, "met, and the aim"), (0.04, "met"), (0.051, "missed"), (math.nan, "missed"), (None, "nothing to measure")],
)  # fmt: skip
def test_bars(value: float | None, outcome: str) -> None:
    assert at_most("it", value, 0.05, 0.03).outcome == outcome


def test_bars_of_shares() -> None:
    assert at_least("it", 0.98, 0.98).outcome == "met"
    assert at_least("it", 0.979, 0.98).outcome == "missed"
    assert at_least("it", None, 0.98).outcome == "nothing to measure"


def found(context: int, depth: float, dense: bool, sparse: bool) -> Found:
    right = {"dense": dense, "256": sparse}
    return Found(context=context, depth=depth, phrasing=0, value="x", answers={}, right=right)


def test_needles_retention_is_of_what_dense_finds_and_nothing_is_left_out() -> None:
    rows = [found(512, 0.0, True, True), found(512, 0.5, True, False), found(1024, 0.0, False, True), found(1024, 0.0, False, False)]  # fmt: skip
    result = needles.summarise(rows, [256])
    kept = result.retention["256"]
    assert (kept.right, kept.of) == (1, 2)
    assert [result.accuracy[s]["all"].right for s in ("dense", "256")] == [2, 2]
    assert result.accuracy["dense"]["1024"].value == 0
    cells = grid(rows, "256")
    assert (cells[0.0, 1024].right, cells[0.0, 1024].of) == (1, 2)
    (verdict,) = needles.verdicts(result, 256)
    assert needles.verdicts(result, 512) == []
    assert verdict.outcome == "missed"
    assert is_right("It is the PENGUIN.", "penguin")
    assert not is_right("It is the pen.", "penguin")


def test_equality_finds_the_largest_difference() -> None:
    one = {"tokens": ["a", "b"], "token_logprobs": [None, -1.0]}
    assert equality.difference(one, one) == 0
    assert equality.difference(one, {"tokens": ["a", "b"], "token_logprobs": [None, -1.5]}) == 0.5
    assert equality.difference(one, {"tokens": ["a", "c"], "token_logprobs": [None, -1.0]}) is None


def test_a_quick_look_is_spread_over_all() -> None:
    assert spread(range(10), None) == range(10)
    assert list(spread(range(10), 20)) == list(range(10))
    few = list(spread(range(231), 5))
    assert len(set(few)) == 5
    assert (few[0], few[-1]) == (23, 207)


def of(engine: FakeEngine) -> Client:
    return Client(client(make_app(engine)), MODEL, 256, wait_seconds=0.0)


async def test_equality_over_the_wire() -> None:
    def script(submit: Submit) -> Script:
        return Script([*ids("same" if submit.index_top_k != 16 else "sane"), EOS])

    texts = [HeldOut("prose", 0, tuple(ids("b" * 50)))]
    equal = await equality.measure(of(FakeEngine(script)), texts, [64], silent, cases=3, answer_tokens=4)
    assert [(case.prompt_tokens, case.equal) for case in equal.cases] == [(20, True), (40, True)]
    other = await equality.measure(of(FakeEngine(script)), texts, [16], silent, cases=1, answer_tokens=4)
    assert [case.equal for case in other.cases] == [False]


async def test_a_server_without_an_indexer_is_found_out() -> None:
    with pytest.raises(EvaluationError, match="no trained indexer"):
        await of(FakeEngine(default_top_k=None)).raw([1, 2], 16, 4)


async def test_a_refusal_is_tried_again_and_then_said() -> None:
    asked = of(FakeEngine(lambda submit: Script(fault="refuse")))
    with pytest.raises(EvaluationError, match="4 tries were made"):
        await asked.raw([1, 2], "dense", 4)
    assert asked.repeated == 3


def test_results_are_kept_for_the_same_settings_only(tmp_path: Any) -> None:
    results = EvalResults(settings={"top_k": [256]}, environment={})
    results.needles = needles.summarise([found(512, 0.0, True, True)], [256])
    results.save(tmp_path)
    kept = load(tmp_path, {"top_k": [256]})
    assert kept is not None
    assert kept.needles == results.needles
    assert (kept.has("needles"), kept.has("loss")) == (True, False)
    assert load(tmp_path, {"top_k": [512]}) is None
    assert RecallResult.__struct_fields__[0] == "beyond"
