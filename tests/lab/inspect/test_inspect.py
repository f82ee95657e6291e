"""The counts of `dsa inspect` equal the published figures for the published config, and those of a loaded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint.loader import load
from engine.checkpoint.source import open_source
from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError
from engine.kernels import native
from engine.models.mla.config import MlaConfig
from engine.models.mla.weights import weight_table
from engine.parallel.ranks import Ranks
from engine.step.build import build
from lab.inspect.report import Devices, Wanted, inspect, render
from server.hub.models import DEFAULT_MODEL, resolve
from tests.engine.checkpoint.test_fp8 import quantise_folder
from tests.engine.kit import base_of, random_overlay, tiny_checkpoint
from tests.engine.models.gqa.test_members import MEMBERS
from tests.engine.models.mla.kit import FAMILIES, tiny_deepseek
from tests.kit import ROOT

CONFIG = ROOT / "engine" / "models" / "mla" / "configs" / "deepseek-v3.2.json"
GIB = 1 << 30


def look(path: Path, overlay: Path | None = None, **changes: Any) -> dict[str, Any]:
    wanted = {"context": None, "concurrency": 1, "dtype": "bfloat16", "cache_dtype": "auto"} | changes
    return inspect(path, overlay, Wanted(**wanted), Devices(8, 80 * GIB))


def test_the_published_config_has_the_published_figures() -> None:
    """671B and 37B (arXiv 2412.19437), 685B with the MTP module's copies, 656 + 132 bytes (FlashMLA, DeepGEMM)."""
    report = look(CONFIG)
    parameters = report["parameters"]
    without = parameters["total"] - parameters["indexer"]
    assert without == 671_026_419_200
    assert parameters["active"] // 10**9 == 37
    assert 36.5e9 < parameters["active"] - parameters["indexer"] < 36.75e9  # 36.7B in README_WEIGHTS.md
    copies = 2 * 129280 * 7168
    assert round((without + parameters["mtp"] + copies) / 1e9) == 685
    # 64 x 128 query rows on 1536, a key row of 128 on 7168, 64 head weights, a norm: in each of 61 layers
    assert parameters["indexer"] == 61 * (64 * 128 * 1536 + 128 * 7168 + 64 * 7168 + 2 * 128)
    cache = report["cache"]
    assert cache["dtype"] == "fp8"
    assert (cache["kv_bytes_per_token_per_layer"], cache["index_bytes_per_token_per_layer"]) == (656, 132)
    assert cache["bytes_per_token"] == 61 * 788
    assert round(report["weights"]["file_bytes"] / GIB) == 642
    assert look(CONFIG, cache_dtype="bfloat16")["cache"]["kv_bytes_per_token_per_layer"] == 1152


def test_whether_it_fits() -> None:
    report = look(CONFIG, context=131072, concurrency=3)
    assert report["cache"]["bytes"] == 3 * 131072 * 61 * 788
    enough = Devices(1, report["weights"]["loaded_bytes"] + report["cache"]["bytes"])
    wanted = Wanted(131072, 3, "bfloat16", "auto")
    assert inspect(CONFIG, None, wanted, enough)["fit"]["fits"]
    assert not inspect(CONFIG, None, wanted, Devices(1, enough.memory - 1))["fit"]["fits"]
    assert look(CONFIG, context=65)["cache"]["bytes"] == 128 * 61 * 788  # whole pages
    with pytest.raises(ConfigError, match="--context is 163841, but the model has 163840 positions"):
        look(CONFIG, context=163841)


def test_text_says_that_fp8_becomes_bfloat16() -> None:
    text = render(look(CONFIG, weight_dtype="plain"))
    assert "642.1 GiB in files (expected of this config)" in text
    assert "in bfloat16, the head in float32; FP8 weights are dequantised on loading" in text
    assert "656 + 132 bytes a token a layer" in text
    assert "does not fit" in text


def test_fp8_weights_take_what_the_loader_takes(tmp_path: Path) -> None:
    tiny_deepseek("deepseek_v32", tmp_path / "tiny", moe_intermediate_size=128, hidden_size=128)
    quantise_folder(tmp_path / "tiny")
    settings: dict[str, Any] = {"weights": str(tmp_path / "tiny"), "device": "cpu", "dtype": "float32"}
    for kind in ("fp8", "plain"):
        built = build(EngineConfig(**settings, weight_dtype=kind))
        found = look(tmp_path / "tiny", dtype="float32", weight_dtype=kind)["weights"]
        wanted = built.weights
        assert (found["loaded_bytes"], found["loaded_fp8_bytes"], found["dequantised_bytes"]) == (
            wanted.num_bytes, wanted.fp8_bytes, wanted.dequantised_bytes
        )  # fmt: skip


def test_packed_weights_take_what_the_loader_takes(default_model: Path) -> None:
    overlay = resolve(DEFAULT_MODEL).overlay
    settings: dict[str, Any] = {"weights": str(default_model), "device": "cpu", "dtype": "bfloat16"}
    built = build(EngineConfig(**settings, overlay=str(overlay)))
    found = look(default_model, overlay)
    if native.library() is not None:
        assert found["weights"]["packed_bytes"] == built.weights.num_bytes
    assert "MiB packed as stored, on a CPU with the native kernels" in render(found)


def test_native_kernels_need_what_they_allocate(default_model: Path) -> None:
    if native.library() is None:
        pytest.skip(str(native.missing()))
    overlay = resolve(DEFAULT_MODEL).overlay
    built = build(EngineConfig(weights=str(default_model), overlay=str(overlay), device="cpu"))
    found = look(default_model, overlay, native=True, context=128)
    planes = [built.cache.plane(i, name) for i in range(found["layers"]) for name in ("kv", "index_key")]
    pages = sum(plane[:2].numel() * plane.element_size() for plane in planes)
    assert found["cache"]["bytes"] == pages
    assert found["fit"]["needed_bytes"] == built.weights.num_bytes + pages
    assert "packed as stored for the native kernels" in render(found)
    plain = look(default_model, overlay, context=128)
    assert plain["fit"]["needed_bytes"] > found["fit"]["needed_bytes"]


def weights_of(report: dict[str, Any]) -> int:
    size: int = report["weights"]["loaded_bytes"]
    return size


def test_a_device_of_several_needs_what_its_part_takes(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    tiny_deepseek("deepseek_v32", folder, moe_intermediate_size=256, hidden_size=128, q_lora_rank=128)
    quantise_folder(folder)
    source = open_source(folder)
    config = MlaConfig.read(source.config, "config.json")
    for count in (2, 4):
        report = inspect(folder, None, Wanted(64, 1, "float32", "auto"), Devices(count, GIB))
        _, first = load(
            weight_table(config, Ranks(0, count)),
            source,
            dtype=torch.float32,
            device=torch.device("cpu"),
            fp8=True,
        )
        assert first.fp8_bytes > 0
        assert report["fit"]["devices_used"] == count
        assert report["fit"]["needed_bytes"] == first.num_bytes + report["cache"]["bytes"]
        assert first.num_bytes < weights_of(report)


def test_what_cannot_be_split_is_counted_on_one_device(tmp_path: Path) -> None:
    tiny_deepseek("deepseek_v32", tmp_path / "tiny")
    tiny_checkpoint(tmp_path / "llama")
    for name, why in (
        ("tiny", "4 attention heads cannot be split"),
        ("llama", "served on one device, not on 8"),
    ):
        report = look(tmp_path / name)
        fit = report["fit"]
        assert (fit["devices"], fit["devices_used"]) == (8, 1)
        assert fit["needed_bytes"] == weights_of(report) + report["cache"]["bytes"]
        assert why in fit["not_split_because"]
        assert why in render(report)


def test_the_published_model_fits_eight_devices_in_fp8_alone() -> None:
    def look_at(kind: Any) -> dict[str, Any]:
        return inspect(CONFIG, None, Wanted(131072, 1, "bfloat16", "auto", kind), Devices(8, 141 * GIB))

    resident, plain = look_at("auto"), look_at("plain")
    assert resident["fit"]["fits"]
    assert resident["fit"]["needed_bytes"] > (weights_of(resident) + 8 * resident["cache"]["bytes"]) / 8
    assert not plain["fit"]["fits"]
    weights = resident["weights"]
    # kv_b of 128 heads of 128 + 128 on 512, index queries and keys: in each of 61 layers, 2 bytes a number
    index = 64 * 128 * 1536 + 128 * 7168
    assert weights["dequantised_bytes"] == 2 * 61 * (128 * 256 * 512 + index)
    assert weights["loaded_bytes"] < weights["file_bytes"] + 8 * GIB
    assert weights["loaded_fp8_bytes"] > 0.97 * weights["loaded_bytes"]


def test_fp8_weights_are_refused_where_there_are_none(tmp_path: Path) -> None:
    tiny_deepseek("deepseek_v3", tmp_path / "plain")
    with pytest.raises(
        ConfigError, match="--weight-dtype is fp8, but this deepseek_v3 has no weights that are"
    ):
        look(tmp_path / "plain", weight_dtype="fp8")


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = tiny_deepseek(family, tmp_path)
    report = look(tmp_path)
    buffers = sum(b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    named = any(n.endswith("e_score_correction_bias") for n, _ in model.named_parameters())
    assert report["parameters"]["total"] == numbers + (0 if named else buffers)
    assert report["unused_tensors"] == []
    assert (report["cache"]["index_bytes_per_token_per_layer"] > 0) == (family != "deepseek_v3")


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_of_the_llama_family_needs_what_it_then_takes(
    tmp_path: Path, name: str, indexed: bool
) -> None:
    folder = tmp_path / "tiny"
    tiny_checkpoint(folder, **MEMBERS[name])
    overlay = random_overlay(tmp_path / "o.safetensors", base_of(folder)) if indexed else None
    report = look(folder, overlay, dtype="float32", context=640)
    built = build(
        EngineConfig(
            weights=str(folder),
            overlay=None if overlay is None else str(overlay),
            device="cpu",
            dtype="float32",
        )
    )
    assert report["parameters"]["total"] == built.ready.model.num_parameters
    assert report["parameters"]["active"] <= report["parameters"]["total"]
    assert report["cache"]["bytes"] == 10 * built.ready.capacity.page_bytes
    assert report["unused_tensors"] == []
    assert report["architecture"] == built.ready.model.architecture == MEMBERS[name]["kind"]


def test_a_config_alone_says_the_same_but_for_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    tiny_deepseek("deepseek_v32", folder)
    quantise_folder(folder)
    held = look(folder)
    assert held["weights"]["files"] == "on disk"
    stored = sum(
        tensor.nbytes for path in folder.glob("*.safetensors") for tensor in load_file(path).values()
    )
    assert held["weights"]["file_bytes"] == stored
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_text((folder / "config.json").read_text())
    alone = look(tmp_path / "alone")
    assert alone["weights"]["files"] == "expected of this config"
    for key in ("parameters", "cache", "fit"):
        assert alone[key] == held[key]


def test_shards_are_checked(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    tiny_deepseek("deepseek_v32", folder)
    quantise_folder(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="there is no such file beside it"):
        look(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()  # a folder with an index must have its weights
    with pytest.raises(CheckpointError):
        look(folder)


def test_json_is_the_report() -> None:
    assert json.loads(json.dumps(look(CONFIG)))["architecture"] == "deepseek_v32"
