"""All other ranks, as the engine process sees them: its own workers, and the nodes with theirs."""

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
from engine.parallel.link import Loaded, Progress
from engine.parallel.nodes import Nodes
from engine.parallel.ranks import Ranks
from engine.plan.types import StepPlan

_REASON_SECONDS = 3.0  # what a worker's death may take to be noticed after a sum with it has failed

OnLost = Callable[[str], None]
"""Called, from a thread, with the reason, once: a worker is gone and no step can be computed any more."""


class Team:
    """Ranks 1 to count - 1, and this process as rank 0."""

    def __init__(
        self,
        config: EngineConfig,
        on_lost: OnLost | None = None,
        progress: Progress = lambda stage, done, total: None,
    ) -> None:
        """Wait for the other nodes, if there are any, and start the workers; all begin to load.

        Args:
            config: theirs, and how many
            on_lost: tells of a death at once; without it the next step does
            progress: of the waiting

        Raises:
            ConfigError: the leader's address is not of this host, or taken.
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
                self._door = Door(self._address, self._count)
                meeting = self._door.meeting
                self._nodes.gather(meeting, progress)
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
        """Become rank 0; returns when every worker has joined too."""
        store = None if self._door is None else self._door.store
        return join(0, self._count, self._meeting, device, address=self._address, store=store)

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
        body = encode(plan)
        if self._nodes is not None:
            self._nodes.forward(body)
        self.crew.forward(body)

    def reason(self) -> str | None:
        """Which worker was lost and how, if one was; waits a little for it to be known."""
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

    def _hear_loaded(self, message: Loaded) -> None:
        with self._changed:
            self.loaded[message.rank] = message.num_bytes
            self._changed.notify_all()

    def _hear_failed(self, reason: str) -> None:
        with self._changed:
            first = self._lost is None
            self._lost = self._lost or reason
            self._changed.notify_all()
        if first and self._on_lost is not None:
            self._folder.cleanup()  # what is called may end this process
            self._on_lost(reason)
