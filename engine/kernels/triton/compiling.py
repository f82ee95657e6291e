"""Compiles kernels before they are launched, in processes of their own.

Triton takes a second or two for a kernel, mostly in Python, where threads would wait for one another. What a process
compiles lies in Triton's cache on disk, where the launch finds it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import logging
import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from contextvars import ContextVar
from multiprocessing import get_context
from typing import Any, NamedTuple

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.cache import get_cache_key, get_cache_manager
from triton.runtime.jit import JITFunction

_log = logging.getLogger(__name__)

_MOST = 12
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class KernelOrder(NamedTuple):
    """A kernel to compile, and for what."""

    module: str
    name: str
    signature: dict[str, str]
    constexprs: dict[Any, Any]
    attrs: dict[Any, Any]
    options: dict[str, Any]
    target: GPUTarget


class Compilers:
    """Processes that compile. They begin with their first orders."""

    def __init__(self, count: int | None = None) -> None:
        """`count` processes; None: one for each core but this process's own, and not many."""
        self._pool = ProcessPoolExecutor(
            count or max(1, min(_MOST, (os.cpu_count() or 1) - 1)), get_context("spawn"), initializer=_begin
        )
        self._orders: list[Future[None]] = []
        self._known: set[Any] = set()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, nothing is launched: what launches would need is compiled, and is ready at the end.

        What cannot be compiled so is compiled at its first launch, which says why if it cannot be at all.
        """
        before = _current.set(self)
        try:
            yield
        finally:
            _current.reset(before)
        for order in self._orders:
            try:
                order.result()
            except Exception as error:
                _log.warning("a kernel is compiled later: %s: %s", type(error).__name__, error)
        self._orders.clear()

    def knows(self, key: Any) -> bool:
        """Whether it is asked so for the second time."""
        if key in self._known:
            return True
        self._known.add(key)
        return False

    def order(self, order: KernelOrder) -> None:
        """Have a kernel compiled, if it is not in the cache."""
        try:
            if is_cached(order):
                return
            self._orders.append(self._pool.submit(build, pickle.dumps(order)))
        except (pickle.PicklingError, AttributeError, TypeError, BrokenProcessPool) as error:
            _log.warning("%s.%s is compiled later: %s", order.module, order.name, error)

    def started(self) -> None:
        """From now on a kernel that has to be compiled is a request's delay, and is logged."""
        global _started
        _started = True

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)


_current: ContextVar[Compilers | None] = ContextVar("compilers", default=None)


def compilers_at_work() -> Compilers | None:
    """Those in whose `together` this is; None: launches launch."""
    return _current.get()


_LATE_SECONDS = 0.1
"""A kernel that is read from the cache takes less."""
_started = False


@contextmanager
def noted(name: str) -> Iterator[None]:
    """Log a compilation that comes after `Compilers.started`."""
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    if _started and seconds > _LATE_SECONDS:
        _log.warning(
            "requests waited %.1f s until %s was compiled: no step at the start needed it so", seconds, name
        )


def build(pickled: bytes) -> None:
    """Compile what a pickled `KernelOrder` says, into Triton's cache."""
    order: KernelOrder = pickle.loads(pickled)  # noqa: S301 - this program's own
    triton.compile(_source(order), target=order.target, options=order.options)


def is_cached(order: KernelOrder) -> bool:
    """Whether Triton's cache has the kernel; also False if this version of Triton does not say."""
    try:
        source = _source(order)
        backend = make_backend(order.target)
        options = backend.parse_options({**order.options, **source.parse_options()})
        key = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
        name = f"{source.name[:150]}.json"
        group = get_cache_manager(hashlib.sha256(key.encode()).hexdigest()).get_group(name)
    except Exception as error:
        _log.debug("the cache cannot be asked for %s: %s", order.name, error)
        return False
    return name in (group or {})


def _source(order: KernelOrder) -> ASTSource:
    function = getattr(importlib.import_module(order.module), order.name)
    assert isinstance(function, JITFunction)
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(function, order.signature, order.constexprs, order.attrs)
    return ASTSource(function, order.signature, order.constexprs, order.attrs)


def _begin() -> None:
    """Get ready; end when the parent ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
