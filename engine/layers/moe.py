"""DeepSeek's mixture of experts (arXiv 2412.19437, section 2.1.2): a sigmoid gate, and a choice limited to groups."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.layers.linear import linear
from engine.memory.blocks import Matrix


@dataclass(frozen=True)
class MoEConfig:
    """The sizes of a mixture of experts, and how its gate chooses."""

    num_experts: int  # routed experts
    num_shared_experts: int
    experts_per_token: int
    num_groups: int
    groups_per_token: int
    normalise: bool  # whether a token's expert weights sum to `scaling`
    scaling: float
    intermediate_size: int  # F of one expert


def route(x: Tensor, gate: Tensor, bias: Tensor, config: MoEConfig) -> tuple[Tensor, Tensor]:
    """Choose each token's experts and their weights.

    s = sigmoid(x gate^T); b = s + bias. The choice uses b: the score of a group is the sum of its two best b, and the
    best experts of the best groups are chosen. The weights are s, made to sum to 1 if `config.normalise`, times
    `config.scaling`.

    Args:
        x: [T, E]
        gate: [X, E] float32
        bias: [X] float32

    Returns:
        experts [T, k] int64, weights [T, k] float32
    """
    c = config
    scores = F.linear(x.float(), gate).sigmoid()
    grouped = (scores + bias).view(-1, c.num_groups, c.num_experts // c.num_groups)
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(c.groups_per_token, dim=-1).indices  # [T, groups]
    out = torch.ones(grouped.shape[:2], dtype=torch.bool, device=x.device).scatter_(1, best, False)
    choice = grouped.masked_fill(out.unsqueeze(-1), -math.inf).flatten(1)
    experts = choice.topk(c.experts_per_token, dim=-1).indices
    weights = scores.gather(1, experts)
    if c.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return experts, weights * c.scaling


def run_experts(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: Matrix, down: Matrix, first: int = 0
) -> Tensor:
    """Compute y[t] = sum_j weights[t,j] * E_{experts[t,j]}(x[t]) with E(x) = down (silu(gate x) * up x).

    Rows are sorted by expert. Each expert that a row chose is visited once; others are not visited. An expert in FP8
    blocks is plain only during its visit.

    Args:
        x: [T, E]
        experts: [T, k] int64
        weights: [T, k] float32
        gate_up: [X', 2F, E], gate rows first
        down: [X', E, F]
        first: the weights are those of experts `first` to `first + X' - 1`; the sum leaves out other experts

    Returns:
        [T, E] float32, whatever dtype the experts compute in
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    rows = order // experts.shape[1]
    weight = weights.flatten()[order].unsqueeze(1)
    hit, counts = torch.unique(flat, return_counts=True)  # sorted by expert, as the rows are
    start = 0
    for expert, count in zip(hit.tolist(), counts.tolist(), strict=True):
        local, span = expert - first, slice(start, start + count)
        start += count
        if not 0 <= local < gate_up.shape[0]:
            continue
        gate, up = linear(x[rows[span]], gate_up[local]).chunk(2, dim=-1)
        made = linear(F.silu(gate) * up, down[local])
        out.index_add_(0, rows[span], made.float() * weight[span])
    return out
