"""`dsa eval` from end to end: a small corpus of this Python's own library, a real server, the real model and indexer."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from lab.corpus.chatml import ChatML
from lab.corpus.manifest import FILE_NAME, LONG_PROMPTS, Manifest, SequenceInfo, SplitInfo, sha256
from lab.corpus.needles import make_needles
from lab.evaluate.__main__ import app
from server.text.tokenizer import Tokenizer
from tests.e2e.serving import Server

PROSE = " ".join(
    f"On day {n} of the voyage the crew counted {7 * n % 90} birds and wrote it down." for n in range(300)
)


def corpus(folder: Path, tokenizer: Tokenizer) -> Path:
    """One held-out text of 2300 tokens, two needles of 600 and two prompts."""
    folder.mkdir()
    chat = ChatML(tokenizer)
    ids = np.array(chat.text(inspect.getsource(argparse))[:2300], np.uint16)
    np.save(folder / "heldout.npy", ids)
    text = SequenceInfo(
        start=0, length=len(ids), kind="code", sources=("argparse",), licences=("PSF-2.0",), focus=()
    )
    split = SplitInfo(
        file="heldout.npy", sha256=sha256(folder / "heldout.npy"), tokens=len(ids),
        tokens_by_kind={"code": len(ids)}, sequences=(text,),
    )  # fmt: skip
    rows, start = [], 0
    needles = list(make_needles([PROSE], chat, 0, contexts=(600,), depths=(0.2, 0.9), repeats=1))
    for needle in needles:
        names = ("context", "depth", "phrasing", "statement", "question", "value", "needle")
        rows.append(
            {"start": start, "length": len(needle.ids)} | {name: getattr(needle, name) for name in names}
        )
        start += len(needle.ids)
    np.save(folder / "needles.npy", np.concatenate([np.array(needle.ids, np.uint16) for needle in needles]))
    (folder / "needles.json").write_bytes(msgspec.json.encode(rows))
    prompts = [
        {"kind": "code", "source": "here", "tokens": 500, "messages": [{"role": "user", "content": content}]}
        for content in (inspect.getsource(json)[:2000], inspect.getsource(inspect)[:2500])
    ]
    (folder / LONG_PROMPTS).write_bytes(msgspec.json.encode(prompts))
    manifest = Manifest(
        version=1, seed=0, target_tokens=0, separator=chat.separator, removed={}, sources=(),
        splits={"heldout": split},
        files={name: sha256(folder / name) for name in ("needles.npy", "needles.json", LONG_PROMPTS)},
    )  # fmt: skip
    (folder / FILE_NAME).write_bytes(msgspec.json.encode(manifest))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_whole_evaluation(server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["smollm2-135m-instruct", "--corpus", str(corpus(tmp_path / "corpus", tokenizer))]
    result = CliRunner().invoke(
        app,
        [
            *command,
            "--url",
            server.url,
            "--limit",
            "2",
            "--top-k",
            "256,400",
            "--answer-top-k",
            "256",
            "--out",
            str(out),
        ],
    )
    assert result.exit_code == 0, result.output
    found = json.loads((out / "eval.json").read_text())
    rows = found["loss"]["rows"]
    assert 0.5 < rows["dense"]["code"]["loss"] < 4
    assert abs(rows["256"]["code"]["above_dense"]) < 0.3
    assert rows["256"]["code"]["above_dense"] != 0  # the two runs used different settings
    assert [needle["context"] for needle in found["needles"]["needles"]] == [600, 600]
    assert all("dense" in needle["answers"] for needle in found["needles"]["needles"])
    assert len(found["faithful"]["prompts"]) == 2
    assert 0.5 < found["faithful"]["rows"]["256"]["all"]["agreement"] <= 1
    assert found["faithful"]["rows"]["dense"]["all"]["agreement"] > 0.95
    assert all(v["outcome"] == "met" for v in found["verdicts"] if "short" in v["what"].lower())
    recall = found["recall"]["top_k"]["256"]
    assert 0 < recall["window"]["all"] < recall["indexer"]["all"] <= recall["oracle"]["all"] <= 1
    for name in ("loss", "needles", "recall"):
        assert (out / f"eval.{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "dense" in result.output
