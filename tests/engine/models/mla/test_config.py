"""The DeepSeek family's config and weight table against checkpoints that transformers writes, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.loader import load
from engine.checkpoint.source import open_source
from engine.errors import CheckpointError
from engine.models import read_config
from engine.models.mla.config import MlaConfig
from engine.models.mla.family import Mla
from engine.models.mla.weights import mtp_table, weight_table
from tests.engine.models.mla.kit import FAMILIES, SIZES, YARN, tiny_deepseek

PUBLISHED: dict[str, Any] = {  # DeepSeek-V3.2's sizes, as its inference code and config give them
    "model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"], "vocab_size": 129280,
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
    "first_k_dense_replace": 3, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
    "num_nextn_predict_layers": 1, "rope_theta": 10000, "tie_word_embeddings": False,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
        "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip


def read(**changes: Any) -> MlaConfig:
    raw = {key: value for key, value in {**PUBLISHED, **changes}.items() if value != "absent"}
    family = read_config(raw, "config.json")
    assert isinstance(family, Mla)
    return family.config


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_names_every_tensor_that_transformers_writes(family: str, tmp_path: Path) -> None:
    tiny_deepseek(family, tmp_path)
    source = open_source(tmp_path)
    config = MlaConfig.read(source.config, "config.json")
    weights, report = load(weight_table(config), source, dtype=torch.float32, device=torch.device("cpu"))
    assert report.unused == ()
    assert config.moe_layers == (False, True, True)
    assert weights["layers.1.moe.experts_gate_up"].shape == (16 * 2 * 24, 64)


def test_a_config_that_transformers_wrote_reads_as_it_was_meant(tmp_path: Path) -> None:
    for family in FAMILIES:
        tiny_deepseek(family, tmp_path / family)
        config = MlaConfig.read(open_source(tmp_path / family).config, "config.json")
        assert config.architecture == family
        assert config.rope_theta == 10000.0
        assert config.rope_scaling == {k: v for k, v in YARN.items() if k != "rope_theta"}
        assert (config.num_layers, config.latent_dim, config.qk_head_dim) == (3, 40, 24)
        assert (config.indexer is None) == (family == "deepseek_v3")
        if config.indexer is not None:
            assert config.indexer.rope_interleaved == (family == "glm_moe_dsa")
            assert config.indexer.index_top_k == 24


def test_the_published_config() -> None:
    config = read()
    assert sum(config.moe_layers) == 58
    assert config.index_layers == (True,) * 61
    assert config.indexer is not None
    assert config.indexer.index_top_k == 2048
    assert config.num_mtp_layers == 1
    table = weight_table(config)
    assert table["layers.3.moe.experts_gate_up"].names[:3] == (
        "model.layers.3.mlp.experts.0.gate_proj.weight",
        "model.layers.3.mlp.experts.0.up_proj.weight",
        "model.layers.3.mlp.experts.1.gate_proj.weight",
    )
    assert table["layers.0.attn.kv_b"].shape == (32768, 512)
    assert table["layers.0.mlp.gate_up"].shape == (36864, 7168)
    drafts = mtp_table(config, 0)
    assert drafts["eh_proj"].names == ("model.layers.61.eh_proj.weight",)
    assert drafts["indexer.wk"].names == ("model.layers.61.self_attn.indexer.wk.weight",)
    assert all(name.startswith("model.layers.61.") for weight in drafts.values() for name in weight.names)


def test_the_table_counts_the_published_parameters() -> None:
    """DeepSeek-V3 has 671 billion (its report, section 1). V3.2 has 14 million more in each layer, for its indexer."""

    def count(config: MlaConfig) -> float:
        total = 0
        for weight in weight_table(config).values():
            rows, columns = (*weight.shape, 1)[:2]
            total += rows * columns
        return total / 1e9

    dense = read(model_type="deepseek_v3")
    assert count(dense) == pytest.approx(671.0, abs=0.1)
    assert count(read()) - count(dense) == pytest.approx(61 * 13.96e-3, rel=1e-3)


def test_index_sharing_follows_the_config() -> None:
    glm = {"model_type": "glm_moe_dsa", "num_hidden_layers": 12}
    assert read(**glm).index_layers == (True,) * 12
    by_frequency = read(**glm, index_topk_freq=4, index_skip_topk_offset=3).index_layers
    full = FAMILIES["glm_moe_dsa"][0](
        **{**SIZES, "num_hidden_layers": 12}, index_topk_freq=4, index_skip_topk_offset=3
    ).indexer_types
    assert by_frequency == tuple(kind == "full" for kind in full)
    assert True in by_frequency[1:]
    assert False in by_frequency
    pattern = "FSSF" * 3
    assert read(**glm, index_topk_pattern=pattern).index_layers == tuple(c == "F" for c in pattern)
    listed = ["full", "shared"] * 6
    assert read(**glm, indexer_types=listed).index_layers == (True, False) * 6
    # V3.2 checkpoints have an indexer in every layer; the same keys switch some of them off
    assert read(index_topk_freq=2, index_skip_topk_offset=1).index_layers[:4] == (True, False, True, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": "absent"}, "config.json lacks 'kv_lora_rank', which a deepseek_v32 model needs"),
        ({"hidden_size": "7168"}, "hidden_size '7168', which is not a positive integer"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'.*'silu' only"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax'.*'sigmoid' only"),
        ({"topk_method": "greedy"}, "topk_method 'greedy'.*'noaux_tc' only"),
        ({"attention_bias": True}, "sets attention_bias"),
        ({"attention_bias": "no"}, "attention_bias 'no', which is not true or false"),
        ({"num_key_value_heads": 8}, "8 key heads for 128 query heads"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2, but only 1"),
        ({"n_group": 3}, "256 experts do not make 3 equal groups"),
        ({"topk_group": 9}, "topk_group is 9, but there are 8 groups"),
        ({"topk_group": 1, "num_experts_per_tok": 33}, "num_experts_per_tok is 33.*hold 32"),
        ({"mlp_layer_types": ["dense"]}, "not a list of dense or sparse for each of the 61 layers"),
        ({"index_topk_pattern": "F"}, "not a list of full or shared for each of the 61 layers"),
        ({"index_topk_pattern": "S" * 61}, "layer 0 share"),
        ({"qk_rope_head_dim": 63}, "needs it even"),
        ({"index_head_dim": 32}, "first 64 dims are to be rotated"),
        ({"q_lora_rank": None}, "no q_lora_rank"),
        ({"model_type": "deepseek_v9"}, "'deepseek_v9', which is not supported; supported: deepseek_v3"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_in_a_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(**changes)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tiny_deepseek("deepseek_v32", tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    for key, value in {"num_hidden_layers": 4, "mlp_layer_types": None, "layer_types": None}.items():
        raw[key] = value
    file.write_text(json.dumps(raw))
    source = open_source(tmp_path)
    table = weight_table(MlaConfig.read(source.config, "config.json"))
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.3\.input_layernorm\.weight and"):
        load(table, source, dtype=torch.float32, device=torch.device("cpu"))
