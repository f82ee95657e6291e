"""Builds the corpus: fetch, clean, deduplicate, pack, write. The same seed and packages give the same files."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from lab.corpus.chatml import ChatML, Encoder
from lab.corpus.codetasks import make_code_tasks
from lab.corpus.dedupe import dedupe
from lab.corpus.dialogues import make_dialogues
from lab.corpus.documents import Document, gather
from lab.corpus.lengths import OF_8K, Lengths
from lab.corpus.longprompts import make_long_prompts
from lab.corpus.manifest import (
    CODE_TASKS,
    FILE_NAME,
    LONG_PROMPTS,
    VERSION,
    Manifest,
    NeedleRow,
    SequenceInfo,
    SourceInfo,
    SplitInfo,
    compact,
    sha256,
)
from lab.corpus.needles import DEPTHS, Needle, make_needles
from lab.corpus.packing import Packed, budgets, pack
from lab.corpus.prompts import make_prompts
from lab.corpus.retrieval import make_retrieval
from lab.corpus.sources import SOURCES, CorpusSource, SplitName
from lab.tool import StageProgress

SHARES: dict[str, float] = {
    "prose": 0.16,
    "books": 0.14,
    "docs": 0.24,
    "code": 0.20,
    "chat": 0.12,
    "retrieval": 0.14,
}
"""Kind -> its share of the training tokens. A quarter is chats that look far back, because the aim is long context."""
PROMPTS = (2400, 200)
"""How many prompts to make for training and held out, at 8K of context."""
HELDOUT_KINDS = ("prose", "books", "docs", "code", "chat")
CHARS_PER_TOKEN = 3.5  # an estimate, used only to share the budget among sources


def prompts_of(context: int) -> tuple[int, int]:
    """Return how many prompts to make for a context: with longer texts fewer, so that all together are as long."""
    train, heldout = (count * OF_8K.context // context for count in PROMPTS)
    return train, heldout


def build_corpus(
    out: Path,
    encoder: Encoder | ChatML,
    seed: int,
    target_tokens: int,
    *,
    heldout_tokens: int = 400_000,
    prompts: tuple[int, int] = PROMPTS,
    long_prompts: int = 120,
    code_tasks: int = 300,
    needle_repeats: int = 3,
    lengths: Lengths = OF_8K,
    sources: Sequence[CorpusSource] = SOURCES,
    cache: Path | None = None,
    report: StageProgress = lambda what, done, total: None,
) -> Manifest:
    """Build a corpus into a folder.

    Args:
        out: the folder for the files; made if missing.
        encoder: the model's tokenizer, with ChatML's control tokens; or the `ChatML` that writes its chats.
        seed: decides all random choices.
        target_tokens: size of the training split; it is smaller if the sources have too little text.
        heldout_tokens: size of the held-out split.
        prompts: how many prompts to make, for training and held out.
        long_prompts: how many long held-out prompts to make (`lab.corpus.longprompts`).
        code_tasks: how many code tasks to make, if `lengths` has any.
        needle_repeats: needles in each cell of the grid of depth and context; 0 makes no needles.
        lengths: of everything, by the model's context.
        sources: packages to read.
        cache: folder where packages are kept and unpacked; the default is `out / "cache"`.
        report: callback for the progress.

    Raises:
        FetchError: a package could not be fetched.
        ValueError: the tokenizer does not fit, or the sources have too little text for needles or retrieval.
    """
    out.mkdir(parents=True, exist_ok=True)
    chat = encoder if isinstance(encoder, ChatML) else ChatML(encoder)
    names = iter(range(len(sources)))
    documents, versions = gather(
        sources,
        cache or out / "cache",
        seed,
        lambda name: report(f"reading {name}", next(names), len(sources)),
    )
    report("deduplicating", 0, 1)
    documents, removed = dedupe(documents)
    licences = {source.name: source.licence for source in sources}
    splits: dict[str, SplitInfo] = {}
    tokens: Counter[str] = Counter()
    for split, total in (("train", target_tokens), ("heldout", heldout_tokens)):
        wanted = [document for document in documents if document.split == split]
        shares = SHARES if split == "train" else dict.fromkeys(HELDOUT_KINDS, 1 / len(HELDOUT_KINDS))
        made = list(
            _counted(
                _sequences(wanted, chat, seed, total, shares, lengths), f"packing {split}", total, report
            )
        )
        random.Random(f"{seed}:order:{split}").shuffle(made)
        for packed in made:
            if packed.kind not in ("chat", "retrieval"):
                tokens[packed.sources[0]] += len(packed.ids)
        splits[split] = _write(out / f"{split}.npy", made, licences)
    files = [
        _write_prompts(out, documents, chat, seed, split, n, lengths)
        for split, n in zip(_SPLITS, prompts, strict=True)
    ]
    files.append(out / LONG_PROMPTS)
    made_long = make_long_prompts(documents, chat, seed, long_prompts, lengths=lengths)
    files[-1].write_bytes(msgspec.json.format(msgspec.json.encode(made_long), indent=1))
    if lengths.code_tasks:
        files.append(out / CODE_TASKS)
        tasks = make_code_tasks(documents, chat, seed, lengths.code_tasks, code_tasks)
        files[-1].write_bytes(msgspec.json.format(msgspec.json.encode(tasks), indent=1))
    if needle_repeats:
        files += _write_needles(out, documents, chat, seed, needle_repeats, lengths.needles, report)
    manifest = Manifest(
        version=VERSION,
        seed=seed,
        target_tokens=target_tokens,
        separator=chat.separator,
        removed=dict(removed),
        sources=_source_infos(sources, versions, documents, tokens),
        splits=splits,
        files={path.name: sha256(path) for path in files},
        context=lengths.context,
    )
    (out / FILE_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    return manifest


_SPLITS: tuple[SplitName, SplitName] = ("train", "heldout")


def _sequences(
    documents: Sequence[Document],
    chat: ChatML,
    seed: int,
    total: int,
    shares: dict[str, float],
    lengths: Lengths,
) -> Iterator[Packed]:
    by_source: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        by_source[document.source].append(document)
    for kind, share in shares.items():
        budget = round(share * total)
        rng = random.Random(f"{seed}:{kind}:{documents[0].split if documents else ''}")
        if kind == "chat":
            yield from make_dialogues(documents, chat, rng, budget, lengths=lengths)
        elif kind == "retrieval":
            yield from make_retrieval(documents, chat, rng, budget, lengths=lengths)
        else:
            own = {name: group for name, group in by_source.items() if any(d.kind == kind for d in group)}
            available = {
                name: round(sum(len(d.text) for d in group) / CHARS_PER_TOKEN) for name, group in own.items()
            }
            for name, part in budgets(available, budget).items():
                yield from pack(own[name], chat, rng, part, lengths=lengths)


def _counted(made: Iterable[Packed], what: str, total: int, report: StageProgress) -> Iterator[Packed]:
    done = 0
    for packed in made:
        done += len(packed.ids)
        report(what, min(done, total), total)
        yield packed


def _write(path: Path, made: Sequence[Packed], licences: dict[str, str]) -> SplitInfo:
    infos: list[SequenceInfo] = []
    kinds: Counter[str] = Counter()
    start = 0
    for packed in made:
        length = len(packed.ids)
        own = tuple(sorted({licences[name] for name in packed.sources}))
        infos.append(
            SequenceInfo(
                start=start,
                length=length,
                kind=packed.kind,
                sources=packed.sources,
                licences=own,
                focus=packed.focus,
            )
        )
        kinds[packed.kind] += length
        start += length
    ids = np.concatenate([packed.ids for packed in made]) if made else np.empty(0, np.uint32)
    np.save(path, compact(ids))
    return SplitInfo(
        file=path.name, sha256=sha256(path), tokens=start, tokens_by_kind=dict(kinds), sequences=tuple(infos)
    )


def _write_prompts(
    out: Path,
    documents: Sequence[Document],
    chat: ChatML,
    seed: int,
    split: SplitName,
    count: int,
    lengths: Lengths,
) -> Path:
    rows = make_prompts(documents, split, chat, seed, count, lengths=lengths)
    path = out / f"prompts.{split}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=1))
    return path


def _write_needles(
    out: Path,
    documents: Sequence[Document],
    chat: ChatML,
    seed: int,
    repeats: int,
    contexts: Sequence[int],
    report: StageProgress,
) -> list[Path]:
    by_source: dict[str, list[str]] = defaultdict(list)
    for document in documents:
        if document.split == "heldout" and document.kind in ("prose", "books"):
            by_source[document.source].append(document.text)
    haystacks = ["\n\n".join(group) for group in by_source.values()]
    needles: list[Needle] = []
    for needle in make_needles(haystacks, chat, seed, contexts=contexts, repeats=repeats):
        needles.append(needle)
        report("making needles", len(needles), len(contexts) * len(DEPTHS) * repeats)
    rows, start = [], 0
    for needle in needles:
        rows.append(
            NeedleRow(
                start=start, length=len(needle.ids), context=needle.context, depth=needle.depth,
                phrasing=needle.phrasing, statement=needle.statement, question=needle.question, value=needle.value,
                needle=needle.needle,
            )
        )  # fmt: skip
        start += len(needle.ids)
    ids = np.concatenate([np.array(needle.ids, np.uint32) for needle in needles])
    np.save(out / "needles.npy", compact(ids))
    (out / "needles.json").write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=1))
    return [out / "needles.npy", out / "needles.json"]


def _source_infos(
    sources: Sequence[CorpusSource],
    versions: dict[str, str],
    documents: Sequence[Document],
    tokens: Counter[str],
) -> tuple[SourceInfo, ...]:
    count: Counter[str] = Counter(document.source for document in documents)
    chars: Counter[str] = Counter()
    for document in documents:
        chars[document.source] += len(document.text)
    return tuple(
        SourceInfo(
            name=source.name,
            package=source.package,
            version=versions[source.name],
            fetch=source.fetch,
            kind=source.kind,
            split=source.split,
            licence=source.licence,
            documents=count[source.name],
            chars=chars[source.name],
            tokens=tokens[source.name],
        )
        for source in sources
    )
