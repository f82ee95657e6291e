"""The FP8 cache and indexer in the engine: equal to the formula, the same however rows are cut, near full precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention.mla import LatentAttention, Projected
from engine.checkpoint.source import open_source
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.step.build import build
from tests.engine.checkpoint.test_fp8 import quantise_folder
from tests.engine.kit import Lab, Run, tiny_checkpoint
from tests.engine.models.mla.kit import VOCAB, tiny_deepseek

TOP_K, RANK = 24, 200
TOKENS = torch.randint(0, VOCAB, (150,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("precision") / "tiny"
    tiny_deepseek("deepseek_v32", path, kv_lora_rank=RANK)
    return path


def run(folder: Path, budget: int = 64, **settings: Any) -> Run:
    lab = Lab(folder, **settings)
    lab.sparse = True
    made = lab.run(budget=budget)
    made.submit("a", TOKENS, max_tokens=8, index_top_k=TOP_K)
    return made.finish()


def hidden(made: Run) -> Tensor:
    return torch.stack([made.rows["a"][position][0] for position in range(len(TOKENS))])


def round_trip(cached: Tensor) -> Tensor:
    """FlashMLA's quantiser in float64: a power-of-two scale of at least 1e-4 for each 128; the key in bfloat16."""
    made = cached.double()
    for at in range(0, RANK, 128):
        part = made[:, at : min(at + 128, RANK)]
        scale = torch.exp2((part.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-4).log2().ceil())
        part.copy_((part / scale).float().to(torch.float8_e4m3fn).double() * scale)
    made[:, RANK:] = cached[:, RANK:].bfloat16().double()
    return made.to(cached.dtype)


@pytest.mark.parametrize("form", ["gather", "mask"])
def test_the_fp8_cache_is_the_latent_after_a_round_trip(
    folder: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(folder, kv_cache_dtype="fp8", sparse_form=form)
    plain = run(folder, sparse_form=form)
    project = LatentAttention.project

    def simulated(self: LatentAttention, *args: Any) -> Projected:
        rows = project(self, *args)
        return Projected(rows.query, round_trip(rows.cached), rows.query_latent)

    monkeypatch.setattr(LatentAttention, "project", simulated)
    wanted = run(folder, sparse_form=form)
    torch.testing.assert_close(hidden(found), hidden(wanted), rtol=1e-5, atol=1e-5)
    assert found.tokens == wanted.tokens
    assert (hidden(found) - hidden(plain)).abs().max() > 1e-3  # it does change something


@pytest.mark.parametrize("budget", [16, 150])
def test_fp8_hardly_depends_on_the_cutting(folder: Path, budget: int) -> None:
    """If rows are cut differently, float32's last digits change. Then e4m3 may round to the other side, which changes a
    number by a sixteenth. A wrong page or position would change the result a hundred times as much."""
    settings: dict[str, Any] = {"kv_cache_dtype": "fp8", "indexer_dtype": "fp8"}
    one, other = run(folder, **settings), run(folder, budget=budget, **settings)
    assert (hidden(one) - hidden(other)).norm() < 1e-3 * hidden(one).norm()
    assert one.tokens == other.tokens


def test_the_fp8_indexer_selects_nearly_the_same(folder: Path) -> None:
    """It compares the first layer, where the inputs are the same. An untrained indexer of 16 dims selects 24 tokens of up
    to 150."""
    plain, low = run(folder), run(folder, indexer_dtype="fp8")
    shares = []
    for position in range(TOP_K, len(TOKENS)):
        key = (TOP_K, *TOKENS[: position + 1])
        wanted, found = (set(made.selected[key][0].tolist()) for made in (plain, low))
        shares.append(len(wanted & found) / TOP_K)
    assert sum(shares) / len(shares) > 0.95
    assert min(shares) < 1


@pytest.mark.parametrize(
    ("kv", "index", "stored"),
    [
        ("auto", "auto", (RANK + 8) * 4 + 16 * 4),
        ("bf16", "bf16", (RANK + 8) * 2 + 16 * 2),
        ("fp8", "fp8", RANK + 2 * 4 + 8 * 2 + 16 + 4),
    ],
)
def test_bytes_a_token(folder: Path, kv: str, index: str, stored: int) -> None:
    built = Lab(folder, kv_cache_dtype=kv, indexer_dtype=index).built
    assert built.ready.capacity.page_bytes == 3 * 64 * stored


def test_the_published_model_takes_656_and_132_bytes() -> None:
    from engine.attention.precision import Precision

    asked = Precision("fp8", "fp8")
    assert asked.latent({}, 512, 64, torch.bfloat16).spec.token_bytes == 656
    assert asked.index({}, 128, torch.bfloat16).spec(frozenset({0})).token_bytes == 132


def test_auto_follows_the_checkpoint(tmp_path: Path) -> None:
    tiny_deepseek("deepseek_v32", tmp_path / "tiny", kv_lora_rank=RANK)
    quantise_folder(tmp_path / "tiny")
    assert open_source(tmp_path / "tiny").config["quantization_config"]
    found = Lab(tmp_path / "tiny")
    assert found.built.ready.capacity.page_bytes == 3 * 64 * (RANK + 2 * 4 + 8 * 2 + 16 + 4)


@pytest.mark.parametrize(("name", "value"), [("kv_cache_dtype", "fp8"), ("indexer_dtype", "bf16")])
def test_a_llama_has_no_other_precision(tmp_path: Path, name: str, value: str) -> None:
    tiny_checkpoint(tmp_path)
    settings: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=f"{name} is {value}, but a llama model keeps its cache in its own"):
        build(EngineConfig(weights=str(tmp_path), device="cpu", dtype="float32", **settings))


def test_an_index_vector_that_cannot_be_rotated(tmp_path: Path) -> None:
    tiny_deepseek("deepseek_v32", tmp_path, index_head_dim=24)
    with pytest.raises(ConfigError, match="index vectors of 24 numbers cannot be kept in FP8"):
        Lab(tmp_path, indexer_dtype="fp8")
