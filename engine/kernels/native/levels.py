"""The processors that the native kernels are compiled for. setup.py imports it too, so it imports nothing of ours."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple


class Level(NamedTuple):
    """A kind of processor, with its compiled library."""

    name: str
    machine: str  # the value of `platform.machine()`
    target: str  # Zig's target, with the C library's version of torch's own wheels
    cpu: str  # Zig's CPU model and features
    flags: frozenset[str]  # what /proc/cpuinfo must list

    @property
    def file(self) -> str:
        """The library's name in the folder `lib`."""
        return f"dsa-{self.name}.so"


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"})

LEVELS = (
    Level(
        "x86-64-avx512bf16",
        "x86_64",
        "x86_64-linux-gnu.2.28",
        "x86_64_v4+avx512bf16+avx512vnni",
        _AVX2 | _AVX512,
    ),
    Level("x86-64-v3", "x86_64", "x86_64-linux-gnu.2.28", "x86_64_v3", _AVX2),
    Level("aarch64", "aarch64", "aarch64-linux-gnu.2.28", "generic", frozenset()),
)
"""The best level comes first. The first level whose flags the processor has is used."""


def sources(folder: Path) -> list[Path]:
    """The source files of a library, headers included, in a fixed order."""
    return sorted([*folder.glob("*.c"), *folder.glob("*.h")])


def fingerprint(folder: Path) -> str:
    """Hash the content of the sources. A library contains this hash, so an outdated library is never used."""
    digest = hashlib.sha256()
    for path in sources(folder):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
