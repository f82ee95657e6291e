"""Who may import whom, read from the source: the directions of the plan, no circles, and what a start pulls in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.imports import Import, circles, names_in, read_imports
from tests.kit import ROOT

PACKAGES = ("server", "engine", "lab")
FACE = ("protocol", "config", "errors", "grammar", "client", "channel", "supervisor")
TENSORS = ("torch", "transformers", "triton")
HTTP = "fastapi starlette uvicorn httptools uvloop httpx openai tokenizers jinja2 sqlalchemy typer rich yaml".split()
ABOVE = {
    "plan": "memory kernels layers attention checkpoint models parallel step",
    "memory": "kernels layers attention checkpoint models parallel step",
    "kernels": "layers attention checkpoint models parallel step",
    "layers": "attention checkpoint models parallel step",
    "attention": "checkpoint models parallel step",
    "checkpoint": "layers attention models parallel step",
    "parallel": "kernels layers attention models step",
    "models": "step",
}
"""What the rooms of the engine do not know: those above them."""


def wrong_direction(one: Import) -> bool:
    """Whether the plan of the house forbids an import."""
    package, *rooms = one.file.removesuffix(".py").split("/")
    top, *inner = one.name.split(".")
    room = rooms[0] if len(rooms) > 1 else ""
    into = inner[0] if inner else ""
    if package == "server":
        wrong = top in ("lab", *TENSORS) or (top == "engine" and into not in FACE)
    elif package == "engine":
        wrong = top in ("server", "lab", *HTTP)
        wrong |= room in ("", "plan") and top in TENSORS
        wrong |= top == "engine" and into in ABOVE.get(room, "").split()
    else:
        wrong = top == "server" and into not in ("text", "chat", "hub")
    # Two libraries that one room each may know.
    wrong |= top == "prometheus_client" and rooms[:2] != ["telemetry", "metrics"] and package != "lab"
    wrong |= package == "engine" and one.name.startswith("torch.distributed") and room != "parallel"
    return wrong


def home(file: str) -> str:
    """The folder that a file lies in. The files in a package's own root lie each alone: what all others need
    (config, errors) and what needs all others (app) are both there."""
    return file if file.count("/") == 1 else file.rpartition("/")[0]


def complaints(root: Path) -> list[str]:
    """All that is wrong with the imports of a tree."""
    imports = read_imports(root, PACKAGES)
    wrong = [f"wrong direction: {one}" for one in imports if wrong_direction(one)]
    return [*wrong, *circles(imports, lambda file: file), *circles(imports, home)]


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    found = read_imports(ROOT, PACKAGES)
    assert len({one.file for one in found}) > 200
    return found


def test_imports_point_where_the_plan_allows(imports: list[Import]) -> None:
    assert [str(one) for one in imports if wrong_direction(one)] == []


def test_no_files_need_each_other(imports: list[Import]) -> None:
    found = circles(imports, lambda file: file)
    assert not found, "\n".join(found)


def test_no_folders_need_each_other(imports: list[Import]) -> None:
    found = circles(imports, home)
    assert not found, "\n".join(found)


def test_every_form_of_an_import_is_read() -> None:
    source = (
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    from h.i import j as k\n"
        "def f():\n    from . import e\n    from ..x import y\n    importlib.import_module('g')\n"
    )
    read = {1: ["a.b"], 2: ["c.d"], 4: ["h.i.j"], 6: ["server.text.e"], 7: ["server.x.y"], 8: ["g"]}
    assert sorted(names_in(source, ("server", "text"))) == [(n, name) for n, (name,) in read.items()]


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    return root


SOUND = {
    "server/app.py": "from engine.client import EngineClient\nfrom server.http.routes import chat\n",
    "server/config.py": "import msgspec\n",
    "server/http/routes/chat.py": "from server.config import ServerConfig\n",
    "server/http/routes/models.py": "",
    "engine/client.py": "",
    "engine/attention/batch.py": "from engine.memory import planes\n",
    "engine/attention/mla.py": "from engine.attention.batch import Batch\n",
    "engine/memory/planes.py": "import torch\n",
    "engine/models/mla.py": "import engine.attention.mla\n",
    "lab/distill/train.py": "from engine.models import mla\nfrom server.text import tokenizer\n",
    "lab/distill/plot.py": "from lab.distill.train import Step\n",
    "server/text/tokenizer.py": "",
}


def test_a_sound_tree_has_no_complaint(tmp_path: Path) -> None:
    assert complaints(tree(tmp_path, SOUND)) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("server/app.py", "from engine.models import mla"),
        ("server/app.py", "import engine"),
        ("server/app.py", "def later():\n    import torch"),
        ("server/app.py", "from lab.distill import train"),
        ("engine/client.py", "import server.app"),
        ("engine/client.py", "from fastapi import FastAPI"),
        ("engine/client.py", "import torch"),
        ("engine/client.py", "from lab.distill import train"),
        ("engine/plan/cost.py", "from torch import Tensor"),
        ("engine/memory/planes.py", "from engine.attention import batch"),
        ("engine/memory/planes.py", "if TYPE_CHECKING:\n    import engine.kernels.native"),
        ("engine/attention/mla.py", "from engine.models import mla"),
        ("engine/checkpoint/loader.py", "import engine.models"),
        ("engine/parallel/team.py", "from engine.step import build"),
        ("engine/step/core.py", "import torch.distributed"),
        ("lab/distill/train.py", "from server.config import ServerConfig"),
        ("server/http/reply.py", "import prometheus_client"),
    ],
)
def test_a_wrong_direction_is_told(tmp_path: Path, file: str, source: str) -> None:
    told = complaints(tree(tmp_path, SOUND | {file: source}))
    assert any(
        line.startswith(f"wrong direction: {file}:{source.count(chr(10)) + 1} imports") for line in told
    )


def test_a_circle_of_files_is_told(tmp_path: Path) -> None:
    added = {"engine/attention/batch.py": "if TYPE_CHECKING:\n    from engine.attention.mla import MLA\n"}
    assert complaints(tree(tmp_path, SOUND | added)) == [
        "circle of engine/attention/batch.py, engine/attention/mla.py:\n"
        "  engine/attention/batch.py:2 imports engine.attention.mla.MLA\n"
        "  engine/attention/mla.py:1 imports engine.attention.batch.Batch"
    ]


def test_a_circle_of_folders_is_told(tmp_path: Path) -> None:
    """No two files need each other here."""
    added = {"server/text/tokenizer.py": "import server.http.routes.models\n",
             "server/http/routes/chat.py": "def f():\n    from server.text.tokenizer import Tokenizer\n"}  # fmt: skip
    assert complaints(tree(tmp_path, SOUND | added)) == [
        "circle of server/http/routes, server/text:\n"
        "  server/http/routes/chat.py:2 imports server.text.tokenizer.Tokenizer\n"
        "  server/text/tokenizer.py:1 imports server.http.routes.models"
    ]


def test_a_circle_through_a_file_of_the_root_is_told(tmp_path: Path) -> None:
    told = complaints(tree(tmp_path, SOUND | {"server/config.py": "from server.http.routes import models\n"}))
    assert [line.partition(":")[0] for line in told] == ["circle of server/config.py, server/http/routes"]


@pytest.mark.process
@pytest.mark.parametrize("module", ["server.app", "server.cli.main", "server.serve", "engine.supervisor"])
def test_the_server_process_starts_without_torch(module: str) -> None:
    code = f"import sys, {module}\nprint(sorted(name for name in {TENSORS!r} if name in sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.stdout.strip(), run.stderr) == ("[]", "")
