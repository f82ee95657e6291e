"""The table of kernel backends, and the choice of one for a device.

A new backend is a folder and a line in `BACKENDS`. The conformance test compares every backend with `reference`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from engine.config import KernelChoice
from engine.errors import ConfigError
from engine.kernels import native
from engine.kernels.interface.attention import Kernels
from engine.kernels.toolchain import triton_missing

if TYPE_CHECKING:
    import torch

BACKENDS: dict[str, str] = {
    "native": "engine.kernels.native.kernels:NativeKernels",
    "reference": "engine.kernels.reference.attention:ReferenceKernels",
    "torch": "engine.kernels.torchops.attention:VectorisedKernels",
    "triton": "engine.kernels.torchops.beside:BesideTriton",
}


def load_backend(name: str) -> Kernels:
    """Make the backend called `name`.

    Raises:
        ConfigError: there is no such backend.
    """
    if name not in BACKENDS:
        raise ConfigError(f"there is no kernel backend {name!r}; choose one of {', '.join(sorted(BACKENDS))}")
    module, _, attribute = BACKENDS[name].partition(":")
    backend: Kernels = getattr(import_module(module), attribute)()
    return backend


def choose_backend(choice: KernelChoice, device: torch.device) -> Kernels:
    """Make the backend for a model on `device`.

    Raises:
        ConfigError: `choice` asks for kernels that this machine or this device has not.
    """
    if choice == "native" and device.type != "cpu":
        raise ConfigError(
            f"kernels is native, which is for the CPU, but the device is {device}; set it to auto"
        )
    if choice == "triton" and device.type != "cuda":
        raise ConfigError(f"kernels is triton, which is for CUDA, but the device is {device}; set it to auto")
    if choice == "triton" and (why := triton_missing()) is not None:
        raise ConfigError(f"kernels is triton, but it cannot be compiled here. {why}; or set kernels to auto")
    if choice == "auto" and device.type == "cuda" and triton_missing() is None:
        choice = "triton"
    if choice == "auto":
        choice = "torch" if device.type != "cpu" or native.library() is None else "native"
    return load_backend(choice)
