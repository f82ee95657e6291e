"""The benchmark of DeepSeek-V3.2's layers over HTTP: its models, and a whole run with tiny sizes on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.latent_http import MODES, VARIANTS, config, main, parse
from engine.models.mla.config import MlaConfig


def read(variant: str, *, quick: bool) -> MlaConfig:
    return MlaConfig.read(config(4, quick=quick, **VARIANTS[variant][0]), "config.json")


def test_the_models_have_the_published_layers() -> None:
    base = read("base", quick=False)
    assert (base.num_layers, base.moe_layers, base.vocab_size) == (4, (True,) * 4, 129_280)
    assert (base.moe.num_experts, base.moe.experts_per_token, base.moe.intermediate_size) == (256, 8, 2048)
    assert base.index_layers == (True,) * 4
    assert base.num_mtp_layers == 0
    assert read("mtp", quick=False).num_mtp_layers == 1
    assert read("shared", quick=False).index_layers == (True, False, False, False)


def test_flags() -> None:
    asked = parse(["--contexts", "64,128", "--distinct", "2,1", "--only", "mtp", "--", "--device", "cpu"])
    assert (asked.contexts, asked.distinct, asked.only) == ([64, 128], [2, 1], ["mtp"])
    assert asked.flags == ["--device", "cpu"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--only", "base,other"], "--only knows base, mtp, shared; not other"),
        (["--contexts", "64"], "--distinct needs as many numbers as --contexts"),
        (["--streams", "1,x"], "--streams is '1,x'; expected numbers such as 1,16"),
        (["--streams", "0"], "--streams must be numbers above 0"),
    ],
)
def test_wrong_flags(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(flags)
    assert sentence in capsys.readouterr().err


@pytest.mark.process
@pytest.mark.timeout(200)
def test_a_run_with_tiny_sizes(tmp_path: Path) -> None:
    own = "--quick --layers 2 --only mtp --dense mtp --contexts 128 --distinct 1 --streams 2".split()
    flags = ["--device", "cpu", "--kv-cache-memory", "64MiB", "--threads", "1"]
    main([*own, "--tokens", "6", "--seconds", "180", "--out", str(tmp_path), "--", *flags])
    found: dict[str, Any] = json.loads((tmp_path / "latent_http.json").read_text())
    assert found["left_out"] == []
    assert len(found["start"]) == 1
    assert [(row["variant"], row["mode"]) for row in found["prefill"]] == [("mtp", mode) for mode in MODES]
    for row in found["decode"]:
        assert (row["streams"], row["distinct"], row["tokens"], row["cached_tokens"]) == (2, 1, 6, 64)
        assert row["first_token_s"] > 0


def test_without_time_everything_is_left_out(tmp_path: Path) -> None:
    main(["--quick", "--seconds", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "latent_http.json").read_text())
    assert found["left_out"] == [{"variant": variant, "why": "no time"} for variant in VARIANTS]
