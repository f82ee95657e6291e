"""Compares greedy answers: does sparse attention give the same answer as dense attention?

There are two measures. Free: both answer, and the answers are equal or differ from some token on. Forced: the
sparse model reads the dense answer, and each token either is or is not the sparse model's own best one; so an
early difference does not count for all later tokens. Dense is asked a second time for both measures. Its
agreement with itself is the floor, because requests that share a step round differently and so break near ties
differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import msgspec

from lab.corpus.manifest import CorpusPrompt
from lab.evaluate.client import Client, EvaluationError, ModelAnswer, PartProgress, Scores, each
from lab.evaluate.loss import settings
from server.chat import ChatFormat, encode_chat
from server.text.tokenizer import Tokenizer

ANSWER_TOKENS = 128


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt. The keys of the dictionaries are settings; "dense" is the second dense answer."""

    kind: str
    prompt_tokens: int
    answer_tokens: int  # of the dense answer
    answers: dict[str, str]  # also "dense, first", the answer that the others are compared with
    parted: dict[str, int | None]  # first token where the free answer differs from dense's; None: nowhere
    forced: dict[str, int]  # how many tokens of the dense answer are the setting's best ones


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """The counts of several prompts under one setting."""

    prompts: int
    same: int  # prompts whose whole answers are equal
    median_parted: float | None  # over the answers that differ
    tokens: int
    forced: int


class AgreementResult(msgspec.Struct, frozen=True, kw_only=True):
    """The entry of agreement in eval.json.

    Attributes:
        answer_tokens: the largest number of tokens in an answer.
        skipped: number of prompts that are too long for the model's context.
        groups: setting -> group -> counts. The groups are "longer" (prompt and answer have more than top_k
            tokens), "within" (they have not, so both are dense) and "all". The floor ("dense") has only "all".
    """

    answer_tokens: int
    prompts: list[Compared]
    skipped: int
    groups: dict[str, dict[str, Group]]


async def measure(
    client: Client,
    prompts: Sequence[CorpusPrompt],
    text: Tokenizer,
    chat: ChatFormat,
    index_top_ks: Sequence[int],
    concurrency: int,
    progress: PartProgress,
    *,
    answer_tokens: int = ANSWER_TOKENS,
) -> AgreementResult:
    """Answer every prompt dense, dense again, and at each top_k; score the first dense answer under each setting.

    Raises:
        EvaluationError: the server refuses a request, or serves another model.
    """
    vocabulary = {text.raw(token_id): token_id for token_id in reversed(range(text.vocab_size))}
    asked = []
    for prompt in prompts:
        messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
        ids = encode_chat(chat, text, messages)
        if len(ids) + answer_tokens < client.max_model_len:
            asked.append((prompt, messages, ids))

    async def one(item: tuple[CorpusPrompt, list[dict[str, str]], list[int]]) -> Compared:
        prompt, messages, ids = item
        dense = await client.chat(messages, "dense", answer_tokens)
        if dense.prompt_tokens != len(ids):
            raise EvaluationError(
                f"the server's prompt has {dense.prompt_tokens} tokens and the model's own chat format makes "
                f"{len(ids)}: the server serves another model than MODEL"
            )
        said = ids_of(dense.tokens, vocabulary)
        answers, parted, forced = {"": dense.text}, {}, {}
        for setting in settings(index_top_ks):
            again = await client.chat(messages, setting, answer_tokens)
            scores = await client.score([*ids, *said], setting, alternatives=1, start=len(ids))
            answers[str(setting)] = again.text
            parted[str(setting)] = parting(dense, again)
            forced[str(setting)] = best(scores, len(ids), len(said))
        answers["dense, first"] = answers.pop("")
        return Compared(
            kind=prompt.kind,
            prompt_tokens=len(ids),
            answer_tokens=len(said),
            answers=answers,
            parted=parted,
            forced=forced,
        )

    compared = await each(asked, one, concurrency, progress)
    return AgreementResult(
        answer_tokens=answer_tokens,
        prompts=compared,
        skipped=len(prompts) - len(asked),
        groups=summarise(compared, index_top_ks),
    )


def ids_of(tokens: Sequence[bytes], vocabulary: Mapping[bytes, int]) -> list[int]:
    """Look up the ids of an answer's tokens.

    Raises:
        EvaluationError: the vocabulary does not have a token, so the server has another model.
    """
    try:
        return [vocabulary[token] for token in tokens]
    except KeyError as missing:
        raise EvaluationError(
            f"the server said {missing.args[0]!r}, which is no token of MODEL: it serves another model"
        ) from None


def parting(one: ModelAnswer, other: ModelAnswer) -> int | None:
    """Return the first token at which two answers differ; None if they are equal. An answer's end counts as a token."""
    for index, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)):
        if a != b:
            return index
    if len(one.tokens) == len(other.tokens) and one.finish == other.finish:
        return None
    return min(len(one.tokens), len(other.tokens))


def best(scores: Scores, start: int, count: int) -> int:
    """Return how many of the `count` tokens from `start` on are the likeliest at their place."""
    pairs = zip(scores.own[start : start + count], scores.best[start : start + count], strict=True)
    return sum(own is not None and top is not None and own >= top for own, top in pairs)


def summarise(compared: Sequence[Compared], index_top_ks: Sequence[int]) -> dict[str, dict[str, Group]]:
    """Make the `groups` of `AgreementResult`."""
    groups = {"dense": {"all": _group(compared, "dense")}}
    for k in index_top_ks:
        longer = [p for p in compared if p.prompt_tokens + p.answer_tokens > k]
        within = [p for p in compared if p.prompt_tokens + p.answer_tokens <= k]
        groups[str(k)] = {
            "longer": _group(longer, str(k)),
            "within": _group(within, str(k)),
            "all": _group(compared, str(k)),
        }
    return groups


def _group(prompts: Sequence[Compared], setting: str) -> Group:
    parted = [at for p in prompts if (at := p.parted[setting]) is not None]
    return Group(
        prompts=len(prompts),
        same=len(prompts) - len(parted),
        median_parted=float(median(parted)) if parted else None,
        tokens=sum(p.answer_tokens for p in prompts),
        forced=sum(p.forced[setting] for p in prompts),
    )
