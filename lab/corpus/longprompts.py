"""Makes the long prompts that faithfulness is measured on: five kinds, in several lengths.

All text is held-out text, and no training text has these wordings. Sparse attention differs from dense attention only
where a context is longer than what it selects, so a short prompt would prove nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from lab.corpus.chatml import ChatML, ChatTurn
from lab.corpus.documents import Document, Section, sections
from lab.corpus.lengths import OF_8K, Lengths
from lab.corpus.manifest import CorpusPrompt

KINDS = ("summary", "question", "code", "talk", "excerpts")
SHORTEST = 600
_CHARS = 5.0  # characters a token at most: so much text is enough to cut from

_SUMMARY = (
    "What follows is a longer text. Tell me in a paragraph or two what it is about.\n\n{d}",
    "{d}\n\nYou have now read the whole passage. Sum up its argument for a colleague who has no time to read it.",
    "Condense the passage below to its essentials, and say what follows from them.\n\n{d}",
    "{d}\n\nWhat is this passage for, who would need it, and what are its three weightiest points?",
)
_QUESTION = (
    'The passage has a part called "{t}". Explain what that part says, in your own words.\n\n{d}',
    '{d}\n\nMy question about the passage: what does its part "{t}" tell the reader to do, and for what reason?',
    '{d}\n\nI did not understand the part "{t}". Please put it differently and give one instance of it.',
)
_CODE = (
    "I inherited this file. Describe its purpose and how its parts work together.\n\n```\n{d}\n```",
    "```\n{d}\n```\n\nPick the function above that is hardest to understand and explain how it works.",
    "```\n{d}\n```\n\nWrite a test for one of the functions in this file, and say what it checks.",
)
_TALK_SYSTEM = "You answer from the pages of a handbook, patiently and in full sentences."
_TALK_ASK = ("Next, please read me the page on {t}.", "And the page on {t}, how does it go?")
_TALK_END = (
    "Thank you. Which of the pages that you read me should somebody new start with, and what would they learn there?",
    'Thank you. Let us return to "{t}": what did that page say, put simply?',
    "Thank you. Connect two of the pages that you read me: what have they in common?",
)
_EXCERPTS = (
    "Some excerpts, from different places:\n\n{d}\n\nSay of every excerpt, in one sentence each, what it deals with.",
    "{d}\n\nThese excerpts were put together by hand. Explain what excerpt number {n} is about and why it matters.",
    "{d}\n\nWhich of the excerpts would help somebody who must decide what to do today? Argue for your choice.",
)

TEMPLATES = (*_SUMMARY, *_QUESTION, *_CODE, _TALK_SYSTEM, *_TALK_ASK, *_TALK_END, *_EXCERPTS)
"""All wordings, for the test that training has none of them."""


def make_long_prompts(
    documents: Sequence[Document], chat: ChatML, seed: int, count: int, *, lengths: Lengths = OF_8K
) -> list[CorpusPrompt]:
    """Make up to `count` different prompts, the kinds and lengths in turn.

    A kind for which there is no text is left out.

    Args:
        documents: of any split; only held-out ones are used
        chat: renders and counts tokens
        seed: decides all choices
        count: prompts wanted
        lengths: `long_prompts` are those of the prompts
    """
    own = [document for document in documents if document.split == "heldout"]
    makers = {
        kind: maker for kind, maker in _makers(own).items() if maker is not None
    }  # in the order of `KINDS`
    made: dict[str, CorpusPrompt] = {}
    kinds = list(makers)
    for turn in range(8 * count if kinds else 0):
        if len(made) == count:
            break
        kind = kinds[turn % len(kinds)]
        length = lengths.long_prompts[turn // len(kinds) % len(lengths.long_prompts)]
        rng = random.Random(f"{seed}:long prompt:{turn}")
        prompt = _fitted(makers[kind], kind, length, chat, rng)
        if prompt is not None:
            made.setdefault(prompt.messages[-1].content + str(prompt.tokens), prompt)
    return list(made.values())


_Made = tuple[str, list[ChatTurn]]  # the source, and the conversation
_Maker = Callable[[random.Random, int], _Made]  # of about so many characters of text


def _fitted(maker: _Maker, kind: str, length: int, chat: ChatML, rng: random.Random) -> CorpusPrompt | None:
    """Make one prompt of at most `length` tokens: the same draws, with less text until it fits."""
    state, chars = rng.getstate(), round(length * _CHARS)
    for _ in range(12):
        rng.setstate(state)
        source, messages = maker(rng, chars)
        tokens = len(chat.render(messages, generation_prompt=True).ids)
        if tokens <= length:
            if tokens < SHORTEST:
                return None
            return CorpusPrompt(kind=kind, source=source, tokens=tokens, messages=tuple(messages))
        chars = round(chars * min(0.97, (length - 20) / tokens))
    return None


def _makers(documents: Sequence[Document]) -> dict[str, _Maker | None]:
    prose = [d for d in documents if d.kind != "code"]
    titled = [(d, parts) for d in prose if (parts := _titled(d))]
    code = [d for d in documents if d.kind == "code"]
    talks = _by_source(titled)
    return {
        "summary": _summary(prose) if prose else None,
        "question": _question(titled) if titled else None,
        "code": _code(code) if code else None,
        "talk": _talk(talks) if talks else None,
        "excerpts": _excerpts(prose) if prose else None,
    }


def _titled(document: Document) -> list[Section]:
    return [part for part in sections(document.text) if len(part.body) > 300 and len(part.title) <= 60]


def _by_source(titled: Sequence[tuple[Document, list[Section]]]) -> dict[str, list[Section]]:
    found: dict[str, list[Section]] = {}
    for document, parts in titled:
        found.setdefault(document.source, []).extend(parts)
    return {source: parts for source, parts in found.items() if len(parts) >= 8}


def _stretch(text: str, rng: random.Random, chars: int) -> str:
    """Cut whole lines of about so many characters."""
    place = rng.random()
    offset = round(place * max(0, len(text) - chars))
    offset = text.rfind("\n", 0, offset) + 1
    end = text.rfind("\n", offset + chars // 2, offset + chars)
    return text[offset : end if end > 0 else offset + chars].strip("\n")


def _longest(documents: Sequence[Document], rng: random.Random, chars: int) -> Document:
    """Draw a source, then a document of it that has enough text, if it has one."""
    source = rng.choice(sorted({document.source for document in documents}))
    own = [document for document in documents if document.source == source]
    enough = [document for document in own if len(document.text) >= chars]
    return rng.choice(enough) if enough else max(own, key=lambda document: len(document.text))


def _summary(documents: Sequence[Document]) -> _Maker:
    def make(rng: random.Random, chars: int) -> _Made:
        form, document = rng.choice(_SUMMARY), _longest(documents, rng, chars)
        return document.source, [ChatTurn("user", form.format(d=_stretch(document.text, rng, chars)))]

    return make


def _question(titled: Sequence[tuple[Document, list[Section]]]) -> _Maker:
    def make(rng: random.Random, chars: int) -> _Made:
        form = rng.choice(_QUESTION)
        document, parts = rng.choice(titled)
        part = rng.choice(parts)
        # The part stands somewhere among neighbours of its source.
        around = [p for d, own in titled if d.source == document.source for p in own if p is not part]
        rng.shuffle(around)
        kept, size = [part], len(part.body)
        for other in around:
            if size >= chars:
                break
            kept.append(other)
            size += len(other.body)
        rng.shuffle(kept)
        room = max(300, chars // len(kept))
        text = "\n\n".join(f"# {p.title}\n\n{p.body[:room]}" for p in kept)
        return document.source, [ChatTurn("user", form.format(t=part.title, d=text))]

    return make


def _code(documents: Sequence[Document]) -> _Maker:
    def make(rng: random.Random, chars: int) -> _Made:
        form, document = rng.choice(_CODE), _longest(documents, rng, chars)
        return document.source, [ChatTurn("user", form.format(d=_stretch(document.text, rng, chars)))]

    return make


def _talk(by_source: dict[str, list[Section]]) -> _Maker:
    def make(rng: random.Random, chars: int) -> _Made:
        source = rng.choice(sorted(by_source))
        parts, end = list(by_source[source]), rng.choice(_TALK_END)
        rng.shuffle(parts)
        messages, size = [ChatTurn("system", _TALK_SYSTEM)], 0
        for part in parts:
            body = part.body[: max(300, min(2500, chars - size))]
            messages += [
                ChatTurn("user", rng.choice(_TALK_ASK).format(t=part.title)),
                ChatTurn("assistant", body),
            ]
            size += len(body) + 60
            if size >= chars:
                break
        return source, [*messages, ChatTurn("user", end.format(t=parts[0].title))]

    return make


def _excerpts(documents: Sequence[Document]) -> _Maker:
    def make(rng: random.Random, chars: int) -> _Made:
        form, many = rng.choice(_EXCERPTS), rng.randrange(3, 7)
        chosen = [_longest(documents, rng, chars // many) for _ in range(many)]
        cut = [_stretch(document.text, rng, chars // many) for document in chosen]
        text = "\n\n".join(f"Excerpt {n}:\n{piece}" for n, piece in enumerate(cut, 1))
        return chosen[0].source, [ChatTurn("user", form.format(d=text, n=rng.randrange(1, many + 1)))]

    return make
