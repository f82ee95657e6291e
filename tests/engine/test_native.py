"""The native library: built with the package, opened where it fits, and its pool of threads."""

from __future__ import annotations

import ctypes
import platform
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.kernels import native
from engine.kernels.native import levels

LINUX = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
JOB = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)


@pytest.fixture
def library() -> Iterator[ctypes.CDLL]:
    found = native.library()
    if found is None:
        pytest.skip(str(native.missing()))
    before = found.dsa_threads()
    yield found
    found.dsa_set_threads(before)


@pytest.mark.skipif(not LINUX, reason="the kernels are built for Linux on x86-64 and arm64")
def test_an_installed_package_has_its_libraries() -> None:
    built = {path.name for path in (Path(native.__file__).parent / "lib").glob("*.so")}
    assert built == {level.file for level in levels.LEVELS if level.machine == platform.machine()}


@pytest.fixture
def fresh() -> Iterator[None]:
    native._open.cache_clear()
    yield
    native._open.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_a_processor_without_kernels_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.platform, "machine", lambda: "riscv64")
    assert native.library() is None
    assert native.level() is None
    assert native.missing() == "they are not made for this processor (riscv64)"


@pytest.mark.usefixtures("fresh")
def test_a_processor_gets_the_level_that_it_can_run(monkeypatch: pytest.MonkeyPatch, library: object) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("one level only")
    native._open.cache_clear()
    monkeypatch.setattr(native, "_cpu_flags", lambda: frozenset({"avx2", "fma", "f16c", "bmi2", "sse"}))
    assert native.level() == "x86-64-v3"


@pytest.mark.usefixtures("fresh")
def test_a_library_older_than_its_sources_is_not_used(
    monkeypatch: pytest.MonkeyPatch, library: object
) -> None:
    native._open.cache_clear()
    monkeypatch.setattr(native, "fingerprint", lambda folder: "another")
    assert native.library() is None
    assert "older than its sources; run `python setup.py build_native --inplace`" in str(native.missing())


@pytest.mark.usefixtures("fresh")
def test_a_package_without_libraries_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_LIBRARIES", tmp_path)
    if LINUX and any(level.flags <= native._cpu_flags() for level in levels.LEVELS):
        assert native.missing() == "the package was installed without them (ziglang compiles them)"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_job_runs_once_on_every_thread(library: ctypes.CDLL, threads: int) -> None:
    library.dsa_set_threads(threads)
    seen: list[tuple[int, int, int]] = []
    job = JOB(lambda arg, thread, count: seen.append((thread, count, threading.get_ident())))
    for _ in range(50):
        library.dsa_parallel(job, None)
    assert sorted(pair[:2] for pair in seen) == [(i, threads) for i in range(threads) for _ in range(50)]
    assert len({ident for _, _, ident in seen}) == threads


def test_the_barrier_keeps_the_threads_together(library: ctypes.CDLL) -> None:
    library.dsa_set_threads(3)
    log: list[str] = []

    def run(arg: object, thread: int, count: int) -> None:
        for step in "abc":
            log.append(step)
            library.dsa_barrier()

    job = JOB(run)
    for _ in range(20):
        library.dsa_parallel(job, None)
    assert "".join(log) == "aaabbbccc" * 20


def test_fewer_threads_than_before(library: ctypes.CDLL) -> None:
    seen: list[int] = []
    job = JOB(lambda arg, thread, count: seen.append(count))
    for threads in (4, 2, 1, 3):
        library.dsa_set_threads(threads)
        seen.clear()
        library.dsa_parallel(job, None)
        assert seen == [threads] * threads
