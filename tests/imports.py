"""Reads from the source which file imports which, and finds circles. The rules are test_imports.py's."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple


class Import(NamedTuple):
    """One import, wherever it stands: in a function and under TYPE_CHECKING too."""

    file: str
    line: int
    name: str
    """In full; `from a import b` gives a.b."""
    target: str | None
    """The file that it names, if that is one of the tree."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"


def read_imports(root: Path, packages: Iterable[str]) -> list[Import]:
    """Every import of every file of these packages, which lie in `root`."""
    files = sorted(path for package in packages for path in (root / package).rglob("*.py"))
    modules = {}
    for path in files:
        file = path.relative_to(root)
        parts = file.parts[:-1] if file.name == "__init__.py" else file.with_suffix("").parts
        modules[".".join(parts)] = file.as_posix()
    found = []
    for path in files:
        file = path.relative_to(root)
        for line, name in names_in(path.read_text("utf-8"), file.parts[:-1]):
            found.append(Import(file.as_posix(), line, name, _target(name, modules)))
    return found


def names_in(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """The line and the full name of each import in the source of a module of `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [node.module] if node.module else []
            if node.level:
                parts = [*package[: len(package) - node.level + 1], *parts]
            yield from ((node.lineno, ".".join([*parts, alias.name])) for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute | ast.Name)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def circles(imports: Iterable[Import], place: Callable[[str], str]) -> list[str]:
    """Places that need each other, each with the imports that tie it; `place` says where a file lies."""
    ties: dict[tuple[str, str], list[Import]] = defaultdict(list)
    for one in imports:
        if one.target is not None and place(one.file) != place(one.target):
            ties[place(one.file), place(one.target)].append(one)
    told = []
    for members in _knots(ties):
        inside = [one for (a, b), tie in sorted(ties.items()) if {a, b} <= members for one in tie]
        told.append("\n  ".join([f"circle of {', '.join(sorted(members))}:", *map(str, inside)]))
    return told


def _target(name: str, modules: Mapping[str, str]) -> str | None:
    """`a.b.c` is the module a.b.c, or something in the module a.b, or in a."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return modules.get(name)


def _knots(edges: Iterable[tuple[str, str]]) -> list[set[str]]:
    """The strongly connected components with more than one member."""
    after: dict[str, set[str]] = defaultdict(set)
    for a, b in edges:
        after[a].add(b)
    reached = {}
    for start in sorted(after):
        seen, left = set[str](), [start]
        while left:
            new = after.get(left.pop(), set()) - seen
            seen |= new
            left.extend(new)
        reached[start] = seen
    knots = ({b for b in reached[a] if a in reached.get(b, ())} for a in sorted(reached))
    return [set(knot) for knot in dict.fromkeys(frozenset(knot) for knot in knots if len(knot) > 1)]
