"""Makes code tasks that run: complete a function whose constants, helpers and rule stand thousands of tokens before.

A prompt shows files of a project: held-out code, and among it one file that holds the rule. Its names and numbers are drawn
anew for each task, and the request at the end tells none of them. So whoever has not read that file cannot pass the tests.
`lab.evaluate.code` asks a model and runs its answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from textwrap import dedent, indent
from typing import Any, NamedTuple

from lab.corpus.chatml import ChatML, ChatTurn
from lab.corpus.documents import Document
from lab.corpus.manifest import CodeCase, CodeTask

WORDS = "amber basalt cedar delta ember fjord garnet harbor indigo jasper kelp lagoon maple nimbus onyx pewter".split()
"""Each task's project has one of these names, which is also the first part of its constants' names."""
CASES = 8
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""How far into the pasted files the file with the rule stands, in turn."""
_OPENING = "These are files of the project `{word}`. You will add one function to it.\n\n{files}"
_REQUEST = (
    "Now write the function `{name}` for `{word}/{target}.py`. The file begins like this:\n\n"
    "```python\nfrom {word}.{module} import *\n\n\n{signature}\n```\n\n"
    "Follow the rule in the docstring of `{word}/{module}.py`, and use the names that are defined there. Answer with the "
    "whole function in one Python code block, without explanation."
)


class _Task(NamedTuple):
    """One kind of task, with its names and numbers drawn. In its texts `%W` is the project's name in capitals, `%w` in small letters."""

    module: str  # the file with the rule
    target: str  # the file that gets the function
    rule: str  # that file's docstring
    body: str  # the rest of it
    name: str  # of the function
    signature: str
    solution: str  # the function's body
    arguments: Callable[[random.Random], tuple[Any, ...]]


def _parcel(rng: random.Random) -> _Task:
    base, fee, step, factor = (
        rng.randrange(110, 480),
        rng.randrange(15, 95),
        rng.randrange(150, 700),
        rng.randrange(2, 5),
    )
    return _Task(
        "rates", "parcels",
        "Prices of parcels in cents.\n\nA parcel costs %W_BASE_FEE, and %W_STEP_FEE more for every full %W_STEP_GRAMS of its "
        "weight.\nFor an express parcel this whole sum is multiplied by %W_EXPRESS_FACTOR.",
        f"%W_BASE_FEE = {base}\n%W_STEP_FEE = {fee}\n%W_STEP_GRAMS = {step}\n%W_EXPRESS_FACTOR = {factor}\n",
        "parcel_price", 'def parcel_price(weight_grams: int, express: bool) -> int:\n    """Return the price of a parcel in cents."""',
        "price = %W_BASE_FEE + weight_grams // %W_STEP_GRAMS * %W_STEP_FEE\n"
        "return price * %W_EXPRESS_FACTOR if express else price",
        lambda r: (r.randrange(0, 5000), r.random() < 0.5),
    )  # fmt: skip


def _delay(rng: random.Random) -> _Task:
    first, growth, most = rng.randrange(20, 90), rng.randrange(2, 5), rng.randrange(1500, 9000)
    return _Task(
        "backoff", "retries",
        "How long a client waits before it tries again.\n\nThe wait before attempt number 0 is %W_FIRST_WAIT_MS. Each further "
        "attempt multiplies it by %W_WAIT_GROWTH,\nbut no wait is longer than %W_LONGEST_WAIT_MS.",
        f"%W_FIRST_WAIT_MS = {first}\n%W_WAIT_GROWTH = {growth}\n%W_LONGEST_WAIT_MS = {most}\n",
        "wait_before", 'def wait_before(attempt: int) -> int:\n    """Return how many milliseconds to wait before an attempt."""',
        "return min(%W_FIRST_WAIT_MS * %W_WAIT_GROWTH ** attempt, %W_LONGEST_WAIT_MS)",
        lambda r: (r.randrange(0, 9),),
    )  # fmt: skip


def _shard(rng: random.Random) -> _Task:
    factor, offset, count = rng.randrange(11, 97) * 2 + 1, rng.randrange(3, 60), rng.randrange(5, 40)
    return _Task(
        "placement", "lookup",
        "Where users are stored.\n\nThe shard of a user is its id times %W_SHARD_FACTOR plus %W_SHARD_OFFSET, modulo "
        "%W_SHARD_COUNT.",
        f"%W_SHARD_FACTOR = {factor}\n%W_SHARD_OFFSET = {offset}\n%W_SHARD_COUNT = {count}\n",
        "shard_of", 'def shard_of(user_id: int) -> int:\n    """Return the number of the shard that holds a user."""',
        "return (user_id * %W_SHARD_FACTOR + %W_SHARD_OFFSET) % %W_SHARD_COUNT",
        lambda r: (r.randrange(1, 10**6),),
    )  # fmt: skip


def _label(rng: random.Random) -> _Task:
    codes = rng.sample(range(10, 100), 4)
    names = rng.sample(["queued", "packed", "shipped", "returned", "lost", "held", "opened", "sealed"], 4)
    unknown = rng.choice(["nowhere", "unheard", "blank", "missing"])
    table = dict(zip(codes, names, strict=True))
    return _Task(
        "states", "labels",
        "Names of the states of an order.\n\nThe label of a state is its name in %W_STATES, a colon and its code, without "
        "spaces.\nThe label of a code that is not in the table is %W_NO_STATE alone.",
        f"%W_STATES = {table!r}\n%W_NO_STATE = {unknown!r}\n",
        "state_label", 'def state_label(code: int) -> str:\n    """Return the label of a state."""',
        'return f"{%W_STATES[code]}:{code}" if code in %W_STATES else %W_NO_STATE',
        lambda r, known=tuple(codes): (r.choice([*known, r.randrange(100, 200)]),),  # type: ignore[misc]
    )  # fmt: skip


def _level(rng: random.Random) -> _Task:
    low, width = rng.randrange(-20, 15), rng.randrange(8, 40)
    names = rng.sample(["calm", "steady", "raised", "severe", "mild", "fierce"], 3)
    return _Task(
        "limits", "alarms",
        "Levels of a sensor.\n\nBelow %W_LOWER the level is %W_LEVELS[0], above %W_UPPER it is %W_LEVELS[2]. In between, "
        "and at both limits, it is %W_LEVELS[1].",
        f"%W_LOWER = {low}\n%W_UPPER = {low + width}\n%W_LEVELS = {tuple(names)!r}\n",
        "level_of", 'def level_of(reading: int) -> str:\n    """Return the level of a reading."""',
        "if reading < %W_LOWER:\n    return %W_LEVELS[0]\nreturn %W_LEVELS[2] if reading > %W_UPPER else %W_LEVELS[1]",
        lambda r, low=low, width=width: (r.choice([low, low + width, low - 1, low + width + 1, r.randrange(-60, 90)]),),  # type: ignore[misc]
    )  # fmt: skip


def _record(rng: random.Random) -> _Task:
    fields = rng.sample(["owner", "amount", "region", "period", "channel", "status"], 3)
    sign = rng.choice(["|", ";", "~", "#"])
    return _Task(
        "layout", "reading",
        "The lines of an export.\n\nA line holds the values of %W_FIELDS in this order, separated by %W_SEPARATOR. Blanks "
        "around a value do not belong to it.",
        f"%W_FIELDS = {tuple(fields)!r}\n%W_SEPARATOR = {sign!r}\n",
        "read_line", 'def read_line(line: str) -> dict[str, str]:\n    """Return the values of a line by the names of their fields."""',
        "return dict(zip(%W_FIELDS, [part.strip() for part in line.split(%W_SEPARATOR)]))",
        lambda r, s=sign: (s.join(" " * r.randrange(2) + str(r.randrange(999)) + " " * r.randrange(2) for _ in range(3)),),  # type: ignore[misc]
    )  # fmt: skip


def _net(rng: random.Random) -> _Task:
    tax, unit = rng.randrange(40, 260), rng.choice([5, 10, 20, 25])
    return _Task(
        "taxes", "invoices",
        "Taxes on invoices, in cents.\n\nA gross price is the net price and %W_TAX_PERMILLE thousandths of it, in whole cents "
        "(integer division),\nrounded by %w_round_down.",
        f"%W_TAX_PERMILLE = {tax}\n\n\ndef %w_round_down(cents: int) -> int:\n"
        f'    """Round an amount down to the next multiple of {unit} cents."""\n    return cents - cents % {unit}\n',
        "gross_price", 'def gross_price(net_cents: int) -> int:\n    """Return the gross price of a net price."""',
        "return %w_round_down(net_cents + net_cents * %W_TAX_PERMILLE // 1000)",
        lambda r: (r.randrange(100, 90000),),
    )  # fmt: skip


def _points(rng: random.Random) -> _Task:
    every, bonus, least = rng.randrange(3, 30), rng.randrange(20, 200), rng.randrange(300, 900)
    return _Task(
        "loyalty", "members",
        "Points of members.\n\nA purchase gives one point for every full %W_UNITS_A_POINT units spent. A purchase of at least "
        "%W_BONUS_FROM units\ngives %W_BONUS_POINTS points more.",
        f"%W_UNITS_A_POINT = {every}\n%W_BONUS_FROM = {least}\n%W_BONUS_POINTS = {bonus}\n",
        "points_for", 'def points_for(spent: int) -> int:\n    """Return the points that a purchase gives."""',
        "points = spent // %W_UNITS_A_POINT\nreturn points + %W_BONUS_POINTS if spent >= %W_BONUS_FROM else points",
        lambda r, least=least: (r.choice([least, least - 1, r.randrange(0, 3000)]),),  # type: ignore[misc]
    )  # fmt: skip


def _name(rng: random.Random) -> _Task:
    prefix, sign, most = (
        rng.choice(["tmp_", "old_", "raw_", "int_"]),
        rng.choice(["-", ".", "/"]),
        rng.randrange(6, 13),
    )
    return _Task(
        "naming", "keys",
        "Names of keys.\n\nThe key of a name and a number is the name in lower case without %W_PREFIX at its beginning, cut to "
        "its first\n%W_LONGEST letters, then %W_JOINER and the number.",
        f"%W_PREFIX = {prefix!r}\n%W_JOINER = {sign!r}\n%W_LONGEST = {most}\n",
        "key_of", 'def key_of(name: str, number: int) -> str:\n    """Return the key of a name and a number."""',
        'return name.lower().removeprefix(%W_PREFIX)[:%W_LONGEST] + %W_JOINER + str(number)',
        lambda r, p=prefix: (r.choice(["", p, p.upper()]) + "".join(r.choices("abcXYZ", k=r.randrange(4, 16))), r.randrange(100)),  # type: ignore[misc]
    )  # fmt: skip


def _spans(rng: random.Random) -> _Task:
    size, shared = rng.randrange(6, 20), rng.randrange(1, 5)
    return _Task(
        "windows", "cutting",
        "Windows over a list.\n\nA window has %W_WINDOW items, the last one may have fewer. A window begins %W_STRIDE items "
        "after the one before;\nthere is one for every beginning that is inside the list.",
        f"%W_WINDOW = {size}\n%W_STRIDE = {size - shared}\n",
        "windows_of", 'def windows_of(items: list[int]) -> list[list[int]]:\n    """Return the windows of a list."""',
        "return [items[at : at + %W_WINDOW] for at in range(0, len(items), %W_STRIDE)]",
        lambda r: (list(range(r.randrange(0, 50))),),
    )  # fmt: skip


KINDS: dict[str, Callable[[random.Random], _Task]] = {
    "parcel": _parcel, "delay": _delay, "shard": _shard, "label": _label, "level": _level, "record": _record,
    "net": _net, "points": _points, "name": _name, "spans": _spans,
}  # fmt: skip


def make_code_tasks(
    documents: Sequence[Document], chat: ChatML, seed: int, lengths: Sequence[int], count: int
) -> list[CodeTask]:
    """Make `count` tasks: kinds, lengths and depths in turn. Without held-out code, or without lengths, there are none.

    Args:
        documents: of any split; only held-out code is pasted
        chat: renders and counts tokens
        seed: decides all choices
        lengths: tokens of a prompt; it has at most so many, and nearly as many
        count: tasks wanted
    """
    code = [d for d in documents if d.split == "heldout" and d.kind == "code"]
    if not code or not lengths:
        return []
    return [_make(turn, code, chat, random.Random(f"{seed}:code:{turn}"), lengths) for turn in range(count)]


def _make(
    turn: int, code: Sequence[Document], chat: ChatML, rng: random.Random, lengths: Sequence[int]
) -> CodeTask:
    # All kinds once, then all again: each kind meets every length and every depth.
    again, number = divmod(turn, len(KINDS))
    kind = list(KINDS)[number]
    length, depth = lengths[(number + again) % len(lengths)], DEPTHS[(number + 3 * again) % len(DEPTHS)]
    word, task = rng.choice(WORDS), KINDS[kind](rng)

    def named(text: str) -> str:
        return text.replace("%W", word.upper()).replace("%w", word)

    spec = f'"""{named(task.rule)}\n"""\n\n{named(task.body)}'
    request = _REQUEST.format(
        name=task.name, word=word, target=task.target, module=task.module, signature=task.signature
    )
    rule = _shown(f"{word}/{task.module}.py", spec)
    cases = _cases(spec, f"{task.signature}\n{indent(named(task.solution), '    ')}\n", task, rng)
    others = [d for d in code if len(d.text) < 4 * length]
    rng.shuffle(others)
    frame = len(
        chat.render(
            [ChatTurn("user", _OPENING.format(word=word, files=rule) + request)], generation_prompt=True
        ).ids
    )
    # Whole files, the last one cut to what is left.
    room, pieces = length - frame - 60, []
    for number, document in enumerate(others):
        ids = chat.text(document.text)
        if len(ids) > room:
            pieces.append(
                (number, document.text[: max(0, round(len(document.text) * (room - 80) / len(ids)))])
            )
            break
        pieces.append((number, document.text))
        room -= len(ids) + 40
    files = [_shown(f"{word}/vendor/part{number}.{_suffix(others[number])}", text) for number, text in pieces]
    # Below is the boundary between files that is nearest to the depth, by letters.
    sizes = [len(text) for text in files]
    place = min(range(len(files) + 1), key=lambda i: abs(sum(sizes[:i]) - depth * sum(sizes)))
    while True:
        shown = [*files[:place], rule, *files[place:]]
        message = ChatTurn("user", f"{_OPENING.format(word=word, files=chr(10).join(shown))}\n{request}")
        tokens = len(chat.render([message], generation_prompt=True).ids)
        if tokens <= length or not files:
            break
        files = files[:-1]
        place = min(place, len(files))
    return CodeTask(
        kind=kind, tokens=tokens, depth=place / max(1, len(files)), messages=(message,), package=word, module=task.module,
        spec=spec, function=task.name, cases=tuple(cases),
    )  # fmt: skip


def _shown(path: str, text: str) -> str:
    return f"### {path}\n```\n{text.rstrip()}\n```\n"


def _suffix(document: Document) -> str:
    name = document.path.rsplit("#", 1)[0]
    return name.rsplit(".", 1)[-1] if "." in name else "txt"


def _cases(spec: str, solution: str, task: _Task, rng: random.Random) -> list[CodeCase]:
    """Run the known solution for what is expected."""
    names: dict[str, Any] = {}
    exec(dedent(spec) + "\n" + solution, names)  # noqa: S102 - the text is this module's own
    made = []
    for _ in range(CASES):
        arguments = task.arguments(rng)
        made.append(CodeCase(arguments=list(arguments), expected=names[task.name](*arguments)))
    return made
