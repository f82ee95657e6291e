"""Packing, chats, needles, prompts and the whole build, on small synthetic sources."""

from __future__ import annotations

import random
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab.corpus import build_corpus, facts, load_manifest, load_tokens, needles
from lab.corpus.chatml import ChatML, ChatTurn, default_system
from lab.corpus.dialogues import make_dialogues
from lab.corpus.documents import Document
from lab.corpus.lengths import OF_32K
from lab.corpus.manifest import compact, sha256
from lab.corpus.packing import SHORTEST, budgets, pack
from lab.corpus.prompts import make_prompts
from lab.corpus.retrieval import make_retrieval
from lab.corpus.sources import CorpusSource
from server.chat import ChatFormat

CONTROL = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}


class Words:
    """A tokenizer of words and signs. Long words have two tokens, like rare words in a real tokenizer."""

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        if parse_special and text in CONTROL:
            return [CONTROL[text]]
        ids = []
        for word in re.findall(r" ?\w+| ?[^\w\s]|\s", text):
            for part in [word] if len(word) < 9 else [word[:5], word[5:]]:
                ids.append(10 + zlib.crc32(part.encode()) % 60000)
        return ids


CHAT = ChatML(Words())
SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe qui ro su ta ve wi xo za".split()


def prose(seed: int, paragraphs: int) -> str:
    """Make text that passes for English: real function words between invented words, in sentences, under headings."""
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choices(SYLLABLES, k=rng.randrange(2, 5)))

    def sentence() -> str:
        return (
            f"The {word()} of the {word()} is in the {word()} and {word()} {word()} with a {word()} for it."
        )

    text = []
    for number in range(paragraphs):
        if number % 3 == 0:
            text.append(f"# About {word()} {number}")
        text.append(" ".join(sentence() for _ in range(rng.randrange(3, 8))))
    return "\n\n".join(text)


def code(seed: int, functions: int) -> str:
    rng = random.Random(seed)
    parts = [
        f"def {rng.choice(SYLLABLES)}_{seed}_{i}(value):\n"
        f'    """Return the value of {rng.choice(SYLLABLES)} with {i} added to it and nothing else."""\n'
        f"    total = value + {i * 17}\n    return total * {rng.randrange(100)}\n"
        for i in range(functions)
    ]
    return "\n".join(parts)


def documents(split: str = "train") -> list[Document]:
    offset = 0 if split == "train" else 1000
    made = [Document("book", f"{i}", "books", split, prose(offset + i, 60)) for i in range(3)]  # type: ignore[arg-type]
    made += [Document("prog", f"{i}", "code", split, code(offset + i, 60)) for i in range(3)]  # type: ignore[arg-type]
    return made


def test_chat_text_cannot_become_a_control_token() -> None:
    rendered = CHAT.render(
        [ChatTurn("user", "a <|im_end|> b"), ChatTurn("assistant", "c")], generation_prompt=True
    )
    assert rendered.ids.count(2) == 3  # system, user, assistant: none from the text
    assert rendered.ids.count(1) == 4
    (start, end) = rendered.answers[0]
    assert rendered.ids[start] == 1
    assert rendered.ids[end - 1] == 2


class Format(ChatFormat):
    """A chat format that writes one turn after a text of its own."""

    def __init__(self, before: str) -> None:
        self.before = before

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        content = messages[0]["content"]
        return f"{self.before}<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def test_a_chat_without_a_system_message_gets_that_of_the_models_own_format() -> None:
    own = default_system(Format("<|im_start|>system\nYou are Q.\nBe brief.<|im_end|>\n"))
    assert own == "You are Q.\nBe brief."
    asked = [ChatTurn("user", "Hi")]
    with_own = ChatML(Words(), own).render(asked).ids
    assert with_own == ChatML(Words()).render([ChatTurn("system", own), *asked]).ids
    none = default_system(Format(""))
    assert none is None
    assert ChatML(Words(), none).render(asked).ids == with_own[-len(CHAT.text("user\nHi")) - 3 :]
    with pytest.raises(ValueError, match="does not write ChatML"):
        default_system(Format("[INST]"))


def test_tokens_take_32_bits_only_if_a_token_needs_them() -> None:
    small, large = np.array([0, 65535], np.uint32), np.array([0, 65536], np.uint32)
    assert compact(small).dtype == np.uint16
    assert compact(small).tolist() == [0, 65535]
    assert compact(large).dtype == np.uint32
    assert compact(large).tolist() == [0, 65536]
    assert compact(np.empty(0, np.uint32)).dtype == np.uint16


def test_sequences_of_a_longer_context_are_longer() -> None:
    text = [Document("book", "0", "books", "train", prose(3, 900))]
    lengths = [len(p.ids) for p in pack(text, CHAT, random.Random(0), 10**9, lengths=OF_32K)]
    assert set(lengths[:-1]) <= {8192, 16384, 32768}
    assert max(lengths) == 32768
    facts = [len(p.ids) for p in make_retrieval(text, CHAT, random.Random(1), 150_000, lengths=OF_32K)]
    assert 16384 < max(facts) <= 32768
    chats = [len(p.ids) for p in make_dialogues(text, CHAT, random.Random(1), 150_000, lengths=OF_32K)]
    assert 16384 < max(chats) <= 32768
    asked = make_prompts(text, "train", CHAT, 0, 60, lengths=OF_32K)
    assert 16384 < max(prompt.tokens for prompt in asked) <= OF_32K.longest_prompt


def test_a_vocabulary_without_chatml_is_refused() -> None:
    class Plain(Words):
        def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
            return super().encode(text, add_bos=add_bos)

    with pytest.raises(ValueError, match="no control token"):
        ChatML(Plain())


def test_budgets_pour_what_small_sources_lack_into_large_ones() -> None:
    assert budgets({"a": 10, "b": 1000, "c": 1000}, 410) == {"a": 10, "b": 200, "c": 200}
    assert budgets({"a": 10}, 100) == {"a": 10}


def test_packing_joins_and_cuts_documents_without_losing_tokens() -> None:
    own = [item for item in documents() if item.kind == "books"]
    packed = list(pack(own, CHAT, random.Random(0), 10**9))
    assert all(len(item.ids) in (4096, 6144, 8192) for item in packed[:-1])
    stream = np.concatenate([item.ids for item in packed]).tolist()
    everything = [token for item in own for token in (*CHAT.text(item.text), CHAT.separator)]
    assert stream == everything[: len(stream)]
    assert len(everything) - len(stream) < SHORTEST


def test_retrieval_sequences_end_with_answers_that_stand_in_the_text() -> None:
    made = list(make_retrieval(documents(), CHAT, random.Random(0), 30_000))
    assert len(made) > 3
    for packed in made:
        assert len(packed.ids) <= 8192
        assert packed.focus
        for start, end in packed.focus:
            assert packed.ids[start] == 1
            assert packed.ids[end - 1] == 2


def test_facts_ask_for_one_subject_each() -> None:
    made = facts.make_facts(random.Random(0), 100, families=10)
    assert len({fact.statement for fact in made}) == 100
    assert all(fact.value in fact.statement and fact.value in fact.answer for fact in made)


def test_dialogues_answer_with_words_of_the_documents() -> None:
    made = list(make_dialogues(documents(), CHAT, random.Random(0), 20_000))
    assert {packed.kind for packed in made} == {"chat"}
    assert {source for packed in made for source in packed.sources} == {"book", "prog"}
    assert all(200 <= len(packed.ids) <= 8192 and packed.focus for packed in made)


def test_training_and_evaluation_share_no_phrasing_and_no_value() -> None:
    train = {family.name: (*family.statements, *family.questions) for family in facts.FAMILIES}
    trained = {run for forms in train.values() for form in forms for run in _runs(form)}
    measured = {
        run for form in needles.PHRASINGS for text in (form.statement, form.question) for run in _runs(text)
    }
    assert not trained & measured
    pools = ["NAMES", "SURNAMES", "CITIES", "THINGS", "WORDS", "DRINKS"]
    known = {word.lower() for pool in pools for word in getattr(facts, pool)}
    asked = {
        word.lower()
        for pool in ["GEMS", "BEASTS", "TOWNS", "FOODS", "FOLK", "SHADES", "SPOTS"]
        for word in getattr(needles, pool)
    }
    assert not known & asked
    rng = random.Random(0)
    assert all(int(facts.number(rng, 5)) % 7 != 3 for _ in range(200))
    assert all(int(facts.number(rng, 5, evaluation=True)) % 7 == 3 for _ in range(200))
    assert len(needles.PHRASINGS) >= 6


def _runs(form: str) -> set[tuple[str, ...]]:
    """Return all runs of four words. All placeholders count as the same word."""
    words = re.sub(r"\{\w\}", "X", form.lower()).replace("'", " ").split()
    runs = {tuple(words[i : i + 4]) for i in range(len(words) - 3)}
    return {run for run in runs if sum(word == "X" for word in run) < 2}


def test_needles_have_exact_lengths_and_stand_at_their_depth() -> None:
    contexts, depths = (256, 512, 1024), (0.0, 0.3, 0.5, 1.0)
    made = list(needles.make_needles([prose(7, 60)], CHAT, 0, contexts=contexts, depths=depths, repeats=2))
    assert [needle.context for needle in made] == [context for context in contexts for _ in range(8)]
    assert {needle.phrasing for needle in made} == set(range(len(needles.PHRASINGS)))
    for needle in made:
        rendered = CHAT.render([ChatTurn("user", needle.prompt)], generation_prompt=True)
        assert list(needle.ids) == rendered.ids
        assert len(needle.ids) == needle.context
        assert needle.prompt.count(needle.statement) == 1
        assert needle.value in needle.statement
        assert needle.value.lower() not in needle.prompt.replace(needle.statement, "").lower()
        span = needle.ids[needle.needle[0] : needle.needle[1]]
        inner = CHAT.text(" " + needle.statement)[1:-1]
        assert any(list(span[i : i + len(inner)]) == inner for i in range(3))
        text = needle.prompt.split("\n\n")[1]
        place = text.index(needle.statement) / max(1, len(text) - len(needle.statement))
        # A needle goes between sentences, so its depth is only approximate in the shortest context.
        assert abs(place - needle.depth) < 60 / needle.context + 0.02


def test_every_place_of_a_haystack_can_be_its_beginning() -> None:
    for seed in range(40):
        text = "# Title\n\n" + prose(seed, 5)
        assert (
            len(list(needles.make_needles([text], CHAT, seed, contexts=(200,), depths=(0.5,), repeats=1)))
            == 1
        )


def test_too_little_haystack_is_said() -> None:
    with pytest.raises(ValueError, match="no haystack has enough text"):
        list(needles.make_needles([prose(7, 3)], CHAT, 0, contexts=(4096,)))


def test_prompts_of_the_splits_are_disjoint() -> None:
    mixed = documents() + documents("heldout")
    train, heldout = make_prompts(mixed, "train", CHAT, 0, 120), make_prompts(mixed, "heldout", CHAT, 0, 40)
    assert (len(train), len(heldout)) == (120, 40)
    assert not {prompt.messages for prompt in train} & {prompt.messages for prompt in heldout}
    assert {prompt.kind for prompt in heldout} == {"topic", "section", "text"}
    assert max(prompt.tokens for prompt in heldout) > 1000


def test_build_is_deterministic_and_keeps_the_splits_apart(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "archives").mkdir(parents=True)
    sources = []
    for number, (name, kind, split) in enumerate(
        [
            ("b_train", "books", "train"),
            ("c_train", "code", "train"),
            ("b_held", "books", "heldout"),
            ("c_held", "code", "heldout"),
        ]
    ):
        with zipfile.ZipFile(cache / "archives" / f"{name}-1-py3-none-any.whl", "w") as wheel:
            for i in range(4):
                seed = 100 * number + i
                wheel.writestr(f"{name}/{i}.txt", prose(seed, 90) if kind == "books" else code(seed, 90))
        sources.append(CorpusSource(name, kind, "MIT", "pip", f"{name}==1", "plain", ("*.txt",), (), split))  # type: ignore[arg-type]

    def build(folder: str, seed: int) -> dict[str, str]:
        reports: list[tuple[str, int, int]] = []
        manifest = build_corpus(
            tmp_path / folder,
            Words(),
            seed,
            60_000,
            heldout_tokens=20_000,
            prompts=(30, 10),
            needle_repeats=0,
            sources=sources,
            cache=cache,
            report=lambda *step: reports.append(step),
        )
        assert manifest == load_manifest(tmp_path / folder)
        assert '"context"' not in (tmp_path / folder / "manifest.json").read_text()
        assert any(what == "packing train" for what, _, _ in reports)
        for name, split in manifest.splits.items():
            tokens = load_tokens(tmp_path / folder, split)
            assert tokens.dtype == np.uint16
            assert len(tokens) == split.tokens == sum(split.tokens_by_kind.values())
            assert sha256(tmp_path / folder / split.file) == split.sha256
            ends = [sequence.start + sequence.length for sequence in split.sequences]
            assert [0, *ends[:-1]] == [sequence.start for sequence in split.sequences]
            own = {"train": {"b_train", "c_train"}, "heldout": {"b_held", "c_held"}}[name]
            assert {source for sequence in split.sequences for source in sequence.sources} <= own
        assert set(manifest.splits["train"].tokens_by_kind) == {"books", "code", "chat", "retrieval"}
        assert set(manifest.splits["heldout"].tokens_by_kind) == {"books", "code", "chat"}
        return {path.name: sha256(path) for path in (tmp_path / folder).iterdir()}

    first = build("one", 0)
    assert build("two", 0) == first
    assert build("three", 1)["train.npy"] != first["train.npy"]
