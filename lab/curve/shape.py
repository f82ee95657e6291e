"""A layer of DeepSeek-V3.2 that fits on a small machine: the published shape with random weights, to measure speed only.

Attention is not scaled down: 128 heads over latents of 512 + 64, an indexer of 64 heads of 128 dims that selects
2048, hidden size 7168, query rank 1536. So for a pair of tokens the indexer does 1/17 of the arithmetic of the dense
attention that it replaces (64 x 128 against 128 x (576 + 512) multiply-adds), as published. These are smaller:

- layers: 1 of 61, a mixture of experts, as 58 of them are. All costs but the head's are costs of a layer.
- experts: 16 of 256. A token visits 8 and the shared one, all of the published size. But the streams of a decode step
  share the weights of 16 experts, where large published batches share 256.
- vocabulary: 4096 of 129280.
- numbers: bfloat16 for weights, cache and index, unless FP8 is asked for. DeepSeek serves FP8, which halves the indexer's
  part more than attention's.

Only the number format moves the context from which on sparse is cheaper; the other differences change both alike. But
they, and `streams`, change the ratio of a token's cost at 128K to that at 8K: the more streams share the weights, the
less a short context costs. Dense is the same model without selection, so it also computes and keeps index keys (0.2 % of
its arithmetic); the published dense model has no indexer.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

import torch

from engine.checkpoint.random_weights import RandomSource
from engine.models import read_config

_ONE_LAYER = {
    "num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0,
    "n_routed_experts": 16, "vocab_size": 4096,
}  # fmt: skip
_QUICK = {
    "hidden_size": 256, "q_lora_rank": 64, "num_attention_heads": 8, "num_key_value_heads": 8,
    "kv_lora_rank": 128, "index_n_heads": 4, "index_topk": 256, "moe_intermediate_size": 64,
    "vocab_size": 256,
}  # fmt: skip
"""Much smaller sizes, which only show that the command works."""


def config(*, quick: bool, fp8: bool = False) -> dict[str, Any]:
    """Return the model's config, as a config.json would have it. With `fp8` its weights are in FP8 blocks."""
    path = importlib.resources.files("engine").joinpath("models", "mla", "configs", "deepseek-v3.2.json")
    raw: dict[str, Any] = json.loads(path.read_text("utf-8")) | _ONE_LAYER | (_QUICK if quick else {})
    if not fp8:
        del raw["quantization_config"]
    return raw


def random_source(settings: Mapping[str, Any], device: torch.device) -> RandomSource:
    """Make a checkpoint of the model that the config `settings` describes."""
    return RandomSource(settings, read_config(settings, "config.json").shape(None).table.values(), device)
