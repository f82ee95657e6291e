"""Makes retrieval sequences: chats with facts hidden in real text, and questions for them at the end.

An indexer that is trained only on running text learns that the near past matters most. Here the answer depends on
a sentence far back, among others that look similar.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np

from lab.corpus.chatml import ChatML, ChatTurn
from lab.corpus.documents import Document, by_kind
from lab.corpus.facts import Fact, make_facts
from lab.corpus.lengths import OF_8K, Lengths
from lab.corpus.packing import Packed

_INTRODUCTIONS = (
    "I will paste a document. Afterwards I have some questions.",
    "Here is a text:",
    "Please keep what follows in mind:",
    "Document:",
    "Below are my notes, all mixed up.",
    "",
)
_REQUESTS = (
    "{q}",
    "Question: {q}",
    "{q} Answer from the document.",
    "Now tell me: {q}",
    "One more thing. {q}",
)
_DIRECT = "Answer this with the help of the text below: {q}"


class Haystack:
    """Lines of real text. Stretches of lines are drawn from it, in the text's order."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._groups = by_kind(document for document in documents if len(document.text) > 2000)
        if not self._groups:
            raise ValueError("retrieval sequences need at least one document of 2000 characters")

    def stretch(self, rng: random.Random, chars: int) -> tuple[list[str], set[str]]:
        """Draw lines of about so many characters, from one document or more; return them and the documents' sources."""
        lines: list[str] = []
        sources: set[str] = set()
        size = 0
        while size < chars:
            document = rng.choice(rng.choice(self._groups))
            offset = rng.randrange(max(1, len(document.text) - (chars - size)))
            offset = document.text.rfind("\n", 0, offset) + 1
            taken = document.text[offset : offset + chars - size]
            lines += taken.split("\n")
            sources.add(document.source)
            size += len(taken) + 1
        return lines, sources


def make_retrieval(
    documents: Sequence[Document], chat: ChatML, rng: random.Random, budget: int, *, lengths: Lengths = OF_8K
) -> Iterator[Packed]:
    """Make sequences with facts in haystacks, about `budget` tokens in all."""
    haystack = Haystack(documents)
    made = 0
    while made < budget:
        packed = _table(chat, rng, lengths) if rng.random() < 0.1 else _hidden(haystack, chat, rng, lengths)
        if packed is not None:
            made += len(packed.ids)
            yield packed


def _hidden(haystack: Haystack, chat: ChatML, rng: random.Random, lengths: Lengths) -> Packed | None:
    length = rng.choice(lengths.hidden)
    facts = make_facts(rng, rng.randrange(1, 9), families=rng.randrange(1, 4))
    asked = rng.sample(facts, rng.randrange(1, min(4, len(facts)) + 1))
    room = length - 40 * len(facts) - 40 * len(asked) - 60
    lines, sources = haystack.stretch(rng, round(room * rng.uniform(3.0, 3.6)))
    ids = _trim(chat, lines, room)
    for fact in facts:
        ids.insert(rng.randrange(len(ids) + 1), fact.statement)
    return _converse(chat, rng, "\n".join(ids), asked, sources, lengths.context)


def _trim(chat: ChatML, lines: list[str], room: int) -> list[str]:
    kept, used = [], 0
    for line in lines:
        used += len(chat.text(line)) + 1
        if used > room:
            break
        kept.append(line)
    return kept


def _table(chat: ChatML, rng: random.Random, lengths: Lengths) -> Packed | None:
    """Make a sequence without a haystack: a list of facts, where only the subject identifies the right line."""
    facts = make_facts(rng, rng.randrange(20, 200), families=10)
    bullet = rng.choice(("- ", "* ", "", "> "))
    text = "\n".join(bullet + fact.statement for fact in facts)
    return _converse(chat, rng, text, rng.sample(facts, rng.randrange(1, 6)), set(), lengths.context)


def _converse(
    chat: ChatML, rng: random.Random, text: str, asked: Sequence[Fact], sources: set[str], context: int
) -> Packed | None:
    introduction = rng.choice(_INTRODUCTIONS)
    first = asked[0]
    if rng.random() < 0.2:
        opening = f"{_DIRECT.format(q=first.question)}\n\n{text}"
    else:
        request = rng.choice(_REQUESTS).format(q=first.question)
        opening = f"{introduction}\n\n{text}\n\n{request}".strip()
    messages = [ChatTurn("user", opening), ChatTurn("assistant", first.answer)]
    for fact in asked[1:]:
        messages.append(ChatTurn("user", rng.choice(_REQUESTS).format(q=fact.question)))
        messages.append(ChatTurn("assistant", fact.answer))
    rendered = chat.render(messages)
    if len(rendered.ids) > context:
        return None
    ids = np.array(rendered.ids, np.uint32)
    return Packed(ids, "retrieval", tuple(sorted(sources)), tuple(rendered.answers))
