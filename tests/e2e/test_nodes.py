"""`dsa serve` on one node and `dsa worker` on another; here both nodes are processes of one host."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.serving import Server
from tests.e2e.test_deepseek import byte_tokenizer, complete, wait_until
from tests.e2e.test_lifecycle import streaming
from tests.engine.models.mla.kit import tiny_deepseek
from tests.kit import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[tuple[Path, str, subprocess.Popen[str]]]:
    """(the model, the leader's address, a worker process that looks for the leader)."""
    folder = tmp_path / "deepseek_v32"
    folder.mkdir()
    tiny_deepseek("deepseek_v32", folder, vocab_size=byte_tokenizer(folder))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        leader = f"127.0.0.1:{probe.getsockname()[1]}"
    process = subprocess.Popen(
        [sys.executable, "-c", "from server.cli.main import main; main()", "worker", str(folder), "--leader", leader],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield folder, leader, process
    if process.poll() is None:
        for rank in psutil.Process(process.pid).children():
            rank.kill()
        process.kill()
    process.communicate()


def test_a_lost_rank_ends_what_runs_and_the_nodes_join_anew(
    worker: tuple[Path, str, subprocess.Popen[str]],
) -> None:
    folder, leader, process = worker
    server = Server(
        str(folder), "--device", "cpu", "--dtype", "float32", "--kv-cache-memory", "64MiB", "--threads", "1",
        "--tensor-parallel", "2", "--nodes", "2", "--leader", leader,
    )  # fmt: skip
    try:
        server.wait_ready()
        before = complete(server)["choices"]
        (rank,) = psutil.Process(process.pid).children()
        with streaming(server, model=folder.name, prompt="x", max_tokens=500, ignore_eos=True) as events:
            rank.kill()
        assert "engine_died" in events[-1], events[-2:]
        assert sum("engine_died" in event for event in events) == 1
        wait_until(server, lambda: "rank 1 of 2 failed: it was ended by signal 9" in server.errors)
        wait_until(server, lambda: server.ready)
        assert complete(server)["choices"] == before
        assert process.poll() is None
        # As when a group of pods is ended: the worker gets its signal first, but the leader can still finish.
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert complete(server)["choices"] == before
        assert server.end(signal.SIGTERM) == 0
        assert process.wait(20) == 0
    finally:
        server.close()
