"""Tiny random checkpoints of the DeepSeek family, written by transformers, and what transformers says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
)

VOCAB = 101

FAMILIES: dict[str, tuple[type, type]] = {
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "deepseek_v32": (DeepseekV32Config, DeepseekV32ForCausalLM),
    "glm_moe_dsa": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM),
}

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 64,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 640,
    "initializer_range": 0.1,
    "rope_parameters": YARN,
    "tie_word_embeddings": False,
}
# Many heads: a score is exactly 0 where all of them are, and transformers leaves open which of equals it takes.
INDEX = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 24}


def tiny_deepseek(family: str, folder: Path, seed: int = 0, **changes: Any) -> Any:
    """Write a random model of `family` as Hugging Face does; norms and biases are random too."""
    config_type, model_type = FAMILIES[family]
    settings = {**SIZES, **({} if family == "deepseek_v3" else INDEX), **changes}
    torch.manual_seed(seed)
    model = model_type(config_type(**settings, attn_implementation="eager")).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            tensor.data = 0.1 * torch.randn_like(tensor)
        elif name.endswith("k_norm.bias"):
            tensor.data = 0.5 * torch.randn_like(tensor)
        elif "norm" in name:
            tensor.data = 1 + 0.3 * torch.randn_like(tensor)
        elif "indexer" in name or name.endswith("gate.weight"):
            tensor.data = 0.5 * torch.randn_like(tensor)
    model.save_pretrained(folder)
    return model


def oracle(model: Any, tokens: Sequence[int]) -> Tensor:
    """Logits of the whole sequence at once: [T, vocab]."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits
