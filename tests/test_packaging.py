"""What is installed, from where, and that the files which say so agree with each other."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from engine.kernels.native.levels import LEVELS
from tests.kit import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT, BUILD = PYPROJECT["project"], PYPROJECT["build-system"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def named_files() -> list[Path]:
    """The tree without what is made in it."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in tracked.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.slow  # it compiles the native kernels for every level of processor
@pytest.mark.process
def test_the_wheel_holds_the_packages_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for name in ("server", "engine", "lab", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    overlay = source / "engine" / "overlays" / "smollm2-135m-instruct.safetensors"
    overlay.parent.mkdir(exist_ok=True)
    overlay.touch()
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True, timeout=100)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert {name.split("/")[0] for name in names} == {
        "server",
        "engine",
        "lab",
        wheel.name.split("-py3")[0] + ".dist-info",
    }
    assert "dsa = server.cli.main:main" in entry_points
    assert "engine/overlays/smollm2-135m-instruct.safetensors" in names
    libraries = {level.file for level in LEVELS if level.machine == platform.machine()}
    assert {f"engine/kernels/native/lib/{file}" for file in libraries} == {
        n for n in names if n.endswith(".so")
    }
    assert ("-py3-none-any" in wheel.name) == (not libraries)
    for package in ("server", "engine", "lab"):
        for module in (ROOT / package).rglob("*.py"):
            assert module.relative_to(ROOT).as_posix() in names
        for data in ("*.html", "*.css", "*.js", "*.svg", "*.safetensors"):
            for file in (ROOT / package).rglob(data):
                assert file.relative_to(ROOT).as_posix() in names


def test_everything_that_is_asked_for_is_pinned_within_its_range() -> None:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in [Requirement(text) for group in groups for text in group]:
        version = pins()[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} does not allow {version}"


def test_what_the_build_asks_for_is_pinned_and_installed_before_the_package() -> None:
    makefile, dockerfile = ((ROOT / name).read_text("utf-8") for name in ("Makefile", "Dockerfile"))
    for requirement in map(Requirement, BUILD["requires"]):
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])
        for text in (makefile, dockerfile):
            assert re.search(rf"--upgrade pip .*\b{requirement.name}\b", text)


def test_torch_is_pinned_without_choosing_a_build() -> None:
    assert pins()["torch"] == "2.13.0"


def test_make_and_docker_install_torch_before_everything_else() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert makefile.index("$(INSTALL) torch") < makefile.index(
        "$(INSTALL) --no-build-isolation --editable '.[otel]'"
    )
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    assert dockerfile.index("constraints.txt torch") < dockerfile.index('--no-build-isolation ".[${extras}]"')
    assert "--constraint constraints.txt" in makefile


def test_ci_runs_the_checks_the_tests_and_the_long_proofs() -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert re.findall(r"^make (.+)$", script, re.MULTILINE) == ["lint", "test", "test-slow"]
    assert "set -euo pipefail" in script


@pytest.mark.process
@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_says_what_is_wrong_with_python(tmp_path: Path) -> None:
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.0\nexit 1\n')
    old.chmod(0o755)
    for python, sentence in (
        ("no-such-python", "was not found"),
        (str(old), "Python 3.8.0, and 3.11 or newer is needed"),
    ):
        result = subprocess.run(
            ["make", "serve", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 2
        assert sentence in result.stdout


def dry_run(tmp_path: Path, *given: str, nvidia_smi: str | None = None) -> str:
    """What `make serve` would do in a tree where nothing is installed, with such an nvidia-smi first on the path."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    path = os.environ["PATH"]
    if nvidia_smi is not None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        program.chmod(0o755)
        path = f"{program.parent}{os.pathsep}{path}"
    outer = {"GPU", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"}  # of the make that runs the tests
    environ = {name: value for name, value in os.environ.items() if name not in outer} | {"PATH": path}
    run = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "serve", *given],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=environ,
    )  # fmt: skip
    return run.stdout + run.stderr


GPU_HERE = Path("/proc/driver/nvidia/version").exists()


@pytest.mark.process
@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_installs_for_a_gpu_where_one_is_or_where_it_is_told_to(tmp_path: Path) -> None:
    lists_one = "echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)'"
    plain = dry_run(tmp_path, "GPU=0")
    assert "--editable '.[otel]'" in plain
    assert "gpu" not in plain.lower()
    for given, nvidia_smi in ((["GPU=1"], None), ([], lists_one)):
        said = dry_run(tmp_path, *given, nvidia_smi=nvidia_smi)
        assert "--editable '.[gpu]'" in said
        assert said.index("'.[otel]'") < said.index("'.[gpu]'") < said.index("bin/dsa serve")
        # A GPU that was asked for must be usable; one that was found need not be.
        assert ("lab.doctor.software --strict" in said) == bool(given)
    assert dry_run(tmp_path, "GPU=0", nvidia_smi=lists_one) == plain
    assert 'GPU is "yes"; set it to 1 or 0' in dry_run(tmp_path, "GPU=yes")
    if not GPU_HERE:
        for silent in ("exit 9", "echo 'No devices were found'"):
            assert dry_run(tmp_path, nvidia_smi=silent) == plain


def test_docker_installs_for_a_gpu_on_nvidias_bases() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    condition = 'if [ "${GPU}" = 1 ] || { [ "${GPU}" = auto ] && [ -n "${CUDA_VERSION:-}" ]; }; then'
    assert [line.split(condition)[1].strip() for line in dockerfile.splitlines() if condition in line] == [
        'set -- "$@" gcc libc6-dev; fi \\',
        "extras=otel,gpu; fi \\",
    ]
    assert dockerfile.count("\nARG GPU") == 3  # before the first stage, and in the two that read it


def test_every_package_of_the_cuda_build_is_pinned() -> None:
    """What torch 2.13's CUDA build asks for; none of it is asked for by this project."""
    cuda = [name for name in pins() if name.startswith(("nvidia-", "cuda-"))]
    assert len(cuda) == 18
    assert pins()["triton"] == "3.7.1"


@pytest.mark.process
@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_help_names_every_target() -> None:
    listing = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("serve", "chat", "check", "test", "test-all", "lint", "clean"):
        assert f"make {target} " in listing


@pytest.mark.process
def test_no_file_names_a_package_registry() -> None:
    addresses = ("pypi" + ".org", "pythonhosted" + ".org", "download.pytorch" + ".org", "--index" + "-url")
    found = [
        f"{path.relative_to(ROOT)}: {address}"
        for path in named_files()
        if path.suffix not in (".gz", ".safetensors", ".bin", ".npz", ".png")
        for address in addresses
        if address in path.read_text("utf-8", errors="replace")
    ]
    assert found == []
