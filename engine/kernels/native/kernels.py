"""The backend of the CPU: the operations that C code has, and torch's for the others."""

from __future__ import annotations

import torch

from engine.errors import ConfigError
from engine.kernels import native
from engine.kernels.interface.attention import Kernels
from engine.kernels.native.attention import NativeAttention
from engine.kernels.native.latent import NativeLatent


class NativeKernels(NativeAttention, NativeLatent):
    """The backend `native`. The formulas are in `engine.kernels.interface`."""

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
        """Say which operations are compiled, and that torch computes the others."""
        compiled = sorted(
            name
            for part in (NativeAttention, NativeLatent)
            for name in vars(part)
            if hasattr(Kernels, name) and not name.startswith("_")
        )
        if dtype is not torch.bfloat16:
            return f"kernels: torch for attention, for the compiled ones are for bfloat16 and this model is {dtype}"
        return f"kernels: compiled for {native.level()}: {', '.join(compiled)}; torch for the others"
