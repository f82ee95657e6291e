"""The decorator of this package's kernels: `triton.jit`, with a type.

Under TRITON_INTERPRET=1 a kernel runs in NumPy on the CPU instead, which is how it is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from engine.kernels.triton.compiling import KernelOrder, compilers_at_work, noted

_COUNTS = ("num_rows", "bias_stride", "chunks", "programs", "num_groups", "choices", "most")
"""Arguments that are numbers also where they are 1, and for whose values nothing is compiled anew."""


class Kernel(JITFunction[Any]):  # type: ignore[misc]
    """A kernel that `engine.kernels.triton.compiling` can compile without a launch."""

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        compile_only = compilers_at_work() is not None
        return lambda *args, **kwargs: self.run(*args, grid=grid, warmup=compile_only, **kwargs)

    def _do_compile(
        self, key: Any, signature: Any, device: Any, constexprs: Any, options: Any, attrs: Any, warmup: bool
    ) -> Any:
        compilers = compilers_at_work()
        if compilers is None:
            with noted(f"{self.__module__}.{self.__name__} ({self._form(constexprs)})"):
                return super()._do_compile(key, signature, device, constexprs, options, attrs, warmup)
        if not compilers.knows((self.__module__, self.__name__, key)):
            target = self.device_caches[device][2]
            compilers.order(
                KernelOrder(
                    self.__module__, self.__name__, signature, constexprs, attrs, dict(vars(options)), target
                )
            )
        return None  # nothing is kept, so that the first launch takes it from the cache on disk

    def _form(self, constexprs: dict[tuple[int, ...], Any]) -> str:
        """Its numbers that are known when it is compiled, for the log."""
        return ", ".join(
            f"{self.arg_names[place[0]]} {value}" for place, value in constexprs.items() if len(place) == 1
        )


def kernel(function: Callable[..., Any]) -> Any:
    """`function` as a kernel, launched as `function[grid](...)`, or called by other kernels."""
    if triton.knobs.runtime.interpret:
        return triton.jit(function, do_not_specialize=_COUNTS)
    return Kernel(function, do_not_specialize=_COUNTS)


def block(size: int) -> int:
    """The power of two that holds `size` numbers."""
    return 1 << max(size - 1, 0).bit_length()


def warps(numbers: int) -> int:
    """How many warps a program over so many numbers takes: 8 numbers a thread, up to 16 warps."""
    return min(max(block(numbers) // 256, 1), 16)


OVERLAP = True
"""Whether launches overlap where the device can; a benchmark turns it off to compare."""


def overlap() -> dict[str, bool]:
    """Options of a launch whose kernel calls `turn(EARLY)` before it reads or writes memory.

    A device of NVIDIA's from Hopper on then makes its programs ready while the kernel before it still computes
    (programmatic dependent launch).
    """
    return {"EARLY": True, "launch_pdl": True} if OVERLAP and _overlaps() else {"EARLY": False}


@cache
def _overlaps() -> bool:
    interpreted = triton.knobs.runtime.interpret
    return (
        not interpreted
        and torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability() >= (9, 0)
    )


@triton.jit
def turn(EARLY: tl.constexpr) -> None:
    """Let the next kernel make itself ready, and wait until those before have ended and their writes are seen."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


UNFUSED = {"enable_fp_fusion": False}
"""Option of a launch whose bits another kernel must have, too: no product is fused with an addition."""


@triton.constexpr_function
def _halvings(size: int) -> int:
    return size.bit_length() - 1


@triton.jit
def row_sums(x: tl.tensor) -> tl.tensor:
    """[R, N] -> [R, 1], N a power of two: neighbours, then pairs of neighbours, and so on, however x is laid out."""
    ROWS: tl.constexpr = x.shape[0]
    SIZE: tl.constexpr = x.shape[1]
    LEVELS: tl.constexpr = _halvings(SIZE)
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, (ROWS, SIZE >> (level + 1), 2)), 2)
    return tl.reshape(x, (ROWS, 1))
