"""Facts for the retrieval sequences of the training text: statements, questions, answers and their words.

`lab.corpus.needles` measures, so it must not share a phrasing or a value with this module; a test checks that.
Numbers for training and for measuring differ in their remainder (see `number`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

NAMES = (
    "Adela Bruno Carmen Dmitri Elspeth Farid Greta Hugo Ines Jorge Katya Leopold Mirela Nadim Olga Pavel Quentin "
    "Rosalind Stefan Tamara Ulrich Vera Wendell Xenia Yusuf Zora Amos Beatrix Cyril Dolores Emil Fiona Gideon Helga "
    "Ismael Judith Klaus Lavinia Magnus Nell Otto Petra Rufus Sabine Tobias Ursula Viktor Wilma"
).split()
SURNAMES = (
    "Abbott Becker Castillo Dunmore Eriksson Fontaine Galloway Hartmann Ivanova Jimenez Kowalski Lindqvist Moreau "
    "Novak Okafor Petrov Quigley Ramsey Santoro Tanaka Underhill Vasquez Whitlock Yamada Zeller"
).split()
CITIES = (
    "Aberdeen Bogota Cardiff Dresden Edmonton Florence Ghent Hobart Izmir Jakarta Krakow Lisbon Malmo Nairobi Odessa "
    "Porto Quito Rotterdam Seville Tallinn Utrecht Valencia Warsaw York Zagreb Bristol Calgary Delft Genoa Leipzig"
).split()
THINGS = (
    "archive bakery boathouse brewery chapel cellar clinic depot distillery dormitory ferry foundry gallery garage "
    "gatehouse greenhouse gymnasium hangar kennel laboratory laundry library lighthouse mill museum nursery "
    "observatory orchard pantry pavilion quarry reading-room sawmill stable studio theatre tower treasury warehouse"
).split()
WORDS = (
    "acorn amber anvil badger barley beacon birch bramble candle cedar cinder clover cobalt compass copper coral "
    "cricket crystal dagger dahlia ember falcon fennel flint garnet ginger granite hazel heron indigo ivory jasper "
    "juniper kestrel lantern lavender linen magnet maple marble meadow mustard nectar nutmeg olive onyx opal otter "
    "pebble pepper pewter pigeon plum quartz raven ribbon saddle saffron sparrow tangerine thimble thistle timber "
    "topaz tulip velvet walnut willow"
).split()
MONTHS = "January March April June August October December".split()
DRINKS = "black coffee,green tea,apple juice,cold milk,hot chocolate,lemonade,mineral water,ginger ale".split(
    ","
)


def number(rng: random.Random, digits: int, *, evaluation: bool = False) -> str:
    """Draw a number with so many digits. Its remainder modulo 7 is 3 if and only if it is for evaluation."""
    while True:
        value = rng.randrange(10 ** (digits - 1), 10**digits)
        if (value % 7 == 3) is evaluation:
            return str(value)


def _serial(rng: random.Random) -> str:
    letters = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=2))
    return f"{letters}-{number(rng, 4)}"


def _person(rng: random.Random) -> str:
    return f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}"


def _date(rng: random.Random) -> str:
    return f"{rng.randrange(1, 29)} {rng.choice(MONTHS)} {rng.randrange(1700, 1990)}"


def _price(rng: random.Random) -> str:
    return f"{number(rng, 3)} crowns"


@dataclass(frozen=True, slots=True)
class FactFamily:
    """One sort of fact. In the phrasings `{s}` is the subject, `{t}` a second word and `{v}` the value."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    subject: Callable[[random.Random], str]
    value: Callable[[random.Random], str]


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact: a statement to hide in a text, a question for it and the answer."""

    statement: str
    question: str
    answer: str
    value: str


def _pick(pool: list[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(pool)


FAMILIES: tuple[FactFamily, ...] = (
    FactFamily(
        "door code",
        (
            "The door code of the {s} is {v}.",
            "To get into the {s}, type {v} on the keypad.",
            "Remember that the keypad of the {s} accepts {v} and nothing else.",
            "They changed the entry code for the {s} again, and it is now {v}.",
        ),
        ("What is the door code of the {s}?", "Which code opens the {s}?", "How do I get into the {s}?"),
        ("The door code of the {s} is {v}.", "{v}", "Type {v} on the keypad of the {s}."),
        _pick(THINGS),
        lambda rng: number(rng, rng.choice((4, 5, 6))),
    ),
    FactFamily(
        "keeper",
        (
            "The keeper of the {s} is called {v}.",
            "Since last spring, {v} has been in charge of the {s}.",
            "If something breaks in the {s}, ask {v}, who looks after it.",
            "{v} looks after the {s}.",
        ),
        ("Who is the keeper of the {s}?", "Who looks after the {s}?", "Whom do I ask about the {s}?"),
        ("{v} looks after the {s}.", "{v}", "The keeper of the {s} is {v}."),
        _pick(THINGS),
        _person,
    ),
    FactFamily(
        "home",
        (
            "{s} has lived in {v} for many years.",
            "{s} sold the farm and moved to {v}.",
            "Letters for {s} should be sent to {v}.",
            "In those days {s} had a small flat in {v}.",
        ),
        ("Where does {s} live?", "In which city can {s} be found?", "Where should letters for {s} be sent?"),
        ("{s} lives in {v}.", "{v}", "In {v}."),
        _person,
        _pick(CITIES),
    ),
    FactFamily(
        "password",
        (
            "The password for the {s} account is {v}.",
            'Log in to the {s} machine with the word "{v}".',
            "{v}: that is the watchword of the {s}.",
        ),
        ("What is the password of the {s}?", "Which word is used to log in at the {s}?"),
        ("The password of the {s} is {v}.", "{v}", 'The word is "{v}".'),
        _pick(THINGS),
        lambda rng: f"{rng.choice(WORDS)}-{rng.choice(WORDS)}",
    ),
    FactFamily(
        "founding",
        (
            "The {s} of {t} was opened on {v}.",
            "It was on {v} that the {s} of {t} first opened its doors.",
            "A plaque says that the {s} of {t} dates from {v}.",
        ),
        ("When was the {s} of {t} opened?", "What is the opening date of the {s} of {t}?"),
        ("The {s} of {t} was opened on {v}.", "{v}", "It was opened on {v}."),
        _pick(THINGS),
        _date,
    ),
    FactFamily(
        "serial",
        (
            "The serial number of {s}'s bicycle is {v}.",
            "On the frame of {s}'s bicycle one can read {v}.",
            "{s} registered a bicycle under {v}.",
        ),
        ("What is the serial number of {s}'s bicycle?", "Under which number is {s}'s bicycle registered?"),
        ("The serial number of {s}'s bicycle is {v}.", "{v}"),
        _person,
        _serial,
    ),
    FactFamily(
        "price",
        (
            "At the auction, the painting from the {s} went for {v}.",
            "Somebody paid {v} for the painting from the {s}.",
            "The painting from the {s} was valued at {v}.",
        ),
        (
            "How much was paid for the painting from the {s}?",
            "What was the price of the painting from the {s}?",
        ),
        ("The painting from the {s} cost {v}.", "{v}"),
        _pick(THINGS),
        _price,
    ),
    FactFamily(
        "drink",
        (
            "Every morning {s} orders {v}.",
            "{s} drinks nothing but {v}.",
            "When {s} visits, have some {v} ready.",
        ),
        ("What does {s} like to drink?", "Which drink should be ready for {s}?"),
        ("{s} drinks {v}.", "{v}"),
        _person,
        _pick(DRINKS),
    ),
    FactFamily(
        "emblem",
        (
            "The emblem of the {t} team is a {v}.",
            "A {v} is painted on every bus of the {t} team.",
            "Supporters of the {t} team wear a {v} on their scarves.",
        ),
        (
            "What is the emblem of the {t} team?",
            "What do the supporters of the {t} team wear on their scarves?",
        ),
        ("The emblem of the {t} team is a {v}.", "{v}", "A {v}."),
        _pick(CITIES),
        _pick(WORDS),
    ),
    FactFamily(
        "setting",
        (
            "{s}_{t}_limit = {v}",
            "set {s}.{t}.limit to {v}",
            "# default: {s}_{t}_limit is {v}",
        ),
        ("What is the limit for {s} and {t}?", "Which value does the {s} {t} limit have?"),
        ("The {s} {t} limit is {v}.", "{v}"),
        _pick(WORDS),
        lambda rng: number(rng, rng.choice((3, 4, 5))),
    ),
)


def make_facts(rng: random.Random, count: int, *, families: int = 3) -> list[Fact]:
    """Make facts from a few families. No two share a subject, so that every question has one answer."""
    chosen = rng.sample(FAMILIES, min(families, len(FAMILIES)))
    facts: list[Fact] = []
    subjects: set[tuple[str, str, str]] = set()
    while len(facts) < count:
        family = rng.choice(chosen)
        subject, value = family.subject(rng), family.value(rng)
        town = (
            subject if family.name == "emblem" else rng.choice(CITIES if family.name == "founding" else WORDS)
        )
        key = (family.name, subject, town if family.name == "setting" else "")
        if key in subjects:
            continue
        subjects.add(key)
        names = {"s": subject, "t": town, "v": value}
        facts.append(
            Fact(
                rng.choice(family.statements).format(**names),
                rng.choice(family.questions).format(**names),
                rng.choice(family.answers).format(**names),
                value,
            )
        )
    return facts
