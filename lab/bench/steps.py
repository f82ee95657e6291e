"""The engine without a server: the same steps, driven in this process, and where their time goes.

`python -m lab.bench.steps --weights FILE --streams 8 --context 1024 --tokens 128` sends so many requests at once, each
with a prompt of its own of `--context` random tokens, lets each make `--tokens` tokens, does so again with the prompts
cached, and prints one line of JSON (a `StepsReport`). It is the yardstick for what HTTP and the second process cost. Speed
only: what is generated is noise.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import torch

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.protocol import EngineStats, SamplingParams, Submit
from engine.step.build import build
from engine.step.core import EngineCore


class StepSpread(msgspec.Struct, frozen=True):
    """Order statistics of one kind of time, in seconds."""

    p50: float
    p99: float
    max: float


class StepsReport(msgspec.Struct, frozen=True, kw_only=True):
    """The times of a run, in seconds of the wall clock.

    Requests run twice: cold, and again with their prompts cached. In the second run all streams decode at the same
    time, however long their prompts took. Figures of decode steps are from the second run, all others from the first.
    Decode steps are the steps without prompt tokens; of these, only the ones with the most streams count.
    """

    streams: int
    context: int
    tokens: int
    top_k: int | None  # None: dense
    threads: int
    seconds: float  # from the first step to the last
    tokens_per_second: float  # output tokens of all streams over `seconds`, prompts included
    decode_steps: int
    decode_streams: int  # in each decode step
    decode_tokens_per_second: float  # of all streams, over the decode steps
    decode_step: StepSpread
    model: StepSpread  # the part of a decode step that the model's forward and logits take
    outside: StepSpread  # the rest of a decode step: schedule, batch, sample, account
    first_token: StepSpread  # from the first step's start to a stream's first token
    between_tokens: StepSpread  # the time between two tokens of a stream, over all streams
    starvation: float  # p99 of `between_tokens` / its median
    peak_rss_bytes: int


class Step(NamedTuple):
    """One step of a run."""

    end: float  # seconds since the first step began
    seconds: float
    model_seconds: float
    rows: int  # tokens computed
    tokens: tuple[tuple[str, int], ...]  # (request, number of new tokens), for requests that got tokens


def submits(streams: int, context: int, tokens: int, top_k: int | None, vocab_size: int) -> list[Submit]:
    """Make greedy requests of fixed length. No two prompts begin with the same token, so none is in the prefix cache."""
    draw = random.Random(0)
    return [
        Submit(
            request_id=f"stream {i}",
            prompt_token_ids=(i, *draw.choices(range(vocab_size), k=context - 1)),
            sampling=SamplingParams(max_tokens=tokens, seed=i, temperature=0.0),
            index_top_k=top_k,
        )
        for i in range(streams)
    ]


def drive(
    core: EngineCore,
    requests: Sequence[Submit],
    model_seconds: Callable[[], float],
    clock: Callable[[], float] = time.perf_counter,
) -> list[Step]:
    """Run `requests`, all at once, to their end.

    Args:
        core: an engine without other work.
        requests: what to run.
        model_seconds: returns the seconds that the model has taken so far.
        clock: returns seconds.

    Raises:
        EngineError: a request failed or was refused; the message says why.
    """
    refused = [delta for request in requests for delta in core.submit(request)]
    if refused:
        raise EngineError(str(refused[0].error))
    steps: list[Step] = []
    first = began = clock()
    known, rows_before = model_seconds(), _rows(core.stats())
    while (output := core.step()) is not None:
        end, model = clock(), model_seconds()
        for delta in output.deltas:
            if delta.finish_reason == "error":
                raise EngineError(str(delta.error))
        rows = _rows(core.stats())
        tokens = tuple((delta.request_id, len(delta.token_ids)) for delta in output.deltas if delta.token_ids)
        steps.append(Step(end - first, end - began, model - known, rows - rows_before, tokens))
        began, known, rows_before = clock(), model, rows
    return steps


def _rows(stats: EngineStats) -> int:
    return stats.prefill_tokens_total + stats.decode_tokens_total


def report(
    steps: Sequence[Step],
    again: Sequence[Step],
    requests: Sequence[Submit],
    threads: int,
    peak_rss_bytes: int,
) -> StepsReport:
    """Make the report from two runs of `drive`: `steps` cold, `again` with cached prompts."""
    streams = len(requests)
    decodes = [step for step in again if len(step.tokens) == step.rows]
    most = max((step.rows for step in decodes), default=0)
    decodes = [step for step in decodes if step.rows == most]
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    between: list[float] = []
    for step in steps:
        for name, count in step.tokens:
            first.setdefault(name, step.end)
            if name in last:
                between.append(step.end - last[name])
            between.extend([0.0] * (count - 1))  # accepted drafts come together
            last[name] = step.end
    waits = spread(between)
    made = sum(count for step in steps for _, count in step.tokens)
    decoding = sum(step.seconds for step in decodes)
    return StepsReport(
        streams=streams,
        context=len(requests[0].prompt_token_ids),
        tokens=requests[0].sampling.max_tokens,
        top_k=requests[0].index_top_k,
        threads=threads,
        seconds=steps[-1].end,
        tokens_per_second=made / steps[-1].end,
        decode_steps=len(decodes),
        decode_streams=most,
        decode_tokens_per_second=most * len(decodes) / decoding if decodes else 0.0,
        decode_step=spread([step.seconds for step in decodes]),
        model=spread([step.model_seconds for step in decodes]),
        outside=spread([step.seconds - step.model_seconds for step in decodes]),
        first_token=spread(list(first.values())),
        between_tokens=waits,
        starvation=waits.p99 / waits.p50 if waits.p50 else 0.0,
        peak_rss_bytes=peak_rss_bytes,
    )


def spread(seconds: Sequence[float]) -> StepSpread:
    """Compute median, 99th percentile (nearest rank) and maximum; zeros if nothing was measured."""
    if not seconds:
        return StepSpread(0.0, 0.0, 0.0)
    ordered = sorted(seconds)
    return StepSpread(ordered[len(ordered) // 2], ordered[-(-99 * len(ordered) // 100) - 1], ordered[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the model, warm up, run cold and cached, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, help="a .gguf file, or a folder with safetensors")
    parser.add_argument("--overlay", help="an indexer laid over the weights")
    parser.add_argument("--streams", type=int, default=1, help="requests that run side by side")
    parser.add_argument("--context", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens that each request makes")
    parser.add_argument("--top-k", default="default", help="tokens that attention reads; dense; or the indexer's default")  # fmt: skip
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice if left out")
    parser.add_argument("--token-budget", type=int, default=512, help="tokens computed in one step")
    parser.add_argument("--kv-cache-bytes", type=int, default=1 << 30, help="size of the paged cache")
    asked = parser.parse_args(arguments)
    if min(asked.streams, asked.context, asked.tokens) < 1:
        parser.error("--streams, --context and --tokens must be at least 1")
    try:
        built = build(
            EngineConfig(
                weights=asked.weights, overlay=asked.overlay, threads=asked.threads,
                token_budget=max(asked.token_budget, asked.streams), max_running=asked.streams,
                kv_cache_bytes=asked.kv_cache_bytes,
            )
        )  # fmt: skip
        indexer, vocab_size = built.ready.model.indexer, built.ready.model.vocab_size
        top_k = _top_k(asked.top_k, None if indexer is None else indexer.default_index_top_k)
        runner = built.runner
        drive(built.core, submits(1, 16, 4, top_k, vocab_size), lambda: runner.model_seconds)
        requests = submits(asked.streams, asked.context, asked.tokens, top_k, vocab_size)
        steps, again = (drive(built.core, requests, lambda: runner.model_seconds) for _ in range(2))
    except (EngineError, ValueError) as error:
        parser.error(str(error))
    # Kilobytes on Linux (getrusage(2)).
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    one = report(steps, again, requests, torch.get_num_threads(), peak)
    sys.stdout.write(msgspec.json.encode(one).decode() + "\n")
    built.close()


def _top_k(asked: str, default: int | None) -> int | None:
    if asked == "dense":
        return None
    if asked == "default":
        return default
    if default is None:
        raise ValueError(
            f"--top-k is {asked}, but this model has no indexer; give it --overlay, or leave it out"
        )
    try:
        return int(asked)
    except ValueError:
        raise ValueError(f"--top-k must be a number of tokens or dense, not {asked!r}") from None


if __name__ == "__main__":
    main()
