"""The solver, the fit, and the whole calibration of a small model."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import numpy as np
import pytest

from engine.checkpoint.source import open_source
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.plan.cost import CostModel, ModelShape, assumed_coefficients, read_calibration
from engine.plan.tiles import TileCosts
from engine.step.build import build
from lab.calibrate.__main__ import app
from lab.calibrate.fit import fit, modelled, nonnegative_least_squares
from lab.calibrate.steps import Bench, cases, features
from lab.tool import start
from server.hub.models import resolve
from tests.engine.kit import random_overlay, tiny_checkpoint

SHAPE = ModelShape(
    row_flops=200_000_000, sparse_row_flops=9_000_000, head_flops=50_000_000, pair_flops=69_000,
    index_pair_flops=31_000, weight_bytes=280 << 20, kv_token_bytes=23_040, index_token_bytes=3840,
)  # fmt: skip
TILES = TileCosts(budget_bytes=64 << 20, index_row_bytes=32, attention_row_bytes=36, token_bytes=768)


def model() -> CostModel:
    return CostModel(SHAPE, assumed_coefficients(SHAPE, "cpu"), TILES)


def test_the_solver_finds_the_best_that_is_not_negative() -> None:
    generator = np.random.default_rng(0)
    bound = 0
    for _ in range(50):
        matrix = generator.normal(size=(30, 6))
        target = matrix @ generator.normal(size=6) + generator.normal(size=30)
        x = nonnegative_least_squares(matrix, target)
        gradient = matrix.T @ (target - matrix @ x)
        assert (x >= 0).all()
        assert gradient.max() < 1e-6  # no coefficient that is 0 would lower the error if it grew
        assert np.abs(gradient[x > 0]).max(initial=0.0) < 1e-6  # the others are at their minimum
        bound += int((x == 0).sum())
    assert bound > 50


def test_units_of_work_are_the_cost_models_own() -> None:
    own, bench = model(), Bench(None, None, 100, 512)  # type: ignore[arg-type]
    made = cases(8192, 1000, 512, 64, 512)
    assert {case.kind for case in made} == {
        "dense prefill", "dense decode", "sparse prefill", "sparse decode"
    }  # fmt: skip
    assert 0.2 < sum(case.held_out for case in made) / len(made) < 0.5
    for case in made:
        plan = bench.plan(case)
        assert modelled(own.coefficients, features(own, plan)) == pytest.approx(own.seconds(plan))
        pages = [page for request in plan.requests for page in request.page_ids]
        assert len(set(pages)) == len(pages) == case.pages


def test_the_fit_finds_the_coefficients_in_noise_and_outliers() -> None:
    random.seed(2)
    own, bench = model(), Bench(None, None, 100, 512)  # type: ignore[arg-type]
    rows = [features(own, bench.plan(case)) for case in cases(8192, 1000, 512, 64, 512)]
    true = msgspec.structs.replace(own.coefficients, head=0.004)
    seconds = [modelled(true, row) * random.gauss(1, 0.02) for row in rows]
    for i in range(0, len(seconds), 12):
        seconds[i] *= 2.5  # as if other work disturbed the step
    found = fit(rows, seconds)
    errors = sorted(abs(modelled(found, row) / modelled(true, row) - 1) for row in rows)
    assert errors[len(errors) // 2] < 0.02
    assert errors[-1] < 0.1
    assert found.row == pytest.approx(true.row, rel=0.1)


def test_a_calibration_is_written_and_read_by_the_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "model", tmp_path / "made" / "cost.json"
    tiny_checkpoint(folder)
    overlay = random_overlay(tmp_path / "indexer.safetensors", open_source(folder))
    arguments = [
        str(folder), f"--overlay={overlay}", f"--out={out}", "--quick", "--device=cpu", "--dtype=float32", "--kv-cache-memory=16000000"
    ]  # fmt: skip
    assert start(app, "calibrate", arguments) == 0
    printed = capsys.readouterr()
    assert "steps that were not fitted" in printed.out
    assert "one request, sparse and dense" in printed.out
    assert "measuring steps" in printed.err
    written = read_calibration(out)
    assert written.steps > 5
    assert 0 <= written.median_error <= written.worst_error
    assert set(written.dense_errors) == {640}
    config = EngineConfig(
        weights=str(folder), overlay=str(overlay), device="cpu", dtype="float32", kv_cache_bytes=16_000_000,
        cost_calibration=str(out),
    )  # fmt: skip
    built = build(config)
    assert built.ready.model.cost_model == "measured"
    assert built.costs.coefficients == written.coefficients
    with pytest.raises(ConfigError, match="measured with another dtype; run dsa calibrate"):
        build(msgspec.structs.replace(config, dtype="bfloat16"))
    with pytest.raises(ConfigError, match="measured with other kernels; run dsa calibrate"):
        build(msgspec.structs.replace(config, kernels="reference"))
    out.write_text("{}")
    with pytest.raises(ConfigError, match="is not a cost calibration"):
        build(config)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--context=9999"], "context is 9999, but this model has 640 positions"),
        (["--top-k=640"], "with top_k 640 nothing is sparse up to the longest context measured, 640"),
        (["--out=."], ". is a folder; name a file"),
    ],
)
def test_what_cannot_be_measured_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    folder, out = tmp_path / "model", tmp_path / "cost.json"
    tiny_checkpoint(folder)
    overlay = random_overlay(tmp_path / "indexer.safetensors", open_source(folder))
    given = [str(folder), f"--overlay={overlay}", f"--out={out}", "--kv-cache-memory=16000000"]
    assert start(app, "calibrate", [*given, "--device=cpu", "--dtype=float32", *arguments]) == 1
    assert f"error: {sentence}" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sparse_request_tells_what_a_dense_one_costs(tmp_path: Path, default_model: Path) -> None:
    """The estimate from the sparse run is near the time of the same request run dense, at 2K and at 8K.

    Times are CPU time on one thread, the least of some rounds for each step, with sparse and dense in turns. On a machine that
    does nothing else the error is 3 %. Neighbours who share the memory's rate slow a dense step more than a sparse one,
    and change while the steps are measured: 16 % was seen. So a second calibration is made if the first is beyond 10 %, and
    the better one may be off by 25 %. A term that is left out of the model, or counted twice, is off by more.
    """
    files, out = resolve(), tmp_path / "cost.json"
    arguments = [str(files.weights), f"--overlay={files.overlay}", f"--out={out}"]
    worst: list[float] = []
    while len(worst) < 2 and min(worst, default=1.0) >= 0.10:
        assert start(app, "calibrate", [*arguments, "--cpu-time", "--rounds=4"]) == 0
        errors = read_calibration(out).dense_errors
        print(errors)
        assert set(errors) == {2048, 8192}
        worst.append(max(map(abs, errors.values())))
    assert min(worst) < 0.25
