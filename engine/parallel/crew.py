"""Worker processes of this host: started, fed with plans, watched, ended."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import msgspec

from engine.channel import encode
from engine.config import EngineConfig
from engine.errors import ProtocolError
from engine.parallel.group import Meeting
from engine.parallel.link import Assignment, FromWorker, Link, Loaded
from engine.plan.types import StepPlan
from engine.protocol import Failed

_END_SECONDS = 5.0  # what a worker may take to end before it is killed

OnLoaded = Callable[[Loaded], None]
OnFailed = Callable[[str], None]


class Crew:
    """The ranks `ranks`, a process each. What is called is called from threads.

    Args:
        ranks: of this host, without rank 0, which is no worker
        config: theirs
        meeting: where they find the others
        on_loaded: hears of each that has its part of the model
        on_failed: hears of each that is gone and how, unless `close` was called
        address: of this host, where the leader is on another
    """

    def __init__(
        self,
        ranks: range,
        config: EngineConfig,
        meeting: Meeting,
        on_loaded: OnLoaded,
        on_failed: OnFailed,
        address: str = "",
    ) -> None:
        self._count = config.tensor_parallel
        self._on_loaded = on_loaded
        self._on_failed = on_failed
        self._closing = False
        self._links: list[Link] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in ranks:
            self._start(Assignment(config=config, rank=rank, meeting=meeting, address=address))

    def send(self, plan: StepPlan) -> None:
        """Have every worker compute a plan."""
        self.forward(encode(plan))

    def forward(self, body: bytes) -> None:
        """The same with a plan as it came from the leader; raises OSError when a worker is gone."""
        for link in self._links:
            link.forward(body)

    def close(self) -> None:
        """End the workers."""
        self._closing = True
        for link in self._links:
            link.close()
        for process in self.processes:
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, assignment: Assignment) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "engine.step.worker", "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
            )
        link = Link(ours)
        self.processes.append(process)
        self._links.append(link)
        with suppress(OSError):  # already gone: the watcher will say so
            link.send(assignment)
        threading.Thread(target=self._watch, args=(assignment.rank, link, process), daemon=True).start()

    def _watch(self, rank: int, link: Link, process: subprocess.Popen[bytes]) -> None:
        """Thread, one a worker: what it says, and its end."""
        decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
        told: str | None = None
        try:
            while told is None and (message := link.receive(decoder)) is not None:
                if isinstance(message, Failed):
                    told = message.message
                else:
                    self._on_loaded(message)
        except (ProtocolError, OSError) as error:
            told = str(error)
        if self._closing:
            return
        if told is None:
            code = process.wait()
            told = f"it was ended by signal {-code}" if code < 0 else f"it ended with exit code {code}"
        self._on_failed(f"rank {rank} of {self._count} failed: {told}")
