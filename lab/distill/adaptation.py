"""The loss of the last stage: it pulls the predictions of sparse attention to those of dense attention.

Everything runs as in serving: each layer reads what its indexer selects, and rows past top_k run with the
adapter. The teacher is the same model, dense and without the adapter. If a text has answers, the answers
teach too: even dense, a small model finds a fact far back only now and then, and a small change is enough to
lose it. The indexers keep learning from their own loss (arXiv 2512.02556, eq. (4)), whose target is the
attention that the adapter produces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.gqa.trunk import LayerInputs, Trunk
from lab.distill.adapter import Adapter
from lab.distill.objective import captured_mass, divergence, top_mask
from lab.distill.recipe import Combine
from lab.distill.sparse_forward import ROWS_AT_ONCE, by_student, corrections, final_rows, target_of
from lab.distill.student import Student


@dataclass(frozen=True)
class Adapted:
    """The losses of one sequence. `losses` and `recalls` are for the log only."""

    distance: Tensor  # [] KL(dense || sparse) of the next token, mean over rows, nats; with gradient
    answers: Tensor  # [] cross-entropy of the next token, mean over the answers' rows, nats; with gradient
    losses: Tensor  # [layers] the indexers' losses; their gradients are already accumulated
    recalls: Tensor  # [layers] attention mass on the selected tokens, mean over rows


def adapt(
    trunk: Trunk,
    student: Student,
    adapter: Adapter,
    tokens: Tensor,
    rows: Tensor,
    index_top_k: int,
    weight: float,
    answers: Tensor,
    combine: Combine = "sum",
) -> Adapted:
    """Run one sequence forward twice, dense and adapted, and the indexers' losses backward.

    Args:
        trunk: the main model
        student: the indexers that select
        adapter: the adapter to train
        tokens: [T]
        rows: [n] query rows to compare
        index_top_k: how many tokens a row may read
        weight: factor of the indexers' losses
        answers: [m] rows whose next token is part of an answer; m may be 0
        combine: see `attention_target`
    """
    with torch.no_grad():
        dense = trunk.logits(final_rows(trunk, tokens, None)[rows]).log_softmax(-1)
        x = trunk.embed(tokens)
    total = len(tokens)
    losses, recalls = [], []
    select = by_student(student, index_top_k)
    for layer in range(trunk.config.num_layers):
        fix = corrections(trunk, adapter, layer, total, index_top_k, x)
        inputs = trunk.open(layer, x, fix)
        allowed = inputs.visible(rows)
        masks = [
            select(layer, inputs, part)
            for part in torch.split(torch.arange(total, device=x.device), ROWS_AT_ONCE)
        ]
        target = target_of(trunk, layer, inputs, rows, allowed, combine).detach()
        scores = student.scores(layer, inputs, rows)
        chosen = top_mask(scores.detach(), allowed, index_top_k)
        loss = divergence(target, scores, chosen).mean()
        torch.autograd.backward(loss * weight)  # this graph ends at the layer: its input is detached
        losses.append(loss.detach())
        recalls.append(captured_mass(target, chosen).mean())
        x = trunk.close(layer, x, _attend(trunk, inputs, torch.cat(masks)), fix)
    sparse = trunk.logits(x[rows]).log_softmax(-1)
    distance = F.kl_div(sparse, dense, log_target=True, reduction="none").sum(-1).mean()
    told = sparse.new_zeros(())
    if len(answers):
        told = F.cross_entropy(trunk.logits(x[answers]), tokens[answers + 1])
    return Adapted(distance, told, torch.stack(losses), torch.stack(recalls))


def _attend(trunk: Trunk, inputs: LayerInputs, allowed: Tensor) -> Tensor:
    """Compute what `Trunk.attend` does for all rows, but with one mask for all heads.

    Backward then keeps a ninth of the memory.
    """
    c = trunk.config
    total = allowed.shape[0]
    out = F.scaled_dot_product_attention(
        inputs.query.permute(1, 2, 0, 3).reshape(1, c.num_heads, total, c.head_dim),
        inputs.keys.transpose(0, 1).repeat_interleave(c.group, 0).unsqueeze(0),
        inputs.values.transpose(0, 1).repeat_interleave(c.group, 0).unsqueeze(0),
        attn_mask=allowed.expand(1, c.num_heads, total, total),
        scale=trunk.scale,
    )[0]
    return out.permute(1, 0, 2).reshape(total, -1)
