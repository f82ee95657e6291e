"""Starts a `dsa serve` for a measurement, and stops it afterwards."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lab.evaluate.client import EvaluationError
from lab.tool import DSA

_STOP_SECONDS = 20.0


def serve_arguments(arguments: Sequence[str]) -> list[str]:
    """Return arguments of `dsa` that serve on a free port, without a ledger: measurements are nobody's usage."""
    return ["serve", "--ledger", "none", *arguments, "--host", "127.0.0.1", "--port", "0"]


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[str]:
    """Serve on a free port of the loopback interface, and yield the server's URL. The server's stderr is shown.

    Args:
        arguments: arguments of `dsa serve`, without host and port

    Raises:
        EvaluationError: the server does not start; its own error was printed before.
    """
    command = [*DSA, *serve_arguments(arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = next((m[1] for line in process.stdout if (m := re.match(r"ready at (\S+)", line))), None)
        if address is None:
            raise EvaluationError("the server did not start; the reason stands above")
        # Keep reading, so that the server never waits for room in the pipe.
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield address
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
