"""Packed weights: their values are the checkpoint's, and products are those in float64 but for the order of sums.

With integer weights they are those of the activations as 16-bit integers, which are rounded here by the formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from engine.checkpoint.loader import Weight
from engine.checkpoint.packed import can_pack, load_packed
from engine.checkpoint.source import LaidSource, open_source
from engine.errors import EngineError
from engine.kernels import native
from engine.kernels.native import packing
from engine.kernels.native.packed import PackedWeight, Stored, can_chain, packed_bytes
from engine.memory.quantised import Kind, Quantised, quantise_4bit
from engine.memory.superblocks import Superblocks

pytestmark = pytest.mark.skipif(native.library() is None, reason=str(native.missing()))


SUPER: dict[Kind, str] = {"q4_k": "Q4_K", "q5_k": "Q5_K", "q6_k": "Q6_K"}


def super_rows(kind: Kind, outputs: int, inputs: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Rows of random super-blocks as GGUF stores them: every number and every small scale occurs."""
    rng = np.random.default_rng(seed)
    ggml = gguf.GGMLQuantizationType[SUPER[kind]]
    size = gguf.GGML_QUANT_SIZES[ggml][1]
    blocks = rng.integers(0, 256, (outputs, inputs // 256, size)).astype(np.uint8)
    count = 1 if kind == "q6_k" else 2
    scales = (rng.standard_normal((outputs, inputs // 256, count)) * 0.01).astype(np.float16)
    at = 208 if kind == "q6_k" else 0
    blocks[..., at : at + 2 * count] = scales.view(np.uint8)
    return blocks.reshape(outputs, -1)


def super_weight(kind: Kind, outputs: int, inputs: int, seed: int = 0) -> tuple[PackedWeight, Tensor]:
    rows = super_rows(kind, outputs, inputs, seed)
    values = gguf.dequantize(rows, gguf.GGMLQuantizationType[SUPER[kind]])
    return PackedWeight.of(Superblocks(kind, rows)), torch.from_numpy(np.array(values)).double()


def as_integers(x: Tensor) -> Tensor:
    """Round activations as the kernels for integer weights do: 32 neighbours to 16 bits, in float64."""
    groups = x.float().unflatten(-1, (-1, 32))
    most = groups.abs().amax(-1, keepdim=True)
    # A number divided by a tensor would be the number times its inverse, which rounds twice.
    steps = torch.where(most > 0, torch.full_like(most, 127 * 256) / most, 0.0)
    values: Tensor = ((groups * steps).round().double() * (most / (127 * 256)).double()).flatten(-2)
    return values


def weight_of(kind: str, outputs: int, inputs: int, seed: int = 0) -> tuple[PackedWeight, Tensor]:
    """A random weight, and its values in float64."""
    if kind in SUPER:
        return super_weight(kind, outputs, inputs, seed)
    rng = np.random.default_rng(seed)
    if kind == "bf16":
        plain = torch.from_numpy(rng.standard_normal((outputs, inputs))).bfloat16()
        return PackedWeight.of(plain), plain.double()
    scales = (rng.standard_normal((outputs, inputs // 32)) * 0.02).astype(np.float16)
    numbers, offsets = rng.integers(-128, 128, (outputs, inputs)).astype(np.int8), None
    values = np.repeat(scales.astype(np.float64), 32, axis=1)
    if kind == "q4":
        numbers = rng.integers(0, 16, (outputs, inputs)).astype(np.uint8)
        offsets = (rng.standard_normal(scales.shape) * 0.1).astype(np.float16)
    exact = values * numbers
    if offsets is not None:
        exact += np.repeat(offsets.astype(np.float64), 32, axis=1)
    return PackedWeight.of(Quantised(numbers, scales, offsets)), torch.from_numpy(exact)


@pytest.fixture(params=["best", "plain"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The processor's best library, and the one without its 16-bit instructions; both without AMX (test_amx.py)."""
    if request.param == "plain":
        plain = native._cpu_flags() - {"avx512_bf16"}
        monkeypatch.setattr(native, "_cpu_flags", lambda: plain)
        native._open.cache_clear()
        if native.library() is None:
            pytest.skip(str(native.missing()))
    before = native.uses_amx()
    native.use_amx(False)
    yield
    native.use_amx(before)
    native._open.cache_clear()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("kind", ["q4", "q8", "bf16", *SUPER])
@pytest.mark.parametrize("threads", [1, 3])
def test_products_are_those_in_float64(kind: str, threads: int) -> None:
    library = native.library()
    assert library is not None
    before = library.dsa_threads()
    native.set_threads(threads)
    try:
        # Ragged tiles; more groups than are unpacked at once.
        sizes = ((40, 256), (7, 768), (64, 2304)) if kind in SUPER else ((40, 32), (7, 96), (64, 2080))
        for outputs, inputs in sizes:
            weight, exact = weight_of(kind, outputs, inputs)
            for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 70, 300):
                x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).bfloat16()
                expected = (x.double() if kind == "bf16" else as_integers(x)) @ exact.T
                bound = 2e-6 * float(x.double().abs().max() * exact.abs().sum(1).max())
                found = weight.multiply(x, dtype=torch.float32)
                assert float((found.double() - expected).abs().max()) < bound, (outputs, inputs, rows)
                torch.testing.assert_close(
                    weight.multiply(x, dtype=torch.bfloat16), found.bfloat16(), rtol=0, atol=0
                )
    finally:
        native.set_threads(before)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("kind", ["q4", "q8", "bf16", *SUPER])
def test_values_are_exact(kind: str) -> None:
    inputs = 768 if kind in SUPER else 96
    weight, exact = weight_of(kind, 50, inputs)
    assert weight.shape == exact.shape
    assert weight.numel() == exact.numel()
    assert weight.num_bytes == packed_bytes(weight.kind, 50, inputs)
    wanted = torch.tensor([0, 49, 17, 17, 16])
    torch.testing.assert_close(weight.rows(wanted), exact[wanted].float(), rtol=0, atol=0)
    torch.testing.assert_close(weight.dequantise(torch.bfloat16), exact.float().bfloat16(), rtol=0, atol=0)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("kind", SUPER)
def test_parts_of_several_kinds_are_one_weight(kind: Kind) -> None:
    """As q, k and v of most GGUF files are."""
    made = [
        super_weight(kind, 32, 512),
        super_weight("q6_k", 48, 512, seed=1),
        super_weight("q4_k", 7, 512, seed=2),
    ]
    stored: list[Stored] = [
        Superblocks(kind, super_rows(kind, 32, 512)),
        Superblocks("q6_k", super_rows("q6_k", 48, 512, seed=1)),
        quantise_4bit(torch.randn(16, 512)),
        Superblocks("q4_k", super_rows("q4_k", 7, 512, seed=2)),
    ]
    middle = PackedWeight.of(stored[2]).dequantise(torch.float32).double()
    weight = PackedWeight.of(stored)
    assert weight.shape == (103, 512)
    assert weight.numel() == 103 * 512
    assert weight.num_bytes == PackedWeight.bytes_of(stored)
    exact = torch.cat([made[0][1], made[1][1], middle, made[2][1]])
    torch.testing.assert_close(weight.dequantise(torch.float32), exact.float(), rtol=0, atol=0)
    for rows in (1, 5, 40):
        x = torch.randn(rows, 512).bfloat16()
        expected = as_integers(x) @ exact.T
        bound = 2e-6 * float(x.double().abs().max() * exact.abs().sum(1).max())
        assert float((weight.multiply(x, dtype=torch.float32).double() - expected).abs().max()) < bound
    assert can_chain((32, 48, 16, 7))
    assert not can_chain((32, 7, 16))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["q4", *SUPER])
@pytest.mark.parametrize("at", [3, 20])
def test_not_a_number_goes_through(kind: str, fault: float, at: int) -> None:
    """A faulty request must be seen to be one."""
    weight, _ = weight_of(kind, 16, 256)
    x = torch.randn(2, 256).bfloat16()
    x[1, at] = fault
    out = weight.multiply(x, dtype=torch.float32)
    assert out[0].isfinite().all()
    assert not out[1].isfinite().any()


def test_shapes_in_front_and_no_rows() -> None:
    weight, _ = weight_of("q4", 20, 64)
    x = torch.randn(2, 3, 64).bfloat16()
    assert weight.multiply(x, dtype=torch.bfloat16).shape == (2, 3, 20)
    assert weight.multiply(x[:0], dtype=torch.bfloat16).shape == (0, 3, 20)
    with pytest.raises(EngineError, match="multiplies bfloat16, not torch.float32"):
        weight.multiply(x.float(), dtype=torch.float32)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("outputs", [16, 43])
@pytest.mark.parametrize("kind", SUPER)
def test_the_packing_in_c_is_that_in_numpy(kind: Kind, outputs: int) -> None:
    stored = Superblocks(kind, super_rows(kind, outputs, 768))
    found = PackedWeight.of(stored).data
    assert found.shape == (-(-outputs // 16), packed_bytes(kind, 16, 768))
    assert np.array_equal(found.numpy(), packing.pack_superblocks(stored))


def test_activations_of_zero() -> None:
    weight, _ = weight_of("q6_k", 16, 256)
    assert (weight.multiply(torch.zeros(3, 256).bfloat16(), dtype=torch.float32) == 0).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "F16", "F32", "Q4_K", "Q5_K", "Q6_K"])
def test_a_gguf_file_is_packed_as_it_is_stored(tmp_path: Path, name: str) -> None:
    """Values against the gguf package's own dequantisation, rows of the query put in Hugging Face's order."""
    kind = gguf.GGMLQuantizationType[name]
    table = gguf_with(tmp_path / "model.gguf", kind)
    source = open_source(tmp_path / "model.gguf")
    weights, report = load_packed(table, source)
    stays = {"Q4_0": "q4", "Q4_1": "q4", "Q8_0": "q8", "Q5_0": "bf16"}.get(name, "bf16")
    stays = name.lower() if name.lower() in SUPER else stays
    size = 0
    for parameter, weight in table.items():
        held = weights[parameter]
        expected = torch.cat([source.read(part, torch.float32) for part in weight.names])
        if not weight.may_be_packed:
            assert isinstance(held, Tensor)
            size += held.nbytes
            continue
        assert isinstance(held, PackedWeight)
        assert held.kind == stays
        if stays == "bf16":
            expected = expected.bfloat16().float()
        torch.testing.assert_close(held.dequantise(torch.float32), expected, rtol=0, atol=0)
        size += held.num_bytes
    assert report.num_bytes == size
    assert report.num_parameters == sum(np.prod(weight.shape) for weight in table.values())


@pytest.mark.parametrize("mixed", ["Q6_K", "Q8_0", "F32"])
def test_a_parameter_of_two_types_stays_as_it_is_stored(tmp_path: Path, mixed: str) -> None:
    """Only a plain tensor among quantised ones makes the whole plain."""
    kinds = gguf.GGMLQuantizationType
    table = gguf_with(tmp_path / "model.gguf", kinds.Q4_K, v=kinds[mixed])
    source = open_source(tmp_path / "model.gguf")
    held = load_packed(table, source)[0]["qkv"]
    assert isinstance(held, PackedWeight)
    expected = torch.cat([source.read(part, torch.float32) for part in table["qkv"].names])
    if mixed == "F32":
        assert (held.kind, held.rest) == ("bf16", None)
        expected = expected.bfloat16().float()
    else:
        assert held.rest is not None
        assert (held.kind, held.own, held.rest.kind) == ("q4_k", 384, mixed.lower().removesuffix("_0"))
    torch.testing.assert_close(held.dequantise(torch.float32), expected, rtol=0, atol=0)


def gguf_with(
    path: Path, kind: gguf.GGMLQuantizationType, v: gguf.GGMLQuantizationType | None = None
) -> dict[str, Weight]:
    """A small llama file with its matrices in one type, those of values in type `v`, and a table of some of them."""
    rng = np.random.default_rng(1)
    hidden, heads, dim, ffn, vocab = 64, 4, 16, 96, 50
    if kind.name.lower() in SUPER:
        hidden, dim, ffn = 256, 64, 512
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    matrices = {
        "token_embd": (vocab, hidden),
        "blk.0.attn_q": (heads * dim, hidden),
        "blk.0.attn_k": (2 * dim, hidden),
        "blk.0.attn_v": (2 * dim, hidden),
        "blk.0.attn_output": (hidden, heads * dim),
        "blk.0.ffn_gate": (ffn, hidden),
        "blk.0.ffn_up": (ffn, hidden),
        "blk.0.ffn_down": (hidden, ffn),
    }
    for name, shape in matrices.items():
        own = v if v is not None and name.endswith("attn_v") else kind
        if own.name.lower() in SUPER:  # which the gguf package reads and does not make
            data = super_rows(cast("Kind", own.name.lower()), *shape)
        else:
            data = gguf.quantize(rng.standard_normal(shape).astype(np.float32), own)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=own)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    at = "model.layers.0"
    qkv = tuple(f"{at}.self_attn.{part}_proj.weight" for part in "qkv")
    return {
        "embed": Weight(("model.embed_tokens.weight",), (vocab, hidden), may_be_packed=True),
        "norm": Weight(("model.norm.weight",), (hidden,)),
        "qkv": Weight(qkv, (8 * dim, hidden), may_be_packed=True),
        "down": Weight((f"{at}.mlp.down_proj.weight",), (hidden, ffn), may_be_packed=True),
    }


def test_rows_that_are_not_whole_groups_are_not_packed() -> None:
    assert can_pack({"a": Weight(("a",), (3, 64), may_be_packed=True), "b": Weight(("b",), (7,))})
    assert not can_pack({"a": Weight(("a",), (3, 48), may_be_packed=True)})


def test_four_bits_are_the_nearest_that_the_format_has() -> None:
    """As good as gguf's own quantisation to Q4_1; a group of equal numbers is exact, and so is doing it again."""
    weight = torch.randn(20, 96, generator=torch.Generator().manual_seed(2))
    weight[3, 32:64] = 0.25
    kind = gguf.GGMLQuantizationType.Q4_1
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))
    found = PackedWeight.of(quantise_4bit(weight)).dequantise(torch.float32)
    assert (found - weight).abs().max() <= 1.01 * (theirs - weight).abs().max()
    assert (found[3, 32:64] == 0.25).all()
    again = PackedWeight.of(quantise_4bit(found)).dequantise(torch.float32)
    torch.testing.assert_close(again, found, atol=1e-6, rtol=1e-3)


class Indexer:
    """One tensor that lies over a checkpoint, as those of an overlay do."""

    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(4))

    def names(self) -> frozenset[str]:
        return frozenset({"wq"})

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


@pytest.mark.parametrize(
    ("stored", "expected"), [("Q4_1", "q4"), ("Q8_0", "bf16"), ("Q4_K", "q4"), ("Q6_K", "bf16")]
)
def test_what_may_lose_bits_loses_them_only_beside_weights_of_4(
    tmp_path: Path, stored: str, expected: str
) -> None:
    table = gguf_with(tmp_path / "a.gguf", gguf.GGMLQuantizationType[stored])
    source = LaidSource(open_source(tmp_path / "a.gguf"), Indexer(), "an indexer")
    for loses, kind in ((True, expected), (False, "bf16")):
        wq = Weight(("wq",), (48, 256), may_be_packed=True, may_lose_bits=loses)
        held = load_packed(table | {"wq": wq}, source)[0]["wq"]
        assert isinstance(held, PackedWeight)
        assert held.kind == kind
        worst = (held.dequantise(torch.float32) - Indexer.weight).abs().max()
        assert (0.05 < worst < 0.3) if kind == "q4" else worst < 0.02


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("kind", ["q4", "q8", "bf16", *SUPER])
def test_a_row_has_the_same_bits_beside_any_number_of_rows(kind: str) -> None:
    """With `for_alike_rows`, however many rows there are and wherever the row is among them."""
    inputs = 2304
    weight = weight_of(kind, 40, inputs)[0].for_alike_rows()
    x = torch.randn(300, inputs, generator=torch.Generator().manual_seed(1)).bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        wanted = weight.multiply(x, dtype=dtype)
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33):
            for first in (0, 5, 260):
                found = weight.multiply(x[first : first + rows], dtype=dtype)
                assert torch.equal(found, wanted[first : first + rows])


def test_rows_are_alike_in_every_part_of_a_weight() -> None:
    weight = PackedWeight.of((quantise_4bit(torch.randn(16, 64)), torch.randn(16, 64))).for_alike_rows()
    assert weight.descriptor.alike == 1
    assert weight.rest is not None
    assert weight.rest.descriptor.alike == 1
