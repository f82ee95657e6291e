"""The engine process's side of all other ranks: the workers of this host, and the other nodes with theirs."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from engine.channel import encode
from engine.config import EngineConfig
from engine.errors import RankError
from engine.parallel.crew import Crew
from engine.parallel.group import Door, Meeting, join, leave
from engine.parallel.link import Progress, RankLoaded
from engine.parallel.nodes import Nodes
from engine.parallel.ranks import Ranks
from engine.plan.types import StepPlan

_REASON_SECONDS = 3.0  # after a failed sum, how long to wait for the report of the worker's death

OnLost = Callable[[str], None]
"""Called once, from a thread, with the reason, when a worker is gone and no more steps can be computed."""


class Team:
    """Ranks 1 to count - 1, led by this process, which is rank 0."""

    def __init__(
        self,
        config: EngineConfig,
        on_lost: OnLost | None = None,
        progress: Progress = lambda stage, done, total: None,
    ) -> None:
        """Wait for the other nodes, if there are any, and start the workers. All ranks then begin to load.

        Args:
            config: the engine's; it says how many ranks and nodes there are
            on_lost: called at once when a rank is lost; without it only the next step fails
            progress: gets the progress of waiting for the nodes

        Raises:
            ConfigError: the leader's address or the secret's file cannot be used; see `Nodes`.
        """
        self._count = config.tensor_parallel
        self._on_lost = on_lost
        self._lost: str | None = None
        self._changed = threading.Condition()
        self.loaded: dict[int, int] = {}  # rank -> bytes of weights that it holds
        self._folder = tempfile.TemporaryDirectory(prefix="dsa-ranks-")
        self._nodes: Nodes | None = None
        self._crew: Crew | None = None
        self._door: Door | None = None
        self._address = ""
        meeting = Meeting(file=str(Path(self._folder.name) / "meeting"))
        try:
            if config.leader is not None:
                self._nodes = Nodes(config, self._hear_loaded, self._hear_failed)
                self._address = self._nodes.address
                addresses = self._nodes.gather(progress)
                self._door = Door(self._address, self._count, addresses)
                meeting = self._door.meeting
                self._nodes.assign(meeting)
            self._meeting = meeting
            ranks = range(1, config.devices_a_node)
            self._crew = Crew(ranks, config, meeting, self._hear_loaded, self._hear_failed, self._address)
        except BaseException:
            self.close()
            raise

    @property
    def crew(self) -> Crew:
        """The workers of this host."""
        if self._crew is None:
            raise RankError("the workers were not started")
        return self._crew

    def join(self, device: torch.device) -> Ranks:
        """Join the process group as rank 0; return when every worker has joined."""
        store = None if self._door is None else self._door.store
        return join(0, self._count, self._meeting, device, address=self._address, store=store)

    def wait_loaded(self) -> None:
        """Return once every worker has loaded its part of the model.

        Raises:
            RankError: a worker or a node has failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None or len(self.loaded) == self._count - 1)
        if self._lost is not None:
            raise RankError(self._lost)

    def send(self, plan: StepPlan) -> None:
        """Send a plan to every worker, which computes it. This process must compute the same plan next.

        Raises:
            OSError: a worker or a node is gone.
        """
        body = encode(plan)
        if self._nodes is not None:
            self._nodes.forward(body)
        self.crew.forward(body)

    def reason(self) -> str | None:
        """Which rank was lost and why; None if none was. Waits at most `_REASON_SECONDS` for a report."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None, _REASON_SECONDS)
        return self._lost

    def close(self) -> None:
        """End the workers, here and on the other nodes."""
        if self._nodes is not None:
            self._nodes.close()
        if self._crew is not None:
            self._crew.close()
        leave()
        self._folder.cleanup()

    def _hear_loaded(self, message: RankLoaded) -> None:
        with self._changed:
            self.loaded[message.rank] = message.num_bytes
            self._changed.notify_all()

    def _hear_failed(self, reason: str) -> None:
        with self._changed:
            first = self._lost is None
            self._lost = self._lost or reason
            self._changed.notify_all()
        if first and self._on_lost is not None:
            self._folder.cleanup()  # before `on_lost`, which may end this process
            self._on_lost(reason)
