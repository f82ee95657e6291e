"""Fixtures that every test may use. The markers are declared in pyproject.toml."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.hub.models import resolve
from server.text.tokenizer import Tokenizer, load_tokenizer

# No import above loads torch, which reads this once. Tests share the cores with the servers that they
# start; see engine.supervisor.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# No server of a test writes into the user's ledger, unless it is told of one of its own.
os.environ["DSA_LEDGER"] = "none"


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's .gguf file, fetched into the user's cache if it is not there yet."""
    return resolve("smollm2-135m-instruct").weights


@pytest.fixture(scope="session")
def tokenizer(default_model: Path) -> Tokenizer:
    """The default model's tokenizer."""
    return load_tokenizer(default_model)
