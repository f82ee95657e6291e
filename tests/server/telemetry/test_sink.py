"""A log whose reader stalls or goes away: no write waits or raises, memory is bounded, and what is lost is told."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import pytest

from server.telemetry.sink import LogSink, SinkHandler
from tests.kit import ROOT


class Pipe:
    """A pipe whose writing end looks like a text stream."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()

    def fileno(self) -> int:
        return self.writing

    def read(self, sink: LogSink) -> str:
        """Everything until the sink has nothing left."""
        parts: list[bytes] = []

        def run() -> None:
            while data := os.read(self.reading, 1 << 20):
                parts.append(data)

        thread = threading.Thread(target=run)
        thread.start()
        sink.write("more\n")
        sink.flush(5)
        sink.write("last\n")
        sink.flush(5)
        os.close(self.writing)
        thread.join(5)
        return b"".join(parts).decode()


def test_a_reader_that_stalls_stops_nobody() -> None:
    pipe: Any = Pipe()
    sink = LogSink(pipe, most_bytes=1 << 20)
    began = time.monotonic()
    for number in range(5000):
        sink.write(f"{number:999}\n")
    sink.flush(0.1)
    assert time.monotonic() - began < 2
    said = pipe.read(sink).splitlines()
    os.close(pipe.reading)
    # Told twice if the thread took its first lines when some were dropped already.
    lost = sum(int(line.split()[0]) for line in said if "were dropped here" in line)
    numbers = [int(line) for line in said if line.strip().isdecimal()]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) + lost == 5000
    assert said[-1] == "last"


def test_a_reader_that_has_gone_ends_nobody() -> None:
    pipe: Any = Pipe()
    sink = LogSink(pipe)
    os.close(pipe.reading)
    for _ in range(100):
        sink.write("hello\n")
        sink.flush(0.01)
    os.close(pipe.writing)


def test_a_record_that_cannot_be_formatted_is_told() -> None:
    pipe: Any = Pipe()
    sink = LogSink(pipe)
    logger = logging.Logger("broken")
    logger.addHandler(SinkHandler(sink))
    logger.warning("%d", "no number")
    assert "a line of broken could not be written" in pipe.read(sink)
    os.close(pipe.reading)


SERVER = """
import asyncio, logging, sys
from engine.client import EngineState
from server.config import ServerConfig
from server.listen import bind
from server.serve import run
from server.telemetry.logs import configure
from tests.server.kit import TEXT, PlainChat, ids
from tests.server.fake_engine import FakeEngine, Script

configure(sys.argv[1])
engine = FakeEngine(script=lambda submit: Script(token_ids=ids("hello")))
config = ServerConfig(model_name="tiny", port=0, log_format=sys.argv[1])

async def main(listener):
    serving = asyncio.create_task(run(config, engine, TEXT, PlainChat(), listener))
    await asyncio.sleep(0.5)
    for state in (EngineState.DOWN, EngineState.READY) * 2:  # what is said when an engine dies
        engine.set_status(state=state)
        await asyncio.sleep(0.3)
    logging.getLogger("x").error("%s", "y" * 1_000_000)
    await serving

with bind("127.0.0.1", 0) as listener:
    print(listener.getsockname()[1], file=open(int(sys.argv[2]), "w"), flush=True)
    asyncio.run(main(listener))
"""


@pytest.mark.process
@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("gone", [False, True], ids=["stalls", "gone"])
def test_the_server_goes_on_without_a_reader(log_format: str, gone: bool) -> None:
    ours, theirs = os.pipe()
    log_reading, log_writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, log_format, str(theirs)],
        cwd=ROOT, stdout=log_writing, stderr=log_writing, pass_fds=(theirs,),
    )  # fmt: skip
    os.close(theirs)
    os.close(log_writing)
    if gone:
        os.close(log_reading)
    try:
        port = int(os.read(ours, 100))
        time.sleep(2.0)
        body = {"model": "tiny", "prompt": "a", "max_tokens": 3}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as http:
            for _ in range(400):
                assert http.post("/v1/completions", json=body).status_code == 200
            assert http.get("/health/ready").status_code == 200
        assert process.poll() is None
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        if not gone:
            os.close(log_reading)
