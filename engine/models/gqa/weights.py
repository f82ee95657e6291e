"""The table of all parameters of a model and its overlay: name here -> published names, and shape."""

from __future__ import annotations

from dataclasses import replace

from engine.checkpoint.loader import Weight
from engine.checkpoint.overlay import adapter_shapes
from engine.models.gqa.config import GqaConfig
from engine.protocol import IndexerInfo


def weight_table(
    config: GqaConfig, indexer: IndexerInfo | None, *, short_queries: bool = False
) -> dict[str, Weight]:
    """Return every parameter of the model: its name here -> its tensors in the checkpoint, and its shape.

    With `short_queries` the projection to index queries may be packed in 4 bits if the model's weights are. It is most
    of the weights that an indexer reads, and the selection hardly changes (`benchmarks.index_bits`).
    """
    c = config
    attn_rows = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    table = {
        "embed": _matrix(("model.embed_tokens.weight",), (c.vocab_size, c.hidden_size)),
        "norm": Weight(("model.norm.weight",), (c.hidden_size,)),
    }
    if not c.tied:
        table["head"] = _matrix(("lm_head.weight",), (c.vocab_size, c.hidden_size))
    for i in range(c.num_layers):
        at, layer = f"model.layers.{i}", f"layers.{i}"
        qkv = tuple(f"{at}.self_attn.{part}_proj.weight" for part in "qkv")
        gate_up = (f"{at}.mlp.gate_proj.weight", f"{at}.mlp.up_proj.weight")
        table[f"{layer}.input_norm"] = Weight((f"{at}.input_layernorm.weight",), (c.hidden_size,))
        table[f"{layer}.qkv"] = _matrix(qkv, (attn_rows, c.hidden_size))
        table[f"{layer}.o"] = _matrix(
            (f"{at}.self_attn.o_proj.weight",), (c.hidden_size, c.num_heads * c.head_dim)
        )
        table[f"{layer}.post_norm"] = Weight((f"{at}.post_attention_layernorm.weight",), (c.hidden_size,))
        table[f"{layer}.gate_up"] = _matrix(gate_up, (2 * c.intermediate_size, c.hidden_size))
        table[f"{layer}.down"] = _matrix(
            (f"{at}.mlp.down_proj.weight",), (c.hidden_size, c.intermediate_size)
        )
        if c.qkv_bias:
            biases = tuple(name.replace(".weight", ".bias") for name in qkv)
            table[f"{layer}.qkv_bias"] = Weight(biases, (attn_rows,))
        if c.o_bias:
            table[f"{layer}.o_bias"] = Weight((f"{at}.self_attn.o_proj.bias",), (c.hidden_size,))
        if c.mlp_bias:
            biases = tuple(name.replace(".weight", ".bias") for name in gate_up)
            table[f"{layer}.gate_up_bias"] = Weight(biases, (2 * c.intermediate_size,))
            table[f"{layer}.down_bias"] = Weight((f"{at}.mlp.down_proj.bias",), (c.hidden_size,))
        if c.qk_norm:
            for part in "qk":
                table[f"{layer}.{part}_norm"] = Weight((f"{at}.self_attn.{part}_norm.weight",), (c.head_dim,))
        if indexer is not None:
            h, d, inside = indexer.num_heads, indexer.head_dim, f"{at}.self_attn.indexer"
            table[f"{layer}.indexer.wq"] = replace(
                _matrix((f"{inside}.wq.weight",), (h * d, c.hidden_size)), may_lose_bits=short_queries
            )
            table[f"{layer}.indexer.wk"] = _matrix((f"{inside}.wk.weight",), (d, c.hidden_size))
            table[f"{layer}.indexer.k_norm_weight"] = Weight((f"{inside}.k_norm.weight",), (d,))
            table[f"{layer}.indexer.k_norm_bias"] = Weight((f"{inside}.k_norm.bias",), (d,))
            table[f"{layer}.indexer.weights_proj"] = _matrix(
                (f"{inside}.weights_proj.weight",), (h, c.hidden_size)
            )
            shapes = adapter_shapes(
                indexer.adapter_rank, c.num_layers, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
            )
            within = f"{at}.self_attn.sparse_adapter."
            for name, shape in shapes.items():
                if name.startswith(within):
                    table[f"{layer}.adapter.{name.removeprefix(within)}"] = Weight((name,), shape)
    return table


def _matrix(names: tuple[str, ...], shape: tuple[int, int]) -> Weight:
    return Weight(names, shape, may_be_packed=True)
