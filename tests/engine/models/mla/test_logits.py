"""Logits and selected sets of the DeepSeek family equal transformers', however the work is cut.

Tiny random checkpoints in float32, written by transformers' `save_pretrained`, longer than `index_topk`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from engine.checkpoint.source import open_source
from engine.errors import CheckpointError
from engine.layers.rope import inverse_frequencies
from engine.models.mla.model import MlaModel
from engine.plan.types import ScheduledRequest, StepPlan
from tests.engine.kit import Lab, Run, random_overlay
from tests.engine.models.mla.kit import VOCAB, YARN, oracle, tiny_deepseek

TOLERANCE = 1e-4  # of the largest logit
TOP_K = 24
SPARSE = ("deepseek_v32", "glm_moe_dsa")

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("deepseek_v3", {}),
    "v3, no query latent": ("deepseek_v3", {"q_lora_rank": None, "seed": 5}),
    "v32": ("deepseek_v32", {}),
    "v32, other seed, no yarn": (
        "deepseek_v32",
        {"seed": 7, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    ),
    "v32, yarn without mscale": (
        "deepseek_v32",
        {"seed": 8, "rope_parameters": {k: v for k, v in YARN.items() if not k.startswith("mscale")}},
    ),
    "glm": ("glm_moe_dsa", {"n_group": 1, "topk_group": 1}),
    "glm, shared selections": (
        "glm_moe_dsa",
        {"seed": 9, "num_hidden_layers": 5, "index_topk_freq": 2, "index_skip_topk_offset": 2},
    ),
}


def tokens_of(seed: int, length: int) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Tiny:
    """A checkpoint, transformers' model of it, and the engine's, by form of attention."""

    def __init__(self, folder: Path, variant: str) -> None:
        family, changes = VARIANTS[variant]
        self.folder = folder
        self.model = tiny_deepseek(family, folder, **changes)
        self.sparse = family in SPARSE
        self._labs: dict[str, Lab] = {}

    def lab(self, form: str = "auto") -> Lab:
        if form not in self._labs:
            self._labs[form] = Lab(self.folder, sparse_form=form)
            self._labs[form].sparse = self.sparse
        return self._labs[form]

    def reference(self, tokens: list[int], index_top_k: int = TOP_K) -> tuple[Tensor, list[Tensor]]:
        """Logits [T, vocab], and the sets of each layer that has an indexer as masks [T, T]."""
        sets: list[Tensor] = []
        hooks = []
        for layer in self.model.model.layers:
            indexer = getattr(layer.self_attn, "indexer", None)
            if indexer is not None:
                indexer.index_topk = index_top_k
                hooks.append(indexer.register_forward_hook(lambda m, a, out: sets.append(out[0].long())))
        logits = oracle(self.model, tokens)
        for hook in hooks:
            hook.remove()
        causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        return logits, [torch.zeros_like(causal).scatter_(1, one, True) & causal for one in sets]


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    return {}


@pytest.fixture
def tiny(request: pytest.FixtureRequest, tinies: dict[str, Tiny], tmp_path_factory: Any) -> Tiny:
    """A `Tiny` for each variant, kept for the module."""
    if request.param not in tinies:
        tinies[request.param] = Tiny(tmp_path_factory.mktemp("deepseek"), request.param)
    return tinies[request.param]


every = pytest.mark.parametrize("tiny", VARIANTS, indirect=True)


def check(tiny: Tiny, run: Run, name: str, index_top_k: int | None) -> None:
    """Every row ever computed has transformers' logits, every sparse row transformers' sets."""
    logits, sets = tiny.reference(run.tokens[name], index_top_k or 10_000)
    assert run.error(name, logits) < TOLERANCE
    if tiny.sparse and index_top_k is not None:
        assert sets
        for mine, theirs in zip(run.masks(name, index_top_k, layers=len(sets)), sets, strict=True):
            assert torch.equal(mine[:-1], theirs[:-1])


@every
@pytest.mark.parametrize("budget", [1, 7, 64])
def test_prefill_in_chunks_then_decode(tiny: Tiny, budget: int) -> None:
    run = tiny.lab().run(budget=budget, running=1)
    run.submit("a", tokens_of(1, 130), 32, TOP_K)
    run.finish()
    assert len(run.tokens["a"]) == 162
    check(tiny, run, "a", TOP_K if tiny.sparse else None)


@every
@pytest.mark.parametrize("form", ["gather", "mask"])
def test_every_form_gives_the_same(tiny: Tiny, form: str) -> None:
    run = tiny.lab(form).run(budget=50, running=4)
    run.submit("a", tokens_of(2, 140), 4, TOP_K)
    run.finish()
    check(tiny, run, "a", TOP_K if tiny.sparse else None)


@every
def test_a_batch_of_mixed_lengths_and_mixed_top_k(tiny: Tiny) -> None:
    """Requests with another index_top_k are compared with transformers at that `index_topk`."""
    run = tiny.lab().run(budget=90, running=8)
    asked: dict[str, tuple[int, int | None]] = {
        "a": (150, 24), "b": (70, 40), "c": (200, None), "d": (33, 9), "e": (120, 64), "f": (1, 24),
    }  # fmt: skip
    for number, (name, (length, index_top_k)) in enumerate(asked.items()):
        run.submit(name, tokens_of(20 + number, length), 6, index_top_k)
    run.finish()
    for name, (_, index_top_k) in asked.items():
        check(tiny, run, name, index_top_k if tiny.sparse else None)
        usage = run.ends[name].usage
        assert usage is not None
        assert usage.index_top_k == (index_top_k if tiny.sparse else None)


@pytest.mark.parametrize("tiny", ["v32", "glm, shared selections"], indirect=True)
def test_the_comparison_can_fail(tiny: Tiny) -> None:
    run = tiny.lab().run()
    run.submit("a", tokens_of(3, 150), 2, TOP_K)
    run.finish()
    assert run.error("a", tiny.reference(run.tokens["a"], 10_000)[0]) > 0.01


@pytest.mark.parametrize("tiny", ["v32"], indirect=True)
def test_a_prefix_hit_gives_the_same_logits_as_a_cold_start(tiny: Tiny) -> None:
    run = tiny.lab().run()
    for name in ("cold", "warm"):
        run.submit(name, tokens_of(4, 200), 3, TOP_K)
        run.finish()
    usage = run.ends["warm"].usage
    assert usage is not None
    assert usage.cached_tokens == 192
    assert run.error("warm", tiny.reference(run.tokens["warm"])[0]) < TOLERANCE


def test_v32_shares_selections_where_its_config_asks_for_it(tmp_path: Path) -> None:
    """It is compared with transformers' GLM-5, which has the same weights and whose indexer rotates interleaved."""
    shape = {"num_hidden_layers": 4, "index_topk_freq": 2, "index_skip_topk_offset": 1, "seed": 11}
    model = tiny_deepseek("glm_moe_dsa", tmp_path, **shape)
    config = tmp_path / "config.json"
    text = config.read_text().replace('"glm_moe_dsa"', '"deepseek_v32"')
    config.write_text(text.replace("{", '{\n  "indexer_rope_interleave": true,', 1))
    assert open_source(tmp_path).config["model_type"] == "deepseek_v32"
    lab = Lab(tmp_path)
    lab.sparse = True
    run = lab.run(budget=40, running=1)
    run.submit("a", tokens_of(5, 130), 4, TOP_K)
    run.finish()
    assert run.error("a", oracle(model, run.tokens["a"])) < TOLERANCE


@pytest.mark.parametrize("tiny", ["glm, shared selections"], indirect=True)
def test_only_layers_with_an_indexer_cache_index_keys(tiny: Tiny) -> None:
    latent, index = tiny.lab().built.runner._model.plane_specs()
    assert latent.token_bytes == 4 * 40
    assert index.layers == frozenset({0, 1, 3})
    expected = 64 * (5 * latent.token_bytes + 3 * index.token_bytes)
    assert tiny.lab().built.ready.capacity.page_bytes == expected


@pytest.mark.parametrize("tiny", ["v32"], indirect=True)
def test_the_checkpoints_own_indexer_is_reported_with_its_top_k(tiny: Tiny) -> None:
    model = tiny.lab().built.ready.model
    assert model.architecture == "deepseek_v32"
    assert model.indexer is not None
    assert (model.indexer.default_index_top_k, model.indexer.source) == (TOP_K, "checkpoint")
    assert tiny.lab().built.unused_tensors == ()


@pytest.mark.parametrize("tiny", ["v32"], indirect=True)
def test_an_overlay_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    overlay = random_overlay(tmp_path / "over.safetensors", open_source(tiny.folder))
    with pytest.raises(CheckpointError, match="serve it without an overlay"):
        Lab(tiny.folder, overlay)


def test_a_context_of_163840_positions(tmp_path: Path) -> None:
    """Rotation table and pages are long enough: the last position is computed, over a cache of zeros."""
    tiny_deepseek("deepseek_v32", tmp_path, max_position_embeddings=163840, num_hidden_layers=2)
    lab = Lab(tmp_path, kv_cache_bytes=80 << 20)
    model = lab.built.ready.model
    assert model.max_model_len == 163840
    assert lab.built.ready.capacity.num_pages >= 2560
    last = ScheduledRequest(
        request_id="a",
        token_ids=(5,),
        start=163839,
        page_ids=tuple(range(2560)),
        index_top_k=TOP_K,
        sample=None,
    )
    for index_top_k in (TOP_K, None):
        plan = StepPlan(requests=(msgspec.structs.replace(last, index_top_k=index_top_k),))
        assert bool(lab.built.runner.hidden(plan).isfinite().all())
    deepseek = lab.built.runner._model
    assert isinstance(deepseek, MlaModel)
    rotary = deepseek.rotary
    angle = 163839 * inverse_frequencies(8, 10000.0, {k: v for k, v in YARN.items() if k != "rope_theta"})
    torch.testing.assert_close(rotary.at(torch.tensor([163839]))[0][0], angle.cos())
