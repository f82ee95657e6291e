"""What suits a device, and what the config says instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.step.sizes import num_pages, sizes_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("given", "cpu", "cuda"),
    [
        ({}, (512, 64), (2048, 256)),
        ({"token_budget": 8}, (8, 8), (8, 8)),
        ({"max_running": 3000}, (3000, 3000), (3000, 3000)),
        ({"token_budget": 100, "max_running": 7}, (100, 7), (100, 7)),
    ],
)
def test_a_step(given: dict[str, Any], cpu: tuple[int, int], cuda: tuple[int, int]) -> None:
    config = EngineConfig(weights="", **given)
    for device, wanted in ((CPU, cpu), (CUDA, cuda)):
        sizes = sizes_of(config, device)
        assert (sizes.token_budget, sizes.max_running) == wanted


def test_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = EngineConfig(weights="")
    assert num_pages(auto, CPU, 1 << 20, 640, 64) == 1024
    assert num_pages(auto, CPU, 1 << 20, 2000 * 64, 64) == 2000, "one request needs more than 1 GiB"
    with pytest.raises(ConfigError, match="give it at least"):
        num_pages(auto, CPU, 1 << 20, 5000 * 64, 64)
    free = 40 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    assert num_pages(auto, CUDA, 1 << 20, 640, 64) == 64 * 11, "more could not be used"
    assert num_pages(auto, CUDA, 1 << 20, 1 << 17, 64) == int(0.85 * 40 * 1024)
    several = EngineConfig(weights="", tensor_parallel=2)
    assert num_pages(several, CUDA, 1 << 20, 640, 64) == 1024
    free = 1 << 20
    with pytest.raises(
        ConfigError, match="holds 0 tokens, but one request may use 640; give it at least 10485760"
    ):
        num_pages(auto, CUDA, 1 << 20, 640, 64)
