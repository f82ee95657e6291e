"""What can go wrong with a measurement."""

from __future__ import annotations

from lab.tool import ToolError


class BenchError(ToolError):
    """It cannot be measured; the message is one sentence that says why and what to do."""
