"""An independent sparse decoder of the llama family: whole sequences, explicit [T, T] masks, formulas written out.

Shares no code with the engine. Given the selected sets, it says what attention over them must give;
given none, it selects by its own scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class PlainLlama:
    """Float64 forward over Hugging Face tensor names."""

    def __init__(self, weights: Mapping[str, Tensor], config: Any, indexer: Mapping[str, Tensor]) -> None:
        self.w = {name: tensor.double() for name, tensor in {**weights, **indexer}.items()}
        self.c = config
        types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        size = getattr(config, "sliding_window", None)
        self.windows = [size if kind == "sliding_attention" else None for kind in types]
        self.theta = float(config.rope_parameters["rope_theta"])

    def forward(
        self,
        tokens: Sequence[int],
        index_top_k: int,
        heads: int,
        rope_dim: int,
        given: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return logits [T, vocab], and each layer's mask [T, T] and index scores [T, T]."""
        c, w = self.c, self.w
        n, hq, hk, d = len(tokens), c.num_attention_heads, c.num_key_value_heads, c.head_dim
        x = w["model.embed_tokens.weight"][list(tokens)]
        whole = torch.tril(torch.ones(n, n, dtype=torch.bool))
        masks, scores = [], []
        for i in range(c.num_hidden_layers):
            at, window = f"model.layers.{i}.", self.windows[i]
            causal = whole if window is None else whole & ~whole.tril(-window)
            h = self._rms(x, w[at + "input_layernorm.weight"])
            index = self._index_scores(h, at + "self_attn.indexer.", heads, rope_dim).masked_fill(
                ~causal, -math.inf
            )
            mask = self._best(index, index_top_k) if given is None else given[i]
            masks.append(mask & causal)
            scores.append(index)
            narrow = n if window is not None and window <= index_top_k else index_top_k
            q, k, v = (self._product(h, f"{at}self_attn.{part}_proj") for part in "qkv")
            fix = self._corrections(at, "qkv", h, narrow).split([hq * d, hk * d, hk * d], -1)
            q, k = (q + fix[0]).view(n, hq, d), (k + fix[1]).view(n, hk, d)
            if at + "self_attn.q_norm.weight" in w:
                q, k = (
                    self._rms(q, w[at + "self_attn.q_norm.weight"]),
                    self._rms(k, w[at + "self_attn.k_norm.weight"]),
                )
            q, k = self._rope(q, d), self._rope(k, d)
            v = (v + fix[2]).view(n, hk, d)
            out = torch.empty(n, hq, d, dtype=torch.float64)
            for head in range(hq):
                shared = head // (hq // hk)
                logits = (q[:, head] @ k[:, shared].T / math.sqrt(d)).masked_fill(~(mask & causal), -math.inf)
                out[:, head] = torch.softmax(logits, -1) @ v[:, shared]
            out = out.reshape(n, hq * d)
            x = x + self._product(out, at + "self_attn.o_proj") + self._corrections(at, "o", out, narrow)
            h = self._rms(x, w[at + "post_attention_layernorm.weight"])
            gate, up = self._product(h, at + "mlp.gate_proj"), self._product(h, at + "mlp.up_proj")
            x = x + self._product(gate * torch.sigmoid(gate) * up, at + "mlp.down_proj")
        head_name = "lm_head.weight" if "lm_head.weight" in w else "model.embed_tokens.weight"
        return self._rms(x, w["model.norm.weight"]) @ w[head_name].T, masks, scores

    def _product(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[name + ".weight"].T + self.w.get(name + ".bias", 0)

    def _corrections(self, at: str, part: str, x: Tensor, index_top_k: int) -> Tensor:
        """What the sparse adapter adds on rows with a selection."""
        name = f"{at}self_attn.sparse_adapter.{part}."
        out = (
            self.w[name + "b"].shape[0]
            if name + "b" in self.w
            else (
                self.c.hidden_size
                if part == "o"
                else (self.c.num_attention_heads + 2 * self.c.num_key_value_heads) * self.c.head_dim
            )
        )
        fix = torch.zeros(x.shape[0], out, dtype=torch.float64)
        if name + "a" in self.w:
            fix[index_top_k:] = x[index_top_k:] @ self.w[name + "a"].T @ self.w[name + "b"].T
        return fix

    def _index_scores(self, h: Tensor, at: str, heads: int, rope_dim: int) -> Tensor:
        w, n = self.w, h.shape[0]
        key = h @ w[at + "wk.weight"].T
        mean, var = key.mean(-1, keepdim=True), key.var(-1, keepdim=True, unbiased=False)
        key = (key - mean) / torch.sqrt(var + 1e-6) * w[at + "k_norm.weight"] + w[at + "k_norm.bias"]
        dim = key.shape[-1]
        key = self._rope(key.view(n, 1, dim), rope_dim)[:, 0]
        query = self._rope((h @ w[at + "wq.weight"].T).view(n, heads, dim), rope_dim)
        weights = h @ w[at + "weights_proj.weight"].T / math.sqrt(heads * dim)
        total = torch.zeros(n, n, dtype=torch.float64)
        for j in range(heads):
            total += weights[:, j, None] * torch.clamp(query[:, j] @ key.T, min=0)
        return total

    @staticmethod
    def _best(scores: Tensor, index_top_k: int) -> Tensor:
        """Equal scores are common (a ReLU of all heads can be 0 for many tokens): the later token wins."""
        mask = torch.zeros_like(scores, dtype=torch.bool)
        for t in range(scores.shape[0]):
            row: list[float] = scores[t].tolist()
            mask[t, sorted(range(t + 1), key=lambda s: (-row[s], -s))[:index_top_k]] = True
        return mask

    @staticmethod
    def clear(scores: Sequence[Tensor], index_top_k: int, within: float = 1e-5) -> bool:
        """Whether float32 selects as float64 does: no row's last selected score is within so much of its next one, but equal.

        Args:
            scores: of each layer, [T, T]
            index_top_k: tokens that a row selects
            within: a part of the row's largest score
        """
        for layer in scores:
            rows = layer[index_top_k:].sort(-1, descending=True).values
            gap = rows[:, index_top_k - 1] - rows[:, index_top_k] if len(rows) else rows.new_zeros(0)
            if ((gap > 0) & (gap < within * rows.abs().masked_fill(rows.isinf(), 0).amax(-1))).any():
                return False
        return True

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.c.rms_norm_eps) * weight

    def _rope(self, x: Tensor, dim: int) -> Tensor:
        half = dim // 2
        angle = torch.arange(x.shape[0]).double()[:, None] * self.theta ** (
            -torch.arange(half).double() / half
        )
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., :half], x[..., half:dim]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., dim:]), -1)
