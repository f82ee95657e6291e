"""The operations in C where there are such, torch's elsewhere: the backend of the CPU."""

from __future__ import annotations

import torch

from engine.errors import ConfigError
from engine.kernels import native
from engine.kernels.native_latent import NativeLatent


class NativeKernels(NativeLatent):
    """See `engine.kernels.interface.Kernels` for the formulas."""

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
