"""Wrong flags and models of `dsa calibrate` end in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.cli.test_main import dsa


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nothing"], 1, "error: there is no model 'nothing'"),
        (["--dtype", "int4"], 2, "error: --dtype is 'int4'; expected one of auto, float32, bfloat16"),
        (["--kv-cache-memory", "much"], 2, "error: --kv-cache-memory is 'much'; expected a size"),
        (["smollm2-135m-instruct", "--device", "tpu"], 1, "error: device 'tpu' is not known"),
    ],
)
def test_errors_are_one_sentence(
    tmp_path: Path, default_model: Path, arguments: list[str], code: int, sentence: str
) -> None:
    result = dsa("calibrate", "--out", str(tmp_path / "cost.json"), *arguments)
    assert result.returncode == code
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "cost.json").exists()
