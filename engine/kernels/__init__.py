"""The arithmetic of attention: one interface, a plain definition of each operation, and fast forms of it.

`BACKENDS` is the whole list. Add a backend with one file and one line; the conformance test runs every
backend in it against `reference`.
"""

from __future__ import annotations

from importlib import import_module

from engine.errors import ConfigError
from engine.kernels import native
from engine.kernels.interface import Kernels

BACKENDS: dict[str, str] = {
    "native": "engine.kernels.native_kernels:NativeKernels",
    "reference": "engine.kernels.reference:ReferenceKernels",
    "torch": "engine.kernels.vectorised:VectorisedKernels",
}


def load_backend(name: str) -> Kernels:
    """The kernels called `name`.

    Raises:
        ConfigError: no such backend.
    """
    if name not in BACKENDS:
        raise ConfigError(f"there is no kernel backend {name!r}; choose one of {', '.join(sorted(BACKENDS))}")
    module, _, attribute = BACKENDS[name].partition(":")
    backend: Kernels = getattr(import_module(module), attribute)()
    return backend


def default_backend(device_type: str) -> str:
    """The fastest backend of a device: `native` on a processor that there is a library for, `torch` elsewhere."""
    return "native" if device_type == "cpu" and native.missing() is None else "torch"
