"""FP8 block checkpoints as DeepSeek publishes them: they are read exactly, and the error names every fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint.loader import Weight, load
from engine.checkpoint.part import Slice
from engine.checkpoint.safetensors import SafetensorsSource
from engine.checkpoint.source import open_source
from engine.errors import CheckpointError
from engine.memory.blocks import E4M3
from tests.engine.models.mla.kit import tiny_deepseek

QUANTISATION: dict[str, Any] = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
}  # fmt: skip
NAME = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
PLAIN = ("embed", "head", "norm", "gate.weight", "bias", "weights_proj")


def quantise_folder(folder: Path, scales: torch.dtype = torch.float32, shards: int = 2) -> dict[str, Tensor]:
    """Rewrite a folder's weights as DeepSeek publishes them: FP8 blocks in `shards` files. Return the values in float64."""
    config = json.loads((folder / "config.json").read_text())
    kind = QUANTISATION | ({"scale_fmt": "ue8m0"} if scales == torch.float8_e8m0fnu else {})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": kind}))
    (path,) = folder.glob("*.safetensors")
    stored: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    for name, tensor in load_file(path).items():
        if tensor.dim() != 2 or any(part in name for part in PLAIN):
            stored[name], exact[name] = tensor, tensor.double()
            continue
        rows, columns = tensor.shape
        scale = torch.zeros(-(-rows // 128), -(-columns // 128))
        values, meant = (
            torch.zeros(rows, columns, dtype=E4M3),
            torch.zeros(rows, columns, dtype=torch.float64),
        )
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                at = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
                scale[i, j] = tensor[at].abs().max() / 448
                if scales == torch.float8_e8m0fnu:
                    scale[i, j] = torch.exp2(scale[i, j].log2().ceil())
                values[at] = (tensor[at] / scale[i, j]).clamp(-448, 448).to(E4M3)
                meant[at] = values[at].double() * scale[i, j].double()
        stored |= {name: values, name + "_scale_inv": scale.to(scales)}
        exact[name] = meant
    path.unlink()
    where: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {
            name: tensor for i, (name, tensor) in enumerate(sorted(stored.items())) if i % shards == shard
        }
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return exact


def change(folder: Path, name: str, tensor: Tensor | None) -> None:
    """Replace or remove one stored tensor."""
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    path = folder / where[name]
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    del tensors[name]
    if tensor is None:
        del where[name]
        index.write_text(json.dumps({"weight_map": where}))
    else:
        tensors[name] = tensor
    save_file(tensors, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_deepseek("deepseek_v32", tmp_path / "tiny", kv_lora_rank=200, hidden_size=160, num_hidden_layers=2)
    return tmp_path / "tiny"


@pytest.mark.parametrize("scales", [torch.float32, torch.float8_e8m0fnu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_the_exact_product_rounded_once(
    folder: Path, scales: torch.dtype, dtype: torch.dtype
) -> None:
    exact = quantise_folder(folder, scales)
    source = open_source(folder)
    assert source.names() == exact.keys()  # a scale is no tensor of its own
    assert source.description == "tiny (safetensors, FP8 blocks, 2 files)"
    assert source.shape(NAME) == (208, 160)  # blocks of 80 rows and of 32 columns at the edges
    for name, meant in exact.items():
        found = source.read(name, dtype)
        assert found.dtype == dtype
        # half a unit in the last place, for numbers that are not subnormal
        unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}[dtype]
        assert ((found.double() - meant).abs() <= unit * meant.abs()).all(), name
        if scales == torch.float8_e8m0fnu and not any(part in name for part in PLAIN):
            assert torch.equal(found.double(), meant), name


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_is_what_the_whole_has_there(folder: Path, quantised: bool, dtype: torch.dtype) -> None:
    if quantised:
        quantise_folder(folder)
    source = SafetensorsSource(folder)
    whole = source.read(NAME, dtype)  # [208, 160], so blocks end inside of these parts and at their edges
    for dim, spans in ((0, [(0, 104), (104, 208), (128, 208)]), (1, [(0, 80), (80, 160), (128, 160)])):
        for start, stop in spans:
            part = source.read_part(NAME, Slice(dim, start, stop), dtype)
            assert torch.equal(part, whole.narrow(dim, start, stop - start))
            assert part.is_contiguous()


def test_bytes_in_the_files(folder: Path) -> None:
    quantise_folder(folder)
    source = SafetensorsSource(folder)
    assert source.stored_bytes(NAME) == 208 * 160 + 4 * 2 * 2
    assert source.stored_bytes("model.norm.weight") == 4 * 160


def test_the_loader_sees_no_difference(folder: Path) -> None:
    exact = quantise_folder(folder)
    weights, report = load(
        {"w": Weight((NAME,), (208, 160))},
        open_source(folder),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert torch.equal(weights["w"], exact[NAME].float())
    assert not any(name.endswith("_scale_inv") for name in report.unused)


@pytest.mark.parametrize(
    ("change_config", "fault"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq'"),
        ({"quant_method": None}, "quant_method None"),
        ({"weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
        ({"weight_block_size": None}, "weight_block_size None"),
        ({"fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"activation_scheme": "static"}, "activation_scheme 'static'"),
        ({"scale_fmt": "int"}, "scale_fmt 'int'"),
        ({"group_size": 32}, "group_size 32"),
    ],
)
def test_other_kinds_are_refused(folder: Path, change_config: dict[str, Any], fault: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": QUANTISATION | change_config}
    path.write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=rf"quantised weights with {fault}, which are not supported; of"
    ):
        open_source(folder)


def test_what_harms_nobody_is_accepted(folder: Path) -> None:
    quantise_folder(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"modules_to_not_convert": ["lm_head"], "kv_cache_scheme": None}
    path.write_text(json.dumps(config))
    assert NAME in open_source(folder).names()


def test_scales_that_are_missing_or_do_not_fit(folder: Path) -> None:
    quantise_folder(folder)
    change(folder, NAME + "_scale_inv", torch.ones(1, 2))
    with pytest.raises(CheckpointError, match=r"_scale_inv \[1, 2\], but .* \[208, 160\] needs .*: \[2, 2\]"):
        open_source(folder).shape(NAME)
    change(folder, NAME + "_scale_inv", torch.ones(2, 2, dtype=torch.int32))
    with pytest.raises(CheckpointError, match="_scale_inv as I32; scales must be one of F32"):
        open_source(folder).shape(NAME)
    change(folder, NAME + "_scale_inv", None)
    with pytest.raises(CheckpointError, match=f"lacks tensor {NAME}_scale_inv, the scales of the FP8 {NAME}"):
        open_source(folder).shape(NAME)


def test_fp8_that_no_config_announces(folder: Path) -> None:
    quantise_folder(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"as F8_E4M3, but config\.json has no quantization_config"):
        open_source(folder).shape(NAME)


@pytest.mark.parametrize("part", ["", "_scale_inv"])
def test_nan_is_named(folder: Path, part: str) -> None:
    quantise_folder(folder)
    source = open_source(folder)
    assert isinstance(source, SafetensorsSource)
    bad = torch.full((208, 160), 1.0).to(E4M3) if not part else torch.ones(2, 2)
    flat = bad.view(torch.uint8) if not part else bad
    flat[1, 1] = 0x7F if not part else torch.nan
    change(folder, NAME + part, bad)
    with pytest.raises(CheckpointError, match=f"NaN or infinite values in tensor {NAME} "):
        load(
            {"w": Weight((NAME,), (208, 160))}, open_source(folder),
            dtype=torch.bfloat16, device=torch.device("cpu"),
        )  # fmt: skip
