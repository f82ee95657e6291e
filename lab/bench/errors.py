"""The error of a measurement."""

from __future__ import annotations

from lab.tool import ToolError


class BenchError(ToolError):
    """The measurement is not possible; the message is one sentence that says why and what to do."""
