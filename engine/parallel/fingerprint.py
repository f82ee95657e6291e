"""Whether two hosts have the same model, told from its files without reading them through."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLE_BYTES = 64 << 10


def fingerprint(weights: Path, overlay: Path | None) -> str:
    """Digest of sizes, beginnings, middles and ends of what is loaded.

    That covers every header, so other shapes, types and names, and of other weights of the same shape at least a
    sample.

    Args:
        weights: a .gguf file, or a folder
        overlay: laid over it

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
