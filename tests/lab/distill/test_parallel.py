"""Training on several devices: the same run as on one, up to rounding; a process that dies does not leave others waiting."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from engine.parallel.ranks import Ranks
from lab.distill.parallel import shares, sum_gradients
from tests.kit import ROOT
from tests.lab.distill.kit import Bench, write_corpus

RECIPE = {
    "max_length": 96, "min_length": 40, "rows": 16, "first_row": 8, "sequences_per_step": 3, "warmup_steps": 3,
    "sparse_steps": 3, "learning_rate": 1e-3, "ramp_steps": 2, "sparse_top_k": [8, 16], "report_top_k": 12,
}  # fmt: skip


@given(lengths=st.lists(st.integers(1, 32_768), max_size=20), count=st.integers(1, 8))
def test_each_sequence_has_one_rank_and_no_rank_could_give_its_last_one_away(
    lengths: list[int], count: int
) -> None:
    made = shares(lengths, count)
    assert len(made) == count
    assert sorted(index for own in made for index in own) == list(range(len(lengths)))
    tokens = [sum(lengths[i] for i in own) for own in made]
    for own, total in zip(made, tokens, strict=True):
        assert own == sorted(own)
        if own:
            assert total - min(lengths[i] for i in own) <= min(tokens)


def test_a_gradient_that_one_rank_lacks_counts_as_zeros() -> None:
    first, second = (torch.zeros(shape, requires_grad=True) for shape in ((2, 3), (4,)))
    first.grad = torch.arange(6.0).view(2, 3)
    sum_gradients([first, second], Ranks(0, 2, lambda x: 2 * x + 1))
    assert torch.equal(first.grad, 2 * torch.arange(6.0).view(2, 3) + 1)
    assert second.grad is not None
    assert torch.equal(second.grad, torch.ones(4))
    alone = torch.zeros(2, requires_grad=True)
    sum_gradients([alone], Ranks())
    assert alone.grad is None


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    model = tmp_path_factory.mktemp("model")
    Bench(model)
    return model, write_corpus(tmp_path_factory.mktemp("corpus"), train=(60, 96, 41, 80, 96, 50))


def distill(
    folders: tuple[Path, Path], out: Path, devices: int, *flags: str
) -> subprocess.CompletedProcess[str]:
    model, corpus = folders
    sizes = ["--heads=3", "--dim=16", "--rope=8", "--default-top-k=16", "--evaluate-kind=0", "--device=cpu"]
    command = [sys.executable, "-m", "lab.distill", str(model), f"--corpus={corpus}", f"--out={out}"]
    command += [*sizes, f"--recipe={json.dumps(RECIPE)}", f"--devices={devices}", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, check=False)


def log(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.process
def test_two_devices_make_the_run_that_one_makes_also_with_a_stop_between(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    assert distill(folders, tmp_path / "one", 1).returncode == 0
    for flags in (("--until=2",), ()):
        done = distill(folders, tmp_path / "two", 2, *flags)
        assert done.returncode == 0, done.stderr
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [line["step"] for line in two] == list(range(6))
    for ours, theirs in zip(two, one, strict=True):
        assert (ours["stage"], ours["tokens"], ours["rate"]) == (
            theirs["stage"],
            theirs["tokens"],
            theirs["rate"],
        )
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["recall"] == pytest.approx(theirs["recall"], rel=1e-3)
    first, second = (load_file(tmp_path / name / "indexer.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert "error" not in done.stderr


@pytest.mark.process
def test_what_is_wrong_is_said_once(folders: tuple[Path, Path], tmp_path: Path) -> None:
    few = distill(folders, tmp_path / "few", 4)
    assert few.returncode == 1
    assert "--devices is 4, but the recipe has fewer sequences_per_step" in few.stderr
    assert distill(folders, tmp_path / "other", 1, "--until=1").returncode == 0
    other = distill(folders, tmp_path / "other", 2, "--default-top-k=17", "--heads=2")
    assert other.returncode == 1
    assert other.stderr.count("error:") == 1, other.stderr
    assert "was made with another indexer" in other.stderr


DYING = """
import functools, sys, time, torch
from lab.distill.parallel import together
def device(rank): return torch.device("cpu")
def member(ranks): sys.exit(3)  # before it has left the group
if __name__ == "__main__":
    with together(2, device, member) as ranks:
        ranks.sum(torch.ones(1))
        time.sleep(60)
"""


@pytest.mark.process
def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=50, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "ended with status 3" in done.stderr or "onnection" in done.stderr
