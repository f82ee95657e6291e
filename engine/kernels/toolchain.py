"""What Triton needs of a machine besides a GPU: it compiles the code that launches a kernel with the machine's C compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path


def triton_missing() -> str | None:
    """Why Triton's kernels cannot be compiled here; None: they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not os.environ.get("CC") and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "Triton needs a C compiler: install gcc or clang, or name one in CC"
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # Debian's, whose folder of headers is empty; Triton looks in the other, too
        scheme = "posix_prefix"
    if not Path(sysconfig.get_paths(scheme=scheme)["include"], "Python.h").is_file():
        return "Triton needs Python's headers: install python3-dev"
    return None
