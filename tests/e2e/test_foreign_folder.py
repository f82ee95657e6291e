"""Commands that are started in a folder with an `engine`, a `server` and a `lab` of its own run this project's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from tests.engine.kit import tiny_checkpoint

# -P here stands for the console script, which has its own folder on the path and not the current one.
DSA = [
    sys.executable,
    "-P",
    "-c",
    "import sys; from server.cli.main import main; sys.argv[0] = 'dsa'; main()",
]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    for name in ("engine", "server", "lab", "torch"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(
            "raise SystemExit('the package of the current folder ran')"
        )
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_checkpoint(folder, eos_token_id=1)
    Tokenizer(BPE(vocab={chr(97 + i): i for i in range(26)}, merges=[])).save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["inspect", "deepseek-v3.2", "--devices", "8"], 0, "671.9 B"),
        (["worker", "CHECKPOINT", "--leader", "127.0.0.1:9", "--wait-seconds", "0"], 1, "no leader could be reached"),
        (["bench", "curve", "--price", "-1"], 1, "price is -1 USD an hour"),
        (["distill", "--help"], 0, "Train the lightning indexer"),
        (["corpus", "--out", "made", "--model", "x", "--skip", "y"], 2, "--skip names 'y'; expected some of"),
    ],
)  # fmt: skip
def test_a_command_runs_this_projects_code(
    foreign: Path, checkpoint: Path, arguments: list[str], code: int, sentence: str
) -> None:
    given = [str(checkpoint) if one == "CHECKPOINT" else one for one in arguments]
    done = subprocess.run([*DSA, *given], cwd=foreign, capture_output=True, text=True, timeout=90)
    assert done.returncode == code, done.stderr
    assert sentence in done.stdout + done.stderr


def test_a_server_runs_this_projects_engine(foreign: Path, checkpoint: Path) -> None:
    command = [*DSA, "serve", str(checkpoint), "--port", "0", "--device", "cpu", "--kv-cache-memory", "16MiB"]
    with subprocess.Popen(
        [*command, "--ledger", "none"], cwd=foreign, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"DSA_CONFIG": ""},
    ) as server:  # fmt: skip
        assert server.stdout is not None
        said = server.stdout.readline()
        server.terminate()
        _, errors = server.communicate(timeout=30)
    assert re.match(r"ready at http://127\.0\.0\.1:\d+", said), errors
    assert server.returncode == 0, errors
