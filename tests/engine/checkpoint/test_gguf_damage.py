"""Damaged GGUF files: every fault raises a CheckpointError that names it."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint.source import open_source
from engine.errors import CheckpointError
from tests.engine.checkpoint.kit import write_gguf


def damaged(header: bytes) -> bytes:
    return b"GGUF" + struct.pack("<I", 3) + header


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + dims + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"GG", "is not a GGUF file"),
        (b"PK\x03\x04 something else", "is not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1), "GGUF version 1"),
        (damaged(struct.pack("<QQ", 0, 1)), "runs past the end of the file"),
        (damaged(struct.pack("<QQ", 0, 2) + 2 * pair("a", 0, b"x")), "sets a twice"),
        (damaged(struct.pack("<QQ", 0, 1) + pair("a", 77, b"")), "a has value type 77"),
        (damaged(struct.pack("<QQ", 0, 1) + pair("a", 9, struct.pack("<IQ", 9, 1))), "array of arrays"),
        (damaged(struct.pack("<QQ", 0, 1) + pair("a", 9, struct.pack("<IQ", 4, 1 << 60))), "past the end"),
        (
            damaged(struct.pack("<QQ", 0, 1) + pair("tokenizer.x", 9, struct.pack("<IQ", 8, 1 << 60))),
            "past the end",
        ),
        (
            damaged(struct.pack("<QQ", 0, 1) + pair("tokenizer.x", 9, struct.pack("<IQ", 4, 1 << 60))),
            "past the end",
        ),
        (damaged(struct.pack("<QQ", 1, 0) + tensor("t", (1,) * 5, 0)), "t has 5 dimensions"),
        (damaged(struct.pack("<QQ", 1, 0) + tensor("t", (0, 4), 0)), r"t has shape \(4, 0\)"),
        (damaged(struct.pack("<QQ", 1, 0) + tensor("t", (4,), 999)), "tensor t as type 999"),
        (
            damaged(struct.pack("<QQ", 1, 0) + tensor("t", (33,), 8)),
            "not a multiple of the 32 in a block of Q8_0",
        ),
        (damaged(struct.pack("<QQ", 2, 0) + 2 * tensor("t", (4,), 0) + bytes(99)), "names tensor t twice"),
        (damaged(struct.pack("<QQ", 1, 0) + tensor("t", (1 << 62, 1 << 62), 0)), "truncated: tensor t ends"),
        (damaged(struct.pack("<QQ", 1, 0) + tensor("t", (4,), 0, 1 << 63)), "truncated: tensor t ends"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(path)
    assert "x.gguf" in str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    folder = tmp_path_factory.mktemp("damage")
    return write_gguf(folder / "whole.gguf").read_bytes(), folder


@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_truncated_anywhere(whole: tuple[bytes, Path], data: st.DataObject) -> None:
    content, folder = whole
    header = 3000  # cut as often in here as in the much longer rest
    size = data.draw(st.integers(0, header) | st.integers(header, len(content) - gguf.GGUF_DEFAULT_ALIGNMENT))
    path = folder / "cut.gguf"
    path.write_bytes(content[:size])
    with pytest.raises(CheckpointError):
        open_source(path)


@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_a_changed_byte_is_refused_or_read(whole: tuple[bytes, Path], data: st.DataObject) -> None:
    """Some wrong bytes cannot be noticed. If reading fails, it raises CheckpointError and nothing else."""
    content, folder = whole
    at = data.draw(st.integers(0, 3000))
    path = folder / "changed.gguf"
    path.write_bytes(content[:at] + data.draw(st.binary(min_size=1, max_size=9)) + content[at + 1 :])
    with contextlib.suppress(CheckpointError):
        source = open_source(path)
        for name in source.names():
            source.read(name, torch.float32)
