"""Makes chats from documents: pasted texts with questions, explained sections, shown functions.

Answers are always words of the document itself. `lab.corpus.answers` adds answers in the model's own words.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lab.corpus.chatml import ChatML, ChatTurn
from lab.corpus.documents import Document, Section, by_kind, sections
from lab.corpus.lengths import OF_8K, Lengths
from lab.corpus.packing import Packed

_PASTE = (
    "Here is a document. Please read it, I will ask about it.\n\n{d}\n\n{q}",
    "{d}\n\n{q}",
    "I am reading this:\n\n{d}\n\n{q}",
    "Use only the following text.\n\n{d}\n\nQuestion: {q}",
    '{q}\n\n"""\n{d}\n"""',
)
_ABOUT = (
    "What should I know about {t}?",
    "Explain: {t}",
    "{t}?",
    "Tell me about {t}.",
    "Can you describe {t}?",
    'I read "{t}" somewhere. What is it about?',
)
_DEFINITION = re.compile(
    r"^(?P<indent>[ \t]*)(?:async def|def|func|fn|pub fn|class|proc|\(defun)\s+(?P<name>[A-Za-z_][\w:-]*)[^\n]*",
    re.M,
)
_SENTENCE = re.compile(r"[A-Z][^.!?\n]{50,300}[.!?](?=\s)")

Exchange = tuple[str, str]  # a question and its answer


def make_dialogues(
    documents: Sequence[Document], chat: ChatML, rng: random.Random, budget: int, *, lengths: Lengths = OF_8K
) -> Iterator[Packed]:
    """Make chats of about `budget` tokens in all: two thirds with a pasted document, one third without."""
    makers = _makers(documents, lengths)
    made = fruitless = 0
    while made < budget and fruitless < 1000 and makers:
        packed = rng.choices(*makers)[0](chat, rng)
        if packed is None:
            fruitless += 1
            continue
        fruitless = 0
        made += len(packed.ids)
        yield packed


Maker = Callable[[ChatML, random.Random], Packed | None]


def _makers(documents: Sequence[Document], lengths: Lengths) -> tuple[list[Maker], list[float]]:
    by_source: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        by_source[document.source].append(document)
    long_ones = by_kind(document for document in documents if len(document.text) > 3000)
    titled: dict[str, list[Section]] = {}
    functions: dict[str, list[Exchange]] = {}
    for source, group in sorted(by_source.items()):
        if group[0].kind == "code":
            found = [pair for document in group for pair in _functions(document.text)]
            functions |= {source: found} if len(found) >= 5 else {}
        else:
            parts = [part for document in group for part in sections(document.text) if len(part.body) > 80]
            titled |= {source: parts} if len(parts) >= 5 else {}
    makers: list[Maker] = []
    weights: list[float] = []
    if long_ones:
        makers.append(lambda chat, rng: _pasted(rng.choice(rng.choice(long_ones)), chat, rng, lengths))
        weights.append(0.65)
    if titled:
        makers.append(lambda chat, rng: _explained(titled, chat, rng, lengths))
        weights.append(0.2)
    if functions:
        makers.append(lambda chat, rng: _shown(functions, chat, rng, lengths))
        weights.append(0.15)
    return makers, weights


def _pasted(document: Document, chat: ChatML, rng: random.Random, lengths: Lengths) -> Packed | None:
    chars = round(rng.choice(lengths.pasted) * 3.2)
    offset = rng.randrange(max(1, len(document.text) - chars))
    offset = document.text.rfind("\n\n", 0, offset) + 1
    text = document.text[offset : offset + chars].strip()
    exchanges = _exchanges(text, document.kind, rng)
    if not exchanges:
        return None
    question, answer = exchanges[0]
    messages = [
        ChatTurn("user", rng.choice(_PASTE).format(d=text, q=question)),
        ChatTurn("assistant", answer),
    ]
    for question, answer in exchanges[1:]:
        messages += [ChatTurn("user", question), ChatTurn("assistant", answer)]
    return _pack(chat, messages, (document.source,), lengths.context)


def _exchanges(text: str, kind: str, rng: random.Random) -> list[Exchange]:
    """Make at most six questions about a text, with answers from the text, in random order."""
    found: list[Exchange] = []
    parts = sections(text)[:-1]  # the last section may be cut
    for part, following in itertools.pairwise(parts):
        found.append((f'Which section comes right after "{part.title}"?', f'"{following.title}"'))
    found += [(f'How does the section "{part.title}" begin?', _opening(part.body)) for part in parts]
    if kind == "code":
        for name, body in _functions(text):
            found.append((f"Show me the definition of {name}.", body))
            found.append((f"What is the first line of {name}?", body.split("\n")[0].strip()))
    else:
        sentences = _SENTENCE.findall(text)
        for sentence in rng.sample(sentences, min(4, len(sentences))):
            words = sentence.split()
            cut = rng.randrange(4, max(5, len(words) // 2))
            found.append(
                (f'How does this sentence go on: "{" ".join(words[:cut])} ..."?', " ".join(words[cut:]))
            )
            rare = [word for word in words if len(word) > 6 and word.isalpha() and text.count(word) == 1]
            if rare:
                found.append((f'Quote the sentence with the word "{rng.choice(rare)}".', sentence))
    rng.shuffle(found)
    return found[: rng.randrange(1, 7)]


def _opening(body: str) -> str:
    sentence = re.match(r".{20,400}?[.!?:](?=\s|$)", body, re.S)
    return sentence[0].strip() if sentence else body.split("\n\n")[0][:400].strip()


def _explained(
    titled: dict[str, list[Section]], chat: ChatML, rng: random.Random, lengths: Lengths
) -> Packed | None:
    """Make a long chat about one package, which asks for neighbouring sections by title."""
    source = rng.choice(sorted(titled))
    parts = titled[source]
    begin, limit = rng.randrange(len(parts)), rng.choice(lengths.explained) * 3
    messages: list[ChatTurn] = []
    size = 0
    for part in parts[begin:]:
        question = part.title if part.title.endswith("?") else rng.choice(_ABOUT).format(t=part.title)
        answer = part.body[:2500].rsplit("\n\n", 1)[0] if len(part.body) > 2500 else part.body
        size += len(question) + len(answer)
        if messages and size > limit:
            break
        messages += [ChatTurn("user", question), ChatTurn("assistant", answer)]
    return _pack(chat, messages, (source,), lengths.context)


def _shown(
    functions: dict[str, list[Exchange]], chat: ChatML, rng: random.Random, lengths: Lengths
) -> Packed | None:
    """Make a chat about code: it shows definitions one after another, then asks for an earlier one again."""
    source = rng.choice(sorted(functions))
    found = functions[source]
    begin, count = rng.randrange(len(found)), rng.randrange(4, 25)
    messages: list[ChatTurn] = []
    chosen = found[begin : begin + count]
    for name, body in chosen:
        question = rng.choice(("Show me {n}.", "What does {n} look like?", "How is `{n}` implemented?"))
        messages += [ChatTurn("user", question.format(n=name)), ChatTurn("assistant", f"```\n{body}\n```")]
    name, body = rng.choice(chosen)
    if sum(other == name for other, _ in chosen) == 1:
        messages += [ChatTurn("user", f"Show me {name} again."), ChatTurn("assistant", f"```\n{body}\n```")]
    return _pack(chat, messages, (source,), lengths.context)


def _functions(text: str) -> list[Exchange]:
    """Find the names and bodies (up to 40 lines) of the definitions in a source text."""
    found = []
    for match in _DEFINITION.finditer(text):
        lines = text[match.start() : match.start() + 4000].split("\n")
        indent = len(match["indent"])
        body = lines[:1]
        for line in lines[1:40]:
            stripped = line.strip()
            if (
                stripped
                and len(line) - len(line.lstrip()) <= indent
                and not stripped.startswith((")", "}", "{"))
            ):
                break
            body.append(line)
            if stripped.startswith("}") and len(line) - len(line.lstrip()) == indent:
                break
        shown = "\n".join(line[indent:] for line in body).strip()
        if len(body) >= 3 and len(shown) > 60:
            found.append((match["name"], shown))
    return found


def _pack(
    chat: ChatML, messages: Sequence[ChatTurn], sources: tuple[str, ...], context: int
) -> Packed | None:
    rendered = chat.render(messages)
    while len(rendered.ids) > context and len(messages) > 2:
        messages = messages[:-2]
        rendered = chat.render(messages)
    if len(rendered.ids) > context or len(rendered.ids) < 200:
        return None
    return Packed(np.array(rendered.ids, np.uint32), "chat", sources, tuple(rendered.answers))
