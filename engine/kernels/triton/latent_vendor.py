"""Sparse decodes over FP8 latents by FlashMLA's kernel for Hopper, where `sgl-flash-mla` is installed.

Nothing needs it: `engine.kernels.triton.latent_attention` computes the same. For a number of rows it is used if a trial says
so, at the first call with so many: its numbers agree with ours, and it takes less time on the same cache. Its rows of 656
bytes are ours (`engine.memory.layouts.LatentLayout`). It has no dense rows of FP8 latents with a bfloat16 key, so those stay
ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from engine.kernels.capture import captured

_log = logging.getLogger(__name__)

PACKAGE = "flash_mla"
HEADS = (64, 128)
"""Heads that its kernel is compiled for."""
TOKENS = 64
"""A selection's width is a multiple of this."""
MOST_ROWS = 256
"""Of a step of decodes; it is not tried for more."""
MOST_ERROR = 1e-2
"""Relative, of bfloat16: what it may differ from ours; 4e-3 is usual."""
LEAST_GAIN = 1.05
"""Our time over its time from which on it is used. Below, a repeated trial might say the other thing."""

Attend = Callable[[], Tensor]


class FlashMla:
    """Its kernel, and how it splits batches of each size."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._plans: dict[tuple[torch.device, tuple[int, ...], int], Any] = {}

    def attend(self, query: Tensor, plane: Tensor, tokens: Tensor, scale: float) -> Tensor:
        """Attention of rows to their tokens; 0 for a row without any.

        Args:
            query: [T, H, 576] bfloat16
            plane: [num_pages, 64, 656] uint8
            tokens: [T, K] int32, page times 64 plus offset; -1 for none
            scale: of the products

        Returns:
            [T, H, 512] bfloat16
        """
        key = (query.device, tuple(query.shape), tokens.shape[1])
        # A plan is of shapes alone, since all rows count as K tokens long. Its tensors outlive any graph.
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._module.get_mla_metadata()[0]
        out, _ = self._module.flash_mla_with_kvcache(
            query[:, None], plane[:, :, None], None, None, 512, plan, softmax_scale=scale, is_fp8_kvcache=True,
            indices=tokens[:, None], use_legacy=True,
        )  # fmt: skip
        attended: Tensor = out[:, 0]
        return attended


@cache
def installed() -> FlashMla | None:
    """FlashMLA with its kernels for Hopper; None, and a warning if it is there but does not load."""
    if find_spec(PACKAGE) is None:
        return None
    try:
        module = import_module(PACKAGE)
        if not module.has_legacy():
            raise ImportError("it has no kernels for Hopper")
    except Exception as error:
        _log.warning("FlashMLA is installed, but not used: %s", error)
        return None
    return FlashMla(module)


def takes(query: Tensor, plane: Tensor, width: int) -> bool:
    """Whether its kernel computes these: shapes and strides as `FlashMla.attend` says, on Hopper."""
    return (
        query.device.type == "cuda"
        and query.dtype == torch.bfloat16
        and query.shape[1] in HEADS
        and query.shape[2] == 576
        and 0 < len(query) <= MOST_ROWS
        and plane.dtype == torch.uint8
        and plane.shape[1:] == (64, 656)
        and plane.stride()[1:] == (656, 1)
        and width > 0
        and width % TOKENS == 0
        and torch.cuda.get_device_capability(query.device)[0] == 9
    )


class Trials:
    """Which batches the vendor's kernel is right and faster for. Each is tried once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], bool] = {}

    def passed(self, key: tuple[Any, ...], compared: Callable[[], tuple[Attend, Attend]]) -> bool:
        """Whether it is to be used for a batch.

        Args:
            key: of the batch: device, rows, heads, width
            compared: what computes the same, ours first. Not called for a key that is known
        """
        known = self._known.get(key)
        if known is None:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return False  # the first call was not tried; nothing can be timed now
            known = self._known[key] = _is_better(key, *compared())
        return known


def _is_better(key: tuple[Any, ...], ours: Attend, theirs: Attend) -> bool:
    try:
        wanted, got = ours().float(), theirs().float()
        error = float((got - wanted).norm() / wanted.norm())
        if not error < MOST_ERROR:
            _log.warning("FlashMLA is not used for %s: its difference is %.2g", key, error)
            return False
        gain = microseconds(ours) / microseconds(theirs)
    except Exception as failure:
        _log.warning("FlashMLA is not used for %s: %s", key, failure)
        return False
    used = gain >= LEAST_GAIN
    _log.info("FlashMLA is %s for %s: our time is %.2f of its", "used" if used else "not used", key, gain)
    return used


def microseconds(attend: Attend, calls: int = 4, replays: int = 8) -> float:
    """The median time of a call in a CUDA graph, as steps are served."""
    device = torch.device("cuda", torch.cuda.current_device())

    def several() -> Tensor:
        return [attend() for _ in range(calls)][-1]

    graph, _ = captured(several, device, torch.cuda.graph_pool_handle())
    times: list[float] = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return sorted(times)[replays // 2]
