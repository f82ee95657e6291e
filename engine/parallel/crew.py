"""Starts this host's worker processes, sends them plans, watches them and ends them.

`engine.step.worker` is what such a process runs. Other hosts are `engine.parallel.nodes`.
"""

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
from engine.parallel.link import Assignment, FromWorker, Link, RankLoaded
from engine.plan.types import StepPlan
from engine.protocol import Failed

_END_SECONDS = 5.0  # time for a worker to end before it is killed

OnLoaded = Callable[[RankLoaded], None]
OnFailed = Callable[[str], None]


class Crew:
    """Worker processes, one for each rank of this host. The callbacks are called from threads.

    Args:
        ranks: this host's ranks, without rank 0, which is the engine process
        config: the engine's
        meeting: where all ranks meet
        on_loaded: called when a worker has loaded its part of the model
        on_failed: called with the reason when a worker has failed or ended, unless `close` was called
        address: this host's address if the leader is another host, else ""
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
        """Send a plan to every worker, which computes it.

        Raises:
            OSError: a worker is gone.
        """
        self.forward(encode(plan))

    def forward(self, body: bytes) -> None:
        """Send an encoded plan to every worker.

        Raises:
            OSError: a worker is gone.
        """
        for link in self._links:
            link.forward(body)

    def close(self) -> None:
        """End the workers, and wait until they have ended."""
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
                [sys.executable, "-m", "engine.step.worker", "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
            )
        link = Link(ours)
        self.processes.append(process)
        self._links.append(link)
        with suppress(OSError):  # the worker is already gone: `_watch` will report it
            link.send(assignment)
        threading.Thread(target=self._watch, args=(assignment.rank, link, process), daemon=True).start()

    def _watch(self, rank: int, link: Link, process: subprocess.Popen[bytes]) -> None:
        """Read one worker's messages and report its end. Each worker has a thread for this."""
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
