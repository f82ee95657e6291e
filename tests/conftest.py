"""Fixtures that every test may use, what each test needs, and how tests share the machine.

What a test needs is told by markers, declared in pyproject.toml and put on here where a fixture, a folder or what the
test's module works with shows it: `model` for a model, `process` for processes, `interpreted` for Triton's interpreter.
`alone` is for tests that measure seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest

from server.hub.models import resolve
from server.text.loading import load_tokenizer
from server.text.tokenizer import Tokenizer
from tests.kit import ROOT, gpus
from tests.turns import turn

# No import above loads torch, which reads this once. Tests share the cores with the servers that they
# start; see engine.supervisor.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Triton reads this when it is first imported, and when a kernel is made: without a GPU its interpreter runs kernels.
os.environ.setdefault("TRITON_INTERPRET", "0" if gpus() else "1")

# No server of a test writes into the user's ledger, unless it is told of one of its own.
os.environ["DSA_LEDGER"] = "none"

# How long an example takes says nothing where workers, servers and the neighbours of the machine share its cores.
UNTIMED = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("test", UNTIMED)
# `make check` says the same of the same code, and is short.
hypothesis.settings.register_profile("check", UNTIMED, max_examples=10, derandomize=True, database=None)
hypothesis.settings.load_profile("test")

MODEL_MAKERS = {
    "tiny_checkpoint",
    "tiny_deepseek",
    "save_base",
    "write_gguf",
    "LlamaForCausalLM",
    "Lab",
    "Bench",
}
"""What a module that makes models, small ones too, works with."""

_started: list[str] = []
"""What the test that runs has started."""


def pytest_configure(config: pytest.Config) -> None:
    sys.addaudithook(_note_start)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test by what it needs, before any is left out."""
    for item in items:
        file = item.nodeid.partition("::")[0]
        makes_models = MODEL_MAKERS & vars(getattr(item, "module", None) or object).keys()
        if makes_models or "default_model" in getattr(item, "fixturenames", ()):
            item.add_marker("model")
        if file.startswith("tests/e2e/"):
            item.add_marker("process")
        if file.startswith("tests/engine/kernels/triton/"):
            item.add_marker("interpreted")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """What measures seconds has the machine to itself; before any clock of the test starts."""
    if "PYTEST_XDIST_WORKER" not in os.environ:  # one process, one test
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    with turn(Path(__file__), ROOT / "tests" / "turns.py", alone=alone):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A test says that it starts processes, so that `make check` can leave it out."""
    _started.clear()
    result = yield
    if _started and item.get_closest_marker("process") is None:
        pytest.fail(f"{item.name} starts a process ({_started[0]}): mark it with pytest.mark.process")
    return result


def _note_start(event: str, args: tuple[object, ...]) -> None:
    # OpenAI's client and `platform` ask once what system this is.
    asked = any(name in str(args) for name in ("lsb_release", "uname"))
    if event in ("subprocess.Popen", "os.fork", "os.system") and not asked and not _compiles(args):
        _started.append(f"{event} {args[:2]}")


def _compiles(args: tuple[object, ...]) -> bool:
    """Whether it is Triton's assembler, compiler of launchers or search for libraries and systems: on a GPU any kernel's first call."""
    tools = {"file", "ptxas", "ptxas-blackwell", "cc", "gcc", "clang", "ldconfig", "cuobjdump", "nvdisasm"}
    return os.environ["TRITON_INTERPRET"] == "0" and Path(str(args[0])).name in tools


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's .gguf file, fetched into the user's cache if it is not there yet."""
    return resolve("smollm2-135m-instruct").weights


@pytest.fixture(scope="session")
def tokenizer(default_model: Path) -> Tokenizer:
    """The default model's tokenizer."""
    return load_tokenizer(default_model)
