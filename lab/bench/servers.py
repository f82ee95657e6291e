"""Starts servers for a measurement on given cores, watches them, and stops them at the end."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lab.bench.errors import BenchError

_STOP_SECONDS = 20.0
_TAIL = 3
_PARENT, _SESSION, _START = 1, 3, 19
"""Indices of fields in the list that `_stat` returns."""


class LocalServer:
    """A server's process and all processes that it started, in a session of their own.

    Attributes:
        name: the server's name in tables.
        command: the command that was run, with the port filled in.
        url: the address where the server will answer.
        log: the file with the server's output.
    """

    def __init__(self, name: str, template: str, log: Path, cpus: Sequence[int] | None) -> None:
        """Start the server.

        Args:
            name: the server's name in tables
            template: a command line; {port} becomes a free port of the loopback interface
            log: file for the server's output
            cpus: cores that the server may use; None is all cores that this process may use

        Raises:
            BenchError: the command has no {port}, or cannot be started.
        """
        if "{port}" not in template:
            raise BenchError(
                f"the command of {name} has no {{port}}, so its address is not known: {template}"
            )
        port = _free_port()
        self.name = name
        self.command = template.replace("{port}", str(port))
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        try:
            with log.open("wb") as output, pinned(cpus):
                self._process = subprocess.Popen(
                    shlex.split(self.command),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except (OSError, ValueError) as error:
            raise BenchError(f"{name} cannot be started: {error}") from None

    @property
    def pid(self) -> int:
        """The id of the process that was started."""
        return self._process.pid

    def check(self) -> None:
        """Check that the server is still running.

        Raises:
            BenchError: it ended; the message has the last lines of its log.
        """
        if (code := self._process.poll()) is not None:
            lines = self.log.read_text(errors="replace").split("\n")
            last = " | ".join([line.strip() for line in lines if line.strip()][-_TAIL:])
            raise BenchError(
                f"{self.name} ended with exit status {code}; {self.log} ends with: {last or 'nothing'}"
            )

    def peak_memory(self) -> int | None:
        """Return the peak resident memory of the server's largest process, in bytes; None if it is not known."""
        peaks = [peak for process in self._processes() if (peak := _peak(process)) is not None]
        return max(peaks, default=None)

    def pause(self) -> None:
        """Stop all processes of the server until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let the server's processes continue."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """End the server and all processes that it started: first with SIGTERM, then with SIGKILL."""
        family = {process: _stat(process) for process in self._processes()}
        self.resume()  # a paused process does not react to SIGTERM
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        for process, stat in family.items():
            now = _stat(process)
            if stat and now and now[_START] == stat[_START]:  # else another process now has this id
                with suppress(ProcessLookupError):
                    os.kill(int(process.name), signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes():
            with suppress(ProcessLookupError):
                os.kill(int(process.name), number)

    def _processes(self) -> list[Path]:
        """Return the /proc folders of all processes that are in the server's session or descend from it."""
        stats = {int(path.name): stat for path in Path("/proc").glob("[0-9]*") if (stat := _stat(path))}
        found = {pid for pid, stat in stats.items() if int(stat[_SESSION]) == self._process.pid}
        while more := {pid for pid, stat in stats.items() if int(stat[_PARENT]) in found} - found:
            found |= more
        return [Path("/proc", str(pid)) for pid in sorted(found)]


@contextmanager
def pinned(cpus: Sequence[int] | None) -> Iterator[None]:
    """Let processes that are started inside the block run only on these cores.

    Raises:
        BenchError: this process may use none of the cores.
    """
    if cpus is None:
        yield
        return
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, set(cpus))
    except OSError:
        raise BenchError(f"no core of {_list(cpus)} is to be had on this machine") from None
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def cores(text: str) -> tuple[int, ...]:
    """Read the numbers of cores, such as `1` or `0,2-3`.

    Raises:
        BenchError: the text is none of this form.
    """
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or not (last or first).isdigit() or int(last or first) < int(first):
            raise BenchError(f"--cpus is {text!r}; expected cores, such as 1 or 0,2-3")
        found += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(found))


def leave(cpus: Sequence[int]) -> None:
    """Keep this process off the servers' cores, if there are others."""
    if others := os.sched_getaffinity(0) - set(cpus):
        os.sched_setaffinity(0, others)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def _stat(process: Path) -> list[str] | None:
    """Return the fields of /proc/PID/stat (proc(5)) after the command's name, beginning with the state.

    The name may contain any character. The result is None if the process has ended.
    """
    try:
        return (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _peak(process: Path) -> int | None:
    with suppress(OSError):
        for line in (process / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return None


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


@contextmanager
def others_paused(servers: Sequence[LocalServer], measured: LocalServer | None) -> Iterator[None]:
    """Pause all servers but the measured one. They share its cores, and even idle servers use some CPU time."""
    others = [server for server in servers if server is not measured]
    for server in others:
        server.pause()
    try:
        yield
    finally:
        for server in others:
            server.resume()


@contextmanager
def all_stopped(servers: list[LocalServer]) -> Iterator[None]:
    """Stop every server of the list at the end, also servers that were added inside the block."""
    try:
        yield
    finally:
        for server in servers:
            server.stop()
