"""Needles in haystacks: how many of the needles that dense attention finds does sparse attention find too?

`lab.corpus.needles` makes the needles; this module asks for them and counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from lab.evaluate.client import Client, PartProgress, each
from lab.evaluate.loss import settings
from lab.evaluate.material import AskedNeedle
from lab.evaluate.statistics import Interval, wilson
from lab.evaluate.verdict import RETENTION_BARS, Verdict, at_least

ANSWER_TOKENS = 32


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """The answers to one needle. The keys of `answers` and `right` are settings."""

    context: int
    depth: float
    phrasing: int
    value: str
    answers: dict[str, str]
    right: dict[str, bool]


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """A share: `right` out of `of`, with its 95 % interval."""

    right: int
    of: int
    interval: Interval | None = None

    @property
    def value(self) -> float | None:
        """The share, from 0 to 1; None if `of` is 0."""
        return self.right / self.of if self.of else None


class NeedlesResult(msgspec.Struct, frozen=True, kw_only=True):
    """The entry of needles in eval.json.

    Attributes:
        skipped: number of needles that are too long for the model's context.
        accuracy: setting -> context or "all" -> share of needles found.
        retention: top_k -> share that sparse finds of the needles that dense finds.
        gained: top_k -> share that sparse finds of the needles that dense does not find.
    """

    needles: list[Found]
    skipped: int
    accuracy: dict[str, dict[str, Share]]
    retention: dict[str, Share]
    gained: dict[str, Share]


async def measure(
    client: Client,
    needles: Sequence[AskedNeedle],
    index_top_ks: Sequence[int],
    concurrency: int,
    progress: PartProgress,
) -> NeedlesResult:
    """Ask for every needle dense and at each top_k, greedily."""
    asked = [needle for needle in needles if len(needle.ids) + ANSWER_TOKENS <= client.max_model_len]

    async def one(needle: AskedNeedle) -> Found:
        answers = {}
        for setting in settings(index_top_ks):
            answers[str(setting)] = (await client.complete(needle.ids, setting, ANSWER_TOKENS)).text
        row = needle.row
        return Found(
            context=row.context,
            depth=row.depth,
            phrasing=row.phrasing,
            value=row.value,
            answers=answers,
            right={setting: is_right(text, row.value) for setting, text in answers.items()},
        )

    return summarise(await each(asked, one, concurrency, progress), index_top_ks, len(needles) - len(asked))


def is_right(answer: str, value: str) -> bool:
    """Whether the value occurs in the answer, regardless of case."""
    return value.casefold() in answer.casefold()


def summarise(found: list[Found], index_top_ks: Sequence[int], skipped: int = 0) -> NeedlesResult:
    """Count the needles found, and make the result."""
    contexts = sorted({needle.context for needle in found})
    accuracy = {}
    for setting in map(str, settings(index_top_ks)):
        accuracy[setting] = {
            str(context): _share(found, setting, lambda n, c=context: n.context == c)  # type: ignore[misc]
            for context in contexts
        } | {"all": _share(found, setting, lambda needle: True)}
    return NeedlesResult(
        needles=found,
        skipped=skipped,
        accuracy=accuracy,
        retention={str(k): _share(found, str(k), lambda needle: needle.right["dense"]) for k in index_top_ks},
        gained={
            str(k): _share(found, str(k), lambda needle: not needle.right["dense"]) for k in index_top_ks
        },
    )


def _share(found: Sequence[Found], setting: str, among: Callable[[Found], bool]) -> Share:
    chosen = [needle.right[setting] for needle in found if among(needle)]
    return Share(right=sum(chosen), of=len(chosen), interval=wilson(sum(chosen), len(chosen)))


def grid(found: Sequence[Found], setting: str) -> dict[tuple[float, int], Share]:
    """Count the needles of each cell of the grid: (depth, context) -> share found."""
    cells = dict.fromkeys((needle.depth, needle.context) for needle in found)
    return {
        (depth, context): _share(
            found, setting, lambda n, d=depth, c=context: (n.depth, n.context) == (d, c)  # type: ignore[misc]
        )
        for depth, context in cells
    }  # fmt: skip


def verdicts(result: NeedlesResult) -> list[Verdict]:
    """Judge each top_k that has a bar."""
    return [
        at_least(f"needles kept of dense's, top_k {k}", share.value, RETENTION_BARS[int(k)])
        for k, share in result.retention.items()
        if int(k) in RETENTION_BARS
    ]
