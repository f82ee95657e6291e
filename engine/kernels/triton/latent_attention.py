"""Absorbed latent attention of flat rows over a paged cache: selected positions, and dense decodes.

More than 400 lines, because two forms share how rows are split and merged.

    out[t,h] = sum_c softmax_c(scale * query[t,h] . c) c[:r],   c = [latent r | rotated shared key p]

over selected[t] for a sparse row and over all c <= positions[t] for a dense one (multi-head latent attention in its absorbed
form, arXiv 2405.04434, section 2.1). All heads of a row read the same c, so a program takes up to `HEADS_AT_ONCE` of them.
Softmax is the online one of FlashAttention (arXiv 2205.14135). Long rows are split and merged by log-sum-exp
(flash-decoding), in float32 and in a fixed order; there are no atomic additions.

Two forms:

- *sparse rows*, decodes and prompts: a program is one row, one block of heads and one split of what is selected;
- *dense rows*, decodes: as many programs as the device has multiprocessors divide the splits of all rows among themselves,
  since nobody knows before a replay which rows are dense, and how long.

Sparse rows may also be those of FlashMLA's kernel, if it is installed (`latent_vendor`).

Both are there twice: for any operands in `latent_kernels`, and for FP8 latents of rank 512 on Hopper in `latent_roles`, where
some warps read while others multiply. The latter are tried at their first call, and used if they are right.

How a row is split depends on its own length and on the number of rows of the launch, which in a captured graph is that of
its bucket. So the same row has the same bits in any company and at any place of a batch of one size, and may differ in the
last bits between sizes.

FP8 latents lie as `engine.memory.layouts.LatentLayout` says. They are dequantised to the query's dtype, and the products are
of that dtype with float32 sums.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from engine.config import PAGE_SIZE
from engine.errors import EngineError
from engine.kernels.triton.compiling import compilers_at_work
from engine.kernels.triton.kernel import block, overlap
from engine.kernels.triton.latent_kernels import (
    dense_kernel,
    items_kernel,
    locate_kernel,
    merge_kernel,
    sparse_kernel,
)
from engine.kernels.triton.latent_vendor import Attend, FlashMla, Trials, installed, takes
from engine.kernels.triton.rows import Rows
from engine.memory.layouts import LatentLayout

_log = logging.getLogger(__name__)

HEADS_AT_ONCE = 64
"""Heads of one program: more do not fit a multiprocessor's registers, and wgmma takes no fewer."""
MOST_DENSE_SPLITS = 64
"""Of a dense row; `MOST_DENSE_PARTS` bounds them, too."""
MOST_DENSE_PARTS = 512
"""Dense rows of a launch times splits of each: float32 results wait to be merged, 134 MB at 128 heads of rank 512."""
MOST_SPARSE_SPLITS = 32
"""Of a sparse row."""
DENSE_SPLIT = 512
"""Positions in a split of a dense row; it doubles as often as the number of splits wants."""
SPARSE_PROGRAMS = 132
"""Sparse rows are split while the launch has no more programs than this: multiprocessors of an H100 or H200."""
MERGED_HEADS = 8
"""Heads of a dense row that a program merges."""
ROWS_AT_ONCE = 1024
"""Dense rows of a launch; a batch with more takes several."""

ROLES = True
"""Whether warps with roles are used where they can be; a benchmark turns it off to compare."""
ROLES_ERROR = 1e-2
"""Relative, of bfloat16: what a try of them may differ from the definition; 3e-3 is usual."""

VENDOR = True
"""Whether FlashMLA's kernel may be used; a benchmark turns it off to compare."""

_trials = Trials()
_LOCATED = 1024
_LOG2_E = 1.4426950408889634


class LatentShape(NamedTuple):
    """Of a program: heads, positions a step, warps, stages of loads."""

    heads: int
    keys: int
    warps: int
    stages: int


def shape_of(dtype: torch.dtype, fp8: bool) -> LatentShape:
    """What a program takes, however few heads there are. No function of the batch: a row's bits depend on it."""
    if dtype == torch.float32:
        return LatentShape(16, 16, 4, 1)
    return LatentShape(HEADS_AT_ONCE, 64 if fp8 else 32, 8, 3)


def attend_latents(
    query: Tensor, plane: Tensor, rows: Rows, selected: Tensor | None, rank: int, scale: float, max_context: int,
    singles: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of every sparse row, and of dense rows; 0 for padding.

    Args:
        query: [T, H, r + p] bfloat16 or float32, its plain part already multiplied with the head's key expansion
        plane: [num_pages, 64, token_bytes] uint8 as `LatentLayout(r, p)` lays it out, or [num_pages, 64, r + p] of
            floating point; a token's part of it is contiguous
        rows: the batch
        selected: [T, K] int32, the positions that sparse rows attend to, ascending, then -1 for none; of a row's, the first
            index_top_k are read. None: every row is dense, whatever its index_top_k
        rank: r, a multiple of 4 if the plane is uint8
        scale: of the products, positive
        max_context: no row's position reaches it
        singles: [M] int32, the dense rows to compute. None: all of them

    Returns:
        [T, H, r] in the query's dtype. Dense rows that `singles` leaves out are not written if `selected` is given
    """
    count, heads, width = query.shape
    rope = width - rank
    fp8 = plane.dtype == torch.uint8
    stored = LatentLayout(rank, rope).token_bytes if fp8 else width
    if not 0 < rank < width or (fp8 and rank % 4):
        raise EngineError(
            f"a latent of {rank} in a query of {width} numbers; a multiple of 4 below it can be"
        )
    if plane.dim() != 3 or plane.shape[1:] != (PAGE_SIZE, stored) or plane.stride(2) != 1:
        raise EngineError(
            f"a query {tuple(query.shape)} of rank {rank} needs a cache [pages, {PAGE_SIZE}, {stored}], "
            f"but it is {tuple(plane.shape)} of {plane.dtype}"
        )
    if query.stride()[1:] != (width, 1):
        raise EngineError("a row's query is contiguous")
    if scale <= 0:
        raise EngineError(f"the scale is {scale}; it must be positive")
    listed = singles is not None and selected is None
    make = query.new_zeros if listed else query.new_empty  # nobody else would write its padding
    out = make(count, heads, rank)
    call = _Call(query, plane, rows, rank, scale, out, roles_for(query, plane, rank))
    if selected is not None and count:
        vendor = vendor_for(query, plane, rank, selected.shape[1])
        if vendor is None:
            call.sparse(selected)
        else:
            call.sparse_of(vendor, selected)
    for start in range(0, count if singles is None else len(singles), ROWS_AT_ONCE):
        if singles is None:
            call.dense(None, start, min(count - start, ROWS_AT_ONCE), max_context, selected is None)
        else:
            part = singles[start : start + ROWS_AT_ONCE]
            call.dense(part, 0, len(part), max_context, selected is None)
    return call.out


def sparse_splits(count: int, blocks: int, width: int, keys: int) -> int:
    """Splits of `width` selected positions, in a launch of `count` rows and `blocks` blocks of heads each."""
    splits = 1
    while (
        splits < MOST_SPARSE_SPLITS
        and 2 * splits * count * blocks <= SPARSE_PROGRAMS
        and splits * keys < width
    ):
        splits *= 2
    return splits


def dense_splits(count: int, max_context: int) -> int:
    """The most splits of a dense row, in a launch of `count` rows of at most `max_context` positions."""
    splits = 1
    while (
        splits < MOST_DENSE_SPLITS
        and 2 * splits * count <= MOST_DENSE_PARTS
        and splits * DENSE_SPLIT < max_context
    ):
        splits *= 2
    return splits


def roles_for(query: Tensor, plane: Tensor, rank: int) -> ModuleType | None:
    """The kernels of warps with roles, if they take these operands, and are right on their device."""
    if (
        not ROLES
        or plane.dtype != torch.uint8
        or query.dtype != torch.bfloat16
        or query.device.type != "cuda"
    ):
        return None
    if (
        (rank, query.shape[2]) != (512, 576)
        or query.stride(0) % 8
        or plane.stride(0) % 16
        or plane.stride(1) % 16
    ):
        return None
    roles = _roles_of(query.device)
    if roles is None or compilers_at_work() is not None:
        return roles
    return roles if _roles_are_right(query.device, query.shape[1]) else None


@cache
def _roles_of(device: torch.device) -> ModuleType | None:
    if triton.knobs.runtime.interpret or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        return import_module("engine.kernels.triton.latent_roles")
    except (ImportError, AttributeError) as error:
        _log.warning(
            "latent attention is without warps with roles, as Triton %s: %s", triton.__version__, error
        )
        return None


@cache
def _roles_are_right(device: torch.device, heads: int) -> bool:
    """Whether they compile, and agree with the definition: they are of Triton's experimental language."""
    try:
        error = _error_of_roles(device, heads)
    except Exception as failure:
        _log.warning("latent attention is without warps with roles: %s", failure)
        return False
    if not error < ROLES_ERROR:
        _log.warning("latent attention is without warps with roles: their error is %.2g", error)
        return False
    _log.info("latent attention of %d heads is by warps with roles", heads)
    return True


def _error_of_roles(device: torch.device, heads: int) -> float:
    """The largest relative error of a dense row in two splits, a sparse one, and a short one."""
    layout, rank, scale = LatentLayout(512, 64), 512, 0.06
    draw = torch.Generator(device).manual_seed(1)
    options: dict[str, Any] = {"device": device, "generator": draw}
    count, ends, top_k = 16 * PAGE_SIZE, (1000, 900, 65), (0, 512, 2048)
    values = torch.randn(count, rank, **options).to(torch.float8_e4m3fn)
    scales = torch.rand(count, 4, **options) + 0.5
    tokens = layout.pack(values, scales, torch.randn(count, 64, **options))
    query = torch.randn(3, heads, rank + 64, **options).to(torch.bfloat16)
    table = torch.randperm(16, **options).int()[None].expand(3, 16).contiguous()
    numbers: list[Tensor] = [torch.tensor(given, dtype=torch.int32, device=device) for given in (ends, top_k)]
    rows = Rows(torch.arange(3, dtype=torch.int32, device=device), numbers[0], numbers[1], table)
    selected = torch.full((3, 512), -1, dtype=torch.int32, device=device)
    selected[1] = torch.randperm(901, **options)[:512].sort().values.int()
    selected[2, :66] = torch.arange(66, device=device).int()
    out = query.new_full((3, heads, rank), torch.nan)
    call = _Call(query, tokens.view(16, PAGE_SIZE, -1), rows, rank, scale, out, _roles_of(device))
    call.sparse(selected)
    call.dense(None, 0, 3, 2048, False)
    context = layout.unpack(tokens.view(16, PAGE_SIZE, -1)[table[0].long()].view(count, -1), torch.float32)
    worst = 0.0
    for row, chosen in enumerate(
        (torch.arange(1001, device=device), selected[1].long(), selected[2, :66].long())
    ):
        own = context[chosen]
        wanted = (query[row].float() @ own.T * scale).softmax(-1) @ own[:, :rank]
        worst = max(worst, float((out[row].float() - wanted).norm() / wanted.norm()))
    return worst if bool(out.isfinite().all()) else float("inf")


def vendor_for(query: Tensor, plane: Tensor, rank: int, width: int) -> FlashMla | None:
    """FlashMLA's kernel for the sparse rows of a batch, if it is installed, right, and faster than ours."""
    if not VENDOR or rank != 512 or compilers_at_work() is not None or not takes(query, plane, width):
        return None
    vendor = installed()
    if vendor is None:
        return None
    key = (query.device, *query.shape[:2], width)
    return vendor if _trials.passed(key, lambda: _compared(vendor, query, width)) else None


def _compared(vendor: FlashMla, like: Tensor, width: int) -> tuple[Attend, Attend]:
    """Ours and the vendor's attention of a batch of a query's shape, over a cache larger than the L2 cache."""
    device, (count, heads, wide) = like.device, like.shape
    options: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(1)}
    layout, few, times = LatentLayout(512, 64), 128 * PAGE_SIZE, 16
    values = torch.randn(few, 512, **options).to(torch.float8_e4m3fn)
    packed = layout.pack(values, torch.rand(few, 4, **options) + 0.5, torch.randn(few, 64, **options))
    plane = packed.repeat(times, 1).view(times * few // PAGE_SIZE, PAGE_SIZE, -1)
    query = torch.randn(count, heads, wide, **options).to(torch.bfloat16)
    selected = torch.randint(times * few, (count, width), **options).sort(1).values.int()
    numbers = torch.tensor([[0], [times * few - 1], [width]], dtype=torch.int32, device=device)
    request, positions, top_k = numbers.expand(3, count).contiguous()
    table = torch.randperm(len(plane), **options).int()[None]
    rows = Rows(request, positions, top_k, table)

    def ours() -> Tensor:
        out = query.new_empty(count, heads, 512)
        call = _Call(query, plane, rows, 512, 0.06, out, roles_for(query, plane, 512))
        call.sparse(selected)
        return out

    def theirs() -> Tensor:
        call = _Call(query, plane, rows, 512, 0.06, query, None)
        call.sparse_of(vendor, selected)
        return call.out

    return ours, theirs


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


class _Call:
    """One call's tensors, and its launches."""

    def __init__(
        self, query: Tensor, plane: Tensor, rows: Rows, rank: int, scale: float, out: Tensor,
        roles: ModuleType | None,
    ) -> None:  # fmt: skip
        self._query, self._plane, self._rows, self.out = query, plane, rows, out
        self._given_scale, self._scale = scale, scale * _LOG2_E
        self._heads, self._rank = query.shape[1], rank
        self._fp8 = plane.dtype == torch.uint8
        self._shape = shape_of(query.dtype, self._fp8)
        self._blocks = triton.cdiv(self._heads, self._shape.heads)
        self._roles = roles
        self._strides = (query.stride(0), plane.stride(0), plane.stride(1), rows.block_table.stride(0))

    def sparse(self, selected: Tensor) -> None:
        """All sparse rows, and padding."""
        rows, (count, width) = self._rows, selected.shape
        splits = sparse_splits(count, self._blocks, width, self._shape.keys)
        each = triton.cdiv(triton.cdiv(width, splits), self._shape.keys) * self._shape.keys
        parts, sums = self._parts(count, splits)
        grid = (count * splits * self._blocks,)
        if self._roles is not None:
            tokens = self.tokens_of(selected, False)
            self._roles.sparse_roles[grid](
                self._query, self._plane, rows.positions, rows.index_top_k, tokens, self.out, parts, sums, self._scale,
                *self._strides[:3], tokens.stride(0), width, splits, each, HEADS=self._heads, **self._roles.OPTIONS,
                **overlap(),
            )  # fmt: skip
        else:
            sparse_kernel[grid](
                self._query, self._plane, rows.block_table, rows.request, rows.positions, rows.index_top_k, selected,
                self.out, parts, sums, self._scale, *self._strides, selected.stride(0), width, splits, each,
                **self._constants(), **overlap(),
            )  # fmt: skip
        if splits > 1:
            merge_kernel[(count, self._heads)](
                parts, sums, rows.positions, rows.index_top_k, rows.positions, self.out, width, splits, each, 0,
                HEADS=self._heads, RANK=self._rank, RANK_BLOCK=block(self._rank), SPLITS=splits, MOST=0,
                SPARSE=True, LISTED=False, EVERY=False, EACH_HEADS=1, MERGED=min(splits, 8), num_warps=2, **overlap(),
            )  # fmt: skip

    def sparse_of(self, vendor: FlashMla, selected: Tensor) -> None:
        """All sparse rows, and padding, by the vendor's kernel. Its result is `out` from now on; other rows of it are 0."""
        tokens = self.tokens_of(selected, True)
        self.out = vendor.attend(self._query, self._plane, tokens, self._given_scale)

    def dense(self, listed: Tensor | None, first: int, count: int, max_context: int, every: bool) -> None:
        """The dense ones among `listed`, or among `count` rows from `first` on, or `every` one; padding, too."""
        rows = self._rows
        splits = dense_splits(count, max_context)
        parts, sums = self._parts(count, splits)
        source = rows.positions if listed is None else listed
        programs = min(_multiprocessors(self.out.device), count * splits * self._blocks)
        which = {
            "ROWS": block(count), "MOST": splits, "BASE": DENSE_SPLIT, "LISTED": listed is not None, "EVERY": every
        }  # fmt: skip
        if self._roles is not None:
            items = torch.empty(1 + count * splits, 4, dtype=torch.int32, device=self.out.device)
            items_kernel[(1,)](
                rows.positions, rows.index_top_k, source, items, count, first, **which, **overlap()
            )
            self._roles.dense_roles[(programs,)](
                self._query, self._plane, rows.block_table, rows.request, items, self.out, parts, sums, self._scale,
                *self._strides, HEADS=self._heads, **self._roles.OPTIONS, **overlap(),
            )  # fmt: skip
        else:
            dense_kernel[(programs,)](
                self._query, self._plane, rows.block_table, rows.request, rows.positions, rows.index_top_k, source,
                self.out, parts, sums, self._scale, *self._strides, count, first, **which, **self._constants(), **overlap(),
            )  # fmt: skip
        if splits > 1:
            # Mostly there is nothing to merge: few programs end sooner.
            merge_kernel[(count, triton.cdiv(self._heads, MERGED_HEADS))](
                parts, sums, rows.positions, rows.index_top_k, source, self.out, 0, splits, DENSE_SPLIT, first,
                HEADS=self._heads, RANK=self._rank, RANK_BLOCK=block(self._rank), SPLITS=splits, MOST=splits,
                SPARSE=False, LISTED=listed is not None, EVERY=every, EACH_HEADS=MERGED_HEADS, MERGED=min(splits, 16), num_warps=4, **overlap(),
            )  # fmt: skip

    def tokens_of(self, selected: Tensor, every: bool) -> Tensor:
        """Where the selected positions [T, K] lie: page times 64 plus offset.

        The complement of the request's first token, which is below 0, stands for none. Rows that are not sparse are
        left as they are. With `every`, -1 stands for none, and the other rows have nothing else.
        """
        rows, (count, width) = self._rows, selected.shape
        tokens = torch.empty(count, triton.cdiv(width, 4) * 4, dtype=torch.int32, device=selected.device)
        locate_kernel[(count, triton.cdiv(width, _LOCATED))](
            rows.block_table, rows.request, rows.positions, rows.index_top_k, selected, tokens, rows.block_table.stride(0),
            selected.stride(0), tokens.stride(0), width, SIZE=_LOCATED, EVERY=every, num_warps=4, **overlap(),
        )  # fmt: skip
        return tokens[:, :width]

    def _constants(self) -> dict[str, Any]:
        """What both forms are compiled for."""
        shape, rope = self._shape, self._query.shape[2] - self._rank
        return {
            "HEADS": self._heads, "RANK": self._rank, "ROPE": rope, "RANK_BLOCK": max(16, block(self._rank)),
            "ROPE_BLOCK": max(16, block(rope)), "HEADS_BLOCK": shape.heads, "KEYS": shape.keys, "FP8": self._fp8,
            "APART": self._query.dtype == torch.bfloat16, "num_warps": shape.warps, "num_stages": shape.stages,
        }  # fmt: skip

    def _parts(self, count: int, splits: int) -> tuple[Tensor, Tensor]:
        """Room for what the splits of rows leave: outputs [rows, splits, H, r], and the log2 of each one's sum."""
        held = count if splits > 1 else 0
        options: dict[str, Any] = {"dtype": torch.float32, "device": self.out.device}
        return (
            torch.empty(held, splits, self._heads, self._rank, **options),
            torch.empty(held, splits, self._heads, **options),
        )
