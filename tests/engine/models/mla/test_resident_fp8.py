"""FP8 weights that stay FP8 in memory: the same model as the dequantised one, in fewer bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.checkpoint.loader import Weight, load
from engine.checkpoint.source import open_source
from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError, EngineError
from engine.layers import linear as module
from engine.layers.linear import Parameters, linear
from engine.memory.blocks import E4M3, BlockWeight
from engine.models.mla.config import MlaConfig
from engine.models.mla.weights import weight_table
from engine.step.build import build
from tests.engine.checkpoint.test_fp8 import NAME, QUANTISATION, change, quantise_folder
from tests.engine.kit import Lab, Run, tiny_checkpoint
from tests.engine.models.mla.kit import VOCAB, tiny_deepseek

CPU = torch.device("cpu")
TOKENS = torch.randint(0, VOCAB, (80,), generator=torch.Generator().manual_seed(2)).tolist()
# Several blocks in every direction, edges too; experts of whole blocks, as the published ones are.
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "n_routed_experts": 8,
    "q_lora_rank": 136, "kv_lora_rank": 200, "num_attention_heads": 16, "num_key_value_heads": 16,
    "num_hidden_layers": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resident") / "tiny"
    tiny_deepseek("deepseek_v32", path, **SIZES)
    quantise_folder(path)
    return path


def block_weight(*shape: int) -> BlockWeight:
    g = torch.Generator().manual_seed(len(shape))
    scales = torch.rand(*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128), generator=g) + 0.5
    return BlockWeight((torch.randn(*shape, generator=g) * 100).clamp(-448, 448).to(E4M3), scales)


def run(folder: Path, **settings: Any) -> Run:
    lab = Lab(folder, kv_cache_dtype="bf16", indexer_dtype="bf16", **settings)
    made = lab.run(budget=32)
    made.submit("a", TOKENS, max_tokens=6, index_top_k=24)
    return made.finish()


def logits(made: Run) -> Tensor:
    hidden = torch.stack([made.rows["a"][position][-1] for position in sorted(made.rows["a"])])
    return made.lab.logits(hidden)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2.0**-8)])
def test_logits_are_those_of_the_dequantised_model(folder: Path, dtype: str, bound: float) -> None:
    resident, plain = (run(folder, dtype=dtype, weight_dtype=kind) for kind in ("fp8", "plain"))
    assert resident.lab.built.weights.fp8_bytes > 0
    assert plain.lab.built.weights.fp8_bytes == 0
    found, wanted = logits(resident), logits(plain)
    assert len(found) >= len(TOKENS) + 5
    assert (found - wanted).abs().max() <= bound * wanted.abs().max()
    assert resident.tokens == plain.tokens


def test_bytes_in_memory(folder: Path) -> None:
    config = MlaConfig.read(open_source(folder).config, "config.json")
    weights, report = load(
        weight_table(config), open_source(folder), dtype=torch.bfloat16, device=CPU, fp8=True
    )
    held = {name: w.num_bytes if isinstance(w, BlockWeight) else w.nbytes for name, w in weights.items()}
    assert report.num_bytes == sum(held.values())
    in_fp8 = {name: w for name, w in weights.items() if isinstance(w, BlockWeight)}
    assert report.fp8_bytes == sum(held[name] for name in in_fp8)
    numbers = sum(math.prod(w.shape) for w in in_fp8.values())
    assert numbers < report.fp8_bytes < 1.001 * numbers
    # All of a layer but what the model takes apart, the indexer, and what is not stored in FP8.
    kinds = {name.split(".", 2)[2] for name in in_fp8}
    experts = {"experts_gate_up", "experts_down", "shared_gate_up", "shared_down"}
    assert kinds == {
        "attn.q_a", "attn.q_b", "attn.kv_a", "attn.o", "mlp.gate_up", "mlp.down", *(f"moe.{e}" for e in experts)
    }  # fmt: skip
    plain_fp8 = [
        held[f"layers.{i}.{name}"] for i in (0, 1) for name in ("attn.kv_b", "indexer.wq", "indexer.wk")
    ]
    assert report.dequantised_bytes == sum(plain_fp8)
    assert str(report) == (
        f"weights: {report.num_bytes:,} bytes, of which {report.fp8_bytes:,} stay in FP8 blocks, "
        f"{sum(plain_fp8):,} were dequantised from them"
    )


def test_what_shares_a_block_with_another_is_made_plain(tmp_path: Path) -> None:
    """Two experts of 24 rows would share a block, which has one scale, so they are dequantised."""
    tiny_deepseek("deepseek_v32", tmp_path / "tiny", num_hidden_layers=2)
    quantise_folder(tmp_path / "tiny")
    resident, plain = (run(tmp_path / "tiny", weight_dtype=kind) for kind in ("fp8", "plain"))
    weights = resident.lab.built.weights
    assert weights.fp8_bytes > 0
    assert weights.dequantised_bytes > 4 * 16 * 3 * 24 * 64
    torch.testing.assert_close(logits(resident), logits(plain), rtol=1e-5, atol=1e-5)


def test_auto_dequantises_on_the_cpu(folder: Path) -> None:
    built = build(EngineConfig(weights=str(folder), device="cpu", dtype="float32"))
    assert built.weights.fp8_bytes == 0
    assert built.weights.dequantised_bytes > 0


def test_fp8_is_refused_where_nothing_is_stored_so(tmp_path: Path) -> None:
    tiny_deepseek("deepseek_v3", tmp_path / "plain", num_hidden_layers=2)
    with pytest.raises(ConfigError, match="weight_dtype is fp8, but plain .* has no weights in FP8 blocks"):
        build(EngineConfig(weights=str(tmp_path / "plain"), device="cpu", weight_dtype="fp8"))
    path = tmp_path / "plain" / "config.json"  # one that announces them, and still has none
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": QUANTISATION}))
    with pytest.raises(ConfigError, match="weight_dtype is fp8, but plain .* has no weights in FP8 blocks"):
        build(EngineConfig(weights=str(tmp_path / "plain"), device="cpu", weight_dtype="fp8"))
    tiny_checkpoint(tmp_path / "llama")
    with pytest.raises(
        ConfigError, match="weight_dtype is fp8, but llama .* is a llama model, whose weights"
    ):
        build(EngineConfig(weights=str(tmp_path / "llama"), device="cpu", weight_dtype="fp8"))


@pytest.mark.parametrize("part", ["", "_scale_inv"])
def test_nan_is_named(tmp_path: Path, part: str) -> None:
    path = tmp_path / "tiny"
    tiny_deepseek("deepseek_v32", path, kv_lora_rank=200, hidden_size=160, num_hidden_layers=2)
    quantise_folder(path)
    values, scales = torch.ones(208, 160).to(E4M3), torch.ones(2, 2)
    if part:
        scales[1, 1] = 3e38  # finite, but times 448 it is not
    else:
        values.view(torch.uint8)[1, 1] = 0xFF
    change(path, NAME + part, scales if part else values)
    with pytest.raises(CheckpointError, match=f"NaN or infinite values in tensor {NAME} "):
        load(
            {"w": Weight((NAME,), (208, 160), may_stay_fp8=True)}, open_source(path),
            dtype=torch.float32, device=CPU, fp8=True,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_in_groups_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = block_weight(450, 200)
    x = torch.randn(3, 5, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = F.linear(x, weight.dequantise(dtype))
    made: list[int] = []
    dequantise = BlockWeight.dequantise

    def counted(self: BlockWeight, dtype: torch.dtype) -> Tensor:
        made.append(self.shape[0])
        return dequantise(self, dtype)

    monkeypatch.setattr(BlockWeight, "dequantise", counted)
    for at_once, rows in ((1, [128, 128, 128, 66]), (256 * 200, [256, 194]), (1 << 24, [450])):
        monkeypatch.setattr(module, "PLAIN_AT_ONCE", at_once)
        made.clear()
        torch.testing.assert_close(linear(x, weight), wanted)
        assert made == rows


def test_slices_are_whole_blocks() -> None:
    weight = block_weight(300, 400)
    plain = weight.dequantise(torch.float32)
    assert torch.equal(weight.rows(128, 256).dequantise(torch.float32), plain[128:256])
    assert torch.equal(weight.rows(256, 300).dequantise(torch.float32), plain[256:])
    assert torch.equal(weight.columns(256, 400).dequantise(torch.float32), plain[:, 256:])
    for start, stop in ((1, 128), (0, 100), (128, 128), (256, 384)):
        with pytest.raises(
            EngineError, match=rf"{start} to {stop} of 300 numbers are not whole blocks of 128"
        ):
            weight.rows(start, stop)


def test_several_weights_one_below_the_other() -> None:
    weight = block_weight(3 * 256, 200)
    several = weight.view(-1, 256, 200)
    assert several.shape == (3, 256, 200)
    plain = weight.dequantise(torch.float32).view(3, 256, 200)
    assert torch.equal(several[1].dequantise(torch.float32), plain[1])
    assert torch.equal(several.rows(128, 256)[2].dequantise(torch.float32), plain[2, 128:])
    with pytest.raises(EngineError, match="cannot be viewed"):
        weight.view(-1, 192, 200)


def test_a_block_weight_is_no_plain_tensor() -> None:
    with pytest.raises(EngineError, match=r"parameter layers\.0\.norm is in FP8 blocks"):
        Parameters({"layers.0.norm": block_weight(128, 128)}, "layers.0.")("norm")
