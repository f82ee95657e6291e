"""Normalisations. They compute in float32, whatever the dtype of the activations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last dim, in the dtype of x (RMSNorm, arXiv 1910.07467)."""
    wide = x.float()
    return (F.rms_norm(wide, (x.shape[-1],), eps=eps)).to(x.dtype) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute (x - mean) / sqrt(var + eps) * weight + bias over the last dim, in the dtype of x (arXiv 1607.06450)."""
    return F.layer_norm(x.float(), (x.shape[-1],), weight.float(), bias.float(), eps).to(x.dtype)
