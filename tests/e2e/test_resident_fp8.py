"""`dsa serve --weight-dtype fp8` in real processes: it serves from FP8 weights, and refuses a model without them."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

from tests.e2e.serving import Server
from tests.e2e.test_deepseek import byte_tokenizer, complete
from tests.engine.checkpoint.test_fp8 import quantise_folder
from tests.engine.models.mla.kit import tiny_deepseek
from tests.server.cli.test_main import dsa


def test_served_from_fp8_and_refused_without(tmp_path: Path) -> None:
    plain, folder = tmp_path / "plain", tmp_path / "tiny"
    plain.mkdir()
    tiny_deepseek("deepseek_v32", plain, vocab_size=byte_tokenizer(plain), num_hidden_layers=2)
    shutil.copytree(plain, folder)
    quantise_folder(folder)
    server = Server(
        str(folder),
        "--device",
        "cpu",
        "--weight-dtype",
        "fp8",
        "--kv-cache-memory",
        "64MiB",
        "--threads",
        "1",
    )
    try:
        refused = dsa("serve", str(plain), "--port", "0", "--device", "cpu", "--weight-dtype", "fp8")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert [line for line in refused.stderr.splitlines() if line.startswith("error: ")] == [
            "error: weight_dtype is fp8, but plain (safetensors, 1 file) has no weights in FP8 blocks that could "
            "stay so; leave it at auto, or serve an FP8 checkpoint"
        ]
        usage = complete(server.wait_ready())["usage"]
        assert isinstance(usage, dict)
        assert usage["completion_tokens"] == 8
        assert " stay in FP8 blocks, " in server.errors
        assert "of which 0 stay" not in server.errors
        assert server.end(signal.SIGTERM) == 0
    finally:
        server.close()
