"""Weights in 4 and 8 bits: numbers of a few bits, with a scale (and an offset) that neighbours in a row share.

Checkpoints have these formats (GGUF's Q4_0, Q4_1, Q8_0), and the functions here quantise to them.
`engine.kernels.native.packed` lays such numbers out for the kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

GROUP = 32
"""So many neighbours in a row share a scale."""

Kind = Literal["bf16", "q4", "q8", "q4_k", "q5_k", "q6_k"]
"""How a weight is held: plain bfloat16, 4 bits with offsets, 8 bits without offsets, or in super-blocks of 4 to 6 bits
(`engine.memory.superblocks`)."""


@dataclass(frozen=True)
class Quantised:
    """A matrix as a checkpoint stores it: value = scale * number + offset. 32 neighbours in a row share both."""

    numbers: npt.NDArray[Any]  # [out, in]: uint8 from 0 to 15 with offsets, else int8
    scales: npt.NDArray[np.float16]  # [out, in / 32]
    offsets: npt.NDArray[np.float16] | None  # [out, in / 32]; None if `numbers` is int8

    def arrays(self) -> tuple[npt.NDArray[Any] | None, ...]:
        """Return numbers, scales and offsets; each has a row for each row of the matrix."""
        return self.numbers, self.scales, self.offsets

    def with_arrays(self, arrays: Iterable[npt.NDArray[Any] | None]) -> Quantised:
        """Return such a matrix with other `arrays`, in their order."""
        numbers, scales, offsets = arrays
        assert numbers is not None
        assert scales is not None
        return Quantised(numbers, scales, offsets)

    def are_finite(self) -> bool:
        """Whether no scale and no offset is NaN or infinite."""
        return bool(
            np.isfinite(self.scales).all() and (self.offsets is None or np.isfinite(self.offsets).all())
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]."""
        return self.numbers.shape

    @property
    def kind(self) -> Kind:
        """The kind of weight that these numbers are."""
        return "q8" if self.offsets is None else "q4"


def quantise_4bit(weight: Tensor) -> Quantised:
    """Round [out, in] floats as GGUF's Q4_1 does: to 16 values from the least to the largest of 32 neighbours."""
    groups = weight.float().view(len(weight), -1, GROUP)
    least, largest = groups.amin(-1), groups.amax(-1)
    offsets = least.half()
    scales = ((largest - offsets.float()) / 15).half()
    # A group of equal numbers has a scale of 0; all its values are the offset.
    steps = (groups - offsets.float().unsqueeze(-1)) / scales.float().clamp_min(1e-30).unsqueeze(-1)
    numbers = steps.round().clamp(0, 15).to(torch.uint8).flatten(1)
    return Quantised(numbers.numpy(), scales.numpy(), offsets.numpy())


def quantise_8bit(weight: Tensor) -> Quantised:
    """Round [out, in] floats as GGUF's Q8_0 does: a group of 32 is scaled by its largest absolute value."""
    groups = weight.float().view(len(weight), -1, GROUP)
    scales = (groups.abs().amax(-1) / 127).half()
    steps = groups / scales.float().clamp_min(1e-30).unsqueeze(-1)
    numbers = steps.round().clamp(-127, 127).to(torch.int8).flatten(1)
    return Quantised(numbers.numpy(), scales.numpy(), None)
