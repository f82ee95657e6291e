"""`dsa serve org/name` as a user runs it, from a stand-in of the Hugging Face hub on loopback."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import Server
from tests.e2e.test_deepseek import byte_tokenizer
from tests.engine.kit import tiny_checkpoint
from tests.kit import ROOT
from tests.server.hub.stand_in import StandIn

SHARD = "model-00002-of-00004.safetensors"


def sharded(folder: Path) -> dict[str, bytes]:
    """The files of a tiny model in three shards, with code and a pickle beside them."""
    folder.mkdir()
    size = byte_tokenizer(folder)
    tiny_checkpoint(folder, vocab_size=size).save_pretrained(folder, max_shard_size="100KB")
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code was run')")
    (folder / "pytorch_model.bin").write_bytes(b"pickle" * 1000)
    if (folder / "model.safetensors").exists():
        (folder / "model.safetensors").unlink()  # the first save's
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with StandIn() as hub:
        hub.put("org/tiny", sharded(tmp_path / "tiny"))
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        yield hub


PULL = [
    sys.executable, "-P", "-c",
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); from server.cli.main import main; sys.argv[0] = 'dsa'; main()",
    "pull", "org/tiny",
]  # fmt: skip


def pull() -> subprocess.CompletedProcess[str]:
    return subprocess.run(PULL, capture_output=True, text=True, check=False, timeout=100)


def inspect() -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-m", "lab.inspect", "org/tiny", "--json"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    report: dict[str, Any] = json.loads(run.stdout)
    return report


def answer_of(server: Server) -> str:
    reply = server.post(
        "/v1/completions", model="org/tiny", prompt="abc", max_tokens=8, temperature=0, ignore_eos=True
    )
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["text"]
    return text


@pytest.mark.process
@pytest.mark.timeout(300)
def test_a_model_of_the_hub(hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the model needs is told before its weights are fetched.
    before = inspect()
    assert before["served"]
    assert not any(name.endswith("-of-00004.safetensors") for name in hub.sent)
    flags = ("org/tiny", "--kv-cache-memory", "64MiB", "--threads", "1")
    # The first transfer breaks for good after its first bytes, the second file comes with a wrong byte.
    hub.cut[SHARD] = [2000, *itertools.repeat(0, 9)]
    broken = pull()
    assert (broken.returncode, broken.stdout) == (1, "")
    assert "run the command again: it goes on where it stopped" in broken.stderr
    hub.cut.clear()
    hub.spoilt.add(SHARD)
    wrong = pull()
    assert wrong.returncode == 1
    assert f"error: {SHARD} of org/tiny has the hash" in wrong.stderr
    hub.spoilt.clear()

    def serve() -> str:
        server = Server(*flags)
        try:
            server.wait_ready()
            assert server.get("/v1/models/org/tiny").json()["id"] == "org/tiny"
            text = answer_of(server)
            assert server.end(signal.SIGTERM) == 0
            return text
        finally:
            server.close()

    first = serve()
    fetched = {path.name for path in (tmp_path / "home").rglob("snapshots/*/*")}
    assert {SHARD, "config.json", "tokenizer.json"} <= fetched
    assert not {"modeling_tiny.py", "pytorch_model.bin"} & {*fetched, *hub.sent}
    assert hub.sent.count("model-00001-of-00004.safetensors") == 1  # whole files are not sent twice
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert serve() == first
    after = inspect()
    assert after["parameters"] == before["parameters"]
    assert (before["weights"]["files"], after["weights"]["files"]) == (
        "expected of this config",
        "on disk",
    )
    assert hub.asked == []


@pytest.mark.process
def test_ctrl_c_ends_a_transfer_from_a_silent_hub(hub: StandIn, tmp_path: Path) -> None:
    hub.silent.add(SHARD)
    with subprocess.Popen(PULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while SHARD not in hub.sent:
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(5) == 130
        finally:
            process.kill()
    assert list(tmp_path.glob("home/hub/models--org--tiny/blobs/*.unfinished"))
