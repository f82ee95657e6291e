"""Which backend is chosen where, and what is said where it cannot be."""

from __future__ import annotations

import pytest
import torch

from engine.errors import ConfigError
from engine.kernels import choice, toolchain
from engine.kernels.choice import choose_backend

CUDA = torch.device("cuda")


@pytest.mark.parametrize(("missing", "name"), [(None, "triton"), ("Triton is not installed", "torch")])
def test_auto_on_cuda(monkeypatch: pytest.MonkeyPatch, missing: str | None, name: str) -> None:
    monkeypatch.setattr(choice, "triton_missing", lambda: missing)
    assert choose_backend("auto", CUDA).name == name


def test_triton_is_for_cuda_and_must_be_able_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="for CUDA, but the device is cpu"):
        choose_backend("triton", torch.device("cpu"))
    monkeypatch.setattr(choice, "triton_missing", lambda: "Triton is not installed")
    with pytest.raises(ConfigError, match="Triton is not installed"):
        choose_backend("triton", CUDA)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert "C compiler" in str(toolchain.triton_missing())
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": "/nowhere"})
    assert "headers" in str(toolchain.triton_missing())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert toolchain.triton_missing() == "Triton is not installed"
