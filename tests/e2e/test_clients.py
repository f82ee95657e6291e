"""Programs of other people that talk to OpenAI's interface, each from an environment of its own, against a real server.

Their pins clash with each other's, so they are not installed here. DSA_TEST_CLIENTS names a folder of environments (`python -m
venv`), one for each program of `tests/e2e/clients`, with the package in it: DSA_TEST_CLIENTS=/tmp/clients make test-slow.
`lm_eval` is `lm-eval[api]`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.serving import MODEL, Server

CLIENTS = ("guidellm", "instructor", "langchain", "litellm", "lm_eval", "openai_agents", "pydantic_ai")
FOLDER = os.environ.get("DSA_TEST_CLIENTS")
PROGRAMS = Path(__file__).parent / "clients"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.process,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        FOLDER is None, reason="DSA_TEST_CLIENTS names the folder of the clients' environments"
    ),
]


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_works_unchanged(server: Server, name: str) -> None:
    python = Path(FOLDER or "") / name / "bin" / "python"
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/tmp"),
        "OPENAI_API_KEY": "none",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [python, "-P", PROGRAMS / f"use_{name}.py", server.url, MODEL],
        capture_output=True, text=True, timeout=280, env=environ, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def test_each_client_has_a_program() -> None:
    assert {path.stem for path in PROGRAMS.glob("use_*.py")} == {f"use_{name}" for name in CLIENTS}
