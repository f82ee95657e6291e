"""The engine's model in this process, asked for whole distributions: what a server answers, without HTTP.

It computes with the weights, kernels and cache formats that `dsa serve` would choose, in batches, on the CPU or on CUDA.
A server can only report some log-probabilities of a token; a divergence needs all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.attention.batch import build_batch
from engine.checkpoint.overlay import read_overlay
from engine.checkpoint.source import open_source
from engine.config import PAGE_SIZE, EngineConfig
from engine.errors import ConfigError
from engine.kernels import native
from engine.kernels.choice import choose_backend
from engine.memory.planes import PagedCache, page_bytes
from engine.models import read_model
from engine.models.family import Placement
from engine.plan.types import ScheduledRequest, StepPlan
from engine.protocol import IndexerInfo, IndexTopK
from engine.step.build import resolve_device, resolve_dtype

MOST_ROWS = 64
"""Requests that decode in one step."""
_CHUNK = {"cuda": 2048, "cpu": 512}
"""Rows of a step with prompts: 512 is a server's default, and on CUDA steps up to 2,079 rows are graphs."""
_HEAD_ROWS = 512  # rows of logits held at once

TokenDraw = Callable[[Tensor], Tensor]
"""[n, vocab] float32 logits -> [n] int64 tokens."""


def greedy(logits: Tensor) -> Tensor:
    """TokenDraw the likeliest token of each row."""
    return logits.argmax(-1)


def sampled(temperature: float, generator: torch.Generator) -> TokenDraw:
    """Return a draw at a temperature."""

    def draw(logits: Tensor) -> Tensor:
        weights = (logits / temperature).softmax(-1)
        return torch.multinomial(weights, 1, generator=generator).squeeze(-1)

    return draw


@dataclass(frozen=True)
class Reply:
    """The tokens of one answer, without the one that ended it."""

    token_ids: tuple[int, ...]
    end: int | None  # the token with which the model ended it; None: it reached the limit


class Slot:
    """One prompt with its pages in the cache."""

    def __init__(self, name: str, ids: Sequence[int], pages: tuple[int, ...], index_top_k: IndexTopK) -> None:
        self.name, self.ids, self.pages, self.index_top_k = name, tuple(ids), pages, index_top_k

    def rows(self, tokens: Sequence[int], start: int) -> ScheduledRequest:
        """Schedule rows of this slot."""
        width = -(-(start + len(tokens)) // PAGE_SIZE)
        return ScheduledRequest(
            request_id=self.name, token_ids=tuple(tokens), start=start, page_ids=self.pages[:width],
            index_top_k=self.index_top_k, sample=None,
        )  # fmt: skip


class Probe:
    """A loaded model, its cache, and nothing else: no scheduler, no prefix cache.

    Args:
        weights: a .gguf file or a folder
        overlay: the indexer
        device: auto, cpu, cuda or cuda:N
        dtype: auto, float32 or bfloat16
        kv_cache_bytes: size of the cache; it limits how many prompts are held at once
        contexts: the cache is larger if so many prompts of the model's whole context do not fit
        threads: CPU threads; None: torch's number

    Raises:
        CheckpointError: the files cannot be used.
        ConfigError: the device cannot be used, or the cache is too small for one prompt.
    """

    def __init__(
        self, weights: Path, overlay: Path | None, *, device: str = "auto", dtype: str = "auto",
        kv_cache_bytes: int = 2 << 30, contexts: int = 0, threads: int | None = None,
    ) -> None:  # fmt: skip
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = resolve_device(device)
        native.set_threads(torch.get_num_threads())
        source = open_source(weights)
        family = read_model(source)
        laid = None if overlay is None else read_overlay(overlay, source)
        kernels = choose_backend("auto", self.device)
        self.dtype = resolve_dtype(dtype, self.device, compiled=family.compiled_steps)
        self.max_positions = family.max_positions
        self._model, _ = family.build(
            source if laid is None else laid.over(source),
            None if laid is None else laid.info,
            Placement(kernels, family.max_positions, self.dtype, self.device),
            lambda done, total: None,
        )
        usual = EngineConfig(weights=str(weights))
        specs = self._model.plane_specs()
        size = page_bytes(specs, self._model.num_layers)
        # Page 0 pads tables, and holds no token.
        pages = max(kv_cache_bytes // size, 1 + contexts * -(-family.max_positions // PAGE_SIZE))
        self._cache = PagedCache(pages, specs, self._model.num_layers, self.device)
        if self._cache.num_pages * PAGE_SIZE <= family.max_positions:
            raise ConfigError(
                f"a cache of {kv_cache_bytes} bytes holds {self._cache.num_pages * PAGE_SIZE} tokens; one prompt may "
                f"have {family.max_positions}"
            )
        self._costs = self._model.tile_costs(usual.score_budget_bytes, usual.sparse_form)
        self._model.prepare(self._cache, MOST_ROWS, lambda done, total: None)
        self.chunk = _CHUNK[self.device.type]
        self.kernels = kernels.name

    @property
    def indexer(self) -> IndexerInfo | None:
        """The overlay's indexer."""
        return self._model.indexer

    def groups(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Split prompts into groups that the cache holds: indices, longest prompts first.

        Args:
            lengths: the most tokens that each prompt with its answer may have
        """
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        group: list[int] = []
        pages = 1  # page 0 pads tables
        for i in order:
            need = -(-lengths[i] // PAGE_SIZE)
            if group and (pages + need > self._cache.num_pages or len(group) == MOST_ROWS):
                yield group
                group, pages = [], 1
            group.append(i)
            pages += need
        if group:
            yield group

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]], room: int, index_top_k: IndexTopK) -> list[Slot]:
        """Compute prompts, but for their last tokens; return their slots, which later calls of `read` overwrite.

        Args:
            prompts: token ids, at most what `groups` puts into a group
            room: tokens that may follow each prompt
            index_top_k: None is dense
        """
        slots, page = [], 1
        for number, ids in enumerate(prompts):
            need = -(-(len(ids) + room) // PAGE_SIZE)
            slots.append(Slot(str(number), ids, tuple(range(page, page + need)), index_top_k))
            page += need
        waiting = [(slot, 0) for slot in slots if len(slot.ids) > 1]
        while waiting:
            free, parts, later = self.chunk, [], []
            for slot, start in waiting:
                count = min(free, len(slot.ids) - 1 - start)
                if count:
                    parts.append(slot.rows(slot.ids[start : start + count], start))
                    free -= count
                if start + count < len(slot.ids) - 1:
                    later.append((slot, start + count))
            self._run(parts)
            waiting = later
        return slots

    @torch.inference_mode()
    def answer(
        self, slots: Sequence[Slot], max_tokens: int, ends: frozenset[int], draw: TokenDraw = greedy
    ) -> list[Reply]:
        """Continue the prompts of `slots`, all together."""
        said: list[list[int]] = [[] for _ in slots]
        ended: list[int | None] = [None] * len(slots)
        live = list(range(len(slots)))
        while live:
            parts = []
            for i in live:
                known = (*slots[i].ids[-1:], *said[i])
                parts.append(slots[i].rows(known[-1:], len(slots[i].ids) - 1 + len(said[i])))
            tokens = draw(self._model.logits(self._run(parts))).tolist()
            going = []
            for i, token in zip(live, tokens, strict=True):
                if token in ends:
                    ended[i] = token
                    continue
                said[i].append(token)
                if len(said[i]) < max_tokens:
                    going.append(i)
            live = going
        return [Reply(tuple(own), end) for own, end in zip(said, ended, strict=True)]

    @torch.inference_mode()
    def forced(self, slot: Slot, answer: Sequence[int]) -> Tensor:
        """Read an answer after a slot's prompt; return the log-probabilities of each of its places: [n, vocab] float32.

        Row i is the distribution from which `answer[i]` would be drawn.
        """
        rows = (*slot.ids[-1:], *answer[:-1])
        first, found = len(slot.ids) - 1, []
        for start in range(0, len(rows), self.chunk):
            hidden = self._run([slot.rows(rows[start : start + self.chunk], first + start)])
            found += [self._model.logits(part).log_softmax(-1) for part in torch.split(hidden, _HEAD_ROWS)]
        return torch.cat(found)

    @torch.inference_mode()
    def losses(self, ids: Sequence[int], index_top_k: IndexTopK) -> Tensor:
        """Compute the loss of each next token of a text: [T - 1] nats, on the CPU."""
        slot = Slot("0", ids, tuple(range(1, 1 - (-len(ids) // PAGE_SIZE))), index_top_k)
        targets = torch.tensor(ids[1:], device=self.device)
        found = []
        for start in range(0, len(ids) - 1, self.chunk):
            end = min(start + self.chunk, len(ids) - 1)
            hidden = self._run([slot.rows(ids[start:end], start)])
            for at in range(0, end - start, _HEAD_ROWS):
                logits = self._model.logits(hidden[at : at + _HEAD_ROWS]).log_softmax(-1)
                own = targets[start + at : start + at + len(logits)].unsqueeze(-1)
                found.append(-logits.gather(-1, own).squeeze(-1))
        return torch.cat(found).cpu()

    def _run(self, parts: Sequence[ScheduledRequest]) -> Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the step before still reads the memory that this one fills
        batch = build_batch(StepPlan(requests=tuple(parts)), self._model.batch_device)
        return self._model.forward(batch, self._cache, self._costs)
