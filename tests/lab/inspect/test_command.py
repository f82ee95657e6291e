"""`dsa inspect`. About a damaged checkpoint, it and `dsa serve` print one sentence and exit with another status than 0."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

from tests.engine.checkpoint.test_fp8 import quantise_folder
from tests.engine.kit import tiny_checkpoint
from tests.engine.models.mla.kit import tiny_deepseek
from tests.kit import ROOT
from tests.server.cli.test_main import dsa

pytestmark = pytest.mark.process

CODE = "import sys; from server.cli.main import main; sys.argv[0] = 'dsa'; main()"


def test_the_readmes_table() -> None:
    result = dsa(
        "inspect", "deepseek-v3.2", "--devices", "8", "--device-memory", "141GiB", "--context", "131072"
    )
    assert (result.returncode, result.stderr) == (0, "")
    for line in result.stdout.splitlines():
        # Every line is in the document word for word, except the path, which is this machine's.
        assert line.startswith("model ") or line in (ROOT / "docs" / "models.md").read_text(), line
    assert "671.9 B, 37.5 B active" in result.stdout


def test_json_and_the_default_model(default_model: Path) -> None:
    result = dsa("inspect", "smollm2-135m-instruct", "--json", "--context", "4096", "--dtype", "float32")
    report = json.loads(result.stdout)
    assert report["architecture"] == "llama"
    assert report["index_top_k"] == 512  # the overlay that comes with it
    assert report["cache"]["kv_bytes_per_token_per_layer"] == 2 * 3 * 64 * 4
    assert report["fit"]["devices"] >= 1


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nothing"], 1, "error: there is no model 'nothing'"),
        (["deepseek-v3.2", "--dtype", "int4"], 2, "error: --dtype is 'int4'; expected one of auto"),
        (
            ["deepseek-v3.2", "--device-memory", "much"],
            2,
            "error: --device-memory is 'much'; expected a size",
        ),
        (["deepseek-v3.2", "--context", "163841"], 1, "error: --context is 163841, but the model has 163840"),
        (
            ["smollm2-135m-instruct", "--kv-cache-dtype", "fp8"],
            1,
            "error: a cache in fp8 is not known for llama",
        ),
    ],
)
def test_errors_are_one_sentence(default_model: Path, arguments: list[str], code: int, sentence: str) -> None:
    result = dsa("inspect", *arguments)
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.startswith(sentence)
    assert result.stderr.count("\n") == 1


def unknown(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mamba9"}))


def corrupt(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"?" + content[9:])


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def misshapen(folder: Path) -> None:
    _replace(folder, "model.layers.1.mlp.down_proj.weight", lambda tensor: tensor[:, 1:].contiguous())


def missing(folder: Path) -> None:
    _replace(folder, "model.layers.1.mlp.down_proj.weight", lambda tensor: None)


def not_a_number(folder: Path) -> None:
    _replace(folder, "model.layers.1.mlp.down_proj.weight", lambda tensor: tensor * torch.nan)


def _replace(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else tensors | {name: changed}, folder / "model.safetensors")


FAULTS: dict[Callable[[Path], None], str] = {
    unknown: "has model_type 'mamba9', which is not supported; supported: ",
    corrupt: "model.safetensors is not a whole safetensors file",
    truncated: "model.safetensors is not a whole safetensors file",
    misshapen: "has model.layers.1.mlp.down_proj.weight [48, 79], but the model's layers.1.down needs shape",
    missing: "lacks tensor model.layers.1.mlp.down_proj.weight, which the model needs",
    not_a_number: "has NaN or infinite values in tensor model.layers.1.mlp.down_proj.weight",
}


@pytest.mark.timeout(300)
def test_damaged_checkpoints(tmp_path: Path) -> None:
    """Try every fault with both commands, in real processes. Inspection reads no weights, so it does not see NaN."""
    whole = tmp_path / "whole"
    tiny_checkpoint(whole, eos_token_id=1)
    Tokenizer(BPE(vocab={chr(97 + i): i for i in range(26)}, merges=[])).save(str(whole / "tokenizer.json"))
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DSA_") or name == "DSA_LEDGER"
    }
    runs: list[tuple[str, str, subprocess.Popen[str]]] = []
    for spoil, sentence in FAULTS.items():
        folder = tmp_path / spoil.__name__
        shutil.copytree(whole, folder)
        spoil(folder)
        for command in (["serve", "--port", "0", "--device", "cpu", "--ledger", "none"], ["inspect"]):
            if (spoil, command) == (not_a_number, ["inspect"]):
                continue
            process = subprocess.Popen(
                [sys.executable, "-c", CODE, *command, str(folder)],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ,
            )  # fmt: skip
            runs.append((f"{command[0]} {spoil.__name__}", sentence, process))
    for what, sentence, process in runs:
        said, errors = process.communicate(timeout=200)
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert process.returncode == 1, (what, errors)
        assert len(lines) == 1, (what, errors)
        assert sentence in lines[0], (what, errors)
        assert "Traceback" not in errors, (what, errors)
        assert said == "", what


def test_an_fp8_checkpoint_is_inspected_with_its_shards(tmp_path: Path) -> None:
    tiny_deepseek("deepseek_v32", tmp_path / "tiny", kv_lora_rank=200, hidden_size=160, num_hidden_layers=2)
    quantise_folder(tmp_path / "tiny")
    result = dsa("inspect", str(tmp_path / "tiny"))
    assert (result.returncode, result.stderr) == (0, "")
    assert "tiny (safetensors, FP8 blocks, 2 files)" in result.stdout
    assert "FP8 weights are dequantised on loading" in result.stdout
    shard = tmp_path / "tiny" / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    scales = next(name for name in tensors if name.endswith("_scale_inv"))
    save_file({name: tensor for name, tensor in tensors.items() if name != scales}, shard)
    result = dsa("inspect", str(tmp_path / "tiny"))
    assert result.returncode == 1
    assert f"puts tensor {scales} into {shard.name}, but that file does not hold it" in result.stderr
