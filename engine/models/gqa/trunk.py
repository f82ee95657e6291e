"""The frozen main model over whole sequences, layer by layer, for training an indexer.

Serving runs `engine.models.gqa.model` over a paged cache. Training needs each layer's hidden states, queries and keys
of a whole sequence, and attention under an explicit mask. The weights are the same tensors under the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.layers.low_rank import LowRank
from engine.layers.norm import rms_norm
from engine.layers.rope import RotaryTable, rotate
from engine.models.gqa.config import GqaConfig


@dataclass(frozen=True)
class LayerInputs:
    """The inputs of one layer's attention, over T positions."""

    hidden: Tensor  # [T, E], normalised: the indexer's input
    query: Tensor  # [T, Hkv, G, D], rotated
    keys: Tensor  # [T, Hkv, D], rotated
    values: Tensor  # [T, Hkv, D]
    window: int | None  # positions that a row sees; None: all up to its own

    def visible(self, rows: Tensor) -> Tensor:
        """Which positions the rows [n] may see: [n, T] bool."""
        at, own = torch.arange(len(self.hidden), device=rows.device), rows.unsqueeze(-1)
        causal = at <= own
        return causal if self.window is None else causal & (at > own - self.window)

    def first(self, count: int) -> LayerInputs:
        """Return the inputs of the first `count` positions, as views."""
        if count == len(self.hidden):
            return self
        return LayerInputs(
            self.hidden[:count], self.query[:count], self.keys[:count], self.values[:count], self.window
        )


@dataclass(frozen=True)
class Corrections:
    """One layer's sparse adapter, and the rows that it corrects."""

    qkv: LowRank
    o: LowRank
    rows: Tensor  # [T, 1] bool


class Trunk:
    """Computes one sequence layer by layer. The weights have no gradient."""

    def __init__(
        self, config: GqaConfig, weights: Mapping[str, Tensor], max_positions: int, device: torch.device
    ) -> None:
        self.config = config
        self.weights = weights
        self._rotary = RotaryTable(
            config.head_dim, config.rope_theta, max_positions, scaling=config.rope_scaling, device=device
        )
        self.scale = config.head_dim**-0.5

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of tokens: [T] -> [T, E]."""
        return F.embedding(tokens, self.weights["embed"])

    def open(self, layer: int, x: Tensor, corrections: Corrections | None = None) -> LayerInputs:
        """Compute the inputs of the attention and the indexer of layer `layer` from x [T, E]."""
        c = self.config
        hidden = rms_norm(x, self.weights[f"layers.{layer}.input_norm"], c.rms_norm_eps)
        heads = self._linear(layer, "qkv", hidden)
        if corrections is not None:
            heads = heads + corrections.qkv(hidden, corrections.rows)
        heads = heads.view(-1, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        query, key, value = torch.split(heads, [c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        rotation = self._rotary.at(torch.arange(x.shape[0], device=x.device))
        if c.qk_norm:
            query = rms_norm(query, self.weights[f"layers.{layer}.q_norm"], c.rms_norm_eps)
            key = rms_norm(key, self.weights[f"layers.{layer}.k_norm"], c.rms_norm_eps)
        query = rotate(query, rotation).view(-1, c.num_kv_heads, c.group, c.head_dim)
        return LayerInputs(hidden, query, rotate(key, rotation), value, c.windows[layer])

    def attend(self, inputs: LayerInputs, rows: slice, allowed: Tensor | None) -> Tensor:
        """Attend with some rows: [n, Hq * D].

        Args:
            inputs: of `open`
            rows: n rows
            allowed: [n, T] bool, which positions each row reads; None: all that it may see, and `rows` must be all rows
        """
        c = self.config
        query = inputs.query[rows]
        n = query.shape[0]
        if allowed is None and inputs.window is not None:
            allowed = inputs.visible(torch.arange(n, device=query.device))
        if allowed is None:
            out = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3).reshape(1, c.num_heads, n, c.head_dim),
                inputs.keys.transpose(0, 1).repeat_interleave(c.group, 0).unsqueeze(0),
                inputs.values.transpose(0, 1).repeat_interleave(c.group, 0).unsqueeze(0),
                is_causal=True,
                scale=self.scale,
            )[0]
            return out.permute(1, 0, 2).reshape(n, -1)
        folded = query.permute(1, 2, 0, 3).reshape(1, c.num_kv_heads, c.group * n, c.head_dim)
        out = F.scaled_dot_product_attention(
            folded,
            inputs.keys.transpose(0, 1).unsqueeze(0),
            inputs.values.transpose(0, 1).unsqueeze(0),
            attn_mask=allowed.repeat(c.group, 1).unsqueeze(0),
            scale=self.scale,
        )[0]
        return out.reshape(c.num_heads, n, c.head_dim).permute(1, 0, 2).reshape(n, -1)

    def close(
        self, layer: int, x: Tensor, attended: Tensor, corrections: Corrections | None = None
    ) -> Tensor:
        """Compute the rest of the layer: x [T, E] and attention's output [T, Hq * D] -> the next layer's x [T, E]."""
        x = x + self._linear(layer, "o", attended)
        if corrections is not None:
            x = x + corrections.o(attended, corrections.rows)
        hidden = rms_norm(x, self.weights[f"layers.{layer}.post_norm"], self.config.rms_norm_eps)
        gate, up = self._linear(layer, "gate_up", hidden).chunk(2, dim=-1)
        return x + self._linear(layer, "down", F.silu(gate) * up)

    def _linear(self, layer: int, name: str, x: Tensor) -> Tensor:
        at = f"layers.{layer}.{name}"
        return F.linear(x, self.weights[at], self.weights.get(f"{at}_bias"))

    def logits(self, x: Tensor, *, exact: bool = False) -> Tensor:
        """Compute logits from the last layer's x of some rows: [n, E] -> [n, vocab] float32.

        `exact` multiplies in float32, as serving does; otherwise the logits are rounded to the model's dtype.
        """
        x = rms_norm(x, self.weights["norm"], self.config.rms_norm_eps)
        head = self.weights["embed" if self.config.tied else "head"]
        return F.linear(x.float(), head.float()) if exact else F.linear(x, head).float()

    def losses(self, x: Tensor, tokens: Tensor, rows_at_once: int = 2048) -> Tensor:
        """Compute the cross-entropy of each next token in nats: x [T, E], tokens [T] -> [T - 1] float32."""
        x = rms_norm(x, self.weights["norm"], self.config.rms_norm_eps)
        head = self.weights["embed" if self.config.tied else "head"]
        parts = [
            F.cross_entropy(F.linear(part, head).float(), target, reduction="none")
            for part, target in zip(
                torch.split(x[:-1], rows_at_once), torch.split(tokens[1:], rows_at_once), strict=True
            )
        ]
        return torch.cat(parts)
