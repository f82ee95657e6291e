"""What a device can do at most: bytes and operations a second. The floors of `lab.inspect.roofline` divide by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Arithmetic = Literal["fp8", "bf16", "float32"]
"""The number formats that products are computed in."""


@dataclass(frozen=True)
class Ceilings:
    """The most that one device reaches. A multiply-add is 2 operations; rates are of dense matrices."""

    name: str
    source: str
    memory: float  # bytes a second, read or written
    bf16: float  # operations a second of the matrix units
    fp8: float | None  # None: the matrix units do not multiply FP8, so its numbers are multiplied as bf16
    float32: float  # operations a second of the ordinary units: IEEE products, not TF32
    link: float  # bytes a second that a device sends to the others

    def seconds(self, num_bytes: float, flops: Mapping[Arithmetic, float], sent: float) -> float:
        """Return the least time of an operation: memory, both kinds of arithmetic and the link work at once."""
        tensor = flops.get("bf16", 0.0) / self.bf16 + flops.get("fp8", 0.0) / (self.fp8 or self.bf16)
        return max(
            num_bytes / self.memory, tensor, flops.get("float32", 0.0) / self.float32, sent / self.link
        )

    def bound(self, num_bytes: float, flops: Mapping[Arithmetic, float], sent: float) -> str:
        """Say what the least time of an operation is spent on: memory, arithmetic or link."""
        least = self.seconds(num_bytes, flops, sent)
        if num_bytes / self.memory == least:
            return "memory"
        return "link" if sent / self.link == least else "arithmetic"


_DATASHEET = "NVIDIA's data sheet"
CEILINGS: Mapping[str, Ceilings] = {
    "H200": Ceilings(
        "NVIDIA H200", "measured: dsa doctor; float32 and link by NVIDIA's data sheet",
        4.3e12, 794e12, 1350e12, 67e12, 450e9,
    ),
    "H100": Ceilings("NVIDIA H100 SXM", _DATASHEET, 3.35e12, 989e12, 1979e12, 67e12, 450e9),
    "H800": Ceilings("NVIDIA H800 SXM", _DATASHEET, 3.35e12, 989e12, 1979e12, 67e12, 200e9),
    "B200": Ceilings("NVIDIA B200", _DATASHEET, 8e12, 2250e12, 4500e12, 75e12, 900e9),
    "A100": Ceilings("NVIDIA A100 SXM 80 GB", _DATASHEET, 2.039e12, 312e12, None, 19.5e12, 300e9),
}  # fmt: skip
"""Name -> ceilings. Data sheets give more than programs reach: of an H200 4.8 TB/s and 989 TFLOP/s."""


def ceilings_of(device: str) -> Ceilings | None:
    """Return the ceilings of a device by its whole name, such as `NVIDIA H200`; None if they are not known."""
    return next((one for key, one in CEILINGS.items() if key in device.upper().split()), None)
