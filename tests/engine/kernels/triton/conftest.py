"""Triton's kernels on what there is: a GPU, or Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

CHIP = torch.cuda.is_available()
HERE = importlib.util.find_spec("triton") is not None
LATE = "triton" in sys.modules and not CHIP and os.environ.get("TRITON_INTERPRET") != "1"

# Kernels that were made for a GPU cannot be interpreted; tests say by themselves that Triton is missing.
collect_ignore_glob = ["test_*.py"] if LATE else []

if HERE and not LATE and not CHIP:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, and when a kernel is made
    from triton.runtime import interpreter

    _patched = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor: type, scope: object) -> None:
        """Triton 3.6 turns arrays of one number into an int, as numpy 2.4 no longer does by itself."""
        _patched(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = _patch_lang_tensor


def pytest_report_header() -> str:
    """Where the kernels run, or why they do not."""
    if not HERE:
        return "triton kernels: not tested, triton is not installed"
    if LATE:
        return "triton kernels: not tested, triton was imported before TRITON_INTERPRET=1 was set"
    return f"triton kernels: on {torch.cuda.get_device_name() if CHIP else 'the CPU, interpreted'}"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The interpreter's numpy and torch share few cores with other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if CHIP else "cpu")


@pytest.fixture(scope="session")
def dtypes() -> list[torch.dtype]:
    """Numbers of a model: the interpreter multiplies bfloat16 wrongly."""
    return [torch.float32, torch.bfloat16] if CHIP else [torch.float32]


# The interpreter cuts digits off where it should round to bfloat16, and multiplies matrices of it wrongly.
DTYPES = [torch.float32, torch.bfloat16] if torch.cuda.is_available() else [torch.float32]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Of activations and weights."""
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture(scope="session", autouse=True)
def _patch_once_a_launch(device: torch.device) -> None:
    """The interpreter patches all of triton.language at every call of a function; once a launch does, and is far faster."""
    if device.type != "cpu":
        return
    from triton.runtime import interpreter

    patched: set[object] = set()
    launch = interpreter.GridExecutor.__call__

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call
