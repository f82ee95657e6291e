"""Runs the parts one after the other, and saves each as soon as it is done."""

from __future__ import annotations

import asyncio
import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from engine.step.build import resolve_device
from lab.corpus.manifest import CodeTask, CorpusPrompt, sha256
from lab.evaluate import code, equality, faithful, loss, needles
from lab.evaluate.client import EvaluationError, PartProgress, connect
from lab.evaluate.local_server import serving
from lab.evaluate.markdown import written
from lab.evaluate.material import Material
from lab.evaluate.report import show
from lab.evaluate.results import IN_PROCESS, PARTS, EvalResults, RecallResult, fingerprint, load
from lab.probe import Probe
from server.chat import ChatFormat, encode_chat, load_chat_format
from server.hub.models import ModelFiles
from server.hub.stages import Stages
from server.text.loading import load_tokenizer
from server.text.tokenizer import Tokenizer

CACHE_BYTES = {"cuda": 8 << 30, "cpu": 1 << 30}
CONTEXTS = {"cuda": 32, "cpu": 1}
"""The cache of the model in this process: it has so many bytes, or holds so many whole contexts if that is more."""
QUIET_SECONDS = 30.0
"""The time between two lines of progress, if the output is not a terminal."""


class EvalPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure.

    Attributes:
        files: the model's files.
        corpus: the folder of questions.
        out: the folder of results.
        url: a running server for equality; None starts one.
        index_top_k: the values to compare with dense.
        answer_top_k: the values of `index_top_k` to use for answers and needles, which take longest.
        only: parts to measure, even if they are done; None measures the parts that are not done.
        per_kind: held-out texts of each kind; None is all.
        limit: at most so many texts of each kind, needles and prompts; for a quick look.
        device, dtype: for all parts.
        threads: CPU threads; None: torch's number.
        server_flags: more flags of `dsa serve`.
    """

    files: ModelFiles
    corpus: Path
    out: Path
    url: str | None
    index_top_k: tuple[int, ...]
    answer_top_k: tuple[int, ...]
    only: tuple[str, ...] | None
    per_kind: int | None
    limit: int | None
    device: str
    dtype: str
    threads: int | None
    server_flags: tuple[str, ...]

    @property
    def texts_per_kind(self) -> int | None:
        """The smaller of `per_kind` and `limit`; None is all."""
        counts = [count for count in (self.per_kind, self.limit) if count is not None]
        return min(counts) if counts else None


def evaluate(plan: EvalPlan, console: Console) -> EvalResults:
    """Measure, save and show; return the results.

    Raises:
        EvaluationError: a part cannot be measured; the parts done before are kept.
        MaterialError: the corpus cannot be used.
        TokenizerError, PromptError: the model's tokenizer or chat format cannot be used.
    """
    try:  # matplotlib is an extra; if it is missing, say so now and not after the work
        from lab.evaluate.plot import draw
    except ImportError:
        raise EvaluationError(
            "matplotlib is not installed; the pictures need it: pip install 'dsa-serve[train]'"
        ) from None
    if plan.files.overlay is None:
        raise EvaluationError(
            f"{plan.files.name} has no indexer, so there is nothing to compare with dense; give one with --overlay"
        )
    material = Material(plan.corpus, plan.files.name)
    plan.out.mkdir(parents=True, exist_ok=True)
    settings = _settings(plan, material)
    results = load(plan.out, settings) or EvalResults(settings=settings, environment={})
    todo = plan.only or tuple(
        part for part in PARTS if not results.has(part) and (part != "code" or material.has_code)
    )
    if not todo:
        console.print(f"{plan.out} has every part of these settings already; another folder measures anew")
    results.environment |= _environment()
    here = [part for part in IN_PROCESS if part in todo]
    if here:
        _measure_here(plan, material, here, results)
    if "equality" in todo:
        with _server(plan) as url:
            asyncio.run(_ask(plan, url, material, results))
    if "recall" in todo:
        _timed(results, "recall", lambda: _recall(plan, results))
        results.save(plan.out)
    results.save(plan.out)
    show(console, results, plan.index_top_k)
    (plan.out / "eval.md").write_text(written(results, plan.index_top_k))
    for path in draw(results, list(plan.index_top_k), plan.out):
        console.print(f"drawn: {path}", highlight=False)
    return results


def _server(plan: EvalPlan) -> AbstractContextManager[str]:
    if plan.url is not None:
        return nullcontext(plan.url)
    flags = [str(plan.files.weights), "--overlay", str(plan.files.overlay)]
    if plan.threads is not None:
        flags += ["--threads", str(plan.threads)]
    return serving([*flags, "--device", plan.device, "--dtype", plan.dtype, *plan.server_flags])


def _measure_here(plan: EvalPlan, material: Material, parts: Sequence[str], results: EvalResults) -> None:
    """Measure the parts that ask the model in this process; save each."""
    with Stages(quiet_seconds=QUIET_SECONDS) as stages:
        stages("loading the model", 0, 1)
        kind = "cuda" if resolve_device(plan.device).type == "cuda" else "cpu"
        probe = Probe(
            plan.files.weights, plan.files.overlay, device=plan.device, dtype=plan.dtype, kv_cache_bytes=CACHE_BYTES[kind],
            contexts=CONTEXTS[kind], threads=plan.threads,
        )  # fmt: skip
        _check(probe.max_positions, plan)
        text = load_tokenizer(plan.files.weights)
        ends = frozenset(text.eos_token_ids)

        def decode(ids: Sequence[int]) -> str:
            return text.decode(list(ids))

        for part in parts:
            began, progress = time.monotonic(), _progress(stages, part)
            if part == "faithful":
                chat = load_chat_format(plan.files.weights)
                asked = [
                    (prompt, prompt_ids(chat, text, prompt)) for prompt in material.long_prompts(plan.limit)
                ]
                results.faithful = faithful.measure(probe, asked, plan.answer_top_k, ends, decode, progress)
            elif part == "needles":
                rows = material.needles(plan.limit)
                results.needles = needles.measure(probe, rows, plan.answer_top_k, ends, decode, progress)
            elif part == "code":
                chat = load_chat_format(plan.files.weights)
                tasks = [(task, prompt_ids(chat, text, task)) for task in material.code_tasks(plan.limit)]
                results.code = code.measure(probe, tasks, plan.answer_top_k, ends, decode, progress)
            else:
                texts = material.held_out(2 * loss.BEYOND, plan.texts_per_kind)
                if not texts or probe.max_positions <= 2 * loss.BEYOND:
                    raise EvaluationError(
                        f"loss takes held-out texts, and a context, of {2 * loss.BEYOND} tokens and more; "
                        "leave it out with --only"
                    )
                results.loss = loss.measure(probe, texts, plan.index_top_k, progress)
            results.seconds[part] = time.monotonic() - began
            results.default_top_k = None if probe.indexer is None else probe.indexer.default_index_top_k
            _judge(results, plan.index_top_k)
            results.save(plan.out)


def prompt_ids(chat: ChatFormat, text: Tokenizer, asked: CorpusPrompt | CodeTask) -> list[int]:
    """Return the tokens of a prompt of the corpus, in the model's chat format."""
    return encode_chat(chat, text, [msgspec.to_builtins(message) for message in asked.messages])


async def _ask(plan: EvalPlan, url: str, material: Material, results: EvalResults) -> None:
    """Measure equality: ask the server."""
    async with connect(url, 1) as client:
        _check(client.max_model_len, plan)
        if client.info.get("indexer") == "none":
            raise EvaluationError(
                "the server's model has no trained indexer, so all its answers are dense; serve one with --overlay"
            )
        results.environment["server"] = client.info
        began = time.monotonic()
        with Stages(quiet_seconds=QUIET_SECONDS) as stages:
            texts = material.held_out(1, 4)
            cases = min(equality.CASES, plan.limit or equality.CASES)
            results.equality = await equality.measure(
                client, texts, plan.index_top_k, _progress(stages, "equality"), cases=cases
            )
        results.seconds["equality"] = time.monotonic() - began
        results.environment["requests_sent_again"] = client.repeated
        _judge(results, plan.index_top_k)
        results.save(plan.out)


def _check(max_positions: int, plan: EvalPlan) -> None:
    """Check that the model has room for what the plan asks for.

    Raises:
        EvaluationError: it has not.
    """
    if max(plan.index_top_k) > max_positions:
        raise EvaluationError(
            f"--top-k asks for {max(plan.index_top_k)}, but the model's context is {max_positions} tokens"
        )


def _progress(stages: Stages, part: str) -> PartProgress:
    return lambda done, total: stages(part, done, total)


def _recall(plan: EvalPlan, results: EvalResults) -> None:
    """Measure recall in this process, after the server has stopped."""
    from lab.recall.run import run

    if plan.files.overlay is None:
        raise EvaluationError("recall reads the indexer from its file; give it with --overlay")
    quick = {} if plan.limit is None else {"per_kind": min(plan.limit, 4), "rows": 64}
    found = run(
        plan.files, plan.corpus, index_top_k=plan.index_top_k, device=plan.device, dtype=plan.dtype, **quick
    )
    results.recall = msgspec.convert(found, RecallResult)


def _timed(results: EvalResults, part: str, work: Callable[[], None]) -> None:
    began = time.monotonic()
    work()
    results.seconds[part] = time.monotonic() - began


def _judge(results: EvalResults, index_top_ks: Sequence[int]) -> None:
    made, default = [], results.default_top_k or 0
    if results.faithful is not None:
        made += faithful.verdicts(results.faithful, default)
    if results.needles is not None:
        made += needles.verdicts(results.needles, default)
    if results.code is not None:
        made += code.verdicts(results.code, default)
    if results.loss is not None:
        made += loss.verdicts(results.loss, index_top_ks)
    if results.equality is not None:
        made += equality.verdicts(results.equality, index_top_ks)
    results.verdicts = made


def _settings(plan: EvalPlan, material: Material) -> dict[str, Any]:
    overlay = plan.files.overlay
    return {
        "model": plan.files.name,
        "model_sha256": fingerprint(plan.files.weights),
        "overlay": None if overlay is None else overlay.name,
        "overlay_sha256": None if overlay is None else sha256(overlay),
        "corpus_sha256": material.digest,
        "url": plan.url,
        "top_k": list(plan.index_top_k),
        "answer_top_k": list(plan.answer_top_k),
        "per_kind": plan.per_kind,
        "limit": plan.limit,
        "device": plan.device,
        "dtype": plan.dtype,
        "server_flags": list(plan.server_flags),
        "threads": plan.threads,
        "version": importlib.metadata.version("dsa-serve"),
    }


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": importlib.metadata.version("torch"),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
