"""Code tasks: does sparse attention complete the functions that dense attention completes? Tests decide.

`lab.corpus.codetasks` makes the tasks; this module asks for them in this process (`lab.probe`) and runs the answers in a
child (`lab.evaluate.sandbox`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from lab.corpus.manifest import CodeTask
from lab.evaluate.client import PartProgress
from lab.evaluate.loss import settings
from lab.evaluate.needles import Share
from lab.evaluate.sandbox import passes
from lab.evaluate.statistics import Interval, bootstrap, wilson
from lab.evaluate.verdict import CODE_BAR, Verdict, at_least
from lab.probe import Probe

ANSWER_TOKENS = 256
_CHILDREN = 4


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """One task. The keys of `answers` and `passed` are settings."""

    kind: str
    prompt_tokens: int
    depth: float
    answers: dict[str, str]
    passed: dict[str, bool]


class CodeResult(msgspec.Struct, frozen=True, kw_only=True):
    """The entry of code in eval.json.

    Attributes:
        skipped: tasks that are too long for the model.
        rows: setting -> "to N" (tokens of the prompt), or "all" -> share of tasks passed.
        above_dense: top_k -> share passed above dense's, with the 95 % interval of resampled tasks.
    """

    tasks: list[Tried]
    skipped: int
    rows: dict[str, dict[str, Share]]
    above_dense: dict[str, tuple[float, Interval | None]]


def measure(
    probe: Probe, asked: Sequence[tuple[CodeTask, Sequence[int]]], index_top_ks: Sequence[int], ends: frozenset[int],
    decode: Callable[[Sequence[int]], str], progress: PartProgress,
) -> CodeResult:  # fmt: skip
    """Give every task to dense and to each top_k, greedily, and run all answers.

    Args:
        probe: the model
        asked: tasks with their token ids
        index_top_ks: the settings beside dense
        ends: tokens that end an answer
        decode: token ids -> text
        progress: told how many settings are done
    """
    fitting = [(task, tuple(ids)) for task, ids in asked if len(ids) + ANSWER_TOKENS <= probe.max_positions]
    texts: list[dict[str, str]] = [{} for _ in fitting]
    names = settings(index_top_ks)
    for done, setting in enumerate(names):
        progress(done, len(names))
        for group in probe.groups([len(ids) + ANSWER_TOKENS for _, ids in fitting]):
            slots = probe.read(
                [fitting[i][1] for i in group], ANSWER_TOKENS, None if setting == "dense" else setting
            )
            for i, reply in zip(group, probe.answer(slots, ANSWER_TOKENS, ends), strict=True):
                texts[i][str(setting)] = decode(reply.token_ids)
    runs = [(i, name) for i, own in enumerate(texts) for name in own]
    with ThreadPoolExecutor(_CHILDREN) as pool:
        outcomes = list(pool.map(lambda run: passes(fitting[run[0]][0], texts[run[0]][run[1]]), runs))
    passed: list[dict[str, bool]] = [{} for _ in fitting]
    for (i, name), outcome in zip(runs, outcomes, strict=True):
        passed[i][name] = outcome
    tried = [
        Tried(kind=task.kind, prompt_tokens=len(ids), depth=task.depth, answers=texts[i], passed=passed[i])
        for i, (task, ids) in enumerate(fitting)
    ]
    return summarise(tried, index_top_ks, len(asked) - len(fitting))


ENDS = (4096, 8192, 16384, 32768)
"""The groups by length of the prompt: to 4096 tokens, and so on."""


def summarise(tried: list[Tried], index_top_ks: Sequence[int], skipped: int = 0) -> CodeResult:
    """Count the tasks passed, and make the result. A group without tasks is left out."""
    groups = {
        f"to {end}": [t for t in tried if first < t.prompt_tokens <= end]
        for first, end in zip((0, *ENDS[:-1]), ENDS, strict=True)
    }
    groups["all"] = tried
    rows = {
        str(setting): {
            name: _share(own, str(setting)) for name, own in groups.items() if own or name == "all"
        }
        for setting in settings(index_top_ks)
    }
    above: dict[str, tuple[float, Interval | None]] = {}
    for k in map(str, index_top_ks):
        differences = [t.passed[k] - t.passed["dense"] for t in tried]
        above[k] = (sum(differences) / max(1, len(tried)), bootstrap([[(d, 1) for d in differences]]))
    return CodeResult(tasks=tried, skipped=skipped, rows=rows, above_dense=above)


def _share(tried: Sequence[Tried], setting: str) -> Share:
    right = sum(t.passed[setting] for t in tried)
    return Share(right=right, of=len(tried), interval=wilson(right, len(tried)))


def verdicts(result: CodeResult, index_top_k: int) -> list[Verdict]:
    """Judge the setting that serving uses by default."""
    found = result.above_dense.get(str(index_top_k))
    if found is None or not result.tasks:
        return []
    return [at_least(f"code tasks passed above dense's share, top_k {index_top_k}", found[0], -CODE_BAR)]
