"""Compares the models of two hosts by a digest of their files, without reading the files completely."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLE_BYTES = 64 << 10


def fingerprint(weights: Path, overlay: Path | None) -> str:
    """Digest the size, beginning, middle and end of every file that is loaded.

    The digest covers every header, so it differs for other shapes, types and names. Of the weights it covers only a
    sample, which shows most models with the same shapes but other weights.

    Args:
        weights: a .gguf file, or a folder
        overlay: the overlay's file, if there is one

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in _files(weights):
        if weights.is_dir():
            digest.update(f"{file.name}\0".encode())
        _add(digest, file)
    if overlay is not None:
        digest.update(b"overlay\0")
        _add(digest, overlay)
    return digest.hexdigest()


def _files(weights: Path) -> list[Path]:
    if not weights.is_dir():
        return [weights]
    config = weights / "config.json"
    found = [*weights.glob("*.safetensors"), *weights.glob("*.gguf"), *([config] if config.exists() else [])]
    return sorted(found)


def _add(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{size}\0".encode())
    with file.open("rb") as stream:
        for start in sorted({0, max(0, size // 2), max(0, size - _SAMPLE_BYTES)}):
            stream.seek(start)
            digest.update(stream.read(_SAMPLE_BYTES))
