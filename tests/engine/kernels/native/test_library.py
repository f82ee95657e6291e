"""The native library: built with the package, opened where it fits, and its pool of threads."""

from __future__ import annotations

import ctypes
import platform
import sys
import time
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
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
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
def test_a_job_runs_once_on_each_thread_that_came_in_time(library: ctypes.CDLL, threads: int) -> None:
    library.dsa_set_threads(threads)
    seen: list[tuple[int, int]] = []
    job = JOB(lambda arg, thread, count: seen.append((thread, count)))
    for _ in range(300):
        seen.clear()
        library.dsa_parallel(job, None)
        count = len(seen)
        assert 1 <= count <= threads
        assert sorted(seen) == [(thread, count) for thread in range(count)]


def test_all_threads_come_some_time(library: ctypes.CDLL) -> None:
    library.dsa_set_threads(2)
    counts: list[int] = []
    job = JOB(lambda arg, thread, count: counts.append(count))
    for _ in range(5000):
        library.dsa_parallel(job, None)
        if 2 in counts:
            return
        time.sleep(0.001)
    pytest.fail("the worker never came")


def test_the_barrier_keeps_the_threads_together(library: ctypes.CDLL) -> None:
    library.dsa_set_threads(3)
    log: list[str] = []

    def run(arg: object, thread: int, count: int) -> None:
        for step in "abc":
            log.append(step)
            library.dsa_barrier()

    job = JOB(run)
    for _ in range(100):
        log.clear()
        library.dsa_parallel(job, None)
        each = len(log) // 3
        assert "".join(log) == "a" * each + "b" * each + "c" * each
