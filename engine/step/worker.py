"""A worker: `python -m engine.step.worker`. The engine or a node starts it; it computes its part of every step.

A worker ends when the process that started it ends (it sees the end of the socket), or when it can no longer compute.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import shutil
import signal
import socket
import threading
from pathlib import Path

import msgspec

from engine.errors import EngineError, ProtocolError
from engine.parallel.group import Meeting, join
from engine.parallel.link import Assignment, Link, RankLoaded
from engine.pdeath import die_with_parent
from engine.plan.types import StepPlan
from engine.protocol import Failed
from engine.step.build import load_part

_log = logging.getLogger(__name__)


def main() -> None:
    """Read the assignment, load, then compute plans until the end."""
    parser = argparse.ArgumentParser(
        description="One rank of the engine. Started by the engine, not by hand."
    )
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the socket to its parent")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()  # usually the end of the socket is enough, but not if this process hangs
    link = Link(socket.socket(fileno=options.fd))
    assignment = link.receive(msgspec.msgpack.Decoder(Assignment))
    if assignment is None:
        return
    config, rank, meeting = assignment.config, assignment.rank, assignment.meeting
    logging.basicConfig(format=f"engine: rank {rank}: %(message)s", level=logging.INFO)
    plans: queue.SimpleQueue[StepPlan] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(link, plans, meeting), daemon=True).start()
    try:
        part = load_part(
            config,
            rank,
            lambda device: join(rank, config.tensor_parallel, meeting, device, address=assignment.address),
        )
        link.send(RankLoaded(rank=rank, num_bytes=part.report.num_bytes))
        while True:
            part.runner.forward(plans.get())
    except Exception as error:
        if not isinstance(error, EngineError):
            _log.exception("failed")
        message = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
        link.send(Failed(message=message))
        # A normal exit would wait for the device, which may wait for ranks that will not come.
        os._exit(1)


def _read(link: Link, plans: queue.SimpleQueue[StepPlan], meeting: Meeting) -> None:
    """Put plans into the queue; when the parent is gone, tidy up and end the process. Runs in a thread."""
    decoder = msgspec.msgpack.Decoder(StepPlan)
    while True:
        try:
            plan = link.receive(decoder)
        except ProtocolError as error:
            _log.error("%s", error)
            os._exit(2)
        if plan is None:
            if meeting.file is not None:
                shutil.rmtree(Path(meeting.file).parent, ignore_errors=True)
            os._exit(0)
        plans.put(plan)


if __name__ == "__main__":
    main()
