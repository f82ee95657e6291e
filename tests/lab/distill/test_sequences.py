"""The trainer's data: the rows that are drawn, the order of sequences, and folders that are not a corpus."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from lab.corpus.manifest import SequenceInfo
from lab.distill.sequences import CorpusSplit, sample_rows
from tests.engine.kit import VOCAB
from tests.lab.distill.kit import CPU, write_corpus


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_rows_are_sorted_distinct_and_favour_the_focus(data: st.DataObject) -> None:
    first = data.draw(st.integers(0, 40))
    length = data.draw(st.integers(first + 1, 200))
    count = data.draw(st.integers(1, 120))
    spans = data.draw(
        st.lists(st.tuples(st.integers(0, 220), st.integers(1, 30)).map(lambda s: (s[0], s[0] + s[1])), max_size=4)
    )  # fmt: skip
    seed = data.draw(st.integers(0, 1000))
    sequence = SequenceInfo(start=0, length=220, kind="chat", focus=tuple(spans))

    def draw() -> list[int]:
        return sample_rows(sequence, length, count, first, torch.Generator().manual_seed(seed)).tolist()

    rows = draw()
    assert rows == draw()
    assert rows == sorted(set(rows))
    assert all(first <= row < length for row in rows)
    assert len(rows) <= count
    focused = {p for start, end in spans for p in range(start - 1, end) if first <= p < length}
    assert len(focused & set(rows)) >= min(len(focused), count // 4)
    if not focused:
        assert len(rows) == min(count, length - first)


def test_most_rows_come_from_anywhere_though_the_focus_is_large() -> None:
    sequence = SequenceInfo(start=0, length=4000, kind="chat", focus=((2000, 4000),))
    rows = sample_rows(sequence, 4000, 400, 0, torch.Generator().manual_seed(0))
    assert int((rows < 1999).sum()) in range(110, 190)  # half of the 300 that are drawn from anywhere


@pytest.mark.parametrize("seed", range(5))
def test_the_row_that_predicts_a_spans_first_token_belongs_to_it(seed: int) -> None:
    sequence = SequenceInfo(start=0, length=4000, kind="chat", focus=((2000, 2001),))
    rows = sample_rows(sequence, 4000, 8, 64, torch.Generator().manual_seed(seed)).tolist()
    assert {1999, 2000} <= set(rows)


def test_tokens_are_those_of_the_file(tmp_path: Path) -> None:
    split = CorpusSplit.open(write_corpus(tmp_path, train=(30, 50)), "train", VOCAB)
    stored = np.load(tmp_path / "train.npy")
    assert split.tokens(split.sequences[1], 999, CPU).tolist() == stored[30:80].tolist()
    assert split.tokens(split.sequences[1], 20, CPU).tolist() == stored[30:50].tolist()
    assert split.sequences[1].focus == ((25, 34),)


def test_every_pass_has_each_long_sequence_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    lengths = (*range(40, 60), 10, 12)
    split = CorpusSplit.open(write_corpus(tmp_path, train=lengths), "train", VOCAB)
    drawn = [s.length for s in islice(split.shuffled(0, 40), 60)]
    passes = [drawn[:20], drawn[20:40], drawn[40:]]
    assert [sorted(p) for p in passes] == [list(range(40, 60))] * 3
    assert len({tuple(p) for p in passes}) == 3
    assert drawn == [s.length for s in islice(split.shuffled(0, 40), 60)]
    assert drawn != [s.length for s in islice(split.shuffled(1, 40), 60)]
    with pytest.raises(ConfigError, match="no sequence of the corpus has 61 tokens; lower the recipe's min"):
        next(split.shuffled(0, 61))


def test_what_is_too_long_can_be_left_out_instead_of_cut(tmp_path: Path) -> None:
    split = CorpusSplit.open(write_corpus(tmp_path, train=tuple(range(40, 60))), "train", VOCAB)
    assert {s.length for s in islice(split.shuffled(0, 45, most=50), 30)} == set(range(45, 51))
    with pytest.raises(ConfigError, match="no sequence of the corpus has 45 to 44 tokens"):
        next(split.shuffled(0, 45, most=44))


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def no_tokens(folder: Path) -> None:
    (folder / "train.npy").unlink()


def cut_tokens(folder: Path) -> None:
    (folder / "train.npy").write_bytes((folder / "train.npy").read_bytes()[:500])


def empty_tokens(folder: Path) -> None:
    (folder / "train.npy").write_bytes(b"")


def short_tokens(folder: Path) -> None:
    np.save(folder / "train.npy", np.load(folder / "train.npy")[:-1])


def wide_tokens(folder: Path) -> None:
    np.save(folder / "train.npy", np.load(folder / "train.npy").astype(np.int64))


def a_list(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def half_json(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"splits"')


def other_split(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["splits"]["train"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def negative_start(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["sequences"][0][0] = -5
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (no_manifest, "holds no corpus with a 'train' split"),
        (no_tokens, "holds no corpus with a 'train' split"),
        (cut_tokens, "holds no corpus with a 'train' split"),
        (empty_tokens, "holds no corpus with a 'train' split"),
        (a_list, "holds no corpus with a 'train' split"),
        (half_json, "holds no corpus with a 'train' split"),
        (other_split, "holds no corpus with a 'train' split"),
        (negative_start, "holds no corpus with a 'train' split"),
        (short_tokens, "train.npy is shorter than its manifest says"),
        (wide_tokens, "train.npy is not a file of tokens"),
    ],
)
def test_a_folder_that_is_no_corpus_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    folder = write_corpus(tmp_path, train=(300, 200))
    CorpusSplit.open(folder, "train", VOCAB)
    damage(folder)
    with pytest.raises(ConfigError, match=sentence) as caught:
        CorpusSplit.open(folder, "train", VOCAB)
    assert f"dsa corpus --out {folder} --model MODEL" in str(caught.value)


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model knows 90 tokens: it was built with another model's"):
        CorpusSplit.open(write_corpus(tmp_path), "train", 90)
