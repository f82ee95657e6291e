"""What `make` and the Dockerfile say after they have installed what a GPU needs."""

from __future__ import annotations

import pytest

from lab.doctor import software


@pytest.mark.parametrize(
    ("arguments", "cuda", "triton", "status", "said"),
    [
        (["--strict"], "13.0", None, 0, []),
        (["--strict"], None, None, 1, ["error: A GPU needs a CUDA build of torch"]),
        ([], None, "Triton is not installed", 0, ["warning: A GPU needs", "warning: The kernels for GPUs"]),
        (["--strict"], "13.0", "Triton needs a C compiler: install gcc", 1, ["error: The kernels for GPUs are compiled by"]),
    ],
)  # fmt: skip
def test_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], cuda: str | None, triton: str | None, status: int, said: list[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(software, "gpu", lambda: {"torch_cuda": cuda, "triton_missing": triton})
    assert software.main(arguments) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))
