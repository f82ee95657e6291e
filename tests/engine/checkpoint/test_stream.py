"""Parameters that are streamed from files equal those that are read when their turn comes, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.checkpoint import loader
from engine.checkpoint.loader import Weight, load
from engine.checkpoint.part import Slice
from engine.checkpoint.safetensors import SafetensorsSource
from engine.checkpoint.stream import Stream
from engine.errors import CheckpointError
from engine.memory.blocks import E4M3, BlockWeight
from engine.models.mla.config import MlaConfig
from engine.models.mla.weights import weight_table
from engine.parallel.ranks import Ranks
from tests.engine.checkpoint.test_fp8 import NAME, change, quantise_folder
from tests.engine.models.mla.kit import tiny_deepseek

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "STREAMED", ("cpu", "cuda"))
    monkeypatch.setattr(loader, "_AHEAD", 1 << 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    tiny_deepseek("deepseek_v32", path, hidden_size=256, moe_intermediate_size=128, num_hidden_layers=2)
    quantise_folder(path)
    return path


def same(one: Tensor | BlockWeight, other: Tensor | BlockWeight) -> bool:
    if isinstance(one, BlockWeight) and isinstance(other, BlockWeight):
        bits = torch.equal(one.values.cpu().view(torch.uint8), other.values.cpu().view(torch.uint8))
        return bits and torch.equal(one.scales.cpu(), other.scales.cpu())
    assert isinstance(one, Tensor)
    assert isinstance(other, Tensor)
    return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [Ranks(0, 1), Ranks(1, 2)], ids=["alone", "second of two"])
def test_every_parameter_is_the_same(
    folder: Path,
    device: torch.device,
    fp8: bool,
    dtype: torch.dtype,
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = SafetensorsSource(folder)
    table = weight_table(MlaConfig.read(source.config, "config.json"), ranks)
    told: list[tuple[int, int]] = []
    streamed, report = load(
        table,
        source,
        dtype=dtype,
        device=device,
        fp8=fp8,
        progress=lambda done, total: told.append((done, total)),
    )
    monkeypatch.setattr(loader, "STREAMED", ())
    plain, wanted = load(table, source, dtype=dtype, device=torch.device("cpu"), fp8=fp8)
    assert streamed.keys() == plain.keys()
    for name, value in plain.items():
        assert same(streamed[name], value), name
    assert any(isinstance(value, BlockWeight) for value in streamed.values()) == fp8
    assert (report.num_bytes, report.fp8_bytes, report.num_parameters) == (
        wanted.num_bytes, wanted.fp8_bytes, wanted.num_parameters,
    )  # fmt: skip
    assert told[0] == (0, report.num_bytes)
    assert told[-1] == (report.num_bytes, report.num_bytes)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_small_pieces_and_a_small_ring(folder: Path, device: torch.device) -> None:
    source = SafetensorsSource(folder)
    names = tuple(f"model.layers.1.mlp.experts.{x}.down_proj.weight" for x in range(4))
    with Stream(source, device, piece=1000, buffers=2) as stream:
        ends = [
            stream.begin(names, None, (4 * 256, 128), torch.bfloat16, fp8=True),
            stream.begin(names, Slice(0, 128, 256), (4 * 128, 128), torch.float32, fp8=False),
            stream.begin(("model.norm.weight",), None, (256,), torch.bfloat16, fp8=False),
        ]
        blocks, rows, norm = [end() for end in ends]
        stream.check()
    wanted = [source.read_blocks(name) for name in names]
    assert isinstance(blocks, BlockWeight)
    assert same(blocks, BlockWeight(torch.cat([w.values.view(torch.uint8) for w in wanted]).view(E4M3), torch.cat([w.scales for w in wanted])))  # fmt: skip
    assert isinstance(rows, Tensor)
    assert same(rows, torch.cat([w.dequantise(torch.float32)[128:] for w in wanted]))
    assert same(norm, source.read("model.norm.weight", torch.bfloat16))


def test_what_is_not_streamed(folder: Path) -> None:
    """Columns, and rows that cut a block, are read when their turn comes."""
    with Stream(SafetensorsSource(folder), DEVICES[0]) as stream:
        assert stream.takes((NAME,), None)
        assert stream.takes((NAME,), Slice(0, 0, 128))
        assert not stream.takes((NAME,), Slice(0, 0, 100))
        assert not stream.takes((NAME,), Slice(1, 0, 128))
        assert stream.takes(("model.embed_tokens.weight",), Slice(0, 0, 100))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("part", ["", "_scale_inv"])
@pytest.mark.parametrize("fp8", [False, True])
def test_nan_is_named(folder: Path, device: torch.device, part: str, fp8: bool) -> None:
    shape = SafetensorsSource(folder).shape(NAME)
    bad = torch.ones(shape).to(E4M3) if not part else torch.ones([-(-size // 128) for size in shape])
    (bad if part else bad.view(torch.uint8))[-1, -1] = torch.nan if part else 0x7F
    change(folder, NAME + part, bad)
    table = {
        "first": Weight(("model.norm.weight",), (256,)),
        "w": Weight((NAME,), shape, may_stay_fp8=True),
        "last": Weight(
            ("model.embed_tokens.weight",), SafetensorsSource(folder).shape("model.embed_tokens.weight")
        ),
    }
    with pytest.raises(CheckpointError, match=f"NaN or infinite values in tensor {NAME} "):
        load(table, SafetensorsSource(folder), dtype=torch.bfloat16, device=device, fp8=fp8)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_nan_of_plain_tensors_is_named(folder: Path, name: str) -> None:
    shape = SafetensorsSource(folder).shape(name)
    bad = torch.ones(shape)
    bad.view(-1)[0] = torch.inf
    change(folder, name, bad)
    with pytest.raises(
        CheckpointError, match=rf"NaN or infinite values in tensor {name} \(as torch.bfloat16\)"
    ):
        load(
            {"w": Weight((name,), shape)}, SafetensorsSource(folder), dtype=torch.bfloat16, device=DEVICES[0]
        )


def test_a_file_that_becomes_shorter(folder: Path) -> None:
    source = SafetensorsSource(folder)
    place = source.place(NAME)
    shape = source.shape(NAME)
    content = place.path.read_bytes()
    shorter = place.path.with_suffix(".part")
    shorter.write_bytes(content[: place.offset + 100])
    shorter.replace(place.path)  # the map of the old file stays whole, but the new one is opened
    with pytest.raises(CheckpointError, match="ends too early"):
        load({"w": Weight((NAME,), shape)}, source, dtype=torch.float32, device=DEVICES[0])


def test_places_are_where_the_bytes_are(folder: Path) -> None:
    source = SafetensorsSource(folder)
    for name in sorted(source.names()):
        place = source.place(name)
        assert (place.shape, place.path.parent) == (source.shape(name), folder)
        file = place.path.read_bytes()
        size = place.dtype.itemsize * torch.Size(place.shape).numel()
        found = torch.frombuffer(bytearray(file[place.offset : place.offset + size]), dtype=place.dtype)
        if source.in_blocks(name):
            assert torch.equal(
                found.view(torch.uint8), source.read_blocks(name).values.view(torch.uint8).flatten()
            )
        else:
            assert torch.equal(found, source.read(name, place.dtype).flatten())
    assert json.loads((folder / "config.json").read_text())["quantization_config"]
