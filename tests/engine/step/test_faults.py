"""Real faults in a real engine: each ends the requests that it touches with one clear error, and no other."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.attention.batch import build_batch
from engine.kernels import native
from engine.kernels.interface.selection import EMPTY, OUTSIDE, REPEATED, SHORT
from engine.plan.types import Sampled, ScheduledRequest, StepPlan
from engine.protocol import SELECTION_FLAWS
from engine.step.faults import names_of, with_flaws
from tests.engine.kit import VOCAB, Lab, Run, base_of, random_overlay, tiny_checkpoint

SPOILT = 5  # a token whose embedding is not a number
CLEAN = [token for token in range(VOCAB) if token != SPOILT]


def prompt(seed: int, length: int = 90) -> list[int]:
    numbers = torch.randint(0, len(CLEAN), (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [CLEAN[number] for number in numbers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("spoilt")
    tiny_checkpoint(made, hidden_size=96, intermediate_size=160, head_dim=32)
    random_overlay(made / "indexer.st", base_of(made), heads=4, dim=32, rope=16)
    return made


@pytest.fixture(scope="module")
def lab(folder: Path) -> Lab:
    made = Lab(folder, folder / "indexer.st")
    made.tap._model.embed[SPOILT] = math.nan  # type: ignore[attr-defined]  # in memory: the loader refuses such files
    return made


def finished(lab: Lab, *prompts: list[int], index_top_k: int | None = 16) -> Run:
    run = lab.run(caching=False)
    for number, tokens in enumerate(prompts):
        run.submit(str(number), tokens, 6, index_top_k)
    return run.finish()


def said(run: Run, name: str) -> tuple[str | None, str | None]:
    return run.ends[name].finish_reason, run.ends[name].error


def test_a_weight_that_is_not_a_number(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    alone = finished(lab, prompt(1), index_top_k=None)
    run = finished(lab, [*prompt(0)[:40], SPOILT, *prompt(0)[41:]], prompt(1), index_top_k=None)
    reason, error = said(run, "0")
    assert reason == "error"
    assert error is not None
    assert "not finite" in error
    assert run.tokens["1"] == alone.tokens["0"]
    stats = run.core.stats()
    assert (stats.nonfinite_logits_total, sum(stats.invalid_selections_total)) == (1, 0)
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(told) == 1
    assert told[0].startswith("request 0 ends at step 1, with positions 0 to 89:")


FAULTS: dict[str, tuple[Callable[[Tensor], object], int]] = {
    "a position after the row's own": (lambda rows: rows[:, :1].fill_(200), SHORT | OUTSIDE),
    "a position of no page": (lambda rows: rows[:, :1].fill_(1 << 40), SHORT | OUTSIDE),
    "nothing": (lambda rows: rows.fill_(-1), EMPTY),
    "too few": (lambda rows: rows[:, :1].fill_(-1), SHORT),
    "one twice": (lambda rows: rows[:, :1].copy_(rows[:, 1:2]), SHORT | REPEATED),
}


@pytest.mark.parametrize("form", ["gather", "mask"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_selects_badly(
    folder: Path, fault: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab(folder, folder / "indexer.st", sparse_form=form)
    alone = finished(lab, prompt(1, 60))
    kernels, (change, flaws) = lab.tap._kernels._kernels, FAULTS[fault]
    healthy = kernels.select  # type: ignore[attr-defined]

    def bad(scores: Tensor, index_top_k: Tensor) -> Tensor:
        selected: Tensor = healthy(scores, index_top_k).clone()
        visible = (scores > -math.inf).sum(-1)
        rows = selected[visible > 85]  # of the longer prompt
        change(rows)
        selected[visible > 85] = rows
        return selected

    monkeypatch.setattr(kernels, "select", bad)
    run = finished(lab, prompt(0, 90), prompt(1, 60))
    named = " and ".join(names_of(flaws))
    assert said(run, "0") == ("error", f"a layer selected an invalid set of tokens to read ({named})")
    assert run.tokens["1"] == alone.tokens["0"]
    counted = dict(zip(SELECTION_FLAWS, run.core.stats().invalid_selections_total, strict=True))
    assert {name for name, count in counted.items() if count} == set(names_of(flaws))
    assert run.core.stats().failed_steps_total == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_indexer_that_is_not_a_number(folder: Path, dtype: str) -> None:
    """Without the sentinel the answer looks healthy: logits are finite, and only the selection is empty."""
    if dtype == "bfloat16" and native.library() is None:
        pytest.skip(str(native.missing()))
    lab = Lab(folder, folder / "indexer.st", dtype=dtype)
    lab.tap._model.layers[1].indexer.weights.k_norm_bias.fill_(math.nan)  # type: ignore[attr-defined]
    run = finished(lab, prompt(0), prompt(1, 16 - 6))  # the second is always dense
    reason, error = said(run, "0")
    assert reason == "error"
    assert error is not None
    assert "empty" in error
    assert said(run, "1") == ("length", None)


def test_any_row_of_a_request_ends_it() -> None:
    plan = StepPlan(
        requests=tuple(
            ScheduledRequest(
                request_id=str(i),
                token_ids=(1,) * rows,
                start=0,
                page_ids=(i,),
                index_top_k=None,
                sample=None,
            )
            for i, rows in enumerate((3, 1, 2))
        )
    )
    batch = build_batch(plan, torch.device("cpu"))
    healthy = tuple(Sampled(token_ids=(i,)) for i in range(3))
    assert with_flaws(batch, healthy) == healthy
    batch.flaws[0], batch.flaws[2], batch.flaws[5] = EMPTY, OUTSIDE, REPEATED
    assert [one.flaws for one in with_flaws(batch, healthy)] == [EMPTY | OUTSIDE, 0, REPEATED]
