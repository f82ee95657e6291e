"""The backend of the CPU: the operations that C code has, and torch's for the others."""

from __future__ import annotations

import torch

from engine.errors import ConfigError
from engine.kernels import native
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

    def computed_by(self, operation: str, dtype: torch.dtype) -> str:
        part = next((one for one in (NativeAttention, NativeLatent) if operation in vars(one)), None)
        if part is None:
            return "torch"
        if dtype is not torch.bfloat16:
            return "torch (the compiled kernels are for bfloat16)"
        if part is NativeLatent and not self.streams_latents(dtype, dtype):
            return "torch (this processor does not multiply bfloat16)"
        return f"compiled for {native.level()}"
