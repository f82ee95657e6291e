"""Imports point down only: who may import what, read from the source, and what a start pulls in."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.kit import ROOT

FACE = ("protocol", "config", "errors", "client", "supervisor")
FACE_AND_PLAN = ("engine/*.py", "engine/plan/*.py")


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path, source: str | None = None) -> Iterator[str]:
    """Every module that a file imports anywhere, by its full name; `from a import b` gives a.b."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text("utf-8") if source is None else source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(
                    [*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])]
                )
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute | ast.Name)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def top(name: str) -> str:
    return name.partition(".")[0]


def breaches(package: str, is_breach: Callable[[str, str], bool]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(package)
        for name in imported(path)
        if is_breach(path.relative_to(ROOT).as_posix(), name)
    ]


def test_the_reader_of_imports_reads_every_form() -> None:
    source = "import a.b\nfrom c import d\ndef f():\n    from . import e\n    importlib.import_module('g')\n"
    assert list(imported(ROOT / "server" / "text" / "x.py", source)) == ["a.b", "c.d", "server.text.e", "g"]


def test_both_packages_are_there() -> None:
    assert len(modules("server")) > 10
    assert len(modules("engine")) > 10


def test_the_server_knows_only_the_engines_face() -> None:
    def is_breach(path: str, name: str) -> bool:
        parts = name.split(".")
        return parts[0] == "engine" and (len(parts) < 2 or parts[1] not in FACE)

    assert breaches("server", is_breach) == []


def test_the_engine_does_not_know_the_server() -> None:
    assert (
        breaches("engine", lambda path, name: top(name) in ("server", "fastapi", "uvicorn", "tokenizers"))
        == []
    )


def test_nothing_that_serves_imports_the_lab() -> None:
    found = [breaches(package, lambda path, name: top(name) == "lab") for package in ("server", "engine")]
    assert found == [[], []]


def test_the_lab_knows_of_the_server_text_chat_and_hub() -> None:
    def is_breach(path: str, name: str) -> bool:
        return top(name) == "server" and name.split(".")[1] not in ("text", "chat", "hub")

    assert breaches("lab", is_breach) == []


def test_the_server_never_imports_torch() -> None:
    assert breaches("server", lambda path, name: top(name) in ("torch", "transformers")) == []


def test_face_and_plan_are_without_torch() -> None:
    files = [path for pattern in FACE_AND_PLAN for path in ROOT.glob(pattern)]
    assert len(files) > 15
    found = [path.name for path in files for name in imported(path) if top(name) in ("torch", "triton")]
    assert found == []


def test_one_package_knows_prometheus() -> None:
    def is_breach(path: str, name: str) -> bool:
        return top(name) == "prometheus_client" and not path.startswith("server/telemetry/metrics/")

    assert breaches("server", is_breach) + breaches("engine", is_breach) == []


def test_only_engine_parallel_knows_torch_distributed() -> None:
    def is_breach(path: str, name: str) -> bool:
        return name.startswith("torch.distributed") and not path.startswith("engine/parallel/")

    assert breaches("engine", is_breach) == []


def test_layers_know_no_model() -> None:
    def is_breach(path: str, name: str) -> bool:
        return path.startswith("engine/layers/") and name.startswith(("engine.models", "engine.attention"))

    assert breaches("engine", is_breach) == []


def test_the_server_process_starts_without_torch() -> None:
    code = (
        "import sys, server.app, server.cli.main, server.serve, engine.supervisor\n"
        "print(sorted(name for name in ('torch', 'transformers', 'triton') if name in sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.stdout.strip(), run.stderr) == ("[]", "")
