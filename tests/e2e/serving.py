"""Starts a real `dsa serve` as a user would, and observes it from outside."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
from openai import AsyncOpenAI, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.kit import ROOT

MODEL = "smollm2-135m-instruct"
START_SECONDS = 100  # a start takes under ten on a quiet machine

# The command itself with one probe: on SIGUSR1 it writes the names of its asyncio tasks to a file.
COMMAND = """
import asyncio, pathlib, signal, sys
probe = pathlib.Path(sys.argv.pop(1))

def write(number, frame):
    names = sorted(task.get_coro().__qualname__ for task in asyncio.all_tasks(asyncio.get_running_loop()))
    probe.with_suffix(".new").write_text("\\n".join(names))
    probe.with_suffix(".new").rename(probe)

signal.signal(signal.SIGUSR1, write)
from server.cli.main import main
sys.argv[0] = "dsa"
main()
"""


class Resources(NamedTuple):
    """Resources whose numbers must be the same before and after many requests."""

    tasks: list[str]
    server_files: int
    server_threads: int
    engine_files: int
    engine_threads: int
    pages_used: float
    requests: float


class Server:
    """One `dsa serve`, on a free port of the loopback."""

    def __init__(self, *flags: str) -> None:
        self.flags = flags
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._probe = folder / "tasks"
        self._errors = folder / "stderr"
        self.ledger = folder / "usage.sqlite"
        if "--ledger" not in flags:
            flags = (*flags, "--ledger", str(self.ledger))
        environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("DSA_") or name in ("DSA_CACHE", "DSA_LEDGER")
        }
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(self._probe), "serve", "--port", "0", *flags],
                cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""

    def wait_ready(self) -> Server:
        """Wait for the line that says that the server is ready."""
        try:
            line = self._said.get(timeout=START_SECONDS)
        except queue.Empty:
            raise AssertionError(f"the server did not start: {self.errors}") from None
        match = re.match(r"ready at (\S+) - try: curl ", line)
        assert match, f"{line!r}, {self.errors}"
        self.url = match[1]
        return self

    @property
    def errors(self) -> str:
        """The text that the server has written to its standard error so far."""
        return self._errors.read_text()

    @property
    def ready(self) -> bool:
        return self.process.poll() is None and self.get("/health/ready").status_code == 200

    @property
    def engine(self) -> psutil.Process:
        """The engine process; there is exactly one. Grammars are compiled in another process, if there are any."""
        (engine,) = (child for child in self.children() if "engine.step.process" in child.cmdline())
        return engine

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json={"model": MODEL} | body, timeout=100)

    def sdk(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=100)

    def async_sdk(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=100)

    def metrics(self) -> dict[str, float]:
        """Every sample by name, and by `name{a="b"}` where it has labels."""
        samples = {}
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
                samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return samples

    def tasks(self) -> list[str]:
        """The asyncio tasks of the server process, by coroutine."""
        self._probe.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        until(self._probe.exists)
        return self._probe.read_text().splitlines()

    def resources(self) -> Resources:
        metrics = self.metrics()
        server, engine = psutil.Process(self.process.pid), self.engine
        return Resources(
            tasks=self.tasks(),
            server_files=server.num_fds(),
            server_threads=server.num_threads(),
            engine_files=engine.num_fds(),
            engine_threads=engine.num_threads(),
            pages_used=metrics['dsa_kv_pages{state="used"}'],
            requests=metrics["dsa_requests_running"] + metrics["dsa_requests_waiting"],
        )

    def end(self, *numbers: int, seconds: float = 60) -> int:
        """Send signals, wait for the end and return the exit code. No process may be left behind."""
        family = self.children()
        for number in numbers:
            self.process.send_signal(number)
        code = self.process.wait(seconds)
        _, left = psutil.wait_procs(family, 10)
        assert not left, f"left behind: {left}"
        return code

    def close(self) -> None:
        """Clean up, whatever happened."""
        if self.process.poll() is None:
            for process in [*self.children(), psutil.Process(self.process.pid)]:
                process.kill()
        self.process.wait()
        self._reader.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._folder.cleanup()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said.put(line)
        self._said.put("")


def until(condition: Callable[[], bool], seconds: float = 30) -> float:
    """Wait until `condition` is true; return the seconds that this took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"it did not come true within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - start
