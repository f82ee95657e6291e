"""Draws a step's tokens on the device, and keeps there what the next step needs: the tokens, and what penalties count.

Steps that draw in the usual ways are graphs. Others (penalties, biases, log-probabilities) are launched kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.kernels.capture import captured
from engine.kernels.triton.race import COLUMNS
from engine.kernels.triton.sampling import DrawRows, Draws, Needs, count_tokens, draw, remember
from engine.memory.staging import Staging
from engine.models.family import KernelCompilers
from engine.plan.types import Drawn, Sampled, SampleSpec
from engine.protocol import TokenLogprob, has_penalty
from engine.step.device_sampler import (
    given_logprobs,
    logprobs_of,
    needs_of,
    no_masks,
    rows_of,
    sample_on_device,
    table,
    usual_needs,
)
from engine.step.masking import TokenMasks
from engine.step.sampler import NOT_FINITE, Draw

_COLUMNS = COLUMNS.value
_LEAST_SLOTS = 8


class Told:
    """What a step drew, on its way to the host."""

    def __init__(
        self,
        specs: Sequence[SampleSpec],
        tokens: Tensor,
        draws: Draws | None,
        given: Sequence[Tensor | None] = (),
    ) -> None:
        """Copies to the host are under way.

        Args:
            specs: of the rows
            tokens: [N] int64 on the host, -1 where the logits are not finite; filled when the device gets there
            draws: what else is told, likewise; None: nothing
            given: with `draws`, log-probabilities of the tokens that each spec names, likewise
        """
        self._specs, self._tokens, self._draws, self._given = specs, tokens, draws, given
        self._done: torch.cuda.Event | None = None
        if tokens.is_pinned():
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def __len__(self) -> int:
        return len(self._specs)

    def tokens(self) -> list[Drawn]:
        """Wait, and give each row's token, of rows about which nothing else is told."""
        return [NOT_FINITE if token < 0 else Drawn(token_id=token) for token in self._awaited()]

    def drawn(self) -> list[Sampled]:
        """Wait, and give what each row's request gets."""
        tokens = self._awaited()
        if self._draws is None:
            return [_BAD if token < 0 else Sampled(token_ids=(token,)) for token in tokens]
        told = logprobs_of(self._draws, tokens, self._specs, self._given)
        return [_sampled(token, one) for token, one in zip(tokens, told, strict=True)]

    def _awaited(self) -> list[int]:
        if self._done is not None:
            self._done.synchronize()
        tokens: list[int] = self._tokens.tolist()
        return tokens


_BAD = Sampled(error=NOT_FINITE.error, nonfinite=True)


def _sampled(token: int, logprob: TokenLogprob | None) -> Sampled:
    if token < 0:
        return _BAD
    return Sampled(token_ids=(token,), logprobs=() if logprob is None else (logprob,))


def _to_host(numbers: Tensor) -> Tensor:
    """A copy on the host, filled when the device gets there."""
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
    return host.copy_(numbers, non_blocking=True)


def _all_to_host(draws: Draws) -> Draws:
    parts = (getattr(draws, field.name) for field in fields(draws))
    return Draws(*(None if part is None else _to_host(part) for part in parts))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Places:
    """What the drawing of up to R rows reads and writes, on the device."""

    asked: Tensor  # [R * (1 + COLUMNS)] int64: the rows' numbers in the step, then `DrawRows.table`
    masks: Tensor  # [R * (1 + W)] int32: each row's mask's number, then the masks; empty without masks
    wanted: Tensor  # [R, E]: the rows' hidden states; all graphs read them from one place
    told: Tensor  # [R] int64: the tokens; -1 where the logits are not finite


@dataclass(frozen=True)
class _Graph:
    """The drawing of up to so many rows, in one way."""

    graph: torch.cuda.CUDAGraph
    places: _Places


class DrawHead(Protocol):
    """What rows of tokens are drawn from."""

    drawn: Tensor
    """[R] int64: gets the tokens."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits: [N, E] -> [N, V] float32."""
        ...


class GivenLogits:
    """Logits that are there already, as a `DrawHead` of up to so many rows."""

    def __init__(self, most: int, device: torch.device) -> None:
        self.drawn = torch.zeros(most, dtype=torch.int64, device=device)

    def logits(self, hidden: Tensor) -> Tensor:
        """What is given: [N, V]."""
        return hidden


MOST_GIVEN = 256
"""Rows whose logits graphs hold: 4 bytes a token of the vocabulary and row."""


def given_draws(
    vocab: int, rows: int, device: torch.device, compilers: KernelCompilers | None, *, masks: bool
) -> Draw:
    """What draws from logits on a device: up to so many rows at once by graphs, where there are any.

    Args:
        vocab: of the model
        rows: of a step, at most; 0: no graphs
        device: of the logits
        compilers: compile kernels together; None: one by one
        masks: rows may have masks
    """
    if not rows or device.type != "cuda":
        return sample_on_device
    draws = DeviceDraws(GivenLogits(min(rows, MOST_GIVEN), device), vocab, device)
    draws.capture(torch.zeros(1, vocab, device=device), compilers, masks=masks)
    return draws.at_once


class DeviceDraws:
    """The drawing of one model's tokens on one device."""

    def __init__(self, head: DrawHead, vocab: int, device: torch.device) -> None:
        """`head.drawn` gets the tokens of each step's rows."""
        self._head, self._device = head, device
        self._vocab = vocab
        self._staging = Staging(torch.int64, device)
        self._mask_staging = Staging(torch.int32, device)
        self._history = _History(vocab, device)
        self._graphs: dict[tuple[int, Needs], _Graph] = {}
        self._sizes: list[int] = []
        self._wanted = torch.empty(0, device=device)
        self._greedy = table((), (), len(head.drawn)).reshape(-1)

    def capture(self, hidden: Tensor, compilers: KernelCompilers | None, *, masks: bool = False) -> None:
        """Capture graphs for up to as many rows as `drawn` has.

        Args:
            hidden: [any, E], tells the size and dtype of rows
            compilers: compile kernels together; None: one by one
            masks: rows may have masks
        """
        most = len(self._head.drawn)
        self._wanted = hidden.new_zeros(most, hidden.shape[1])
        self._sizes = [*(size for size in _SIZES if size < most), most]
        pool = torch.cuda.graph_pool_handle()
        made = {
            (size, needs): self._made(size, needs)
            for size in reversed(self._sizes)
            for needs in usual_needs(masks=masks)
        }
        if compilers is not None:
            with compilers.together():
                for compute, _ in made.values():
                    compute()
        for key, (compute, places) in made.items():
            graph, _ = captured(compute, self._device, pool)
            self._graphs[key] = _Graph(graph, places)

    def draw(
        self,
        hidden: Tensor,
        rows: Sequence[int],
        specs: Sequence[SampleSpec],
        names: Sequence[str],
        masks: TokenMasks | None = None,
    ) -> Told:
        """Launch the drawing of a token from each of the `rows` of `hidden` [T, E].

        Args:
            hidden: of the step
            rows: N of them
            specs: how to draw
            names: of the requests that the rows are of
            masks: of the rows
        """
        needs = needs_of(specs, masked=masks is not None)
        size = next((size for size in self._sizes if size >= len(rows)), 0)
        usual = self._graphs.get((size, needs))
        if usual is not None:
            return self._replay(usual, size, needs, hidden, rows, specs, masks)
        device = self._device
        index = torch.tensor(rows, device=device)
        logits = self._head.logits(hidden.index_select(0, index))
        slots = self._history.slots(names, specs)
        asked = rows_of(specs, slots, self._history.counts, device, masks)
        draws = draw(logits, asked, needs)
        if any(slot >= 0 for slot in slots):
            count_tokens(asked, draws.tokens)
        self._head.drawn[: len(rows)].copy_(draws.tokens)
        given = [None if one is None else _to_host(one) for one in given_logprobs(logits, specs)]
        told = _to_host(draws.tokens.where(draws.finite, -1))
        return Told(specs, told, _all_to_host(draws) if needs.logprobs else None, given)

    def at_once(
        self, logits: Tensor, specs: Sequence[SampleSpec], masks: TokenMasks | None = None
    ) -> list[Drawn]:
        """Draw a token from each row of given logits [N, V], and wait: as `sample_on_device`, by graphs in the usual ways.

        The head is `GivenLogits`.
        """
        needs = needs_of(specs, masked=masks is not None)
        size = next((size for size in self._sizes if size >= len(specs)), 0)
        usual = self._graphs.get((size, needs))
        if usual is None:
            return sample_on_device(logits, specs, masks)
        return self._replay(usual, size, needs, logits, range(len(specs)), specs, masks).tokens()

    def _replay(
        self,
        usual: _Graph,
        size: int,
        needs: Needs,
        hidden: Tensor,
        rows: Sequence[int],
        specs: Sequence[SampleSpec],
        masks: TokenMasks | None,
    ) -> Told:
        count = len(rows)
        places = usual.places
        host = self._staging.take(size * (1 + _COLUMNS)).numpy()
        host[:count] = rows
        if needs.draws:
            host[size:].reshape(size, _COLUMNS)[:] = table(specs, [0] * count, size)
        else:
            host[size:] = self._greedy[: size * _COLUMNS]
        self._staging.send(places.asked)
        if masks is not None:
            self._send_masks(masks, places.masks, size)
        torch.index_select(hidden, 0, places.asked[:count], out=places.wanted[:count])
        usual.graph.replay()
        return Told(specs, _to_host(places.told[:count]), None)

    def _send_masks(self, masks: TokenMasks, to: Tensor, size: int) -> None:
        """Copy masks to the place of a graph of `size` rows; rows after the last have none."""
        words = masks.words.size
        host = self._mask_staging.take(size + words).numpy()
        host[: len(masks.of)] = masks.of
        host[len(masks.of) : size] = -1
        host[size:] = masks.words.reshape(-1)
        self._mask_staging.send(to[: size + words])

    def _made(self, size: int, needs: Needs) -> tuple[Callable[[], None], _Places]:
        """What draws from up to `size` rows, and what it reads and writes."""
        device = self._device
        host = self._staging.take(size * (1 + _COLUMNS)).numpy()
        host[:size] = 0
        host[size:].reshape(size, _COLUMNS)[:] = table((), (), size)
        words = -(-self._vocab // 32)
        places = _Places(
            asked=torch.empty(size * (1 + _COLUMNS), dtype=torch.int64, device=device),
            masks=torch.full(
                (size * (1 + words) if needs.masks else 0,), -1, dtype=torch.int32, device=device
            ),
            wanted=self._wanted[:size],
            told=torch.zeros(size, dtype=torch.int64, device=device),
        )
        self._staging.send(places.asked)
        nothing = torch.zeros(size, 1, device=device)
        masks, mask_of = no_masks(size, device)
        if needs.masks:
            mask_of, masks = places.masks[:size], places.masks[size:].view(size, words)
        rows = DrawRows(
            table=places.asked[size:].view(size, _COLUMNS),
            bias_ids=nothing.int(),
            bias_values=nothing,
            history=nothing.int(),
            masks=masks,
            mask_of=mask_of,
        )

        def compute() -> None:
            draws = draw(self._head.logits(places.wanted), rows, needs)
            self._head.drawn[:size].copy_(draws.tokens)
            places.told.copy_(draws.tokens.where(draws.finite, -1))

        return compute, places


_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class _History:
    """What the requests with penalties have said: a row of counts each, which the device goes on counting."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self.counts = torch.zeros(1, vocab, dtype=torch.int32, device=device)
        self._slots: dict[str, int] = {}  # least recently used first
        self._said: dict[
            str, int
        ] = {}  # output tokens that a slot has counted or will have when the device gets there

    def slots(self, names: Sequence[str], specs: Sequence[SampleSpec]) -> list[int]:
        """Each row's slot, filled; -1: it has no penalty.

        Raises:
            EngineError: a token is pending that was not counted.
        """
        penalised = [
            (name, spec) for name, spec in zip(names, specs, strict=True) if has_penalty(spec.params)
        ]
        here = {name for name, _ in penalised}
        for name, spec in penalised:
            known = len(spec.history) - spec.prompt_len
            if self._said.get(name) != spec.output_index:
                if known != spec.output_index:
                    raise EngineError(f"request {name!r} has pending tokens that no step has counted")
                slot = self._slots.get(name)
                if slot is None:
                    slot = self._free(here)
                remember(self.counts, slot, spec.history[: spec.prompt_len], spec.history[spec.prompt_len :])
                self._slots[name] = slot
            self._slots[name] = self._slots.pop(name)  # now the last
            self._said[name] = spec.output_index + 1
        return [
            self._slots[name] if has_penalty(spec.params) else -1
            for name, spec in zip(names, specs, strict=True)
        ]

    def _free(self, here: set[str]) -> int:
        """A slot of nobody, or of a request that is not `here`, or a new one."""
        if len(self._slots) < len(self.counts):
            return len(self._slots)
        for name in self._slots:
            if name not in here:
                del self._said[name]
                return self._slots.pop(name)
        grown = torch.zeros(
            max(_LEAST_SLOTS, 2 * len(self.counts)),
            self.counts.shape[1],
            dtype=self.counts.dtype,
            device=self.counts.device,
        )
        grown[: len(self.counts)] = self.counts
        self.counts = grown
        return len(self._slots)
