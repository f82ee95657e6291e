"""Servers started for a measurement: on given cores, watched, and stopped in the end."""

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
"""Fields of `_stat`."""


class LocalServer:
    """A process, with all that it started, in a session of its own.

    Attributes:
        name: what tables call it.
        command: what was run, the port filled in.
        url: where it will answer.
        log: the file that has its output.
    """

    def __init__(self, name: str, template: str, log: Path, cpus: Sequence[int] | None) -> None:
        """Start it.

        Args:
            name: what tables call it
            template: a command line; {port} becomes a free port of the loopback
            log: file for its output
            cpus: cores that it may use; None is all that this process may

        Raises:
            BenchError: there is no such command.
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

    def check(self) -> None:
        """Say why it ended, if it did.

        Raises:
            BenchError: it did.
        """
        if (code := self._process.poll()) is not None:
            lines = self.log.read_text(errors="replace").split("\n")
            last = " | ".join([line.strip() for line in lines if line.strip()][-_TAIL:])
            raise BenchError(
                f"{self.name} ended with exit status {code}; {self.log} ends with: {last or 'nothing'}"
            )

    def peak_memory(self) -> int | None:
        """The most memory that its largest process ever had resident, bytes; None where it is not known."""
        peaks = [peak for process in self._processes() if (peak := _peak(process)) is not None]
        return max(peaks, default=None)

    def pause(self) -> None:
        """Let it do nothing until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it and all that it started: politely, then not."""
        family = {process: _stat(process) for process in self._processes()}
        self.resume()  # one that is paused would not hear of it
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        for process, stat in family.items():
            now = _stat(process)
            if stat and now and now[_START] == stat[_START]:  # else the number is another process's by now
                with suppress(ProcessLookupError):
                    os.kill(int(process.name), signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes():
            with suppress(ProcessLookupError):
                os.kill(int(process.name), number)

    def _processes(self) -> list[Path]:
        """Folders in /proc of the process and all that descend from it or are of its session."""
        stats = {int(path.name): stat for path in Path("/proc").glob("[0-9]*") if (stat := _stat(path))}
        found = {pid for pid, stat in stats.items() if int(stat[_SESSION]) == self._process.pid}
        while more := {pid for pid, stat in stats.items() if int(stat[_PARENT]) in found} - found:
            found |= more
        return [Path("/proc", str(pid)) for pid in sorted(found)]


@contextmanager
def pinned(cpus: Sequence[int] | None) -> Iterator[None]:
    """Let what is started meanwhile run on these cores only.

    Raises:
        BenchError: this process may not use one of them.
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


def leave(cpus: Sequence[int]) -> None:
    """Keep this process off the servers' cores, if there are others."""
    if others := os.sched_getaffinity(0) - set(cpus):
        os.sched_setaffinity(0, others)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def _stat(process: Path) -> list[str] | None:
    """The fields of /proc/PID/stat after the command's name, which may hold anything (proc(5)): state is the first."""
    try:
        return (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None  # it ended


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
    """Let one server have the cores that they share: idle ones poll, and take a part of them."""
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
    """Stop every server of the list in the end, also those that are added meanwhile."""
    try:
        yield
    finally:
        for server in servers:
            server.stop()
