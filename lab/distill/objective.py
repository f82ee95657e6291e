"""The indexer's training objective: targets from attention, and the KL divergence to them.

Letters: n sampled query rows, T positions, Hq attention heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lab.distill.recipe import Combine


def attention_target(
    query: Tensor,
    keys: Tensor,
    allowed: Tensor,
    scale: float,
    combine: Combine = "sum",
    lengths: Tensor | None = None,
) -> Tensor:
    """Combine the attention of a layer's heads into one distribution: p[t, s] in arXiv 2512.02556, eq. (3).

    `sum` is the paper's: the heads' attention probabilities are summed and L1-normalised over the positions.
    Every head's probabilities sum to 1 over the same positions, so the result is the mean over heads.
    `max` takes the largest of the heads' probabilities at each position, and L1-normalises too. With `max`, a
    head that looks at one token only is not outvoted by heads that look at many.
    `output` weighs each probability by the length of what that token's value adds to the layer's output, sums over
    heads and L1-normalises: leaving out a token that is looked at but adds nothing loses nothing.

    Args:
        query: [n, Hkv, G, D], rotated; Hq = Hkv * G
        keys: [T, Hkv, D], rotated
        allowed: [n, T] bool, at least one True a row
        scale: softmax scale
        combine: how the heads are combined
        lengths: [T, Hkv, G] of `output_lengths`; needed for `output`

    Returns:
        [n, T] float32, without gradient; each row sums to 1 and is 0 where not allowed
    """
    with torch.no_grad():
        logits = torch.einsum("nhgd,thd->hgnt", query.float(), keys.float()) * scale
        logits.masked_fill_(~allowed, -math.inf)
        each = logits.softmax(-1)
        if combine == "sum":
            return each.mean((0, 1))
        if combine == "max":
            joined = each.amax((0, 1))
        else:
            assert lengths is not None
            joined = each.mul_(lengths.permute(1, 2, 0).unsqueeze(2)).sum((0, 1))
        return joined / joined.sum(-1, keepdim=True)


@torch.no_grad()
def output_lengths(values: Tensor, output: Tensor) -> Tensor:
    """Compute how long the vector is that each token adds to a layer's output, for each query head, if it is all it sees.

    Args:
        values: [T, Hkv, D]
        output: [E, Hq * D], the output projection; Hq = Hkv * G

    Returns:
        [T, Hkv, G] float32
    """
    heads, dim = values.shape[1:]
    parts = output.float().view(output.shape[0], heads, -1, dim)  # [E, Hkv, G, D]
    gram = torch.einsum("ehgc,ehgd->hgcd", parts, parts)
    square = torch.einsum("thc,hgcd,thd->thg", values.float(), gram, values.float())
    return square.clamp_min(0).sqrt()


def index_logits(query: Tensor, head_weights: Tensor, keys: Tensor) -> Tensor:
    """Compute index scores of rows over a whole sequence, unmasked, with gradient: arXiv 2512.02556, eq. (1).

    Args:
        query: [n, H, d]
        head_weights: [n, H] float32, already scaled
        keys: [T, d]

    Returns:
        [n, T] float32
    """
    n, heads, dim = query.shape
    per_head = torch.relu(query.reshape(n * heads, dim).float() @ keys.float().T)
    return torch.bmm(head_weights.unsqueeze(1), per_head.view(n, heads, -1)).squeeze(1)


def divergence(target: Tensor, scores: Tensor, support: Tensor) -> Tensor:
    """Compute KL(target || softmax(scores)) over `support`; the target is renormalised over `support`.

    If `support` is the causal positions, this is the warm-up's loss (arXiv 2512.02556, eq. (3)). If it is the
    selected sets, this is the sparse stage's loss (eq. (4)).

    Args:
        target: [n, T] float32
        scores: [n, T] float32
        support: [n, T] bool, at least one True a row

    Returns:
        [n] nats, with gradient to `scores`
    """
    inside = target.where(support, 0.0)
    inside = inside / inside.sum(-1, keepdim=True).clamp_min(1e-30)
    log_scores = scores.masked_fill(~support, -math.inf).log_softmax(-1)
    # 0 log 0 = 0: a position where the target is 0 adds nothing, and must not become 0 * -inf.
    terms = inside * (inside.clamp_min(1e-30).log() - log_scores.masked_fill(~support, 0.0))
    return terms.sum(-1)


def top_mask(scores: Tensor, allowed: Tensor, index_top_k: int) -> Tensor:
    """Select the `index_top_k` best allowed positions of each row: [n, T] -> [n, T] bool.

    If scores are equal at the edge of a set, the later positions are selected, as in serving. Equal scores are
    common: if every head's ReLU gives 0 for a token, its score is exactly 0.
    """
    if index_top_k >= scores.shape[-1]:
        return allowed
    scores = scores.masked_fill(~allowed, -math.inf)
    edge = scores.topk(index_top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    best = scores >= edge
    if not bool((best & allowed).sum(-1).gt(index_top_k).any()):
        # No tie crosses an edge. The running counts below would cost more than all the rest.
        return best & allowed
    above, level = scores > edge, scores == edge
    free = index_top_k - above.sum(-1, keepdim=True)
    latest = level.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1) <= free
    return (above | (level & latest)) & allowed


def captured_mass(target: Tensor, selected: Tensor) -> Tensor:
    """Return the share of each row's attention that falls on the selected positions: [n], from 0 to 1."""
    return target.where(selected, 0.0).sum(-1)
