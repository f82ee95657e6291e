"""Faithfulness: does sparse attention say what dense attention says? Measured in this process (`lab.probe`).

Forced: the sparse model reads dense's own greedy answer. At each token either its likeliest token is dense's or it is not
(agreement), and its distribution is at some divergence from dense's (KL, nats). One early difference counts once.
Free: the sparse model answers by itself; compared are how long answers are, how many the model ends within a sentence, and
how many end in repetitions.
Dense's agreement with its own answer, read again in one piece, is the floor: rounding alone changes so much.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

import msgspec
import torch
import torch.nn.functional as F

from lab.corpus.manifest import CorpusPrompt
from lab.evaluate.client import PartProgress
from lab.evaluate.statistics import Interval, bootstrap, wilson
from lab.evaluate.verdict import Verdict, at_least, at_most, bars
from lab.probe import Probe, Reply

ANSWER_TOKENS = 256
LENGTHS = (0, 1024, 2048, 4096, 8192, 16384)
"""The first prompt lengths of the groups by length. The last group has no end."""
_AT_ONCE = {"cuda": 64, "cpu": 12}
"""Prompts whose distributions are held at once: one of 256 tokens takes 50 MB, of a vocabulary of 152K tokens 160 MB."""


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt under one setting; `tokens`, `agreed` and `nats` are of dense's answer, read forced."""

    agreed: int  # tokens of dense's answer that are the setting's likeliest
    nats: float  # KL(dense || setting), summed over these tokens
    length: int  # tokens of the free answer
    ended: bool  # the model ended the free answer
    clipped: bool  # it did so within a sentence
    repeats: bool  # the free answer ends in repetitions
    text: str


class Prompted(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt. The keys of `answers` are settings."""

    kind: str
    prompt_tokens: int
    tokens: int  # of dense's answer
    answers: dict[str, Answered]


class FaithfulRow(msgspec.Struct, frozen=True, kw_only=True):
    """Several prompts under one setting; intervals are of 95 % of resampled prompts."""

    prompts: int
    tokens: int
    agreement: float
    agreement_interval: Interval | None
    kl: float  # nats a token
    kl_interval: Interval | None
    length: float  # mean tokens of a free answer
    length_ratio: float  # to dense's
    length_interval: Interval | None
    clipped: int
    clipped_interval: Interval | None
    unended: int  # free answers that reached the limit
    repeats: int


class FaithfulResult(msgspec.Struct, frozen=True, kw_only=True):
    """The entry of faithful in eval.json. `rows`: setting -> kind, "from P" by prompt length, or "all" -> row."""

    answer_tokens: int
    device: str
    dtype: str
    kernels: str
    prompts: list[Prompted]
    skipped: int  # prompts that are too long for the model
    rows: dict[str, dict[str, FaithfulRow]]


def measure(
    probe: Probe,
    prompts: Sequence[tuple[CorpusPrompt, Sequence[int]]],
    index_top_ks: Sequence[int],
    ends: frozenset[int],
    decode: Callable[[Sequence[int]], str],
    progress: PartProgress,
    *,
    answer_tokens: int = ANSWER_TOKENS,
) -> FaithfulResult:
    """Answer every prompt dense and at each top_k, and read dense's answers under each setting.

    Args:
        probe: the model
        prompts: with their token ids
        index_top_ks: the settings beside dense
        ends: tokens that end an answer
        decode: token ids -> text
        progress: told how many prompts are done
        answer_tokens: the most tokens of an answer
    """
    asked = [(p, tuple(ids)) for p, ids in prompts if len(ids) + answer_tokens < probe.max_positions]
    found: dict[int, Prompted] = {}
    progress(0, len(asked))
    most = _AT_ONCE[probe.device.type]
    for group in probe.groups([len(ids) + answer_tokens for _, ids in asked]):
        for start in range(0, len(group), most):
            chosen = group[start : start + most]
            made = _answer_all(
                probe, [asked[i][1] for i in chosen], index_top_ks, ends, decode, answer_tokens
            )
            for i, (tokens, answers) in zip(chosen, made, strict=True):
                prompt, ids = asked[i]
                found[i] = Prompted(kind=prompt.kind, prompt_tokens=len(ids), tokens=tokens, answers=answers)
            progress(len(found), len(asked))
    rows = [found[i] for i in sorted(found)]
    return FaithfulResult(
        answer_tokens=answer_tokens, device=str(probe.device), dtype=str(probe.dtype).removeprefix("torch."),
        kernels=probe.kernels, prompts=rows, skipped=len(prompts) - len(asked), rows=summarise(rows, index_top_ks),
    )  # fmt: skip


def _answer_all(
    probe: Probe, prompts: Sequence[tuple[int, ...]], index_top_ks: Sequence[int], ends: frozenset[int],
    decode: Callable[[Sequence[int]], str], answer_tokens: int,
) -> list[tuple[int, dict[str, Answered]]]:  # fmt: skip
    """Return for each prompt the tokens of dense's answer, and all settings' answers."""
    slots = probe.read(prompts, answer_tokens, None)
    dense = probe.answer(slots, answer_tokens, ends)
    # The end is also a token that is predicted, and compared.
    said = [r.token_ids if r.end is None else (*r.token_ids, r.end) for r in dense]
    truth = [probe.forced(slot, own) for slot, own in zip(slots, said, strict=True)]
    answers = [
        {"dense": _judged(reply, own, known, known, decode)}
        for reply, own, known in zip(dense, said, truth, strict=True)
    ]
    for k in index_top_ks:
        slots = probe.read(prompts, answer_tokens, k)
        replies = probe.answer(slots, answer_tokens, ends)
        for i, slot in enumerate(slots):
            answers[i][str(k)] = _judged(replies[i], said[i], truth[i], probe.forced(slot, said[i]), decode)
    return [(len(own), made) for own, made in zip(said, answers, strict=True)]


def _judged(
    reply: Reply, said: Sequence[int], dense: torch.Tensor, own: torch.Tensor,
    decode: Callable[[Sequence[int]], str],
) -> Answered:  # fmt: skip
    text = decode(reply.token_ids)
    tokens = torch.tensor(said, device=own.device)
    return Answered(
        agreed=int((own.argmax(-1) == tokens).sum()),
        nats=float(F.kl_div(own, dense, log_target=True, reduction="sum")),
        length=len(reply.token_ids),
        ended=reply.end is not None,
        clipped=reply.end is not None and is_clipped(text),
        repeats=is_repeating(reply.token_ids),
        text=text,
    )


_SENTENCE_END = re.compile(r"(?:[.!?:;…]|```|\|)[\"'”’)\]*_`]*$")
_ITEM = re.compile(r"^\s*(?:[-*+•#]|\d+[.)]|[A-Za-z][.)]\s)")


def is_clipped(text: str) -> bool:
    """Whether an answer that its model ended stops within a sentence.

    It does not if it ends in a mark that ends sentences, or in a fence; nor if its last line is an item of a list or a
    line of code, which need no mark.
    """
    text = text.rstrip()
    if not text:
        return True
    last = text.rsplit("\n", 1)[-1]
    if _SENTENCE_END.search(last) or _ITEM.match(last):
        return False
    return not (text.count("```") % 2 or re.search(r"[;{}()=]$", last))


def is_repeating(token_ids: Sequence[int]) -> bool:
    """Whether an answer ends in the same piece again and again: three times or more, 24 tokens or more in all."""
    ids = list(token_ids)
    for period in range(1, min(len(ids) // 3, 64) + 1):
        times = max(3, -(-24 // period))
        if len(ids) >= times * period and ids[-times * period :] == ids[-period:] * times:
            return True
    return False


def summarise(prompts: Sequence[Prompted], index_top_ks: Sequence[int]) -> dict[str, dict[str, FaithfulRow]]:
    """Make the `rows` of `FaithfulResult`; a group without prompts is left out."""
    groups = {kind: [p for p in prompts if p.kind == kind] for kind in dict.fromkeys(p.kind for p in prompts)}
    for first, end in zip(LENGTHS, (*LENGTHS[1:], 1 << 60), strict=True):
        groups[f"from {first}"] = [p for p in prompts if first <= p.prompt_tokens < end]
    groups["all"] = list(prompts)
    return {
        setting: {name: _row(own, setting) for name, own in groups.items() if own}
        for setting in ("dense", *map(str, index_top_ks))
    }


def _row(prompts: Sequence[Prompted], setting: str) -> FaithfulRow:
    by_kind: dict[str, list[Prompted]] = defaultdict(list)
    for prompt in prompts:
        by_kind[prompt.kind].append(prompt)
    own = [p.answers[setting] for p in prompts]
    tokens, total = sum(p.tokens for p in prompts), sum(p.answers["dense"].length for p in prompts)

    def interval(pair: Callable[[Prompted], tuple[float, int]]) -> Interval | None:
        strata = [[one for p in group if (one := pair(p))[1]] for group in by_kind.values()]
        return bootstrap(strata)

    clipped = sum(a.clipped for a in own)
    return FaithfulRow(
        prompts=len(own),
        tokens=tokens,
        agreement=sum(a.agreed for a in own) / max(1, tokens),
        agreement_interval=interval(lambda p: (p.answers[setting].agreed, p.tokens)),
        kl=sum(a.nats for a in own) / max(1, tokens),
        kl_interval=interval(lambda p: (p.answers[setting].nats, p.tokens)),
        length=sum(a.length for a in own) / len(own),
        length_ratio=sum(a.length for a in own) / max(1, total),
        length_interval=interval(lambda p: (p.answers[setting].length, p.answers["dense"].length)),
        clipped=clipped,
        clipped_interval=wilson(clipped, len(own)),
        unended=sum(not a.ended for a in own),
        repeats=sum(a.repeats for a in own),
    )


def verdicts(result: FaithfulResult, index_top_k: int) -> list[Verdict]:
    """Judge the setting that serving uses by default."""
    name = str(index_top_k)
    if name not in result.rows or "all" not in result.rows[name]:
        return []
    rows, bar = result.rows[name], bars(index_top_k)
    row, dense = rows["all"], result.rows["dense"]["all"]
    at = f"top_k {name}"

    def of(group: str) -> str:
        return at if group == "all" else f"{at}, prompts {group}"

    return [
        *(
            at_least(
                f"forced agreement, {of(group)}", rows[group].agreement if group in rows else None, least
            )
            for group, least in bar.agreement.items()
        ),
        *(
            at_most(f"KL to dense, {of(group)} (nats)", rows[group].kl if group in rows else None, most)
            for group, most in bar.kl.items()
        ),
        at_most(f"clipped answers above dense's, {at}", row.clipped - dense.clipped, 0),
        at_most(f"mean length apart from dense's, {at}", abs(row.length_ratio - 1), bar.length),
    ]
