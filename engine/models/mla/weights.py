"""The table of all parameters of a DeepSeek-V3-family model: name here -> published names, and shape.

Letters: E hidden size, H heads, r_q and r_kv latent ranks, n / p / v the plain, rotated and value dims of a
head, F an MLP's or expert's inner size, X routed experts.

Ranks split the heads (q_b, kv_b, o), the inner size of MLPs and of the shared expert, and the routed experts. Only
rank 0 has the head of the model. Every rank has all the rest, so that it selects and routes by itself.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.checkpoint.loader import Weight
from engine.models.mla.config import MlaConfig
from engine.parallel.ranks import ALONE, Ranks

_MAY_STAY_FP8 = frozenset({
    "attn.q", "attn.q_a", "attn.q_b", "attn.kv_a", "attn.o", "mlp.gate_up", "mlp.down",
    "moe.experts_gate_up", "moe.experts_down", "moe.shared_gate_up", "moe.shared_down",
})  # fmt: skip
"""The weights that may stay in FP8 blocks: those that `engine.layers.linear` multiplies. kv_b may not, because the
absorbed form multiplies head by head. The indexer may not, because it is small and decides the selection. In bfloat16
kv_b and the indexer take 1.9 and 1.5 GiB of DeepSeek-V3.2, twice what is stored."""


def weight_table(config: MlaConfig, ranks: Ranks = ALONE) -> dict[str, Weight]:
    """Return the main model's parameters: `embed`, `norm`, `head` (unless tied), `layers.{i}.*` as in `layer_table`."""
    c = config
    table = {
        "embed": Weight(("model.embed_tokens.weight",), (c.vocab_size, c.hidden_size)),
        "norm": Weight(("model.norm.weight",), (c.hidden_size,)),
    }
    if not c.tied and ranks.rank == 0:
        table["head"] = Weight(("lm_head.weight",), (c.vocab_size, c.hidden_size))
    for i in range(c.num_layers):
        one = layer_table(c, f"model.layers.{i}", moe=c.moe_layers[i], indexer=c.index_layers[i], ranks=ranks)
        table |= {f"layers.{i}.{name}": weight for name, weight in one.items()}
    return table


def mtp_table(config: MlaConfig, k: int) -> dict[str, Weight]:
    """Return the parameters of the `k`-th multi-token prediction module (arXiv 2412.19437, section 2.2).

    Checkpoints store it as layer `num_layers + k`. It has two norms and a projection, a whole MoE layer with its own
    indexer, a norm and a head. `embed` and `head` are copies of the main model's.
    """
    c = config
    at = f"model.layers.{c.num_layers + k}"
    return {
        "embed": Weight((f"{at}.embed_tokens.weight",), (c.vocab_size, c.hidden_size)),
        "enorm": Weight((f"{at}.enorm.weight",), (c.hidden_size,)),
        "hnorm": Weight((f"{at}.hnorm.weight",), (c.hidden_size,)),
        "eh_proj": Weight((f"{at}.eh_proj.weight",), (c.hidden_size, 2 * c.hidden_size)),
        **layer_table(c, at, moe=True, indexer=c.indexer is not None),
        "norm": Weight((f"{at}.shared_head.norm.weight",), (c.hidden_size,)),
        "head": Weight((f"{at}.shared_head.head.weight",), (c.vocab_size, c.hidden_size)),
    }


def layer_table(
    config: MlaConfig, at: str, *, moe: bool, indexer: bool, ranks: Ranks = ALONE
) -> dict[str, Weight]:
    """Return the parameters of one decoder layer. Its published names begin with `at` (`model.layers.3`).

    Returns:
        input_norm, post_norm; attn.*; indexer.* if `indexer`; moe.* if `moe`, else mlp.*
    """
    c, attn = config, f"{at}.self_attn"
    table = {
        "input_norm": Weight((f"{at}.input_layernorm.weight",), (c.hidden_size,)),
        "post_norm": Weight((f"{at}.post_attention_layernorm.weight",), (c.hidden_size,)),
    }
    q_rows = c.num_heads * c.qk_head_dim
    if c.q_lora_rank is None:
        table["attn.q"] = Weight(
            (f"{attn}.q_proj.weight",), (q_rows, c.hidden_size), part=ranks.part(0, q_rows)
        )
    else:
        table["attn.q_a"] = Weight((f"{attn}.q_a_proj.weight",), (c.q_lora_rank, c.hidden_size))
        table["attn.q_a_norm"] = Weight((f"{attn}.q_a_layernorm.weight",), (c.q_lora_rank,))
        table["attn.q_b"] = Weight(
            (f"{attn}.q_b_proj.weight",), (q_rows, c.q_lora_rank), part=ranks.part(0, q_rows)
        )
    kv_rows, columns = c.num_heads * (c.qk_nope_head_dim + c.v_head_dim), c.num_heads * c.v_head_dim
    table |= {
        # [r_kv latent | p shared rotated key] rows
        "attn.kv_a": Weight((f"{attn}.kv_a_proj_with_mqa.weight",), (c.latent_dim, c.hidden_size)),
        "attn.kv_a_norm": Weight((f"{attn}.kv_a_layernorm.weight",), (c.kv_lora_rank,)),
        # H times [n key rows | v value rows]
        "attn.kv_b": Weight(
            (f"{attn}.kv_b_proj.weight",), (kv_rows, c.kv_lora_rank), part=ranks.part(0, kv_rows)
        ),
        "attn.o": Weight((f"{attn}.o_proj.weight",), (c.hidden_size, columns), part=ranks.part(1, columns)),
    }
    if indexer:
        table |= _indexer_table(c, f"{attn}.indexer")
    table |= _moe_table(c, f"{at}.mlp", ranks) if moe else _mlp_table(c, f"{at}.mlp", ranks)
    return {
        name: replace(weight, may_stay_fp8=True) if name in _MAY_STAY_FP8 else weight
        for name, weight in table.items()
    }


def _indexer_table(config: MlaConfig, at: str) -> dict[str, Weight]:
    index, rank = config.indexer, config.q_lora_rank
    assert index is not None
    assert rank is not None
    return {
        "indexer.wq": Weight((f"{at}.wq_b.weight",), (index.num_heads * index.head_dim, rank)),
        "indexer.wk": Weight((f"{at}.wk.weight",), (index.head_dim, config.hidden_size)),
        "indexer.k_norm_weight": Weight((f"{at}.k_norm.weight",), (index.head_dim,)),
        "indexer.k_norm_bias": Weight((f"{at}.k_norm.bias",), (index.head_dim,)),
        # The published code computes the head weights in float32, because a rounded one would change the selection.
        "indexer.weights_proj": Weight(
            (f"{at}.weights_proj.weight",), (index.num_heads, config.hidden_size), dtype=torch.float32
        ),
    }


def _mlp_table(config: MlaConfig, at: str, ranks: Ranks) -> dict[str, Weight]:
    inner, hidden = config.intermediate_size, config.hidden_size
    return {
        "mlp.gate_up": Weight(
            (f"{at}.gate_proj.weight", f"{at}.up_proj.weight"),
            (2 * inner, hidden),
            rows=(inner, inner),
            part=ranks.part(0, inner),
        ),
        "mlp.down": Weight((f"{at}.down_proj.weight",), (hidden, inner), part=ranks.part(1, inner)),
    }


def _moe_table(config: MlaConfig, at: str, ranks: Ranks) -> dict[str, Weight]:
    """Return the parameters of experts, which are stacked as [X * 2F, E] (gate rows first, then up) and [X * E, F]."""
    moe, hidden = config.moe, config.hidden_size
    inner, shared, experts = moe.intermediate_size, at + ".shared_experts", ranks.share(moe.num_experts)
    shared_inner = inner * moe.num_shared_experts
    return {
        # Routing is a choice too, so it is computed in float32.
        "moe.gate": Weight((f"{at}.gate.weight",), (moe.num_experts, hidden), dtype=torch.float32),
        "moe.bias": Weight((f"{at}.gate.e_score_correction_bias",), (moe.num_experts,), dtype=torch.float32),
        "moe.experts_gate_up": Weight(
            tuple(f"{at}.experts.{x}.{part}_proj.weight" for x in experts for part in ("gate", "up")),
            (len(experts) * 2 * inner, hidden),
            rows=(inner,) * (2 * len(experts)),
        ),
        "moe.experts_down": Weight(
            tuple(f"{at}.experts.{x}.down_proj.weight" for x in experts),
            (len(experts) * hidden, inner),
            rows=(hidden,) * len(experts),
        ),
        "moe.shared_gate_up": Weight(
            (f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight"),
            (2 * shared_inner, hidden),
            rows=(shared_inner, shared_inner),
            part=ranks.part(0, shared_inner),
        ),
        "moe.shared_down": Weight(
            (f"{shared}.down_proj.weight",), (hidden, shared_inner), part=ranks.part(1, shared_inner)
        ),
    }
