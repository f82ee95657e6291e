"""A recipe is fitted into a time; the distance from dense is that of its definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engine.errors import ConfigError
from lab.distill.recipe import Recipe, read_recipe
from lab.distill.run import DistillPlan, run
from lab.distill.sequences import CorpusSplit
from lab.distill.sparse_forward import by_student, by_window, final_rows
from lab.distill.timing import TRIAL_STEPS, fitted
from lab.distill.train import StepLog, Trainer
from lab.distill.validate import Validation, except_in
from tests.engine.kit import VOCAB
from tests.lab.distill.kit import Bench, one_thread, write_corpus


def test_a_recipe_is_fitted_into_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"dense": 0.5, "sparse": 2.0}

    class Timed:
        def __init__(self, recipe: Recipe) -> None:
            self.recipe = recipe

        def run(self, on_step: object, *, save_every: int) -> None:
            assert self.recipe.total_steps == TRIAL_STEPS < save_every
            for step in range(TRIAL_STEPS):
                stage, _, _ = self.recipe.stage(step)
                took = 99.0 if step == 0 else seconds[stage]
                on_step(StepLog(step=step, stage=stage, rate=1, loss=[], recall=[], tokens=1, seconds=took))  # type: ignore[operator]

    recipe = Recipe(warmup_steps=200, sparse_steps=50)  # takes 100 + 100 seconds
    made = fitted(recipe, 50.0, lambda own, folder: Timed(own))  # type: ignore[arg-type,return-value]
    assert (made.warmup_steps, made.sparse_steps) == (50, 12)


def test_a_trial_trains_neither_the_student_nor_the_folder(tmp_path: Path) -> None:
    with one_thread():
        bench = Bench(tmp_path / "model")
        split = CorpusSplit.open(write_corpus(tmp_path / "corpus"), "train", VOCAB)
        recipe = Recipe(
            max_length=200, min_length=100, rows=8, first_row=8, sequences_per_step=1, warmup_steps=100,
            sparse_steps=100, sparse_top_k=(16,), report_top_k=16,
        )  # fmt: skip

        def trainer(own: Recipe, folder: Path) -> Trainer:
            return Trainer(bench.trunk, bench.student(), split, own, folder)

        made = fitted(recipe, 3600.0, trainer)
    assert made.warmup_steps == pytest.approx(made.sparse_steps, abs=2)  # the same number was asked for
    assert made.warmup_steps > 100


def test_the_distance_is_kl_and_agreement_over_the_rows(tmp_path: Path) -> None:
    with one_thread():
        bench = Bench(tmp_path)
        ids = torch.randint(0, VOCAB, (203,), generator=torch.Generator().manual_seed(0))
        rows = torch.tensor([50, 150, 199, 202])  # the last is cut off: lengths are multiples of 8
        validation = Validation(bench.trunk, [(ids, rows)])
        select = by_student(bench.student(), 24)
        found = validation.measure(select)
        with torch.no_grad():
            dense, sparse = (
                bench.trunk.logits(final_rows(bench.trunk, ids[:200], own)[rows[:3]]).log_softmax(-1)
                for own in (None, select)
            )
        expected = F.kl_div(sparse, dense, log_target=True, reduction="none").sum(-1).mean()
        assert found.kl == pytest.approx(float(expected), rel=1e-4)
        assert found.agreement == pytest.approx(float((sparse.argmax(-1) == dense.argmax(-1)).float().mean()))
        layers = frozenset(range(bench.trunk.config.num_layers))
        same = validation.measure(except_in(layers, by_window(5)))
        assert same.kl == pytest.approx(0, abs=1e-5)
        assert validation.measure(except_in(frozenset({0}), by_window(5))).kl > 0.01


def test_a_run_that_continues_keeps_the_steps_that_it_began_with(tmp_path: Path) -> None:
    with one_thread():
        bench = Bench(tmp_path / "model")
        corpus = write_corpus(tmp_path / "corpus")
        recipe = {
            "max_length": 200, "min_length": 100, "rows": 8, "first_row": 8, "sequences_per_step": 1,
            "warmup_steps": 3, "sparse_steps": 1, "sparse_top_k": [16], "report_top_k": 16,
        }  # fmt: skip
        plan = DistillPlan(
            weights=bench.folder, corpus=corpus, out=tmp_path / "out", heads=3, dim=16, rope=8, device="cpu",
            evaluate_kind=0, recipe=json.dumps(recipe), minutes=1e-4,
        )  # fmt: skip
        assert run(plan) == 0
        kept = (tmp_path / "out" / "recipe.json").read_text()
        steps = read_recipe(kept).total_steps
        assert len((tmp_path / "out" / "log.jsonl").read_bytes().splitlines()) == steps
        assert run(plan) == 0
    assert (tmp_path / "out" / "recipe.json").read_text() == kept
    assert len((tmp_path / "out" / "log.jsonl").read_bytes().splitlines()) == steps


def test_an_adapters_steps_are_not_timed(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "model")
    plan = DistillPlan(
        weights=bench.folder, corpus=write_corpus(tmp_path / "corpus"), out=tmp_path / "out", device="cpu",
        recipe='{"adapt_steps": 3, "max_length": 600}', minutes=1,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="leave it out, or adapt_steps"):
        run(plan)
