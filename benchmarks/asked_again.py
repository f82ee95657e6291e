"""Asks prompts of an evaluation again on another device: is sparse attention as faithful there?

    dsa eval MODEL --corpus corpus --out results --device cuda --only faithful
    python -m benchmarks.asked_again results/eval.json MODEL --corpus corpus --device cpu --limit 8

The model reads dense's answers of `eval.json` again, with the evaluation's default `top_k`. It counts how often its likeliest
token is dense's, and prints this beside what the evaluation counted for the same prompts. Dense itself is not asked here, so a
long prompt is read once, not four times. The answers are taken from their text, which may be cut into other tokens in rare places.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from lab.corpus.manifest import CorpusPrompt
from lab.evaluate.faithful import Prompted
from lab.evaluate.material import Material, spread
from lab.evaluate.results import EvalResults
from lab.evaluate.run import prompt_ids
from lab.probe import Probe
from lab.tool import ToolError
from server.chat import load_chat_format
from server.hub.models import resolve
from server.hub.stages import Stages
from server.text.loading import load_tokenizer


class Again(NamedTuple):
    """One prompt, read on both devices."""

    kind: str
    prompt_tokens: int
    there: float  # share of dense's tokens that were sparse's likeliest in the evaluation
    tokens: int  # of dense's answer here
    agreed: int  # how many of them are sparse's likeliest here


def chosen(
    results: EvalResults, prompts: Sequence[CorpusPrompt], digest: str, limit: int | None, longest: int | None
) -> list[tuple[Prompted, CorpusPrompt]]:
    """Pair prompts of an evaluation with those of its corpus: `limit` of them, spread over kinds and lengths.

    Args:
        results: of `dsa eval --only faithful`, with all prompts of its corpus
        prompts: the corpus's
        digest: of the corpus
        limit: None is all
        longest: longer prompts are left out; None leaves none out

    Raises:
        ToolError: the evaluation has no such part, or is of another corpus.
    """
    found = results.faithful
    if found is None or str(results.default_top_k) not in found.rows:
        raise ToolError("the evaluation has no agreement at the default top_k; run it with --only faithful")
    if results.settings["corpus_sha256"] != digest or len(found.prompts) != len(prompts):
        raise ToolError(
            "the evaluation is of other prompts; give the corpus that it was run with, and run it without --limit"
        )
    pairs = [
        (one, asked)
        for one, asked in zip(found.prompts, prompts, strict=True)
        if longest is None or one.prompt_tokens <= longest
    ]
    return list(spread(pairs, limit))


def read_again(
    probe: Probe,
    asked: Prompted,
    ids: Sequence[int],
    encode: Callable[[str], Sequence[int]],
    ends: Sequence[int],
    index_top_k: int,
) -> Again:
    """Read dense's answer behind a prompt with sparse attention, and count.

    Args:
        probe: the model
        asked: the prompt in the evaluation
        ids: its tokens
        encode: text -> tokens, without one that begins a text
        ends: tokens that end an answer; the first is taken where dense ended its own
        index_top_k: the setting
    """
    dense = asked.answers["dense"]
    said = [*encode(dense.text), *(ends[:1] if dense.ended else ())]
    slot = probe.read([ids], len(said), index_top_k)[0]
    likeliest = probe.forced(slot, said).argmax(-1).tolist()
    agreed = sum(one == other for one, other in zip(likeliest, said, strict=True))
    there = asked.answers[str(index_top_k)].agreed / max(1, asked.tokens)
    return Again(asked.kind, len(ids), there, len(said), agreed)


def table(found: Sequence[Again], device: str) -> Table:
    """Make the table: a line for each prompt, and one for all, by tokens."""
    made = Table(title="dense's answers read again with sparse attention: the likeliest token is dense's")
    for column in ("prompt", "its tokens", "tokens of the answer", "in the evaluation", f"here ({device})"):
        made.add_column(column, justify="left" if column == "prompt" else "right")
    for one in found:
        made.add_row(
            one.kind,
            f"{one.prompt_tokens:,}",
            f"{one.tokens:,}",
            f"{one.there:.1%}",
            f"{one.agreed / one.tokens:.1%}",
        )
    tokens = sum(one.tokens for one in found)
    there = sum(one.there * one.tokens for one in found) / tokens
    here = sum(one.agreed for one in found) / tokens
    made.add_section()
    made.add_row("all", "", f"{tokens:,}", f"{there:.1%}", f"{here:.1%}")
    return made


def main() -> None:
    """Read, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("results", type=Path, help="eval.json of the evaluation")
    add("model", help="as dsa eval takes it")
    add("--corpus", type=Path, required=True, help="the evaluation's")
    add("--device", default="cpu", help="where to read again (%(default)s)")
    add("--limit", type=int, help="so many prompts; all if left out")
    add("--longest", type=int, metavar="TOKENS", help="leave out longer prompts")
    options = parser.parse_args()
    try:
        results = msgspec.json.decode(options.results.read_bytes(), type=EvalResults)
        material, files = Material(options.corpus, options.model), resolve(options.model)
        pairs = chosen(results, material.long_prompts(None), material.digest, options.limit, options.longest)
        text, chat = load_tokenizer(files.weights), load_chat_format(files.weights)

        def encode(answer: str) -> list[int]:
            return text.encode(answer, add_bos=False)

        with Stages() as stages:
            stages("loading the model", 0, 1)
            probe = Probe(files.weights, files.overlay, device=options.device, contexts=1)
            found = []
            for done, (asked, prompt) in enumerate(pairs):
                stages("reading", done, len(pairs))
                ids = prompt_ids(chat, text, prompt)
                assert results.default_top_k is not None
                found.append(read_again(probe, asked, ids, encode, text.eos_token_ids, results.default_top_k))
    except (OSError, msgspec.DecodeError, ToolError) as error:
        parser.error(str(error))
    Console().print(table(found, options.device))


if __name__ == "__main__":
    main()
