"""Needles in haystacks: how many of the needles that dense attention finds does sparse attention find too?

`lab.corpus.needles` makes the needles; this module asks for them in this process (`lab.probe`) and counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from lab.evaluate.client import PartProgress
from lab.evaluate.loss import settings
from lab.evaluate.material import AskedNeedle
from lab.evaluate.statistics import Interval, wilson
from lab.evaluate.verdict import Verdict, at_least, bars
from lab.probe import Probe

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
        accuracy: setting -> context or "all" -> share of needles found; sparse is asked for those that dense finds.
        retention: top_k -> share that sparse finds of the needles that dense finds.
    """

    needles: list[Found]
    skipped: int
    accuracy: dict[str, dict[str, Share]]
    retention: dict[str, Share]


def measure(
    probe: Probe, asked: Sequence[AskedNeedle], index_top_ks: Sequence[int], ends: frozenset[int],
    decode: Callable[[Sequence[int]], str], progress: PartProgress,
) -> NeedlesResult:  # fmt: skip
    """Ask for every needle dense, and at each top_k for those that dense finds; the others count as not found."""
    fitting = [n for n in asked if len(n.ids) + ANSWER_TOKENS <= probe.max_positions]
    texts: list[dict[str, str]] = [{} for _ in fitting]

    def ask(which: Sequence[int], setting: str, k: int | None) -> None:
        for group in probe.groups([len(fitting[i].ids) + ANSWER_TOKENS for i in which]):
            chosen = [which[i] for i in group]
            slots = probe.read([fitting[i].ids for i in chosen], ANSWER_TOKENS, k)
            for i, reply in zip(chosen, probe.answer(slots, ANSWER_TOKENS, ends), strict=True):
                texts[i][setting] = decode(reply.token_ids)

    progress(0, 1 + len(index_top_ks))
    ask(range(len(fitting)), "dense", None)
    kept = [i for i, n in enumerate(fitting) if is_right(texts[i]["dense"], n.row.value)]
    for done, k in enumerate(index_top_ks, 1):
        progress(done, 1 + len(index_top_ks))
        ask(kept, str(k), k)
    names = [str(setting) for setting in settings(index_top_ks)]
    found = [
        Found(
            context=n.row.context, depth=n.row.depth, phrasing=n.row.phrasing, value=n.row.value, answers=own,
            right={s: s in own and is_right(own[s], n.row.value) for s in names},
        )
        for n, own in zip(fitting, texts, strict=True)
    ]  # fmt: skip
    return summarise(found, index_top_ks, len(asked) - len(fitting))


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


def verdicts(result: NeedlesResult, index_top_k: int) -> list[Verdict]:
    """Judge the setting that serving uses by default."""
    share = result.retention.get(str(index_top_k))
    if share is None:
        return []
    return [at_least(f"needles kept of dense's, top_k {index_top_k}", share.value, bars(index_top_k).kept)]
