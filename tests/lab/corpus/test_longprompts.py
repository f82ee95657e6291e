"""Long prompts: five kinds, held-out text only, and no wording of the training text."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from lab.corpus import dialogues, prompts, retrieval
from lab.corpus.chatml import ChatML
from lab.corpus.documents import Document
from lab.corpus.lengths import OF_8K, OF_32K
from lab.corpus.longprompts import KINDS, SHORTEST, TEMPLATES, make_long_prompts


class Words:
    """An encoder with a token for each word, and control tokens."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, text: str, *, add_bos: bool = False, parse_special: bool = False) -> Sequence[int]:
        if parse_special:
            return [self.ids.setdefault(text, len(self.ids))]
        pieces = text.replace("\n", " \n ").split(" ")
        return [self.ids.setdefault(piece, len(self.ids)) for piece in pieces if piece]


def page(name: str, split: str, kind: str, parts: int) -> Document:
    rng = random.Random(name)
    words = [f"{split[0]}{i}" for i in range(100)]

    def body() -> str:
        return "\n".join(" ".join(rng.choices(words, k=12)) + "." for _ in range(40))

    text = "\n\n".join(f"# Part {name} {i}\n\n{body()}" for i in range(parts))
    return Document(name, f"{name}#0", kind, split, text)  # type: ignore[arg-type]


DOCUMENTS = [
    *(page(f"held {kind} {i}", "heldout", kind, 20) for kind in ("prose", "docs", "code") for i in range(2)),
    *(page(f"train {kind}", "train", kind, 20) for kind in ("prose", "docs", "code")),
]


def test_kinds_and_lengths_are_even_and_all_text_is_held_out() -> None:
    made = make_long_prompts(DOCUMENTS, ChatML(Words()), 0, 60)
    assert len(made) == 60
    kinds = Counter(prompt.kind for prompt in made)
    assert set(kinds) == set(KINDS)
    assert max(kinds.values()) <= 2 * min(kinds.values())
    tokens = [prompt.tokens for prompt in made]
    assert SHORTEST <= min(tokens) <= OF_8K.long_prompts[0]
    assert 0.9 * OF_8K.long_prompts[-1] <= max(tokens) <= OF_8K.long_prompts[-1]
    for prompt in made:
        assert prompt.source.startswith("held")
        assert not any(" t7 " in turn.content for turn in prompt.messages)
        assert prompt.messages[-1].role == "user"
    assert made == make_long_prompts(DOCUMENTS, ChatML(Words()), 0, 60)
    assert made != make_long_prompts(DOCUMENTS, ChatML(Words()), 1, 60)


def test_a_longer_context_has_longer_prompts() -> None:
    pages = [
        page(f"held {kind} {i}", "heldout", kind, 90) for kind in ("prose", "docs", "code") for i in range(2)
    ]
    made = make_long_prompts(pages, ChatML(Words()), 0, 20, lengths=OF_32K)
    assert {prompt.kind for prompt in made} == set(KINDS)
    for length in OF_32K.long_prompts:
        assert sum(0.9 * length <= prompt.tokens <= length for prompt in made) >= 3, length


def test_nothing_is_made_without_held_out_text() -> None:
    assert make_long_prompts([d for d in DOCUMENTS if d.split == "train"], ChatML(Words()), 0, 5) == []


def test_training_has_none_of_the_wordings() -> None:
    training = {
        *prompts._TEMPLATES["train"], *prompts._ABOUT_SECTION["train"], *prompts._ABOUT_TEXT["train"],
        *prompts._ABOUT_CODE["train"], *dialogues._PASTE, *dialogues._ABOUT, *retrieval._INTRODUCTIONS,
        *retrieval._REQUESTS, retrieval._DIRECT,
    }  # fmt: skip

    def stretches(text: str) -> set[tuple[str, ...]]:
        """Six words in a row, without the places for text."""
        words = [w.strip(".,:?!\"'`\n").lower() for w in text.split() if "{" not in w]
        return {tuple(words[i : i + 6]) for i in range(len(words) - 5)}

    known = set().union(*map(stretches, training))
    for template in TEMPLATES:
        assert template not in training
        assert not stretches(template) & known, template
