"""Where deploy/ is, and its tools: absent ones are skipped, except in CI, which must have them."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.kit import ROOT

DEPLOY = ROOT / "deploy"


def tool(name: str, package: str) -> str:
    """The path of a program; the test is skipped without it, and fails where CI is set."""
    path = shutil.which(name)
    if path is None:
        reason = f"{name} is not here; install it (Debian, Ubuntu: apt install {package})"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path
