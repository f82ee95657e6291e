"""The model's own answers as training text: `python -m lab.corpus.answers --corpus DIR --model MODEL [--url URL]`.

An indexer serves what the model writes, so it also learns from that. The model answers the corpus's training prompts
dense, and the conversations join the training split as sequences of kind `answers`. Without `--url` it is loaded into
this process and answers long prompts, half of them greedily: a conversation is then a sequence of its own. With `--url`
a running server is asked; its answers are kept in `answers.train.json`: where that file is, nobody is asked again.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from engine.errors import EngineError
from engine.step.build import resolve_device
from lab.corpus.chatml import ChatML, ChatTurn, Rendered, default_system
from lab.corpus.lengths import BY_CONTEXT, OF_8K, Lengths
from lab.corpus.manifest import (
    FILE_NAME,
    CorpusPrompt,
    SequenceInfo,
    SplitInfo,
    compact,
    load_manifest,
    load_tokens,
    sha256,
)
from lab.corpus.packing import SHORTEST, Packed, draw_length
from lab.probe import Probe, greedy, sampled
from lab.tool import ToolError
from server.chat import PromptError, load_chat_format
from server.hub.models import ModelError, resolve
from server.text.loading import load_tokenizer
from server.text.tokenizer import TokenizerError

KIND = "answers"
LONG = 600
"""Tokens of a prompt from which on it is asked without a server, if --shortest says no other: a shorter one is nearly dense."""
_TEMPERATURE = 0.7
_TIMEOUT = httpx.Timeout(connect=5, read=600, write=60, pool=None)


class AnswersError(ToolError):
    """The model's answers could not be got or added; the message says why."""


async def ask(
    url: str,
    prompts: Sequence[CorpusPrompt],
    *,
    max_tokens: int,
    seed: int,
    concurrency: int,
    transport: httpx.AsyncBaseTransport | None = None,
) -> list[str]:
    """Ask the server for answers to the prompts, sampled at temperature 0.7; return them in the prompts' order.

    Raises:
        AnswersError: the server cannot be reached, or refuses a prompt.
    """
    gate = asyncio.Semaphore(concurrency)
    answers = [""] * len(prompts)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT, transport=transport) as client:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("answering", total=len(prompts))

            async def one(index: int, model: str) -> None:
                body: dict[str, Any] = {
                    "model": model,
                    "messages": msgspec.to_builtins(prompts[index].messages),
                    "temperature": _TEMPERATURE,
                    "seed": seed + index,
                    "max_tokens": max_tokens,
                }
                async with gate:
                    response = await client.post("/v1/chat/completions", json=body)
                if response.is_error:
                    raise AnswersError(
                        f"{url} refused a prompt with {response.status_code}: {response.text:.300}"
                    )
                answers[index] = response.json()["choices"][0]["message"]["content"]
                progress.advance(task)

            try:
                model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
                async with asyncio.TaskGroup() as group:
                    for index in range(len(prompts)):
                        group.create_task(one(index, model))
            except httpx.HTTPError as error:
                raise AnswersError(f"no server answers at {url} ({error}); start one: dsa serve") from None
            except BaseExceptionGroup as failures:
                first = failures.exceptions[0]
                if isinstance(first, AnswersError):
                    raise first from None
                raise AnswersError(f"{url} failed while answering: {first}") from None
    return answers


def converse(
    prompts: Sequence[CorpusPrompt],
    answers: Sequence[str],
    chat: ChatML,
    rng: random.Random,
    *,
    lengths: Lengths = OF_8K,
) -> Iterator[Packed]:
    """Make sequences of kind `answers`: conversations joined with the separator; their focus is the answers.

    Lengths are drawn as for other sequences (`draw_length`). A conversation with an empty answer is left out.
    """
    ids: list[int] = []
    focus: list[tuple[int, int]] = []
    sources: set[str] = set()
    length = draw_length(rng, lengths)

    def packed() -> Packed:
        return Packed(np.array(ids, np.uint32), KIND, tuple(sorted(sources)), tuple(focus))

    for prompt, answer in zip(prompts, answers, strict=True):
        if not answer.strip():
            continue
        one: Rendered = chat.render([*prompt.messages, ChatTurn("assistant", answer)])
        if ids and len(ids) + len(one.ids) + 1 > length:
            yield packed()
            ids, focus, sources, length = [], [], set(), draw_length(rng, lengths)
        focus += [(start + len(ids), end + len(ids)) for start, end in one.answers]
        ids += [*one.ids, chat.separator]
        sources |= {prompt.source} if prompt.source else set()
    if len(ids) >= SHORTEST:
        yield packed()


def answer_here(
    probe: Probe, prompts: Sequence[CorpusPrompt], chat: ChatML, ends: Sequence[int], *, max_tokens: int, seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Packed]:  # fmt: skip
    """Answer prompts dense, every other one greedily and the rest at temperature 0.7; make a sequence of each.

    The sequence is prompt, answer and the token that ended it, as the model read and wrote them; its focus is the
    answer.

    Args:
        probe: the model
        prompts: those that are too long for the model with an answer are left out
        chat: renders prompts
        ends: tokens that end an answer
        max_tokens: of an answer
        seed: of the draws
        progress: told how many prompts are done
    """
    generator = torch.Generator(probe.device).manual_seed(seed)
    rendered = [(p, chat.render(p.messages, generation_prompt=True).ids) for p in prompts]
    asked = [(p, ids) for p, ids in rendered if len(ids) + max_tokens < probe.max_positions]
    made: dict[int, Packed] = {}
    for odd in (0, 1):
        draw = sampled(_TEMPERATURE, generator) if odd else greedy
        which = list(range(odd, len(asked), 2))
        for group in probe.groups([len(asked[i][1]) + max_tokens for i in which]):
            chosen = [which[i] for i in group]
            slots = probe.read([asked[i][1] for i in chosen], max_tokens, None)
            for i, reply in zip(chosen, probe.answer(slots, max_tokens, frozenset(ends), draw), strict=True):
                prompt, ids = asked[i]
                whole = [*ids, *reply.token_ids, *(() if reply.end is None else (reply.end,))]
                sources = (prompt.source,) if prompt.source else ()
                made[i] = Packed(np.array(whole, np.uint32), KIND, sources, ((len(ids), len(whole)),))
            progress(len(made), len(asked))
    return [made[i] for i in sorted(made) if made[i].focus[0][1] > made[i].focus[0][0] + 1]


def extend(folder: Path, made: Sequence[Packed]) -> None:
    """Add sequences to the training split. The token file is written first and the manifest last.

    Raises:
        AnswersError: the corpus has answers already.
    """
    manifest = load_manifest(folder)
    split = manifest.splits["train"]
    if KIND in split.tokens_by_kind:
        raise AnswersError(f"{folder} has answers already; build the corpus again to take others")
    licences = {source.name: source.licence for source in manifest.sources}
    infos, start = list(split.sequences), split.tokens
    for packed in made:
        own = tuple(sorted({licences[name] for name in packed.sources}))
        infos.append(
            SequenceInfo(
                start=start, length=len(packed.ids), kind=KIND, sources=packed.sources, licences=own, focus=packed.focus,
            )
        )  # fmt: skip
        start += len(packed.ids)
    tokens = np.concatenate([load_tokens(folder, split).astype(np.uint32), *(packed.ids for packed in made)])
    # The tokens go into a new file. Until the manifest names it, the corpus is unchanged.
    path = folder / "train-with-answers.npy"
    np.save(path, compact(tokens))
    grown = SplitInfo(
        file=path.name,
        sha256=sha256(path),
        tokens=start,
        tokens_by_kind=split.tokens_by_kind | {KIND: start - split.tokens},
        sequences=tuple(infos),
    )
    whole = msgspec.structs.replace(manifest, splits=manifest.splits | {"train": grown})
    part = folder / f"{FILE_NAME}.part"
    part.write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=1))
    part.replace(folder / FILE_NAME)
    if split.file != path.name:
        (folder / split.file).unlink()


def _answers(options: argparse.Namespace, prompts: Sequence[CorpusPrompt]) -> list[str]:
    """Read the answers from the folder's file. If there is no file, ask the server and write the file."""
    path: Path = options.corpus / "answers.train.json"
    if path.exists():
        answers = msgspec.json.decode(path.read_bytes(), type=list[str])
        if len(answers) != len(prompts):
            raise AnswersError(
                f"{path} holds {len(answers)} answers to {len(prompts)} prompts; delete it, or give --count {len(answers)}"
            )
        return answers
    answers = asyncio.run(
        ask(
            options.url,
            prompts,
            max_tokens=options.max_tokens,
            seed=options.seed,
            concurrency=options.concurrency,
        )
    )
    path.write_bytes(msgspec.json.encode(answers))
    return answers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        "lab.corpus.answers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="folder made by dsa corpus")
    parser.add_argument(
        "--model", required=True, help="the checkpoint whose tokenizer to use: a name or a path"
    )
    parser.add_argument("--url", help="a server of that model to ask")
    parser.add_argument(
        "--device", default="auto", help="without --url: auto, cpu, cuda or cuda:N (%(default)s)"
    )
    parser.add_argument("--count", type=int, default=1200, help="prompts to answer (%(default)s)")
    parser.add_argument(
        "--shortest",
        type=int,
        default=LONG,
        help="without --url: of so many tokens on, prompts are asked (%(default)s)",
    )
    parser.add_argument("--max-tokens", type=int, default=256, help="of one answer (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and packing (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=32, help="requests at once (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        weights = resolve(options.model).weights
        text = load_tokenizer(weights)
        chat = ChatML(text, default_system(load_chat_format(weights)))
        lengths = BY_CONTEXT[load_manifest(options.corpus).context]
        listed = (options.corpus / "prompts.train.json").read_bytes()
        prompts = msgspec.json.decode(listed, type=list[CorpusPrompt])
        if options.url is None:
            prompts = [prompt for prompt in prompts if prompt.tokens >= options.shortest][: options.count]
            contexts = 32 if resolve_device(options.device).type == "cuda" else 1
            probe = Probe(weights, None, device=options.device, contexts=contexts)
            made = answer_here(
                probe, prompts, chat, text.eos_token_ids, max_tokens=options.max_tokens, seed=options.seed
            )
        else:
            prompts = prompts[: options.count]
            answers = _answers(options, prompts)
            made = list(
                converse(prompts, answers, chat, random.Random(f"{options.seed}:answers"), lengths=lengths)
            )
        extend(options.corpus, made)
    except (AnswersError, EngineError, ModelError, PromptError, TokenizerError, OSError, ValueError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    total = sum(len(packed.ids) for packed in made)
    Console().print(
        f"added {len(made)} sequences of {total:,} tokens: {len(prompts):,} prompts and their answers",
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
