"""Triton's interpreter on the CPU, made to work with numpy 2.4 and faster; on a machine with a GPU kernels run there.

tests/conftest.py sets TRITON_INTERPRET before anything imports triton.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Any

import numpy as np


@cache
def prepare() -> None:
    """Patch the interpreter, once, where it is what runs kernels."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: type, scope: Any) -> None:
        """Triton 3.6 turns arrays of one number into an int, as numpy 2.4 no longer does by itself."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index

    # All of triton.language is patched at every call of a function; once a launch does, and is far faster.
    patched: set[object] = set()
    launch = interpreter.GridExecutor.__call__

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        with (
            np.errstate(all="ignore"),
            warnings.catch_warnings(),
        ):  # a GPU does not warn of infinities and such
            warnings.simplefilter("ignore", RuntimeWarning)
            launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call
