"""The kernels run on the GPU where there is one, else in Triton's interpreter, which needs a word before its import."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Without Triton there is nothing to test.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
