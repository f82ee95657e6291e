"""The cost curve: its arithmetic on made-up seconds, its shape, and the command on a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch

from engine.memory.layouts import IndexKeyLayout, LatentLayout
from engine.memory.planes import PagedCache, PlaneSpec
from engine.models.mla.config import MlaConfig
from lab.curve.__main__ import app
from lab.curve.measure import CurvePlan, CurvePoint, Lab, crossover, fill, growth
from lab.curve.report import CurveReport
from lab.curve.shape import config, random_source
from lab.inspect.roofline import Phase
from lab.tool import start


def curve(phase: Phase, dense: dict[int, float], sparse: dict[int, float]) -> list[CurvePoint]:
    both: tuple[tuple[Literal["dense", "sparse"], dict[int, float]], ...]
    both = (("dense", dense), ("sparse", sparse))
    return [
        CurvePoint(phase=phase, attention=attention, position=at, forms=(), tokens=4, seconds=(4 * cost, 8 * cost, 0.0))
        for attention, costs in both
        for at, cost in costs.items()
    ]  # fmt: skip


def test_cost_is_the_median_seconds_of_a_token_times_the_price() -> None:
    (point, *_) = curve("decode", {0: 0.5}, {0: 0.5})
    assert point.token_seconds == 0.5
    assert point.usd(3.6) == pytest.approx(500.0)  # 500,000 s at 0.001 USD a second


def test_the_crossover_lies_between_measured_positions() -> None:
    points = curve("decode", {0: 1, 100: 1, 200: 2, 400: 4}, {0: 2, 100: 2, 200: 2.5, 400: 3})
    assert crossover(points, "decode", 50) == pytest.approx(200 + 200 / 3)
    assert growth(points, "decode", "dense", 100, 400) == 4
    assert growth(points, "decode", "sparse", 100, 400) == 1.5


def test_a_gain_that_is_lost_again_is_no_crossover() -> None:
    points = curve("decode", {100: 2, 200: 1, 300: 3}, {100: 1, 200: 2, 300: 2})
    assert crossover(points, "decode", 50) == pytest.approx(250)
    assert crossover(points[:2] + points[3:5], "decode", 50) is None


def test_a_gain_below_top_k_is_noise() -> None:
    """Below top_k, dense and sparse are the same computation."""
    points = curve("prefill", {0: 2, 100: 1, 200: 3}, {0: 1, 100: 2, 200: 2})
    assert crossover(points, "prefill", 200) == 200


def test_attention_and_indexer_have_the_published_sizes() -> None:
    shape = MlaConfig.read(config(quick=False), "config.json")
    assert (shape.hidden_size, shape.num_heads, shape.kv_lora_rank, shape.qk_rope_head_dim) == (
        7168,
        128,
        512,
        64,
    )
    assert (shape.q_lora_rank, shape.qk_nope_head_dim, shape.v_head_dim) == (1536, 128, 128)
    assert shape.indexer is not None
    assert (shape.indexer.num_heads, shape.indexer.head_dim, shape.indexer.index_top_k) == (64, 128, 2048)
    assert (shape.moe.experts_per_token, shape.moe.intermediate_size) == (8, 2048)
    assert shape.moe_layers == (True,)


def test_random_weights_keep_the_size_of_what_they_multiply() -> None:
    source = random_source(config(quick=True), torch.device("cpu"))
    name = "model.layers.0.self_attn.o_proj.weight"
    made = source.read(name, torch.bfloat16)
    assert tuple(made.shape) == source.shape(name) == (256, 8 * 128)
    assert made.float().std() == pytest.approx(1024**-0.5, rel=0.05)
    assert (source.read("model.norm.weight", torch.float32) == 1).all()


def test_every_page_holds_numbers_of_its_own() -> None:
    """With equal keys all scores would be equal, and the selection would be arbitrary."""
    specs = (PlaneSpec("latent", (8,), torch.bfloat16), PlaneSpec("index_key", (4,), torch.bfloat16))
    cache = PagedCache(5, specs, 1, torch.device("cpu"))
    fill(cache, [(0, "latent"), (0, "index_key")], lambda *_: None, at_once=2)
    for name in ("latent", "index_key"):
        pages = cache.plane(0, name).flatten(1).float()
        assert len(torch.unique(pages, dim=0)) == 5
        assert pages.std() == pytest.approx(1, rel=0.1)


def test_a_step_is_the_engines_own_dense_or_sparse() -> None:
    plan = CurvePlan(
        positions=(64, 1024), chunk=16, streams=2, rounds=1, quick=True, device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip
    lab = Lab(plan, lambda *_: None)
    case = {a: lab.case("decode", a, 1024, plan) for a in ("dense", "sparse")}
    assert lab.forms(case["dense"]) == ("dense",)
    assert lab.forms(case["sparse"]) == ("gather",)
    assert lab.forms(lab.case("decode", "sparse", 64, plan)) == ("dense",)
    assert (case["sparse"].requests, case["sparse"].rows, case["sparse"].start) == (2, 1, 1024)
    assert lab.seconds(case["sparse"]) > 0


def test_steps_in_fp8_and_their_floors() -> None:
    """No step is faster than its floor at the rates that this machine reaches; a longer context has a higher floor."""
    plan = CurvePlan(
        positions=(64, 1024), chunk=16, streams=2, rounds=1, quick=True, device=torch.device("cpu"),
        dtype=torch.float32, fp8=True,
    )  # fmt: skip
    lab = Lab(plan, lambda *_: None)
    assert {lab.cache.plane(0, name).dtype for name in ("latent", "index_key")} == {torch.uint8}
    for attention in ("dense", "sparse"):
        near, far = (lab.case("decode", attention, position, plan) for position in (64, 1024))
        assert lab.seconds(far) > lab.floor(far) > lab.floor(near) > 0
    point = CurvePoint(
        phase="decode", attention="dense", position=0, tokens=2, seconds=(6.0,), floor_seconds=2.0
    )
    assert point.over_floor == 3.0


def test_pages_in_fp8_hold_normal_numbers() -> None:
    latent, key = LatentLayout(128, 8), IndexKeyLayout(16)
    cache = PagedCache(3, (latent.spec("latent"), key.spec("index_key")), 1, torch.device("cpu"))
    layouts: dict[str, LatentLayout | IndexKeyLayout] = {"latent": latent, "index_key": key}
    fill(cache, [(0, "latent"), (0, "index_key")], lambda *_: None, at_once=2, layouts=layouts)
    latents = latent.unpack(cache.plane(0, "latent"), torch.float32)
    values, scales = key.read(cache.plane(0, "index_key"), torch.arange(3))
    for numbers in (latents, values.float() * scales.unsqueeze(-1)):
        assert numbers.isfinite().all()
        assert numbers.std() == pytest.approx(1, rel=0.1)
        assert len(torch.unique(numbers.flatten(1), dim=0)) == 3


@pytest.mark.process
def test_the_command_writes_table_json_and_picture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--quick",
        "--positions=0,512",
        "--chunk=8",
        "--price=2",
        f"--out={tmp_path}",
        "--dtype=float32",
    ]
    assert start(app, "bench curve", arguments) == 0
    out = capfd.readouterr().out
    assert "dense USD/M" in out
    assert "x floor" in out
    assert "the floor is the least time of each operation, added up: this CPU (measured now)" in out
    assert "sparse is cheaper from" in out or "dense is the cheaper one" in out
    raw = json.loads((tmp_path / "curve.json").read_text("utf-8"))
    assert set(raw) == set(CurveReport.__struct_fields__)
    assert raw["price_an_hour"] == 2
    assert raw["command"].startswith("dsa bench curve --quick")
    assert len(raw["points"]) == 2 * 2 * 2
    assert {len(point["seconds"]) for point in raw["points"]} == {1}
    assert all(0 < point["floor_seconds"] < 2 * point["seconds"][0] for point in raw["points"])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--positions=0,x"], "error: positions is '0,x'; expected numbers such as 0,1K"),
        (["--positions=200K"], "ends beyond the model's 163840 positions; lower positions or chunk"),
        (["--positions=1K,1K"], "error: positions must be different numbers"),
        (["--price=0"], "error: price is 0 USD an hour; it must be above 0"),
        (["--cpu-time", "--threads=2"], "error: cpu_time is the time of one CPU thread; leave it out"),
        (["--device=tpu"], "error: device 'tpu' is not known"),
    ],
)
def test_errors_are_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    threads = torch.get_num_threads()
    assert start(app, "bench curve", ["--quick", f"--out={tmp_path / 'made'}", *arguments]) == 1
    torch.set_num_threads(threads)
    error = capfd.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
