"""A layer with the dimensions of DeepSeek-V3.2 (but 4 of its 256 experts) in bfloat16, compared with transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.checkpoint.source import open_source
from engine.models.mla.config import MlaConfig
from tests.engine.kit import Lab
from tests.engine.models.mla.kit import FAMILIES

TOP_K, LENGTH = 64, 200


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_layer_of_full_dimensions(tmp_path: Path) -> None:
    config_type, model_type = FAMILIES["deepseek_v32"]
    rope = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    config = config_type(
        vocab_size=128, num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=4, n_group=2,
        topk_group=2, num_experts_per_tok=4, index_topk=TOP_K, rope_parameters=rope,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # so that its 0.4 billion weights are never made in float32
    try:
        model = model_type(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in model.named_parameters():
        if name.endswith("k_norm.bias"):
            tensor.data = 0.5 * torch.randn_like(tensor)
        elif "norm" in name:
            tensor.data = 1 + 0.2 * torch.randn_like(tensor)
    model.model.rotary_emb.__init__(config)  # its table is float32 whatever the weights are
    model.save_pretrained(tmp_path)
    read = MlaConfig.read(open_source(tmp_path).config, "config.json")
    assert (read.hidden_size, read.num_heads, read.latent_dim, read.moe_layers) == (7168, 128, 576, (True,))
    assert read.indexer is not None
    assert (read.indexer.num_heads, read.indexer.head_dim) == (64, 128)

    # All four experts serve every token: a choice would be a step, which bfloat16 may take elsewhere.
    lab = Lab(tmp_path, dtype="bfloat16", max_model_len=256, kv_cache_bytes=4 << 20)
    lab.sparse = True
    run = lab.run(budget=96, running=1)
    run.submit("a", torch.randint(0, 128, (LENGTH,)).tolist(), 4, TOP_K)
    run.finish()

    model.float()
    (mask,) = run.masks("a", TOP_K, layers=1)
    rows = range(TOP_K, len(run.tokens["a"]) - 1)
    shared = []

    def compare_and_replace(module: object, args: object, chosen: torch.Tensor) -> torch.Tensor:
        """Measure how the selected sets differ here. Then compare attention over the same sets."""
        for t in rows:
            mine = mask[t].nonzero().flatten()
            shared.append(len(set(mine.tolist()) & set(chosen[0, t].tolist())))
            chosen[0, t] = mine
        return chosen

    model.model.layers[0].self_attn.indexer.register_forward_hook(compare_and_replace)
    with torch.no_grad():
        hidden = model.model(torch.tensor([run.tokens["a"]]), use_cache=False).last_hidden_state[0]
    overlap = sum(shared) / (len(rows) * TOP_K)
    assert overlap > 0.97  # bfloat16 scores swap positions that are nearly equal
    errors = [
        float((row[-1].float() - hidden[t]).norm() / hidden[t].norm()) for t, row in run.rows["a"].items()
    ]
    print(
        f"overlap {overlap:.4f}, relative error worst {max(errors):.4f}, mean {sum(errors) / len(errors):.4f}"
    )
    assert len(errors) >= LENGTH
    assert max(errors) < 0.03
