"""Kernels in C for the CPU. setup.py compiles them with the package; ctypes opens them, and releases the GIL in calls.

`library()` is the library for this processor. If there is none, `missing()` says why; then torch's own operations do
the work, and the engine says so at its start.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path
from typing import NamedTuple

from engine.kernels.native.levels import LEVELS, fingerprint, sources

_FOLDER = Path(__file__).parent
_LIBRARIES = _FOLDER / "lib"


class _Found(NamedTuple):
    library: ctypes.CDLL | None
    level: str  # the library's name, or why there is none


def library() -> ctypes.CDLL | None:
    """The opened library; None if there is none for this machine."""
    return _open().library


def level() -> str | None:
    """The name of the level in use, `x86-64-v3` for example."""
    found = _open()
    return None if found.library is None else found.level


def missing() -> str | None:
    """Why there is no library, as part of a sentence; None if there is one."""
    found = _open()
    return None if found.library is not None else found.level


def set_threads(count: int) -> None:
    """Set how many threads each kernel call uses, the caller's thread included. It is usually torch's number."""
    found = library()
    if found is not None:
        found.dsa_set_threads(count)


def use_amx(wanted: bool) -> bool:
    """Turn AMX on or off for the products after this call; return whether it is on. It is on wherever it may be used."""
    found = library()
    return found is not None and bool(found.dsa_use_amx(wanted))


def uses_amx() -> bool:
    """Whether products of many rows use AMX now."""
    found = library()
    return found is not None and bool(found.dsa_uses_amx())


@cache
def _open() -> _Found:
    machine, flags = platform.machine(), _cpu_flags()
    fitting = [level for level in LEVELS if level.machine == machine and level.flags <= flags]
    if not fitting:
        return _Found(None, f"they are not made for this processor ({machine})")
    for level in fitting:
        path = _LIBRARIES / level.file
        if not path.exists():
            continue
        try:
            opened = ctypes.CDLL(str(path))
        except OSError as fault:
            return _Found(None, f"{path.name} cannot be opened ({fault})")
        opened.dsa_fingerprint.restype = ctypes.c_char_p
        if sources(_FOLDER) and opened.dsa_fingerprint().decode() != fingerprint(_FOLDER):
            return _Found(
                None, f"{path.name} is older than its sources; run `python setup.py build_native --inplace`"
            )
        return _Found(opened, level.name)
    return _Found(None, "the package was installed without them (ziglang compiles them)")


def _cpu_flags() -> frozenset[str]:
    """The processor's features as Linux lists them; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return frozenset()
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()
