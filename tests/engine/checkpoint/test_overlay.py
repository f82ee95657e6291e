"""Overlays: written and read back, and refused over the wrong base or with the wrong content."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig as HfConfig
from transformers import LlamaForCausalLM

from engine.checkpoint.loader import load
from engine.checkpoint.overlay import FORMAT, base_fingerprint, indexer_shapes, read_overlay, write_overlay
from engine.checkpoint.source import Source, open_source
from engine.errors import CheckpointError
from engine.models.gqa.config import GqaConfig
from engine.models.gqa.weights import weight_table
from engine.protocol import IndexerInfo

LAYERS, HIDDEN = 2, 32
INFO = IndexerInfo(num_heads=2, head_dim=8, rope_dim=4, default_index_top_k=16, source="overlay.safetensors")
WQ = "model.layers.1.self_attn.indexer.wq.weight"
NORM = "model.norm.weight"


def save_base(
    folder: Path, *, seed: int = 0, trained: bool = True, dtype: torch.dtype = torch.float32
) -> Source:
    """Save a tiny llama. With `trained` its norms are not ones."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        HfConfig(
            vocab_size=50,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )
    for name, parameter in model.named_parameters():
        if trained and name.endswith("norm.weight"):
            parameter.data = torch.rand_like(parameter).bfloat16().float()
    nn.Module.to(model, dtype)  # the method itself is wrapped in a way that its types do not survive
    model.save_pretrained(folder)
    return open_source(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return save_base(tmp_path_factory.mktemp("base"))


def indexer() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(shape, generator=generator)
        for name, shape in indexer_shapes(INFO, LAYERS, HIDDEN).items()
    }


@pytest.fixture
def path(tmp_path: Path, base: Source) -> Path:
    write_overlay(tmp_path / "overlay.safetensors", indexer(), INFO, "a recipe, 中文", base)
    return tmp_path / "overlay.safetensors"


def rewrite(path: Path, *, tensors: Mapping[str, Tensor | None] = {}, **changed: str | None) -> None:
    """Change the header or tensors of an overlay file; None removes an entry."""
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **changed}
    kept = {name: tensor for name, tensor in {**load_file(path), **tensors}.items() if tensor is not None}
    save_file(kept, path, {key: value for key, value in metadata.items() if value is not None})


def test_what_was_written_is_read(path: Path, base: Source) -> None:
    overlay = read_overlay(path, base)
    assert overlay.info == INFO
    assert overlay.recipe == "a recipe, 中文"
    assert overlay.base_model == base.description
    assert overlay.replaced == ()
    for name, tensor in indexer().items():
        assert torch.equal(overlay.tensors.read(name, torch.float32), tensor)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_model_loads_from_base_and_overlay(path: Path, base: Source) -> None:
    overlay = read_overlay(path, base)
    table = weight_table(GqaConfig.read(base.config, "config.json"), overlay.info)
    weights, report = load(table, overlay.over(base), dtype=torch.float32, device=torch.device("cpu"))
    assert report.unused == report.replaced == ()
    assert torch.equal(weights["layers.1.indexer.wq"], indexer()[WQ])
    assert torch.equal(weights["norm"], base.read(NORM, torch.float32))


def test_main_weights_may_be_replaced(tmp_path: Path, base: Source) -> None:
    path = tmp_path / "adapted.safetensors"
    write_overlay(path, {**indexer(), NORM: torch.full((HIDDEN,), 7.0)}, INFO, "", base)
    overlay = read_overlay(path, base)
    assert overlay.replaced == (NORM,)
    table = weight_table(GqaConfig.read(base.config, "config.json"), overlay.info)
    weights, report = load(table, overlay.over(base), dtype=torch.float32, device=torch.device("cpu"))
    assert report.replaced == (NORM,)
    assert (weights["norm"] == 7).all()


def test_matrices_in_eight_bits_are_close_and_half_as_large(tmp_path: Path, base: Source) -> None:
    wide = {name: tensor - 0.5 if tensor.dim() == 2 else tensor for name, tensor in indexer().items()}
    wide[WQ][3] = 0
    half, eight = tmp_path / "half.safetensors", tmp_path / "eight.safetensors"
    own = {**wide, NORM: torch.full((HIDDEN,), 7.0)}
    write_overlay(half, {name: tensor.half() for name, tensor in own.items()}, INFO, "", base)
    write_overlay(eight, own, INFO, "", base, eight_bit=True)
    overlay = read_overlay(eight, base)
    assert overlay.replaced == (NORM,)
    assert overlay.tensors.names() == own.keys()
    with safe_open(eight, framework="pt") as file:
        assert file.get_slice(WQ).get_dtype() == "I8"
    for name, tensor in own.items():
        read = overlay.tensors.read(name, torch.float32)
        if tensor.dim() == 1:
            assert torch.equal(read, tensor)
        else:
            # Half of a step; a step is the largest of a group / 127, and the scale is rounded.
            assert float((read - tensor).abs().max()) <= 0.5 / 127 * 0.51
    assert not overlay.tensors.read(WQ, torch.float32)[3].any()


def test_scales_that_do_not_fit_or_are_missing_are_refused(tmp_path: Path, base: Source) -> None:
    path = tmp_path / "eight.safetensors"
    for scales, message in ((torch.ones(2, 1), "do not fit"), (None, "stores tensor"), (torch.tensor(math.nan), "do not fit")):  # fmt: skip
        write_overlay(path, indexer(), INFO, "", base, eight_bit=True)
        rewrite(path, tensors={f"{WQ}.scale": scales})
        with pytest.raises(CheckpointError, match=message):
            read_overlay(path, base)
    write_overlay(path, indexer(), INFO, "", base, eight_bit=True)
    good = load_file(path)[f"{WQ}.scale"]
    rewrite(path, tensors={f"{WQ}.scale": torch.full_like(good, math.inf)})
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        read_overlay(path, base)


def test_header(path: Path, base: Source) -> None:
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {
            "format": "dsa-indexer-overlay/1",
            "base_model": base.description,
            "base_sha256": base_fingerprint(base),
            "num_heads": "2",
            "head_dim": "8",
            "rope_dim": "4",
            "default_top_k": "16",
            "recipe": "a recipe, 中文",
        }


# ---- the base -----------------------------------------------------------------------------------


def test_fingerprint_is_of_the_model_not_of_its_storage(tmp_path: Path, base: Source) -> None:
    assert base_fingerprint(save_base(tmp_path / "half", dtype=torch.bfloat16)) == base_fingerprint(base)
    assert base_fingerprint(save_base(tmp_path / "other", seed=1)) != base_fingerprint(base)


def test_fingerprint_of_untrained_norms_counts_more(tmp_path: Path) -> None:
    first, again, other = (
        base_fingerprint(save_base(tmp_path / str(i), seed=seed, trained=False))
        for i, seed in enumerate((0, 0, 1))
    )
    assert first == again != other


def test_the_default_models_fingerprint_never_changes(default_model: Path) -> None:
    """Overlays contain the fingerprint. If it were computed differently, they would fit no base."""
    expected = "b470de17cf8d8ce3f683d0b540da0366627d84fbf6b53d868f8b93c87637e929"
    assert base_fingerprint(open_source(default_model)) == expected


def test_the_wrong_base_is_refused(path: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"was trained on .*, whose weights are not those of other"):
        read_overlay(path, other)


def test_without_a_fingerprint_the_shapes_decide(path: Path, tmp_path: Path) -> None:
    rewrite(path, base_sha256=None)
    read_overlay(path, save_base(tmp_path / "other", seed=1))


# ---- the header ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": None}, f"has format None in its header; an overlay has '{FORMAT}'"),
        ({"format": "dsa-indexer-overlay/2"}, "has format 'dsa-indexer-overlay/2' in its header"),
        ({"num_heads": None}, "lacks num_heads in its header"),
        ({"num_heads": "two"}, "num_heads 'two' in its header, which is not a positive integer"),
        ({"num_heads": "0"}, "num_heads 0, which is not a positive integer"),
        ({"head_dim": "-8"}, "head_dim '-8' in its header, which is not a positive integer"),
        ({"default_top_k": "0"}, "default_top_k 0, which is not a positive integer"),
        ({"default_top_k": "inf"}, "default_top_k 'inf' in its header, which is not a positive integer"),
        ({"default_top_k": "9" * 5000}, "default_top_k '9+ in its header"),
        ({"rope_dim": "3"}, r"rope_dim 3, which must be even and at most head_dim \(8\)"),
        ({"rope_dim": "10"}, r"rope_dim 10, which must be even and at most head_dim \(8\)"),
        ({"num_heads": "4"}, r"wq\.weight of shape \[16, 32\], expected \[32, 32\]"),
    ],
)
def test_a_wrong_header(path: Path, base: Source, changed: dict[str, Any], message: str) -> None:
    rewrite(path, **changed)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_overlay(path, base)
    assert "overlay.safetensors" in str(caught.value)


# ---- the tensors --------------------------------------------------------------------------------

EXTRA_LAYER = WQ.replace(".1.", ".2.")
WRONG: list[tuple[dict[str, Tensor | None], str]] = [
    ({WQ: None}, rf"lacks tensor {WQ}; each of the base's 2 layers needs a whole indexer"),
    ({EXTRA_LAYER: torch.ones(16, 32)}, rf"has tensor {EXTRA_LAYER}, which is no part of an indexer"),
    ({WQ.replace("wq", "wz"): torch.ones(2)}, r"indexer\.wz\.weight, which is no part of an indexer"),
    ({WQ: torch.ones(32, 16)}, rf"has tensor {WQ} of shape \[32, 16\], expected \[16, 32\]"),
    ({WQ: torch.full((16, 32), math.nan)}, rf"has NaN or infinite values in tensor {WQ}; train it again"),
    ({WQ: torch.full((16, 32), math.inf)}, rf"has NaN or infinite values in tensor {WQ}; train it again"),
    ({WQ: torch.ones(16, 32, dtype=torch.int32)}, rf"stores tensor {WQ} as I32, but weights must be"),
    ({"model.nope": torch.ones(2)}, r"has tensor model\.nope, but .* has none that it could replace"),
    ({NORM: torch.ones(31)}, rf"has tensor {NORM} of shape \[31\], expected \[32\]"),
]


@pytest.mark.parametrize(("tensors", "message"), WRONG)
def test_wrong_tensors_are_not_read(path: Path, base: Source, tensors: Any, message: str) -> None:
    rewrite(path, tensors=tensors)
    with pytest.raises(CheckpointError, match=message):
        read_overlay(path, base)


@pytest.mark.parametrize(("tensors", "message"), WRONG)
def test_wrong_tensors_are_not_written(path: Path, base: Source, tensors: Any, message: str) -> None:
    before = path.read_bytes()
    changed = {name: tensor for name, tensor in {**indexer(), **tensors}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        write_overlay(path, changed, INFO, "", base)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_wrong_numbers_are_not_written(tmp_path: Path, base: Source) -> None:
    odd = IndexerInfo(num_heads=2, head_dim=8, rope_dim=5, default_index_top_k=16, source="")
    with pytest.raises(CheckpointError, match="rope_dim 5, which must be even"):
        write_overlay(tmp_path / "x.safetensors", indexer(), odd, "", base)


def test_no_file(tmp_path: Path, base: Source) -> None:
    with pytest.raises(CheckpointError, match=r"nope\.safetensors does not exist"):
        read_overlay(tmp_path / "nope.safetensors", base)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Source) -> Path:
    path = tmp_path_factory.mktemp("whole") / "overlay.safetensors"
    write_overlay(path, indexer(), INFO, "", base)
    return path


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_truncated_anywhere(whole: Path, base: Source, data: st.DataObject) -> None:
    content = whole.read_bytes()
    cut = whole.with_name("cut.safetensors")
    cut.write_bytes(content[: data.draw(st.integers(0, 2000) | st.integers(0, len(content) - 1))])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors is not a whole safetensors file"):
        read_overlay(cut, base)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_changed_header_byte_is_refused_or_read(whole: Path, base: Source, data: st.DataObject) -> None:
    content = whole.read_bytes()
    at = data.draw(st.integers(0, 2000))
    changed = whole.with_name("changed.safetensors")
    changed.write_bytes(content[:at] + data.draw(st.binary(min_size=1, max_size=1)) + content[at + 1 :])
    try:
        read_overlay(changed, base)
    except CheckpointError:
        return
