"""Triton's kernels on what there is: a GPU, or Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from tests.interpreter import prepare

CHIP = torch.cuda.is_available()
HERE = importlib.util.find_spec("triton") is not None

# The interpreter cuts digits off where it should round to bfloat16, and multiplies matrices of it wrongly.
DTYPES = [torch.float32, torch.bfloat16] if CHIP else [torch.float32]

collect_ignore_glob = [] if HERE else ["test_*.py"]  # Triton is made for Linux on x86-64 only

if HERE:
    prepare()


def pytest_report_header() -> str:
    """Where the kernels run, or why they do not."""
    if not HERE:
        return "triton kernels: not tested, triton is not installed"
    return f"triton kernels: on {torch.cuda.get_device_name() if CHIP else 'the CPU, interpreted'}"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The interpreter's numpy and torch share few cores with other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if CHIP else "cpu")


@pytest.fixture(scope="session")
def dtypes() -> list[torch.dtype]:
    """Numbers of a model."""
    return DTYPES


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Of activations and weights."""
    chosen: torch.dtype = request.param
    return chosen
