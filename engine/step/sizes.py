"""How much a step and the cache hold: what the config says, else what suits the device."""

from __future__ import annotations

import msgspec
import torch

from engine.config import PAGE_SIZE, EngineConfig
from engine.errors import ConfigError

_CPU_CACHE = 1 << 30
_CPU_MOST = 4 << 30  # for one request of a model with a long context, in float32
_CUDA_SHARE = 0.85
"""Of the free memory for the cache: the rest is for what a step computes and for graphs."""


class Sizes(msgspec.Struct, frozen=True):
    """The sizes of one engine."""

    token_budget: int  # tokens computed in one step, prefill and decode together
    max_running: int  # requests in one step


def sizes_of(config: EngineConfig, device: torch.device) -> Sizes:
    """The sizes of a step. A CPU is busy with few rows; a GPU reads its weights for 256 streams as fast as for one."""
    cuda = device.type == "cuda"
    budget = config.token_budget or max(2048 if cuda else 512, config.max_running or 1)
    return Sizes(budget, config.max_running or min(256 if cuda else 64, budget))


def num_pages(
    config: EngineConfig, device: torch.device, page_bytes: int, max_model_len: int, max_running: int
) -> int:
    """How many pages the cache has, asked once the weights are loaded.

    Without `kv_cache_bytes`: 1 GiB on a CPU, and for a model on several devices, or up to 4 GiB if one request needs more
    than 1; on one GPU 85 % of what is free, but no more than all running requests can use.

    Args:
        config: the engine's
        device: of the cache
        page_bytes: of one page, all layers
        max_model_len: positions of a request
        max_running: requests in one step

    Raises:
        ConfigError: one request of `max_model_len` positions does not fit.
    """
    size = config.kv_cache_bytes
    if size is None:
        one_request = -(-max_model_len // PAGE_SIZE) * page_bytes
        size = one_request if _CPU_CACHE < one_request <= _CPU_MOST else _CPU_CACHE
        if device.type == "cuda" and config.tensor_parallel == 1:
            free, _ = torch.cuda.mem_get_info(device)
            most = max_running * (-(-max_model_len // PAGE_SIZE) + 1) * page_bytes
            size = min(int(_CUDA_SHARE * free), most)
    pages, needed = size // page_bytes, -(-max_model_len // PAGE_SIZE)
    if pages < needed:
        raise ConfigError(
            f"the KV cache of {size} bytes holds {pages * PAGE_SIZE} tokens, but one request "
            f"may use {max_model_len}; give it at least {needed * page_bytes} bytes or lower max_model_len"
        )
    return pages
