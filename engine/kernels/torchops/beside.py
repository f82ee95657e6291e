"""Tiles beside Triton's rows: what models whose steps run over flat rows (`engine.kernels.triton`) do not compute so."""

from __future__ import annotations

from engine.kernels.torchops.attention import VectorisedKernels


class BesideTriton(VectorisedKernels):
    """torch's operations; a model that sees this name computes its steps over rows where it can."""

    name = "triton"
