"""Every Python process that this project starts keeps the current folder off its path."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit import ROOT


def unsafe(source: str) -> Iterator[int]:
    """Lines where `sys.executable` is followed by something that is not "-P"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.List | ast.Tuple):
            words = node.elts
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") != "execv":
            words = node.args
        else:
            continue
        for i, word in enumerate(words):
            if ast.unparse(word) == "sys.executable":
                following = words[i + 1] if i + 1 < len(words) else None
                if not (isinstance(following, ast.Constant) and following.value == "-P"):
                    yield word.lineno


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("run([sys.executable, '-P', '-m', 'engine'])", []),
        ("run([sys.executable, '-m', 'engine'])", [1]),
        ("exec(sys.executable, '-c', 'pass')", [1]),
        ("os.execv(sys.executable, [sys.executable, '-P'])", []),
        ("COMMAND = (sys.executable, *more)", [1]),
    ],
)
def test_what_is_unsafe(source: str, found: list[int]) -> None:
    assert list(unsafe(source)) == found


def test_every_child_is_started_with_p() -> None:
    files = [
        path
        for package in ("server", "engine", "lab", "benchmarks")
        for path in (ROOT / package).rglob("*.py")
    ]
    starts = {path for path in files if "sys.executable" in path.read_text("utf-8")}
    assert len(starts) >= 6
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in starts
        for line in unsafe(Path(path).read_text("utf-8"))
    ]
    assert found == []
