"""The workers, as the engine process sees them: started, fed with plans, watched, ended."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import torch

from engine.config import EngineConfig
from engine.errors import ProtocolError, RankError
from engine.parallel.group import join, leave
from engine.parallel.link import FromWorker, Link
from engine.parallel.ranks import Ranks
from engine.plan import StepPlan
from engine.protocol import Failed

_log = logging.getLogger(__name__)

_END_SECONDS = 5.0  # what a worker may take to end before it is killed
_REASON_SECONDS = 3.0  # what a worker's death may take to be noticed after a sum with it has failed

OnLost = Callable[[str], None]
"""Called, from a thread, with the reason, once: a worker is gone and no step can be computed any more."""


class Team:
    """Ranks 1 to count - 1 as processes, and this process as rank 0."""

    def __init__(self, config: EngineConfig, on_lost: OnLost | None = None) -> None:
        """Start the workers; they begin to load.

        Args:
            config: theirs, and how many
            on_lost: tells of a death at once; without it the next step does
        """
        self._count = config.tensor_parallel
        self._on_lost = on_lost
        self._closing = False
        self._lost: str | None = None
        self._changed = threading.Condition()
        self.loaded: dict[int, int] = {}  # rank -> bytes of weights that it holds
        self._folder = tempfile.TemporaryDirectory(prefix="dsa-ranks-")
        self._meeting = Path(self._folder.name) / "meeting"
        self._links: list[Link] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(1, self._count):
            self._start(rank, config)

    def _start(self, rank: int, config: EngineConfig) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "engine.parallel.worker", "--fd", str(theirs.fileno())]
            process = subprocess.Popen(
                [*command, "--rank", str(rank), "--meeting", str(self._meeting)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
            )
        link = Link(ours)
        self.processes.append(process)
        self._links.append(link)
        with suppress(OSError):  # already gone: the watcher will say so
            link.send(config)
        threading.Thread(target=self._watch, args=(rank, link, process), daemon=True).start()

    def join(self, device: torch.device) -> Ranks:
        """Become rank 0; returns when every worker has joined too."""
        return join(0, self._count, self._meeting, device)

    def wait_loaded(self) -> None:
        """Return once every worker has its part.

        Raises:
            RankError: one of them has failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None or len(self.loaded) == self._count - 1)
        if self._lost is not None:
            raise RankError(self._lost)

    def send(self, plan: StepPlan) -> None:
        """Have every worker compute a plan; this process must compute it too, next."""
        for link in self._links:
            link.send(plan)

    def reason(self) -> str | None:
        """Which worker was lost and how, if one was; waits a little for it to be known."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None, _REASON_SECONDS)
        return self._lost

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
        leave()
        self._folder.cleanup()

    def _watch(self, rank: int, link: Link, process: subprocess.Popen[bytes]) -> None:
        """Thread, one a worker: what it says, and its end."""
        decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
        told: str | None = None
        try:
            while told is None and (message := link.receive(decoder)) is not None:
                if isinstance(message, Failed):
                    told = message.message
                else:
                    with self._changed:
                        self.loaded[rank] = message.num_bytes
                        self._changed.notify_all()
        except (ProtocolError, OSError) as error:
            told = str(error)
        if self._closing:
            return
        if told is None:
            code = process.wait()
            told = f"it was ended by signal {-code}" if code < 0 else f"it ended with exit code {code}"
        reason = f"rank {rank} of {self._count} failed: {told}"
        with self._changed:
            first = self._lost is None
            self._lost = self._lost or reason
            self._changed.notify_all()
        if first and self._on_lost is not None:
            self._folder.cleanup()  # what is called may end this process
            self._on_lost(reason)
