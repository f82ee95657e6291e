"""What the engine's log and a calibration say about who computes a step: every operation, and only what is true."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.kernels import native
from engine.kernels.choice import load_backend
from engine.step import build as module
from engine.step.build import Built, build
from tests.engine.kit import base_of, random_overlay, tiny_checkpoint
from tests.engine.models.mla.kit import tiny_deepseek
from tests.interpreter import prepare

OPERATIONS = {"index scores", "selection", "attention", "products", "norms and rotation", "steps", "sampling"}
WHOLE: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32}
"""Sizes that the native step does."""
compiled = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def told(built: Built) -> dict[str, str]:
    """What is said of each operation."""
    assert built.kernels.startswith("kernels: ")
    said: dict[str, str] = {}
    for part in built.kernels.removeprefix("kernels: ").split("; "):
        names, _, what = part.partition(": ")
        assert what
        for name in names.split(", "):
            assert name not in said
            said[name] = what
    return said


def built_of(folder: Path, overlay: bool = True, dtype: str = "bfloat16", **more: Any) -> Built:
    own = str(random_overlay(folder / "indexer.safetensors", base_of(folder))) if overlay else None
    return build(
        EngineConfig(
            weights=str(folder), overlay=own, device="cpu", dtype=dtype,  # type: ignore[arg-type]
            max_model_len=128, kv_cache_bytes=8 << 20, **more,
        )
    )  # fmt: skip


@compiled
def test_a_whole_step_in_compiled_code(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, **WHOLE)
    built = built_of(tmp_path)
    said, level = told(built), f"compiled for {native.level()}"
    assert set(said) == OPERATIONS
    assert all(
        said[name] == level for name in ("index scores", "selection", "attention", "norms and rotation")
    )
    assert said["products"].startswith(level)
    assert (said["steps"], said["sampling"], built.backend) == ("one call each", "torch", "native")
    plain_keys = told(built_of(tmp_path, indexer_dtype="bf16"))
    assert plain_keys["steps"] == "one call each, with up to 32 rows, else torch's"
    dense = told(built_of(tmp_path, overlay=False))
    assert set(dense) == OPERATIONS - {"index scores", "selection"}


@compiled
@pytest.mark.parametrize("multiplies", [True, False])
def test_auto_is_bfloat16_where_that_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, multiplies: bool
) -> None:
    """A llama model's compiled steps are faster in bfloat16 on any CPU; torch's operations only on one that multiplies it."""
    monkeypatch.setattr(module, "cpu_multiplies_bfloat16", lambda: multiplies)
    llama, deepseek = tmp_path / "llama", tmp_path / "deepseek"
    tiny_checkpoint(llama)
    tiny_deepseek("deepseek_v32", deepseek)
    compiled = multiplies or native.library() is not None
    for folder, kernels, fast in (
        (llama, "auto", compiled), (llama, "torch", multiplies), (deepseek, "auto", multiplies)
    ):  # fmt: skip
        config = EngineConfig(weights=str(folder), kernels=kernels, device="cpu", kv_cache_bytes=16_000_000)  # type: ignore[arg-type]
        assert build(config).ready.model.dtype == ("bfloat16" if fast else "float32"), (folder, kernels)


def test_what_the_compiled_kernels_leave_to_torch(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    said = told(built_of(tmp_path, dtype="float32"))
    assert said["attention"] == "torch (the compiled kernels are for bfloat16)"
    assert said["selection"] == f"compiled for {native.level()}"  # scores are float32 in any model
    assert said["norms and rotation"] == "torch"
    assert said["products"].startswith("torch (packed weights are for the native kernels")


@pytest.mark.parametrize(("kernels", "what"), [("torch", "torch"), ("reference", "the reference")])
def test_other_backends(tmp_path: Path, kernels: str, what: str) -> None:
    tiny_checkpoint(tmp_path)
    built = built_of(tmp_path, dtype="float32", kernels=kernels)
    said = told(built)
    assert set(said) == OPERATIONS
    assert (said["index scores"], said["selection"], said["attention"], built.backend) == (
        what,
        what,
        what,
        kernels,
    )
    assert said["steps"] == "operation by operation"


@pytest.fixture
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend of a GPU with Triton, for a model that is built on the CPU and does not run."""
    prepare()
    monkeypatch.setattr(module, "choose_backend", lambda choice, device: load_backend("triton"))


@with_triton
@pytest.mark.usefixtures("_on_a_gpu")
def test_rows_in_triton(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    built = built_of(tmp_path, dtype="float32")
    said = told(built)
    assert set(said) == OPERATIONS
    assert all(
        said[name] == "Triton" for name in ("index scores", "selection", "attention", "norms and rotation")
    )
    assert "CUDA graphs" in said["steps"]
    assert said["sampling"] == "Triton, the usual ways as CUDA graphs"
    assert built.backend == "triton"
    drafting = told(built_of(tmp_path, dtype="float32", drafter="ngram"))
    assert drafting["sampling"] == "Triton, with penalties torch"


@with_triton
@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize("family", ["deepseek_v32", "deepseek_v3"])
def test_latents_in_triton(tmp_path: Path, family: str) -> None:
    tiny_deepseek(family, tmp_path)
    built = built_of(tmp_path, overlay=False, dtype="float32")
    said = told(built)
    own = {"attention", "norms and rotation", "experts"}
    own |= {"index scores", "selection"} if family == "deepseek_v32" else set()
    assert set(said) == own | {"products", "steps", "sampling"}
    assert all(said[name] == "Triton" for name in own)
    assert said["products"] == "torch"
    assert "CUDA graphs" in said["steps"]
    assert built.backend == "triton"


@with_triton
@pytest.mark.usefixtures("_on_a_gpu")
def test_models_without_rows_do_not_say_triton(tmp_path: Path) -> None:
    """The backend of the GPU is chosen, and torch computes: the log, the cost model and a calibration say torch."""
    tiny_checkpoint(tmp_path, kind="mistral", sliding_window=32)
    built = built_of(tmp_path, overlay=False, dtype="float32")
    said = told(built)
    assert set(said) == OPERATIONS - {"index scores", "selection"}
    assert all(what.startswith("torch") for name, what in said.items() if name not in ("steps", "sampling"))
    assert said["steps"] == "operation by operation"
    assert built.backend == "torch"


def test_latents_in_compiled_code(tmp_path: Path) -> None:
    kernels = load_backend("torch" if native.missing() else "native")
    if not kernels.streams_latents(torch.bfloat16, torch.bfloat16):
        pytest.skip("this processor has no products of bfloat16")
    tiny_deepseek("deepseek_v32", tmp_path)
    said = told(built_of(tmp_path, overlay=False))
    level = f"compiled for {native.level()}"
    assert (said["attention"], said["index scores"], said["selection"]) == (level, level, level)
    assert (said["products"], said["experts"]) == ("torch", "torch")
    assert (
        told(built_of(tmp_path, overlay=False, kv_cache_dtype="fp8", indexer_dtype="fp8"))["index scores"]
        == "torch"
    )
