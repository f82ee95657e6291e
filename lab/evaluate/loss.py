"""Held-out loss: how many nats a token sparse attention costs, by kind of text and by position."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from lab.evaluate.client import PartProgress, TopKSetting
from lab.evaluate.material import HeldOut
from lab.evaluate.statistics import Interval, bootstrap
from lab.evaluate.verdict import LOSS_BARS, Verdict, at_most
from lab.probe import Probe

BEYOND = 1024
"""Positions before this one leave out few tokens at any useful top_k, so they would dilute the difference."""
EDGES = (1024, 2048, 4096)
"""The first positions of the buckets. The last bucket has no end."""


class TextLoss(msgspec.Struct, frozen=True, kw_only=True):
    """The losses of one text. Lists have one entry for each bucket of `EDGES`."""

    kind: str
    start: int
    length: int
    tokens: list[int]  # how many were scored
    nats: dict[str, list[float]]  # setting -> summed losses


class LossRow(msgspec.Struct, frozen=True, kw_only=True):
    """The mean loss of several texts under one setting, nats a token."""

    tokens: int
    loss: float
    above_dense: float
    interval: Interval | None  # 95 % interval of above_dense


class LossResult(msgspec.Struct, frozen=True, kw_only=True):
    """The entry of loss in eval.json. `rows`: setting -> kind of text, "all" or "from P" -> row."""

    beyond: int
    texts: list[TextLoss]
    rows: dict[str, dict[str, LossRow]]


def measure(
    probe: Probe,
    texts: Sequence[HeldOut],
    index_top_ks: Sequence[int],
    progress: PartProgress,
    *,
    beyond: int = BEYOND,
) -> LossResult:
    """Measure the loss of every text dense and at each top_k."""
    measured = []
    for done, text in enumerate(texts):
        progress(done, len(texts))
        ids = text.ids[: probe.max_positions - 1]
        nats, tokens = {}, [0]
        for setting in settings(index_top_ks):
            own = probe.losses(ids, None if setting == "dense" else setting)
            tokens, nats[str(setting)] = buckets([None, *(-own).tolist()], beyond)
        measured.append(TextLoss(kind=text.kind, start=text.start, length=len(ids), tokens=tokens, nats=nats))
    return LossResult(beyond=beyond, texts=measured, rows=summarise(measured, index_top_ks))


def settings(index_top_ks: Sequence[int]) -> tuple[TopKSetting, ...]:
    """Return all settings: dense first, then each top_k."""
    return ("dense", *index_top_ks)


def buckets(logprobs: Sequence[float | None], beyond: int) -> tuple[list[int], list[float]]:
    """Count tokens and sum their losses from position `beyond` on, for each bucket of `EDGES`.

    The first bucket also has the positions before its edge.
    """
    tokens, nats = [0] * len(EDGES), [0.0] * len(EDGES)
    for position, logprob in enumerate(logprobs[beyond:], beyond):
        if logprob is not None:
            bucket = max(0, sum(position >= edge for edge in EDGES) - 1)
            tokens[bucket] += 1
            nats[bucket] -= logprob
    return tokens, nats


def summarise(texts: Sequence[TextLoss], index_top_ks: Sequence[int]) -> dict[str, dict[str, LossRow]]:
    """Make the rows: setting -> kind of text, "all", or "from P" for a bucket -> row. All tokens have equal weight."""
    rows: dict[str, dict[str, LossRow]] = {}
    kinds = list(dict.fromkeys(text.kind for text in texts))
    for setting in map(str, settings(index_top_ks)):
        own = {kind: _row((t for t in texts if t.kind == kind), setting, None) for kind in kinds}
        own["all"] = _row(texts, setting, None)
        for bucket, edge in enumerate(EDGES):
            own[f"from {edge}"] = _row(texts, setting, bucket)
        rows[setting] = {name: row for name, row in own.items() if row is not None}
    return rows


def _row(texts: Iterable[TextLoss], setting: str, bucket: int | None) -> LossRow | None:
    which = slice(None) if bucket is None else slice(bucket, bucket + 1)
    strata: dict[str, list[tuple[float, int]]] = defaultdict(list)
    loss, tokens = 0.0, 0
    for text in texts:
        count = sum(text.tokens[which])
        if count:
            nats = sum(text.nats[setting][which])
            strata[text.kind].append((nats - sum(text.nats["dense"][which]), count))
            loss, tokens = loss + nats, tokens + count
    if not tokens:
        return None
    above = sum(difference for own in strata.values() for difference, _ in own) / tokens
    interval = None if setting == "dense" else bootstrap(list(strata.values()))
    return LossRow(tokens=tokens, loss=loss / tokens, above_dense=above, interval=interval)


def verdicts(result: LossResult, index_top_ks: Sequence[int]) -> list[Verdict]:
    """Judge each top_k that has a bar."""
    made = []
    for index_top_k in index_top_ks:
        if index_top_k in LOSS_BARS:
            row = result.rows[str(index_top_k)].get("all")
            bar, aim = LOSS_BARS[index_top_k]
            value = None if row is None else row.above_dense
            made.append(at_most(f"loss above dense, top_k {index_top_k} (nats)", value, bar, aim))
    return made
