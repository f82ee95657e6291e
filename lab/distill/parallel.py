"""Data parallelism: several processes train one student, each on a device of its own with some of a step's sequences.

Every process draws the same sequences and rows from the same seed, computes the gradients of its own share, and sums them
with the others'. So all make the same step, and a run has the same result, up to rounding, on any number of devices.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import EngineError
from engine.parallel.group import Meeting, join
from engine.parallel.ranks import Ranks

_GRACE_SECONDS = 5.0


def shares(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Divide sequences so that the ranks have about as many tokens: the longest first, each to the rank with the fewest.

    Args:
        lengths: of the sequences, tokens
        count: how many ranks there are

    Returns:
        for each rank, the indices of its sequences in order
    """
    made: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = min(range(count), key=lambda r: (tokens[r], r))
        made[rank].append(index)
        tokens[rank] += lengths[index]
    return [sorted(own) for own in made]


def sum_gradients(parameters: Sequence[Tensor], ranks: Ranks) -> None:
    """Replace each gradient by its sum over the ranks; one that is missing counts as zeros."""
    if ranks.count == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    whole = ranks.sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, torch.split(whole, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def part(ranks: Ranks, device: torch.device) -> None:
    """Leave the group; every rank calls it when all that they do together is done.

    NCCL ends its communicators while all ranks are still there: a rank that leaves after another one has gone may wait for ever.
    """
    if ranks.count > 1:
        ranks.sum(torch.zeros(1, device=device)).item()
        dist.destroy_process_group()


@contextmanager
def together(
    count: int, device_of: Callable[[int], torch.device], member: Callable[[Ranks], object]
) -> Iterator[Ranks]:
    """Start the other ranks' processes, join them as rank 0, and wait for them in the end. Each rank leaves with `part`.

    A rank that dies would leave the others waiting for its part of a sum, so this process then ends too.

    Args:
        count: how many ranks there are
        device_of: gives the device of a rank
        member: what another rank does, up to `part`; it can be pickled, as `device_of` can
    """
    if count == 1:
        yield Ranks()
        return
    spawning = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        meeting = Meeting(file=str(Path(folder) / "ranks"))
        others = [
            spawning.Process(target=_member, args=(rank, count, meeting, device_of, member), daemon=True)
            for rank in range(1, count)
        ]
        over = threading.Event()
        for process in others:
            process.start()
            threading.Thread(target=_watch, args=(process, over), daemon=True).start()
        try:
            yield join(0, count, meeting, device_of(0))
            for process in others:
                process.join()
        finally:
            over.set()


def _member(
    rank: int, count: int, meeting: Meeting, device_of: Callable[[int], torch.device], member: Callable[[Ranks], object]
) -> None:  # fmt: skip
    # Ctrl-C reaches every process of a terminal. Rank 0 tells the others when to stop, all after the same step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        member(join(rank, count, meeting, device_of(rank)))
    except EngineError as error:
        # What is wrong for all ranks is told by rank 0, which ends all processes then.
        time.sleep(_GRACE_SECONDS)
        sys.exit(f"error: device {rank}: {error}")


def _watch(process: multiprocessing.process.BaseProcess, over: threading.Event) -> None:
    process.join()
    if process.exitcode and not over.is_set():
        os.write(
            2, f"error: a process that trains beside this one ended with status {process.exitcode}\n".encode()
        )
        os._exit(1)
