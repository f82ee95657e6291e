"""Floors: their arithmetic on cases that are worked out by hand, and the command's report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.quantisation import published_in_blocks
from engine.errors import ConfigError
from engine.models import read_config
from engine.protocol import IndexerInfo
from lab.inspect.__main__ import app
from lab.inspect.ceilings import CEILINGS, Ceilings, ceilings_of
from lab.inspect.roofline import Asked, floor, positions
from lab.inspect.work import HeldModel, Operation, StepRows, operations
from lab.tool import start
from tests.kit import ROOT

CONFIG = ROOT / "engine" / "models" / "mla" / "configs" / "deepseek-v3.2.json"
K = 1024
H200 = CEILINGS["H200"]
ROUND = Ceilings("round", "for tests", memory=1e12, bf16=1e15, fp8=2e15, float32=1e13, link=1e11)


def deepseek(devices: int = 1, cache: str = "fp8", **changes: Any) -> HeldModel:
    raw = json.loads(CONFIG.read_text()) | changes
    shape = read_config(raw, "config.json").shape(None)
    blocks = published_in_blocks if cache == "fp8" else lambda name: False
    return HeldModel(shape, devices, torch.bfloat16, cache, blocks)


def named(held: HeldModel, rows: StepRows) -> dict[str, Operation]:
    found: dict[str, Operation] = {}
    for one in operations(held, rows):
        assert one.name not in found
        found[one.name] = one
    return found


def test_a_sparse_decode_at_128k_reads_every_index_key_and_2048_latents() -> None:
    done = named(deepseek(), StepRows(16, 1, 128 * K - 1, 2048, 16))
    pairs = 16 * 128 * K
    assert done["index scores"].num_bytes == pairs * (132 + 4) + 16 * 64 * (128 + 4)
    assert done["index scores"].flops == {"fp8": 2 * 64 * 128 * pairs}
    assert done["selection"].num_bytes == 4 * pairs + 4 * 16 * 2048
    chosen = 16 * 2048
    assert done["sparse attention"].num_bytes == chosen * (656 + 4) + 16 * 128 * (576 + 512) * 2
    assert done["sparse attention"].flops == {"bf16": 2 * 128 * (576 + 512) * chosen}
    assert "dense attention" not in done
    assert done["cache writes"].num_bytes == 16 * 656
    assert done["index key writes"].num_bytes == 16 * 132
    assert done["attn.q_b"].flops == {"fp8": 2 * 24576 * 1536 * 16}
    assert done["attn.q_b"].num_bytes == 24576 * 1536 + 4 * 192 * 12 + 2 * 16 * (24576 + 1536)
    assert done["head"].num_bytes == 2 * (129280 + 16) * 7168 + 4 * 16 * 129280
    assert (done["attn.q_b"].layers, done["moe.gate"].layers, done["mlp.down"].layers) == (61, 58, 3)
    assert done["moe.gate"].flops == {"float32": 2 * 256 * 7168 * 16}


def test_experts_that_no_row_visits_are_not_read() -> None:
    """One row of 8 among 256 experts reads 8 of them; 16 rows are expected to hit 256 (1 - (1 - 1/32)^16)."""
    whole = 2048 * 7168 + 4 * 16 * 56  # bytes of one expert's down projection with its scales
    alone = named(deepseek(), StepRows(1, 1, 0, None))["moe.experts_down"]
    assert alone.num_bytes == pytest.approx(8 * whole + 7168 * 2)
    assert alone.flops == {"fp8": 2 * 8 * 2048 * 7168}
    many = named(deepseek(), StepRows(16, 1, 0, None))["moe.experts_down"]
    assert many.num_bytes == pytest.approx(256 * (1 - (31 / 32) ** 16) * whole + 16 * 7168 * 2)
    split = named(deepseek(8), StepRows(16, 1, 0, None))["moe.experts_down"]
    assert split.num_bytes - 16 * 7168 * 2 == pytest.approx((many.num_bytes - 16 * 7168 * 2) / 8)
    assert split.flops["fp8"] == many.flops["fp8"] / 8


def test_dense_prompts_take_the_cheaper_form() -> None:
    prompt = named(deepseek(), StepRows(1, 512, 128 * K, None))
    pairs = sum(128 * K + i + 1 for i in range(512))
    expansion = 2 * 32768 * 512 * (128 * K + 512)
    assert prompt["dense attention, expanded"].flops == {"bf16": 2 * 128 * (192 + 128) * pairs + expansion}
    assert "attn.kv_b" not in prompt
    decode = named(deepseek(), StepRows(16, 1, 128 * K, None))
    assert decode["dense attention"].flops == {"bf16": 2 * 128 * (576 + 512) * 16 * (128 * K + 1)}
    assert decode["attn.kv_b"].flops == {"bf16": 2 * 32768 * 512 * 16}
    assert "index scores" not in decode
    assert "indexer.wq" not in decode
    assert "indexer.wk" in decode


def test_rows_up_to_top_k_are_dense() -> None:
    done = named(deepseek(), StepRows(1, 512, 2048 - 256, 2048))
    scored = sum(2048 + i + 1 for i in range(256))
    assert done["index scores"].flops == {"fp8": 2 * 64 * 128 * scored}
    assert done["indexer.wq"].flops["bf16"] == 2 * 8192 * 1536 * 256
    assert done["indexer.wk"].flops["bf16"] == 2 * 128 * 7168 * 512
    assert any(name.startswith("dense attention") for name in done)
    assert (
        named(deepseek(), StepRows(1, 512, 0, 2048)).keys()
        == named(deepseek(), StepRows(1, 512, 0, None)).keys()
    )


def test_layers_that_share_a_selection_do_not_score() -> None:
    """Four layers share one: freq 4, offset 3 lets layers 0 to 2 and each fourth after them score."""
    done = named(deepseek(index_topk_freq=4, index_skip_topk_offset=3), StepRows(16, 1, 64 * K, 2048))
    scoring = sum(max(i - 2, 0) % 4 == 0 for i in range(61))
    assert done["index scores"].layers == done["selection"].layers == done["indexer.wq"].layers == scoring
    assert done["sparse attention"].layers == 61


def test_a_plain_cache_and_plain_weights() -> None:
    done = named(deepseek(cache="bfloat16"), StepRows(16, 1, 8 * K - 1, 2048))
    assert done["attn.o"].flops.keys() == {"bf16"}
    assert done["index scores"].flops.keys() == {"bf16"}
    assert done["index scores"].num_bytes == 16 * (8 * K * (256 + 4) + 64 * (256 + 4))
    assert done["sparse attention"].num_bytes == 16 * (2048 * (1152 + 4) + 128 * 1088 * 2)


def test_tensor_parallel_devices_add_up_their_sums() -> None:
    one, eight = (named(deepseek(n), StepRows(64, 1, 8 * K, 2048)) for n in (1, 8))
    assert "all-reduce" not in one
    assert eight["all-reduce"].sent == 2 * 7 / 8 * 64 * 7168 * 2
    assert eight["all-reduce"].layers == 122
    assert eight["sparse attention"].flops["bf16"] == one["sparse attention"].flops["bf16"] / 8
    assert eight["index scores"] == one["index scores"]  # every device selects by itself


def test_a_window_bounds_what_is_read() -> None:
    raw = {
        "model_type": "mistral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 1024, "max_position_embeddings": 8192,
    }  # fmt: skip
    family = read_config(raw, "config.json")
    held = HeldModel(family.shape(None), 1, torch.bfloat16, "bfloat16", lambda name: False)
    done = named(held, StepRows(3, 1, 4096, None, 3))["dense attention, window 1024"]
    assert done.flops == {"bf16": 2 * 4 * 32 * 3 * 1024}
    assert done.num_bytes == 3 * (1024 * 2 * 2 * 16 * 2 + 4 * 32 * 2)
    indexer = IndexerInfo(num_heads=2, head_dim=8, rope_dim=4, default_index_top_k=256, source="x")
    sparse = HeldModel(family.shape(indexer), 1, torch.bfloat16, "bfloat16", lambda name: False)
    scores = named(sparse, StepRows(3, 1, 4096, 256, 3))["index scores, window 1024"]
    assert scores.flops == {"bf16": 2 * 2 * 8 * 3 * 1024}
    assert not any(name.startswith("index scores") for name in named(sparse, StepRows(3, 1, 4096, 1024, 3)))


def test_a_floor_is_the_larger_of_bytes_and_arithmetic() -> None:
    one = Operation("x", 3, 1e9, {"bf16": 1e12, "fp8": 1e12})
    assert one.seconds(ROUND) == pytest.approx(3 * 1.5e-3)  # both share the matrix units
    assert one.bound(ROUND) == "arithmetic"
    assert Operation("x", 1, 2e9, {"bf16": 1e12}).bound(ROUND) == "memory"
    assert Operation("x", 1, 1e9, {"float32": 2e10}).seconds(ROUND) == pytest.approx(2e-3)
    assert Operation("x", 1, 1e6, sent=1e9).bound(ROUND) == "link"
    slow = CEILINGS["A100"]
    assert Operation("x", 1, 0.0, {"fp8": slow.bf16}).seconds(slow) == pytest.approx(1.0)


def test_cost_is_seconds_of_a_token_times_the_price() -> None:
    found = floor(deepseek(), H200, "decode", 128 * K, 16, 2048)
    assert found.seconds == pytest.approx(sum(one.seconds(H200) for one in found.operations))
    assert found.usd(2.0) == pytest.approx(found.seconds / 16 * 1e6 / 3600 * 2)
    dense = floor(deepseek(), H200, "decode", 128 * K, 16, None)
    assert 1 < dense.seconds / found.seconds < 10


def test_positions_and_errors() -> None:
    assert positions(4096) == [0, 1024, 2048, 4096]
    assert positions(4095) == [0, 1024, 2048]
    assert positions(1023) == [0]
    with pytest.raises(ConfigError, match="lower --chunk"):
        positions(-1)
    with pytest.raises(ConfigError, match="price is 0 USD an hour; it must be above 0"):
        Asked(1, 512, 0, 0.0)
    assert ceilings_of("NVIDIA H200") is H200
    assert ceilings_of("NVIDIA GeForce RTX 4090") is None


@pytest.mark.process  # matplotlib may ask for fonts
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "roofline.png"
    flags = [
        "--roofline",
        "--gpu",
        "h200",
        "--devices",
        "8",
        "--device-memory",
        "141GiB",
        "--context",
        "131072",
    ]
    assert (
        start(app, "inspect", ["deepseek-v3.2", *flags, "--concurrency", "16", "--json", "--plot", str(plot)])
        == 0
    )
    found = json.loads(capsys.readouterr().out)["roofline"]
    assert (found["devices"], found["usd_per_hour"], found["weights"], found["cache"]) == (
        8,
        16.0,
        "fp8",
        "fp8",
    )
    assert len(found["steps"]) == 2 * 2 * 9  # phases, kinds, 0 and 1K to 128K
    last = found["steps"][-1]
    assert (last["phase"], last["attention"], last["position"], last["tokens"]) == (
        "prefill",
        "sparse",
        128 * K,
        512,
    )
    assert last["seconds"] == pytest.approx(sum(one["seconds"] for one in last["operations"]))
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert start(app, "inspect", ["deepseek-v3.2", *flags]) == 0
    text = capsys.readouterr().out
    assert "decode: 1 requests, one token each" in text
    assert "Floor on 8 x NVIDIA H200: 4.3 TB/s, 794 TFLOP/s bf16, 1,350 FP8" in text
    assert "prefill, sparse, at 131,072, on one device" in text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--gpu", "X1"], "error: --gpu is 'X1'; expected one of H200, "),
        ([], "error: the ceilings of this machine's CPU are not known; name a device with --gpu"),
    ],
)
def test_what_cannot_be_asked(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert start(app, "inspect", ["deepseek-v3.2", "--roofline", *flags]) == 2
    assert capsys.readouterr().err.startswith(sentence)
