"""Builds the native CPU kernels with the package. Everything else about the package is in pyproject.toml.

The C compiler is Zig's, from the wheel `ziglang`, a build requirement: no compiler of the system is needed. What
comes out are plain shared libraries, one a level of processor, which `engine.kernels.native` opens with ctypes; they
know nothing of Python, so one wheel serves every version of it.

    python setup.py build_native --inplace    # after a change to the C sources of an editable install
"""

from __future__ import annotations

import importlib.util
import os
import platform
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.install import install

ROOT = Path(__file__).parent
NATIVE = Path("engine/kernels/native")
PLAN = runpy.run_path(str(ROOT / NATIVE / "levels.py"))
FLAGS = (
    *("-shared", "-fPIC", "-std=c11", "-O3", "-g0", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    # Sums may be contracted (a*b+c in one rounding), but NaN and infinities keep their meaning.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-sanitize=all"),
)


def levels() -> list[tuple[str, ...]]:
    """What this machine's libraries are."""
    wanted = platform.machine() if sys.platform == "linux" else ""
    return [level for level in PLAN["LEVELS"] if level.machine == wanted]


class BuildNative(Command):
    """Compile each level into `engine/kernels/native/lib`."""

    description = "compile the native CPU kernels"
    user_options: ClassVar = [("inplace", "i", "put the libraries into the source tree")]
    boolean_options: ClassVar = ["inplace"]

    def initialize_options(self) -> None:
        self.inplace = False
        self.editable_mode = False
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        folder = ROOT / NATIVE
        out = (ROOT if self.inplace or self.editable_mode else Path(str(self.build_lib))) / NATIVE / "lib"
        if not levels():
            self.warn(
                f"there are no native kernels for {sys.platform} on {platform.machine()}; torch's are used"
            )
            return
        if importlib.util.find_spec("ziglang") is None:
            self.warn(
                "the native kernels were not built, for want of ziglang (pip install ziglang); torch's are used"
            )
            return
        out.mkdir(parents=True, exist_ok=True)
        fingerprint = PLAN["fingerprint"](folder)
        code = [str(path) for path in PLAN["sources"](folder) if path.suffix == ".c"]
        with tempfile.TemporaryDirectory() as cache:
            for level in levels():
                self.announce(f"compiling native kernels for {level.name}", level=2)
                made = Path(cache) / level.file
                command = [
                    sys.executable,
                    "-m",
                    "ziglang",
                    "cc",
                    "-target",
                    level.target,
                    f"-mcpu={level.cpu}",
                ]
                command += [
                    *FLAGS,
                    f'-DDSA_FINGERPRINT="{fingerprint}"',
                    *code,
                    "-o",
                    str(made),
                    "-lm",
                    "-lpthread",
                ]
                subprocess.run(command, check=True, env={"ZIG_GLOBAL_CACHE_DIR": cache, **os.environ})
                # A new file under the old name: a process that has the old one open keeps it.
                (out / f"{level.file}.new").write_bytes(made.read_bytes())
                (out / f"{level.file}.new").replace(out / level.file)

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in PLAN["sources"](ROOT / NATIVE)]

    def get_outputs(self) -> list[str]:
        return [str(Path(str(self.build_lib)) / NATIVE / "lib" / level.file) for level in levels()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """Python first, then the kernels."""

    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None)]


class Install(install):
    """Where packages with libraries go."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if levels():
            self.install_lib = self.install_platlib


class Wheel(bdist_wheel):
    """A wheel for this platform and every Python, where there are libraries in it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not levels()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"build": Build, "build_native": BuildNative, "install": Install, "bdist_wheel": Wheel})
