"""The cost curve of DeepSeek-V3.2 from measured steps of one layer: its arithmetic, on made-up seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import latent_cost
from benchmarks.gpu.latent_cost import BEGIN, END, K, Measured, costs, draw, main, needed_bytes, read, text
from lab.curve.measure import CurvePoint
from tests.kit import ROOT

CONFIG = ROOT / "engine" / "models" / "mla" / "configs" / "deepseek-v3.2.json"


def layer(**changes: Any) -> dict[str, Any]:
    one = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "n_routed_experts": 16}
    raw: dict[str, Any] = json.loads(CONFIG.read_text()) | one | changes
    return raw


def point(phase: Any, attention: Any, context: int, ms: float) -> CurvePoint:
    tokens, rows = (512, 512) if phase == "prefill" else (16, 1)
    seconds = (ms * 1e-3, ms * 2e-3, ms * 0.5e-3)
    return CurvePoint(
        phase=phase, attention=attention, position=context - rows, tokens=tokens, seconds=seconds
    )


MEASURED = Measured(
    points=[
        point("decode", "dense", 2 * K, 0.4), point("decode", "dense", 128 * K, 3.0),
        point("decode", "sparse", 128 * K, 0.6), point("prefill", "sparse", 128 * K, 8.0),
    ],
    model=layer(), machine="NVIDIA H200", head_seconds=1e-3,
)  # fmt: skip


def test_cost_is_layers_times_the_median_and_the_head() -> None:
    found = {(one.phase, one.attention, one.context): one for one in costs(MEASURED, layers=61, price=3.6)}
    sparse = found["decode", "sparse", 128 * K]
    assert sparse.layer_seconds == pytest.approx(0.6e-3)
    assert sparse.usd == pytest.approx((61 * 0.6e-3 + 1e-3) / 16 * 1e6 / 1000)
    assert found["prefill", "sparse", 128 * K].usd == pytest.approx(61 * 8e-3 / 512 * 1e6 / 1000)
    assert sparse.floor_seconds is not None
    assert 0.1e-3 < sparse.floor_seconds < 0.6e-3
    dense = found["decode", "dense", 128 * K]
    assert dense.floor_seconds is not None
    assert dense.floor_seconds > 2 * sparse.floor_seconds


def test_short_contexts_are_dense_in_both() -> None:
    both = [one for one in costs(MEASURED) if one.context == 2 * K]
    assert [one.attention for one in both] == ["dense", "sparse"]
    assert both[0].usd == both[1].usd
    assert len([one for one in costs(MEASURED) if one.phase == "prefill"]) == 1


def test_an_unknown_device_has_no_floor() -> None:
    other = Measured(points=MEASURED.points, model=MEASURED.model, machine="a GPU")
    found = costs(other)
    assert {one.floor_seconds for one in found} == {None}
    assert found[0].usd == pytest.approx(61 * 0.4e-3 / 16 * 1e6 / 3600 * 2)


def test_what_such_a_gpu_would_hold() -> None:
    weights, cache = needed_bytes(MEASURED, 128 * K, 16)
    assert cache == 16 * 128 * K * 61 * (656 + 132)
    experts = 61 * 16 * 3 * 2048 * 7168
    assert experts < weights < 2 * experts


def test_the_text() -> None:
    said = text(MEASURED, costs(MEASURED), 61, 2.0)
    assert "One layer on one NVIDIA H200, times 61, at 2 USD an hour" in said
    assert "more than the 141 GB" in said.replace("\n", " ")
    rows = [line for line in said.splitlines() if line.startswith("| 131,072")]
    assert len(rows) == 2
    assert "| 2.15 | 0.25 |" in rows[0]
    assert "| 0.665 | 0.187 |" in rows[1]
    assert "At 131,072 a dense token costs 4.9 times a sparse one. Sparse is cheaper from 131,072 on." in said
    assert max(map(len, said.splitlines())) <= 130


@pytest.mark.process  # matplotlib may ask for fonts
def test_it_writes_the_page_and_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, file = tmp_path / "measured.md", tmp_path / "latent_step.json"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    points = [{"phase": p.phase, "attention": p.attention, "position": p.position, "tokens": p.tokens, "seconds": p.seconds,
               "graph": True} for p in MEASURED.points]  # fmt: skip
    file.write_text(
        json.dumps({"points": points, "model": layer(), "machine": "NVIDIA H200", "head_seconds": 1e-3})
    )
    monkeypatch.setattr(latent_cost, "MEASURED", page)
    monkeypatch.setattr(latent_cost, "PICTURE", tmp_path / "cost.png")
    main([str(file)])
    printed = capsys.readouterr().out
    assert page.read_text() == f"before\n{BEGIN}\nold\n{END}\nafter\n"
    main([str(file), "--write"])
    assert page.read_text() == f"before\n{BEGIN}\n{printed}{END}\nafter\n"
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    draw(costs(MEASURED)[:1], "one point", tmp_path / "one.png")


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .* cannot be read .*latent_step --out DIR writes it"):
        read(tmp_path / "nothing.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit, match="is not a file of benchmarks.gpu.latent_step"):
        read(tmp_path / "other.json")
    with pytest.raises(SystemExit, match="2"):
        main(["--price", "0"])
