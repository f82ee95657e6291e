"""Checks `quantization_config`: only one kind of quantised safetensors can be read.

It is DeepSeek-V3's (README_WEIGHTS.md of github.com/deepseek-ai/DeepSeek-V3): `X.weight` in e4m3 and
`X.weight_scale_inv` with one scale for each 128 x 128 block. The files say which tensors are stored so: a tensor in
another dtype is read as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError

SCALE_SUFFIX = "_scale_inv"
_SIDE = 128
_ALLOWED: Mapping[str, tuple[object, ...]] = {
    "fmt": (None, "e4m3"),
    "activation_scheme": (None, "dynamic"),
    "scale_fmt": (None, "float", "ue8m0"),
    "dequantize": (None, False, True),  # for transformers; here a setting of the engine decides
}
_BLOCKED = re.compile(
    r".*\.(q_proj|k_proj|v_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj"
    r"|indexer\.(wq_b|wk)|gate_proj|up_proj|down_proj)\.weight"
)
"""Tensors that DeepSeek stores in FP8. Routers, head weights, norms, embeddings and MTP projections are not among them."""
_FREE = ("quant_method", "weight_block_size", "modules_to_not_convert")


def check_quantisation(raw: Mapping[str, Any], where: str) -> bool:
    """Whether a config.json's object announces FP8 weights in 128 x 128 blocks.

    Raises:
        CheckpointError: it announces another kind of quantisation.
    """
    found = raw.get("quantization_config")
    if not found:
        return False
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{where} has quantization_config {found!r}, which is not an object")
    method = found.get("quant_method")
    fault = None
    if method != "fp8":
        fault = f"quant_method {method!r}"
    elif found.get("weight_block_size") != [_SIDE, _SIDE]:
        fault = f"weight_block_size {found.get('weight_block_size')!r}"
    for key, allowed in _ALLOWED.items():
        if fault is None and found.get(key) not in allowed:
            fault = f"{key} {found[key]!r}"
    for key, value in found.items():
        if fault is None and key not in (*_ALLOWED, *_FREE) and value is not None:
            fault = f"{key} {value!r}"
    if fault is not None:
        raise CheckpointError(
            f"{where} describes quantised weights with {fault}, which are not supported; of quantised safetensors "
            f"only fp8 (e4m3) in {_SIDE} x {_SIDE} blocks is: use such a checkpoint, the unquantised one, "
            "or a GGUF file of the model"
        )
    return True


def published_in_blocks(name: str) -> bool:
    """Whether DeepSeek stores the tensor with this name in FP8 blocks."""
    return _BLOCKED.fullmatch(name) is not None
