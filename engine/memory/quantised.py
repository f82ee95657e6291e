"""Weights of 4 and 8 bits: numbers of a few bits, and a scale (and an offset) that neighbours in a row share.

These are the formats of checkpoints (GGUF's Q4_0, Q4_1, Q8_0) and of what is quantised here. How the kernels lay such
numbers out is theirs (`engine.kernels.native.packed`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

GROUP = 32
"""Neighbours in a row that share a scale."""

Kind = Literal["bf16", "q4", "q8"]
"""How a weight is held: plain, in 4 bits with offsets, in 8 bits without."""


@dataclass(frozen=True)
class Quantised:
    """A matrix as a checkpoint stores it: value = scale * number + offset, of 32 neighbours in a row together."""

    numbers: npt.NDArray[Any]  # [out, in]: uint8 of 0 to 15, or int8 where there are no offsets
    scales: npt.NDArray[np.float16]  # [out, in / 32]
    offsets: npt.NDArray[np.float16] | None  # likewise; None with signed bytes

    @property
    def kind(self) -> Kind:
        """How it is packed."""
        return "q8" if self.offsets is None else "q4"


def quantise_4bit(weight: Tensor) -> Quantised:
    """The nearest that GGUF's Q4_1 has: [out, in] floats, each group of 32 between its least and its largest."""
    groups = weight.float().view(len(weight), -1, GROUP)
    least, largest = groups.amin(-1), groups.amax(-1)
    offsets = least.half()
    scales = ((largest - offsets.float()) / 15).half()
    # A group of equal numbers has a scale of 0; its numbers are then all the offset.
    steps = (groups - offsets.float().unsqueeze(-1)) / scales.float().clamp_min(1e-30).unsqueeze(-1)
    numbers = steps.round().clamp(0, 15).to(torch.uint8).flatten(1)
    return Quantised(numbers.numpy(), scales.numpy(), offsets.numpy())


def quantise_8bit(weight: Tensor) -> Quantised:
    """The nearest that GGUF's Q8_0 has: [out, in] floats, each group of 32 by its largest size."""
    groups = weight.float().view(len(weight), -1, GROUP)
    scales = (groups.abs().amax(-1) / 127).half()
    steps = groups / scales.float().clamp_min(1e-30).unsqueeze(-1)
    numbers = steps.round().clamp(-127, 127).to(torch.int8).flatten(1)
    return Quantised(numbers.numpy(), scales.numpy(), None)
