"""Random weights: they stand for the files of the same model, and load as these do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.loader import load
from engine.checkpoint.part import Slice
from engine.checkpoint.random_weights import RandomSource
from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError
from engine.memory.blocks import BlockWeight
from engine.models import read_config
from engine.plan.types import SampleSpec, ScheduledRequest, StepPlan
from engine.protocol import SamplingParams
from engine.step.build import build

CPU = torch.device("cpu")
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
TINY: dict[str, Any] = {
    "model_type": "deepseek_v32", "vocab_size": 300, "hidden_size": 128, "intermediate_size": 256,
    "moe_intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "q_lora_rank": 128,
    "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 16,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "index_n_heads": 4, "index_head_dim": 32, "index_topk": 16, "max_position_embeddings": 256,
    "num_nextn_predict_layers": 1, "quantization_config": FP8,
}  # fmt: skip


def source_of(config: dict[str, Any]) -> RandomSource:
    shape = read_config(config, "config.json").shape(None)
    return RandomSource(config, [*shape.table.values(), *shape.mtp.values()], CPU)


def test_a_tensor_keeps_the_size_of_what_it_multiplies() -> None:
    plain = {key: value for key, value in TINY.items() if key != "quantization_config"}
    name = "model.layers.1.self_attn.o_proj.weight"
    for config in (TINY, plain):
        source = source_of(config)
        made = source.read(name, torch.float32)
        assert tuple(made.shape) == source.shape(name) == (128, 128)
        assert made.std() == pytest.approx(128**-0.5, rel=0.5)  # FP8's scale is rounded to a power of two
        assert made.isfinite().all()
    assert (source.read("model.norm.weight", torch.float32) == 1).all()
    assert (source.read("model.layers.0.self_attn.indexer.k_norm.bias", torch.float32) == 0).all()
    with pytest.raises(CheckpointError, match="have no tensor nothing"):
        source.shape("nothing")


def test_formats_are_the_published_ones() -> None:
    source = source_of(TINY)
    blocks = {name for name in source.names() if source.in_blocks(name)}
    at = "model.layers.1."
    assert {f"{at}mlp.experts.3.up_proj.weight", f"{at}self_attn.kv_b_proj.weight"} <= blocks
    assert not blocks & {"model.embed_tokens.weight", f"{at}mlp.gate.weight", f"{at}input_layernorm.weight"}
    weight = source.read_blocks(f"{at}self_attn.q_a_proj.weight")
    assert weight.scales.log2().frac().eq(0).all()
    assert len(weight.values.view(torch.uint8).unique()) > 100


def test_a_name_has_the_same_numbers_again_and_others_have_others() -> None:
    one, two = source_of(TINY), source_of(TINY)
    at = "model.layers.1.mlp.experts.{}.gate_proj.weight"
    assert torch.equal(one.read(at.format(0), torch.bfloat16), two.read(at.format(0), torch.bfloat16))
    assert not torch.equal(one.read(at.format(0), torch.bfloat16), one.read(at.format(1), torch.bfloat16))


def test_parts_make_the_whole() -> None:
    source, name = source_of(TINY), "model.layers.0.mlp.gate_proj.weight"
    halves = [source.read_part(name, Slice(0, at, at + 128), torch.float32) for at in (0, 128)]
    assert torch.equal(torch.cat(halves), source.read(name, torch.float32))
    blocks = source.read_blocks(name, Slice(0, 128, 256))
    assert torch.equal(blocks.dequantise(torch.float32), halves[1])


def test_the_loader_keeps_blocks() -> None:
    table = read_config(TINY, "config.json").shape(None).table
    weights, report = load(table, source_of(TINY), dtype=torch.bfloat16, device=CPU, fp8=True)
    assert isinstance(weights["layers.1.moe.experts_down"], BlockWeight)
    assert report.fp8_bytes > 0


def folder_of(path: Path, **changes: Any) -> Path:
    (path / "config.json").write_text(json.dumps(TINY | changes))
    return path


@pytest.mark.parametrize("drafter", ["off", "mtp"])
def test_an_engine_runs_on_a_config_alone(tmp_path: Path, drafter: Any) -> None:
    config = EngineConfig(
        weights=str(folder_of(tmp_path)), load_format="dummy", device="cpu", dtype="float32", drafter=drafter,
        kv_cache_bytes=8 << 20,
    )  # fmt: skip
    built = build(config)
    assert built.ready.model.random_weights
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
    request = ScheduledRequest(
        request_id="r", token_ids=tuple(range(100)), start=0, page_ids=(0, 1), index_top_k=16,
        sample=SampleSpec(params=sampling, output_index=0, prompt_len=100, history=()),
    )  # fmt: skip
    hidden = built.runner.hidden(StepPlan(requests=(request,)))
    assert hidden.isfinite().all()
    assert 0.1 < hidden.std() < 10


def test_a_llama_needs_no_rows(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 100,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            }
        )
    )  # fmt: skip
    config = EngineConfig(weights=str(tmp_path), load_format="dummy", device="cpu", kv_cache_bytes=8 << 20)
    assert build(config).ready.model.num_layers == 2


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        build(EngineConfig(weights=str(tmp_path / "none"), load_format="dummy", device="cpu"))
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        build(EngineConfig(weights=str(tmp_path), load_format="dummy", device="cpu"))
    with pytest.raises(ValueError, match="no overlay fits them"):
        EngineConfig(weights="x", load_format="dummy", overlay="y")
