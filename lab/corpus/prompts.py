"""Makes prompts that the model answers itself.

`lab.corpus.answers` adds the answers to training prompts to the training text. `lab.evaluate.agreement` compares
sparse and dense answers to held-out prompts. The two splits share no template, no topic and no document.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from lab.corpus.chatml import ChatML, ChatTurn
from lab.corpus.documents import Document, Section, by_kind, sections
from lab.corpus.lengths import OF_8K, Lengths
from lab.corpus.manifest import CorpusPrompt
from lab.corpus.sources import SplitName

_TOPICS: dict[SplitName, tuple[str, ...]] = {
    "train": tuple(
        "photosynthesis,the water cycle,black holes,the French Revolution,compound interest,vaccines,earthquakes,"
        "binary search,the Roman Empire,inflation,bees and pollination,how rainbows form,sorting algorithms,jazz,"
        "the printing press,solar panels,the human heart,tides,chess openings,sourdough bread,volcanoes,democracy,"
        "recursion,plate tectonics,the Silk Road,antibiotics,coral reefs,electric cars,meditation,impressionism,"
        "the stock market,DNA,gravity,haiku,composting,the immune system,glaciers,cryptography,marathon training,"
        "dinosaurs,the Great Wall of China,time zones,public libraries,renewable energy,the moon landing,probability,"
        "learning a language,operating systems,the Renaissance,coffee,tea ceremonies,mountain climbing,migration of birds,"
        "the theory of evolution,computer networks,budgeting,sleep,origami,fermentation,the Industrial Revolution,"
        "prime numbers,bridges,lighthouses,maps,clouds,wolves,whales,honey,ancient Egypt,the Olympic Games,vitamins,"
        "fractions,the alphabet,airplanes,submarines,trains,hot air balloons,kites,gardening,bicycles".split(
            ","
        )
    ),
    "heldout": tuple(
        "nuclear fusion,the Aztec civilisation,penguins,hash tables,mortgage loans,auroras,the violin,tornadoes,"
        "the Ottoman Empire,photography,allergies,desert plants,the Black Death,hypothesis testing,knitting,magnets,"
        "supply and demand,satellites,butterflies,Gothic cathedrals,insulin,sailing boats,regular expressions,cheese".split(
            ","
        )
    ),
}
_TEMPLATES: dict[SplitName, tuple[str, ...]] = {
    "train": (
        "Explain {t} in simple terms.",
        "Write a short story that has something to do with {t}.",
        "List five facts about {t}.",
        "What are common misunderstandings about {t}?",
        "Write a poem about {t}.",
        "How would you teach {t} to a ten-year-old?",
        "Give me a quiz with three questions about {t}, then the answers.",
        "Why does {t} matter?",
        "Write a dialogue between two friends who discuss {t}.",
        "Summarise the history of {t} in one paragraph.",
        "What should a beginner know about {t}?",
        "Write an e-mail to a colleague that recommends a talk about {t}.",
        "Compare {t} with {u}.",
        "Give three pros and three cons that come to mind with {t}.",
        "Invent a title and an outline for a book about {t}.",
        "Write a Python program that has {t} as its theme.",
        "Make a table about {t} with three columns.",
        "What questions would an expert ask about {t}?",
        "Describe {t} as if you were a journalist.",
        "Plan a one-hour lesson on {t}, step by step.",
    ),
    "heldout": (
        "I have never heard of {t}. Where do I start?",
        "Can you tell me how {t} came to be, and what came of it?",
        "My daughter asked me about {t} at dinner. What could I have answered?",
        "Draft an introduction of about 150 words for an article on {t}.",
        "Argue first for and then against spending public money on {t}.",
        "Which words would help me to talk about {t}? Define each of them.",
    ),
}
_ABOUT_SECTION: dict[SplitName, tuple[str, ...]] = {
    "train": (
        'What is meant by "{t}"?',
        "Write a short introduction to {t}.",
        "Explain {t} with an example.",
        "What problems can come up with {t}?",
        "Give me a checklist for {t}.",
    ),
    "heldout": ("Could you walk me through {t}?", "In what situations would somebody need {t}?"),
}
_ABOUT_TEXT: dict[SplitName, tuple[str, ...]] = {
    "train": (
        "Summarise this text:\n\n{d}",
        "{d}\n\nWhat are the main points of this text?",
        "{d}\n\nExplain the text above to a beginner.",
        "Read this and write three questions that it answers:\n\n{d}",
        "{d}\n\nRewrite the last paragraph in simpler words.",
        "Here is a text:\n\n{d}\n\nWhich terms in it should be defined? Define them.",
        "{d}\n\nContinue this text.",
    ),
    "heldout": (
        "Give me the gist of the following in a few sentences.\n\n{d}",
        "{d}\n\nWhat does the author want the reader to know?",
        "Please read:\n\n{d}\n\nList the most important statements in order.",
        "{d}\n\nWhat could be a good title for this, and why?",
    ),
}
_ABOUT_CODE: dict[SplitName, tuple[str, ...]] = {
    "train": (
        "What does this code do?\n\n```\n{d}\n```",
        "```\n{d}\n```\n\nWrite documentation for the code above.",
        "```\n{d}\n```\n\nWhich functions are defined here, and what is each for?",
    ),
    "heldout": (
        "```\n{d}\n```\n\nReview this code and suggest improvements.",
        "Explain line by line:\n\n```\n{d}\n```",
    ),
}


def make_prompts(
    documents: Sequence[Document],
    split: SplitName,
    chat: ChatML,
    seed: int,
    count: int,
    *,
    lengths: Lengths = OF_8K,
) -> list[CorpusPrompt]:
    """Make up to `count` different prompts: 15 % on topics, 15 % on titles of sections, the rest with pasted text.

    Pasted texts have the lengths of `lengths.asked`, or fewer tokens if the document ends. If a prompt has fewer tokens than the
    indexer selects, sparse attention is dense, and agreement proves nothing.
    """
    rng = random.Random(f"{seed}:prompts:{split}")
    own = [document for document in documents if document.split == split]
    texts = by_kind(document for document in own if len(document.text) > 1500)
    titles: dict[str, list[Section]] = {}
    for document in own:
        if document.kind != "code":
            parts = [part for part in sections(document.text) if 2 <= len(part.title.split()) <= 9]
            titles.setdefault(document.source, []).extend(parts)
    titles = {source: parts for source, parts in titles.items() if parts}
    found: dict[str, CorpusPrompt] = {}
    for _ in range(
        50 * count
    ):  # if texts are few and short, there may be fewer than `count` different prompts
        if len(found) == count:
            break
        share = rng.random()
        if share < 0.15 or not texts:
            kind, source, content = "topic", "", _topic(split, rng)
        elif share < 0.3 and titles:
            kind, source, content = "section", *_section(titles, split, rng)
        else:
            document, content = _text(texts, split, rng, lengths)
            kind, source = "text", document.source
        messages = (ChatTurn("user", content),)
        tokens = len(chat.render(messages, generation_prompt=True).ids)
        if tokens <= lengths.longest_prompt:
            prompt = CorpusPrompt(kind=kind, source=source, tokens=tokens, messages=messages)
            found.setdefault(content, prompt)
    return list(found.values())


def _topic(split: SplitName, rng: random.Random) -> str:
    topic, other = rng.sample(_TOPICS[split], 2)
    return rng.choice(_TEMPLATES[split]).format(t=topic, u=other)


def _section(titles: dict[str, list[Section]], split: SplitName, rng: random.Random) -> tuple[str, str]:
    source = rng.choice(sorted(titles))
    part = rng.choice(titles[source])
    if part.title.endswith("?"):
        return source, part.title
    return source, rng.choice(_ABOUT_SECTION[split]).format(t=part.title)


def _text(
    groups: Sequence[Sequence[Document]], split: SplitName, rng: random.Random, lengths: Lengths
) -> tuple[Document, str]:
    chars = round(rng.choice(lengths.asked) * 3.2)
    # Most documents are short, so take the longest of a few; else there would be few long prompts.
    group = rng.choice(groups)
    document = max(rng.sample(group, min(4, len(group))), key=lambda one: len(one.text))
    offset = rng.randrange(max(1, len(document.text) - chars))
    offset = document.text.rfind("\n", 0, offset) + 1
    text = document.text[offset : offset + chars].strip("\n")
    forms = _ABOUT_CODE if document.kind == "code" else _ABOUT_TEXT
    return document, rng.choice(forms[split]).format(d=text)
