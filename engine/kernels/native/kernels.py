"""The operations in C where there are such, torch's elsewhere: the backend of the CPU."""

from __future__ import annotations

import torch

from engine.errors import ConfigError
from engine.kernels import native
from engine.kernels.interface.attention import Kernels
from engine.kernels.native.attention import NativeAttention
from engine.kernels.native.latent import NativeLatent


class NativeKernels(NativeAttention, NativeLatent):
    """See `engine.kernels.interface.attention.Kernels` for the formulas."""

    name = "native"

    def __init__(self) -> None:
        """Use as many threads as torch does.

        Raises:
            ConfigError: there is no library for this processor.
        """
        reason = native.missing()
        if reason is not None:
            raise ConfigError(f"there are no native kernels here: {reason}; use the backend torch")
        native.set_threads(torch.get_num_threads())

    def described(self, dtype: torch.dtype) -> str:
        """Which operations are compiled, and that torch has the others."""
        compiled = sorted(
            name
            for part in (NativeAttention, NativeLatent)
            for name in vars(part)
            if hasattr(Kernels, name) and not name.startswith("_")
        )
        if dtype is not torch.bfloat16:
            return f"kernels: torch for attention, for the compiled ones are for bfloat16 and this model is {dtype}"
        return f"kernels: compiled for {native.level()}: {', '.join(compiled)}; torch for the others"
