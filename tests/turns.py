"""Turns at the machine: many tests of several workers at once, or one that is alone."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn(door: Path, room: Path, *, alone: bool) -> Iterator[None]:
    """Wait for a turn and have it. Both files are only locked.

    Who waits to be alone holds the door, so that no other enters and those inside come to an end.
    """
    with door.open() as entrance, room.open() as inside:
        fcntl.flock(entrance, fcntl.LOCK_EX)
        fcntl.flock(inside, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(entrance, fcntl.LOCK_UN)
        yield
