"""Order that no tool keeps: names mean one thing, and files stay short or say why not."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from tests.kit import ROOT

PACKAGES = ("server", "engine", "lab")
MOST_LINES = 400


def types_of(source: str) -> list[str]:
    """The public classes and type aliases that a module makes at its top."""
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp):
            found += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found += [node.target.id] if ast.unparse(node.annotation).endswith("TypeAlias") else []
        elif isinstance(node, getattr(ast, "TypeAlias", ())):
            found.append(node.name.id)  # type: ignore[attr-defined]  # of Python 3.12
    return [name for name in found if re.match(r"[A-Z]+[a-z]", name)]


def twins(root: Path) -> dict[str, list[str]]:
    """The names that several types have, with the files that make them."""
    homes: dict[str, list[str]] = defaultdict(list)
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        for name in types_of(path.read_text("utf-8")):
            homes[name].append(path.relative_to(root).as_posix())
    return {name: files for name, files in sorted(homes.items()) if len(files) > 1}


def test_no_two_types_share_a_name() -> None:
    found = twins(ROOT)
    assert not found, "\n".join(f"{name}: {', '.join(files)}" for name, files in found.items())


def test_types_that_share_a_name_are_told(tmp_path: Path) -> None:
    for name, source in {
        "server/a.py": "class Work: ...\nclass _Own: ...\nLIMITS = A | B\nKind = Literal['x']\n",
        "engine/b.py": "class _Own: ...\nLIMITS = C | D\nReport: TypeAlias = 'int'\nfrom server.a import Kind\n",
        "lab/c.py": "Work = int | str\nKind = dict[str, int]\nclass Report: ...\nkept = found[0]\n",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(source)
    assert twins(tmp_path) == {
        "Kind": ["lab/c.py", "server/a.py"],
        "Report": ["engine/b.py", "lab/c.py"],
        "Work": ["lab/c.py", "server/a.py"],
    }


def unexcused(path: Path) -> bool:
    """Whether a file has more than 400 lines and does not say why where it begins."""
    lines = path.read_text("utf-8").splitlines()
    return len(lines) > MOST_LINES and f"{MOST_LINES} lines" not in " ".join(lines[:15])


def test_a_file_of_more_than_400_lines_says_why() -> None:
    paths = [
        path
        for package in (*PACKAGES, "tests", "benchmarks")
        for pattern in ("*.py", "*.[ch]")
        for path in (ROOT / package).rglob(pattern)
    ]
    assert len(paths) > 300
    assert sorted(str(path.relative_to(ROOT)) for path in paths if unexcused(path)) == []


def test_a_long_file_without_a_reason_is_told(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    path.write_text("x = 1\n" * 400)
    assert not unexcused(path)
    path.write_text("x = 1\n" * 401)
    assert unexcused(path)
    path.write_text('"""One grammar; it has more than 400 lines because ..."""\n' + "x = 1\n" * 401)
    assert not unexcused(path)
