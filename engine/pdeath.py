"""Ties a process's life to its parent's, also while it is stopped and sees no end of a stream."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Have the system kill this process when the thread that started it ends. Linux only; elsewhere nothing happens.

    If the parent has ended already, this process has another parent, and the end of its stream tells it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
