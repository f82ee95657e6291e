"""Makes needles in haystacks: chat prompts of exact token lengths, over a grid of depth and context.

Training text (`lab.corpus.facts`) has none of the phrasings and values here, and the haystacks are held-out text.
`lab.evaluate.needles` asks a server for the needles.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lab.corpus.chatml import ChatML, ChatTurn
from lab.corpus.facts import number
from lab.corpus.lengths import OF_8K

DEPTHS = tuple(step / 10 for step in range(11))

GEMS = "sapphire emerald ruby diamond pearl turquoise amethyst moonstone jade peridot".split()
BEASTS = (
    "penguin giraffe walrus leopard hedgehog kangaroo octopus dolphin squirrel tortoise camel panda".split()
)
TOWNS = "Madrid Oslo Cairo Vienna Toronto Sydney Boston Dublin Prague Athens Helsinki Chicago Berlin Kyoto".split()
FOODS = "sandwich pancake noodle pumpkin cheesecake pretzel omelette burrito pickle waffle lasagna pudding".split()
FOLK = "Alice Robert Maria Daniel Sophie Thomas Laura Peter Emma George Hannah Samuel".split()
SHADES = "purple orange yellow crimson turquoise silver golden scarlet violet pink".split()
SPOTS = "fountain bridge windmill statue staircase fireplace piano chimney bookshelf wardrobe".split()


@dataclass(frozen=True, slots=True)
class Phrasing:
    """One way to state a fact and to ask for it; `{a}` is the subject, `{b}` the value."""

    statement: str
    question: str
    subject: Callable[[random.Random], str]
    value: Callable[[random.Random], str]


def _pick(pool: Sequence[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(pool)


def _magic(rng: random.Random) -> str:
    return number(rng, 5, evaluation=True)


PHRASINGS: tuple[Phrasing, ...] = (
    Phrasing(
        "The special magic {a} number is: {b}.", "What is the special magic {a} number?", _pick(GEMS), _magic
    ),
    Phrasing(
        "The best thing to do in {a} is eat a {b} in the park.",
        "What is the best thing to do in {a}?",
        _pick(TOWNS),
        _pick(FOODS),
    ),
    Phrasing(
        "{a}'s favourite animal is the {b}.", "What is {a}'s favourite animal?", _pick(FOLK), _pick(BEASTS)
    ),
    Phrasing(
        "The treasure map was hidden behind the {b} by {a}.",
        "Behind what did {a} hide the treasure map?",
        _pick(FOLK),
        _pick(SPOTS),
    ),
    Phrasing(
        "Flight {a} to the islands leaves from gate {b}.",
        "From which gate does flight {a} leave?",
        lambda rng: f"K{number(rng, 3, evaluation=True)}",
        lambda rng: rng.choice("BCDEFG") + number(rng, 2, evaluation=True),
    ),
    Phrasing(
        "The secret ingredient in grandmother's {a} soup is {b}.",
        "What is the secret ingredient in grandmother's {a} soup?",
        _pick(SHADES),
        _pick(FOODS),
    ),
    Phrasing(
        "For the costume party, {a} is going to dress up as a {b}.",
        "What is {a} going to dress up as for the costume party?",
        _pick(FOLK),
        _pick(BEASTS),
    ),
    Phrasing(
        "The wizard's tower in {a} is painted {b}.",
        "What colour is the wizard's tower in {a}?",
        _pick(TOWNS),
        _pick(SHADES),
    ),
)

INTRODUCTION = "Read the following text carefully. There is a question about it at the end."
_FILLERS = "and so on as it was then in the end of all that there is to say".split()
CLOSING = "Based on the text above, answer in one short sentence. {question}"


@dataclass(frozen=True, slots=True)
class Needle:
    """One prompt. `ids` has exactly `context` tokens and ends where the assistant begins to answer.

    The answer is right if it contains `value`, regardless of case. `needle` is the span [start, end) of the
    statement in `ids`, exact to one token at each side.
    """

    context: int
    depth: float
    phrasing: int
    statement: str
    question: str
    value: str
    prompt: str  # the user's message
    ids: tuple[int, ...]
    needle: tuple[int, int]


def make_needles(
    haystacks: Sequence[str],
    chat: ChatML,
    seed: int,
    *,
    contexts: Sequence[int] = OF_8K.needles,
    depths: Sequence[float] = DEPTHS,
    repeats: int = 3,
) -> Iterator[Needle]:
    """Make needles over the grid of contexts and depths, with the phrasings in turn.

    Args:
        haystacks: held-out texts; each needle uses a stretch of one text.
        chat: renders and counts tokens.
        seed: decides stretches and values.
        contexts: exact prompt lengths in tokens.
        depths: 0 puts the statement first, 1 last.
        repeats: how many needles each cell has.

    Raises:
        ValueError: no haystack is long enough.
    """
    counted = [_sentences(text, chat) for text in haystacks]
    turn = 0
    for context in contexts:
        for depth in depths:
            for _ in range(repeats):
                rng = random.Random(f"{seed}:needle:{turn}")
                yield _make(counted, chat, rng, context, depth, turn % len(PHRASINGS))
                turn += 1


def _sentences(text: str, chat: ChatML) -> list[tuple[str, int]]:
    folded = " ".join(line for line in text.split("\n") if not line.startswith("#"))
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(folded.split()))
    return [
        (sentence, len(chat.text(" " + sentence))) for sentence in sentences if 20 <= len(sentence) <= 300
    ]


def _make(
    haystacks: Sequence[list[tuple[str, int]]],
    chat: ChatML,
    rng: random.Random,
    context: int,
    depth: float,
    phrasing: int,
) -> Needle:
    form = PHRASINGS[phrasing]
    names = {"a": form.subject(rng), "b": form.value(rng)}
    statement, question = form.statement.format(**names), form.question.format(**names)
    frame = _Frame(chat, statement, question)
    room = context - len(frame.ids([], []))
    # A sentence that names the subject or the value could answer, or contradict, the question.
    taken = re.compile("|".join(map(re.escape, names.values())), re.I)
    stretches = []
    for stack in haystacks:
        usable = [(sentence, count) for sentence, count in stack if not taken.search(sentence)]
        if sum(count for _, count in usable) > 1.2 * room + 100:
            stretches.append(usable)
    if not stretches:
        raise ValueError(f"no haystack has enough text for a context of {context} tokens")
    stack = rng.choice(stretches)
    begin = rng.randrange(len(stack))
    words: list[str] = []
    total = 0
    for sentence, count in stack[begin:] + stack[:begin]:
        if total > room:
            break
        words += sentence.split(" ")
        total += count
    words, before = _fit(frame, words, context, depth)
    ids = frame.ids(words[:before], words[before:])
    start = frame.length_before(words[:before])
    span = (start, start + len(chat.text(" " + statement)))
    prompt = frame.prompt(words[:before], words[before:])
    return Needle(context, depth, phrasing, statement, question, names["b"], prompt, tuple(ids), span)


class _Frame:
    """The text around a haystack: makes the whole prompt and counts its tokens."""

    def __init__(self, chat: ChatML, statement: str, question: str) -> None:
        self._chat = chat
        self._statement = statement
        self._question = question

    def prompt(self, before: Sequence[str], after: Sequence[str]) -> str:
        text = " ".join([*before, self._statement, *after])
        return f"{INTRODUCTION}\n\n{text}\n\n{CLOSING.format(question=self._question)}"

    def ids(self, before: Sequence[str], after: Sequence[str]) -> list[int]:
        message = ChatTurn("user", self.prompt(before, after))
        return self._chat.render([message], generation_prompt=True).ids

    def length_before(self, before: Sequence[str]) -> int:
        """Count the tokens before the statement."""
        text = f"{INTRODUCTION}\n\n" + " ".join(before)
        closed = self._chat.render([ChatTurn("user", text)]).ids
        return len(closed) - 1 - len(self._chat.text("\n"))


def _fit(frame: _Frame, words: list[str], context: int, depth: float) -> tuple[list[str], int]:
    """Cut `words` so that the prompt has exactly `context` tokens.

    Words are dropped at the end that is farther from the statement, so that whole sentences stay around it. If
    the last dropped word had more tokens than needed, short words of one token each fill the gap.

    Returns:
        the words, and the index of the word before which the statement goes

    Raises:
        ValueError: no text has exactly `context` tokens.
    """
    fillers = 0
    at_front = depth > 0.5
    for _ in range(1000):
        before = _place(words, depth)
        excess = len(frame.ids(words[:before], words[before:])) - context
        if excess == 0:
            return words, before
        if excess > 0:
            if fillers:  # the tokenizer splits a filler: try other words
                words, fillers = words[fillers:] if at_front else words[:-fillers], 0
            # Most words have one or two tokens, so dropping half of the excess does not drop much too much.
            drop = max(1, excess // 2)
            words = words[drop:] if at_front else words[: len(words) - drop]
        else:
            filler = _FILLERS[fillers % len(_FILLERS)]
            words = [filler, *words] if at_front else [*words, filler]
            fillers += 1
    raise ValueError(f"no text of exactly {context} tokens could be made")


def _place(words: Sequence[str], depth: float) -> int:
    """Return the index of the word before which the statement goes: the sentence boundary nearest to the depth."""
    target = round(depth * len(words))
    if target in (0, len(words)):
        return target
    boundaries = [0, len(words), *(i + 1 for i, word in enumerate(words) if word[-1] in ".!?")]
    return min(boundaries, key=lambda boundary: (abs(boundary - target), boundary))
