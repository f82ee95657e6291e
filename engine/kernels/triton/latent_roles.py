"""Absorbed latent attention over FP8 latents by warps with roles: for Hopper, in Gluon.

More than 400 lines, because both forms, sparse and dense, are of the same three roles.

The formula and its parts are those of `engine.kernels.triton.latent_attention`, which decides when this is used. There,
all warps read a tile of the cache, dequantise, multiply and weigh, one after the other. Here a program has three groups of
four warps, for 64 heads:

- one *fills*: it reads tiles of 64 tokens and writes them as bfloat16 into one of two buffers of shared memory;
- one *weighs*: it multiplies queries with the tile, takes the softmax's weights, and adds the left half of the result;
- one *adds* the right half, with the same weights, while the one before goes on to the next tile.

A buffer is handed over and back by a barrier each: full and empty; the weights, too: weighed and added. (FlashMLA,
github.com/deepseek-ai/FlashMLA, divides the work of its sparse decodes so, too; no code of it is here.)

Only latents of rank 512 with a shared key of 64 fit: queries 72 KB, two tiles 144 KB, weights 8 KB of 227.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from engine.kernels.triton.kernel import Kernel

HEADS_AT_ONCE = 64
"""Heads of a program."""
KEYS = 64
"""Tokens of a tile."""
RANK = 512
ROPE = 64
OPTIONS: dict[str, Any] = {
    "CHUNK": 8, "DEPTH": 4, "TOUCH": True, "READERS": 4, "ADDING": 168, "REGISTERS": 128, "num_warps": 4
}  # fmt: skip
"""Of a launch: tokens that the filling warps hold as one chunk, chunks on their way at once, whether they ask the L2 cache
for the tile after, how many such warps there are, and registers of a thread: of those that add, and of those that fill."""

_H = gl.constexpr(HEADS_AT_ONCE)
_K = gl.constexpr(KEYS)
_R = gl.constexpr(RANK)
_HALF = gl.constexpr(RANK // 2)
_P = gl.constexpr(ROPE)
_PAGE = gl.constexpr(64)
_SPARSE = gl.constexpr(True)
_meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name since Triton 3.7, and before


class _RolesKernel(Kernel, GluonJITFunction):  # type: ignore[misc]
    """A kernel in Gluon that `engine.kernels.triton.compiling` can compile without a launch."""


@gluon.jit
def _turn(EARLY: gl.constexpr) -> None:
    """As `engine.kernels.triton.kernel.turn`."""
    if EARLY:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def _touch(place: gl.tensor) -> None:
    """Ask the L2 cache for the lines at these addresses; nothing waits for them."""
    gl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [place.to(gl.int64)], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _tokens(source: gl.tensor, at: gl.tensor, end: gl.tensor, SPARSE: gl.constexpr) -> gl.tensor:
    """Page times 64 plus offset of the tokens `at`, from the row's tokens or the request's page table.

    The bitwise complement stands for what weighs nothing. Beyond the end, the last is read again.
    """
    at = gl.minimum(at, end - 1)
    if SPARSE:
        token = gl.load(source + at)
        token = gl.where(token < 0, -1 - token, token)
    else:
        token = gl.load(source + at // _PAGE) * _PAGE + at % _PAGE
    return token


@gluon.jit
def _weighs(source: gl.tensor, at: gl.tensor, end: gl.tensor, SPARSE: gl.constexpr) -> gl.tensor:
    """Whether there is a token at `at`."""
    there = at < end
    if SPARSE:
        there = gl.load(source + at, mask=there, other=-1) >= 0
    return there


@gluon.jit
def _place(plane: gl.tensor, token: gl.tensor, page_stride: gl.tensor, token_stride: gl.tensor) -> gl.tensor:
    return plane + ((token // _PAGE).to(gl.int64) * page_stride + token % _PAGE * token_stride)


@gluon.jit
def _read(
    plane: gl.tensor,
    token: gl.tensor,
    page_stride: gl.tensor,
    token_stride: gl.tensor,
    values: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor]:
    """Numbers [CHUNK, 4, 32], four in each int32, laid out as `values`, and scales [CHUNK, 4] of tokens [CHUNK]."""
    scales_of: gl.constexpr = gl.SliceLayout(2, values)
    b = gl.arange(0, 4, layout=gl.SliceLayout(0, scales_of))
    d = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, values)))
    columns = gl.expand_dims(gl.expand_dims(b, 0), 2) * 32 + gl.expand_dims(gl.expand_dims(d, 0), 1)
    at = _place(plane, token, page_stride, token_stride)
    scales = gl.load((at + _R).to(gl.pointer_type(gl.float32), bitcast=True)[:, None] + b[None, :])
    at = at.to(gl.pointer_type(gl.int32), bitcast=True)
    return gl.load(gl.expand_dims(gl.expand_dims(at, 1), 2) + columns), scales


@gluon.jit
def _widen(raw: gl.tensor, scales: gl.tensor) -> gl.tensor:
    """Numbers times scales in bfloat16, two in each int32: [CHUNK, 256].

    In assembly, since a compiler that sees single bytes of what is on its way takes a register for each.
    """
    low, high = gl.inline_asm_elementwise(
        """
        {
            .reg .b16 a<2>, h<4>;
            .reg .b32 w<2>;
            .reg .f32 f<4>;
            mov.b32 {a0, a1}, $2;
            cvt.rn.f16x2.e4m3x2 w0, a0;
            cvt.rn.f16x2.e4m3x2 w1, a1;
            mov.b32 {h0, h1}, w0;
            mov.b32 {h2, h3}, w1;
            cvt.f32.f16 f0, h0;
            cvt.f32.f16 f1, h1;
            cvt.f32.f16 f2, h2;
            cvt.f32.f16 f3, h3;
            mul.f32 f0, f0, $3;
            mul.f32 f1, f1, $3;
            mul.f32 f2, f2, $3;
            mul.f32 f3, f3, $3;
            cvt.rn.bf16x2.f32 $0, f1, f0;
            cvt.rn.bf16x2.f32 $1, f3, f2;
        }
        """,
        "=r,=r,r,f", [raw, gl.expand_dims(scales, 2)], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    return gl.reshape(gl.join(low, high), [raw.shape[0], _R // 2])


@gluon.jit
def _fill_item(
    k: gl.shared_memory_descriptor, k_rope: gl.shared_memory_descriptor, bias: gl.shared_memory_descriptor, full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor, plane: gl.tensor, source: gl.tensor, begin: gl.tensor,
    end: gl.tensor, page_stride: gl.tensor, token_stride: gl.tensor, done: gl.tensor, CHUNK: gl.constexpr,
    DEPTH: gl.constexpr, TOUCH: gl.constexpr, WARPS: gl.constexpr, SPARSE: gl.constexpr,
) -> None:  # fmt: skip
    """The tiles from `begin` to `end`; `done` tiles were filled before.

    `DEPTH` chunks are on their way while one is dequantised. Lanes lie along tokens, so that their stores meet in no bank.
    """
    values: gl.constexpr = gl.BlockedLayout([1, 1, 4], [8, 1, 4], [1, WARPS, 1], [0, 2, 1])
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS // 2, 2], [0, 1])
    lines_of: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [WARPS, 1], [1, 0])
    CHUNKS: gl.constexpr = _K // CHUNK
    i = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, gl.SliceLayout(2, values)))
    r = gl.arange(0, _K, layout=gl.SliceLayout(1, flat))
    p = gl.arange(0, _P, layout=gl.SliceLayout(0, flat))
    n = gl.arange(0, _K, layout=gl.SliceLayout(1, lines_of))
    pairs = k._reinterpret(gl.int32, [2, _K, _R // 2], gl.NVMMASharedLayout(128, 32))
    lines = gl.minimum(gl.arange(0, 8, layout=gl.SliceLayout(0, lines_of)) * 128, 640)
    m = gl.arange(0, _K, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    if end > begin:
        kept = _weighs(source, begin + m, end, SPARSE)
        tiles = (end - begin + (_K - 1)) // _K
        token_rope = _tokens(source, begin + r, end, SPARSE)
        ahead = _tokens(source, begin + _K + n, end, SPARSE)
        raws = ()
        scales = ()
        for c in gl.static_range(DEPTH):
            token = _tokens(source, begin + c * CHUNK + i, end, SPARSE)
            raw, scale = _read(plane, token, page_stride, token_stride, values)
            raws = raws + (raw,)  # type: ignore[assignment] # noqa: RUF005
            scales = scales + (scale,)  # type: ignore[assignment] # noqa: RUF005
        token = _tokens(source, begin + DEPTH * CHUNK + i, end, SPARSE)
        for j in range(tiles):
            start = begin + j * _K
            buffer = (done + j) % 2
            place = _place(plane, token_rope, page_stride, token_stride) + (_R + 16)
            rotated = gl.load(place.to(gl.pointer_type(gl.bfloat16), bitcast=True)[:, None] + p[None, :])
            token_rope = _tokens(source, start + _K + r, end, SPARSE)
            if TOUCH:
                ahead_place = _place(plane, ahead, page_stride, token_stride)
                ahead = _tokens(source, start + 2 * _K + n, end, SPARSE)
                _touch(ahead_place[:, None] + lines[None, :])
            mbarrier.wait(empty.index(buffer), (((done + j) // 2) & 1) ^ 1)
            bias.index(buffer).store(gl.where(kept, 0.0, float("-inf")))
            kept = _weighs(source, start + _K + m, end, SPARSE)
            for c in gl.static_range(CHUNKS):
                pairs.index(buffer).slice(c * CHUNK, CHUNK, 0).store(_widen(raws[0], scales[0]))  # type: ignore[misc]
                raw, scale = _read(plane, token, page_stride, token_stride, values)
                token = _tokens(source, start + (c + DEPTH + 1) * CHUNK + i, end, SPARSE)
                raws = raws[1:] + (raw,)  # type: ignore[assignment] # noqa: RUF005
                scales = scales[1:] + (scale,)  # type: ignore[assignment] # noqa: RUF005
            k_rope.index(buffer).store(rotated)
            fence_async_shared()
            _meet()
            mbarrier.arrive(full.index(buffer), count=1)


@gluon.jit
def _weigh_item(
    q: gl.shared_memory_descriptor, q_rope: gl.shared_memory_descriptor, k: gl.shared_memory_descriptor,
    k_rope: gl.shared_memory_descriptor, bias: gl.shared_memory_descriptor, weights: gl.shared_memory_descriptor, factors: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor, empty: gl.shared_memory_descriptor, weighed: gl.shared_memory_descriptor,
    added: gl.shared_memory_descriptor, query: gl.tensor, out: gl.tensor, parts: gl.tensor,
    sums: gl.tensor, begin: gl.tensor, end: gl.tensor, head: gl.tensor, row: gl.tensor, alone: gl.tensor,
    scale: gl.tensor, done: gl.tensor, items: gl.tensor, HEADS: gl.constexpr,
) -> None:  # fmt: skip
    """Weights of one row's heads from `head` on, from `begin` to `end`, and the left half of the result."""
    load_of: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    rope_of: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    s_of: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    o_of: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    h = head + gl.arange(0, _H, layout=gl.SliceLayout(1, load_of))
    for c in gl.static_range(4):
        d = c * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, load_of))
        numbers = gl.load(query + h[:, None] * (_R + _P) + d[None, :], mask=(h < HEADS)[:, None], other=0.0)
        q.slice(c * 128, 128, 1).store(numbers)
    h_rope = head + gl.arange(0, _H, layout=gl.SliceLayout(1, rope_of))
    p = _R + gl.arange(0, _P, layout=gl.SliceLayout(0, rope_of))
    q_rope.store(
        gl.load(query + h_rope[:, None] * (_R + _P) + p[None, :], mask=(h_rope < HEADS)[:, None], other=0.0)
    )
    fence_async_shared()
    _meet()

    top = gl.full([_H], float("-inf"), gl.float32, layout=gl.SliceLayout(1, s_of))
    total = gl.zeros([_H], gl.float32, layout=gl.SliceLayout(1, s_of))
    acc = gl.zeros([_H, _HALF], gl.float32, layout=o_of)
    tiles = (end - begin + (_K - 1)) // _K
    phase = done + items
    for j in range(tiles):
        buffer = (done + j) % 2
        mbarrier.wait(full.index(buffer), ((done + j) // 2) & 1)
        s = warpgroup_mma(
            q_rope, k_rope.index(buffer).permute((1, 0)), gl.zeros([_H, _K], gl.float32, layout=s_of), use_acc=False,
            is_async=True,
        )  # fmt: skip
        s = warpgroup_mma(q, k.index(buffer).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        s = s * scale + bias.index(buffer).load(gl.SliceLayout(0, s_of))[None, :]
        highest = gl.maximum(top, gl.max(s, 1))
        base = gl.where(highest == float("-inf"), 0.0, highest)
        wide = gl.exp2(s - base[:, None])
        shrink = gl.exp2(top - base)
        total = total * shrink + gl.sum(wide, 1)
        top = highest
        mbarrier.wait(added, ((phase + j) & 1) ^ 1)
        weights.store(wide.to(gl.bfloat16))
        factors.store(shrink)
        fence_async_shared()
        _meet()
        mbarrier.arrive(weighed, count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, o_of))[:, None]
        acc = warpgroup_mma(weights, k.index(buffer).slice(0, _HALF, 1), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        _meet()
        mbarrier.arrive(empty.index(buffer), count=1)

    divisor = gl.where(total == 0.0, 1.0, total)
    mbarrier.wait(added, ((phase + tiles) & 1) ^ 1)
    factors.store(divisor)
    _meet()
    mbarrier.arrive(weighed, count=1)
    result = acc / gl.convert_layout(divisor, gl.SliceLayout(1, o_of))[:, None]
    h_out = head + gl.arange(0, _H, layout=gl.SliceLayout(1, o_of))
    d_out = gl.arange(0, _HALF, layout=gl.SliceLayout(0, o_of))
    place = (row * HEADS + h_out)[:, None] * _R + d_out[None, :]
    if alone:
        gl.store(out + place, result.to(gl.bfloat16), mask=(h_out < HEADS)[:, None])
    else:
        gl.store(parts + place, result, mask=(h_out < HEADS)[:, None])
        h_sum = head + gl.arange(0, _H, layout=gl.SliceLayout(1, s_of))
        gl.store(sums + row * HEADS + h_sum, top + gl.log2(total), mask=h_sum < HEADS)


@gluon.jit
def _add_item(
    k: gl.shared_memory_descriptor, weights: gl.shared_memory_descriptor, factors: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor, weighed: gl.shared_memory_descriptor, added: gl.shared_memory_descriptor,
    out: gl.tensor, parts: gl.tensor, begin: gl.tensor, end: gl.tensor, head: gl.tensor, row: gl.tensor,
    alone: gl.tensor, done: gl.tensor, items: gl.tensor, HEADS: gl.constexpr,
) -> None:  # fmt: skip
    """The right half of the result."""
    o_of: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    acc = gl.zeros([_H, _HALF], gl.float32, layout=o_of)
    tiles = (end - begin + (_K - 1)) // _K
    phase = done + items
    for j in range(tiles):
        buffer = (done + j) % 2
        mbarrier.wait(weighed, (phase + j) & 1)
        acc = acc * factors.load(gl.SliceLayout(1, o_of))[:, None]
        acc = warpgroup_mma(weights, k.index(buffer).slice(_HALF, _HALF, 1), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        _meet()
        mbarrier.arrive(added, count=1)
        mbarrier.arrive(empty.index(buffer), count=1)
    mbarrier.wait(weighed, (phase + tiles) & 1)
    result = acc / factors.load(gl.SliceLayout(1, o_of))[:, None]
    _meet()
    mbarrier.arrive(added, count=1)
    h_out = head + gl.arange(0, _H, layout=gl.SliceLayout(1, o_of))
    d_out = _HALF + gl.arange(0, _HALF, layout=gl.SliceLayout(0, o_of))
    place = (row * HEADS + h_out)[:, None] * _R + d_out[None, :]
    if alone:
        gl.store(out + place, result.to(gl.bfloat16), mask=(h_out < HEADS)[:, None])
    else:
        gl.store(parts + place, result, mask=(h_out < HEADS)[:, None])


@gluon.jit
def _buffers() -> gl.tuple:
    """Shared memory: queries, tiles, weights with the factors of sums, and barriers of the tiles and the weights."""
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q = gl.allocate_shared_memory(gl.bfloat16, [_H, _R], wide)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [_H, _P], wide)
    k = gl.allocate_shared_memory(gl.bfloat16, [2, _K, _R], wide)
    k_rope = gl.allocate_shared_memory(gl.bfloat16, [2, _K, _P], wide)
    weights = gl.allocate_shared_memory(gl.bfloat16, [_H, _K], wide)
    bias = gl.allocate_shared_memory(gl.float32, [2, _K], plain)
    factors = gl.allocate_shared_memory(gl.float32, [_H], plain)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    weighed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    added = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for n in gl.static_range(2):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(empty.index(n), count=2)
    mbarrier.init(weighed, count=1)
    mbarrier.init(added, count=1)
    return q, q_rope, k, k_rope, bias, weights, factors, full, empty, weighed, added


@_RolesKernel
def sparse_roles(
    query: gl.tensor, plane: gl.tensor, positions: gl.tensor, index_top_k: gl.tensor, tokens: gl.tensor,
    out: gl.tensor, parts: gl.tensor, sums: gl.tensor, scale: gl.tensor, query_row: gl.tensor,
    page_stride: gl.tensor, token_stride: gl.tensor, tokens_row: gl.tensor, width: gl.tensor, splits: gl.tensor,
    each: gl.tensor, HEADS: gl.constexpr,
    CHUNK: gl.constexpr, DEPTH: gl.constexpr, TOUCH: gl.constexpr, READERS: gl.constexpr, ADDING: gl.constexpr,
    REGISTERS: gl.constexpr, EARLY: gl.constexpr,
) -> None:  # fmt: skip
    """One sparse row, one block of heads, one split, as `sparse_kernel` of latent_kernels."""
    _turn(EARLY)
    BLOCKS: gl.constexpr = (HEADS + _H - 1) // _H
    program = gl.program_id(0)
    head = program % BLOCKS * _H
    part = program // BLOCKS % splits
    t = program // BLOCKS // splits
    length = gl.maximum(gl.load(positions + t) + 1, 0)
    chosen = gl.load(index_top_k + t)
    sparse = (length == 0) | (chosen > 0)
    length = gl.minimum(gl.minimum(chosen, width), length)
    begin = part * each
    if sparse & ((begin < length) | (part == 0)):
        end = gl.minimum(begin + each, length)
        alone = length <= each
        row = gl.where(alone, t, t * splits + part).to(gl.int64)
        own = tokens + t.to(gl.int64) * tokens_row
        q, q_rope, k, k_rope, bias, weights, factors, full, empty, weighed, added = _buffers()
        none = program * 0
        gl.warp_specialize(
            [
                (
                    _weigh_item,
                    (
                        q, q_rope, k, k_rope, bias, weights, factors, full, empty, weighed, added,
                        query + t.to(gl.int64) * query_row, out, parts, sums, begin, end, head, row, alone, scale,
                        none, none, HEADS,
                    ),
                ),
                (
                    _add_item,
                    (
                        k, weights, factors, empty, weighed, added, out, parts, begin, end, head, row, alone, none, none,
                        HEADS,
                    ),
                ),
                (
                    _fill_item,
                    (
                        k, k_rope, bias, full, empty, plane, own, begin, end, page_stride, token_stride,
                        none, CHUNK, DEPTH, TOUCH, READERS, _SPARSE,
                    ),
                ),
            ],
            [4, READERS],
            [ADDING, REGISTERS],
        )  # fmt: skip


@gluon.jit
def _fill_dense(
    k: gl.shared_memory_descriptor, k_rope: gl.shared_memory_descriptor, bias: gl.shared_memory_descriptor, full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor, plane: gl.tensor, block_table: gl.tensor, request: gl.tensor,
    items: gl.tensor, first: gl.tensor, page_stride: gl.tensor, token_stride: gl.tensor, table_row: gl.tensor,
    BLOCKS: gl.constexpr, CHUNK: gl.constexpr, DEPTH: gl.constexpr, TOUCH: gl.constexpr, WARPS: gl.constexpr,
) -> None:  # fmt: skip
    """The reading warps of a program's share of the dense items."""
    done = first * 0
    for item in range(first, gl.load(items) * BLOCKS, gl.num_programs(0)):
        entry = items + 4 + item // BLOCKS * 4
        t = gl.load(entry)
        begin = gl.load(entry + 2)
        end = gl.load(entry + 3)
        pages = block_table + gl.load(request + t).to(gl.int64) * table_row
        _fill_item(
            k, k_rope, bias, full, empty, plane, pages, begin, end, page_stride, token_stride, done, CHUNK, DEPTH,
            TOUCH, WARPS, False,
        )  # fmt: skip
        done += (end - begin + (_K - 1)) // _K


@gluon.jit
def _weigh_dense(
    q: gl.shared_memory_descriptor, q_rope: gl.shared_memory_descriptor, k: gl.shared_memory_descriptor,
    k_rope: gl.shared_memory_descriptor, bias: gl.shared_memory_descriptor, weights: gl.shared_memory_descriptor, factors: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor, empty: gl.shared_memory_descriptor, weighed: gl.shared_memory_descriptor,
    added: gl.shared_memory_descriptor, query: gl.tensor, items: gl.tensor, out: gl.tensor, parts: gl.tensor,
    sums: gl.tensor, first: gl.tensor, scale: gl.tensor, query_row: gl.tensor, HEADS: gl.constexpr,
) -> None:  # fmt: skip
    """Weights and left halves of a program's share of the dense items."""
    BLOCKS: gl.constexpr = (HEADS + _H - 1) // _H
    done = first * 0
    before = first * 0
    for item in range(first, gl.load(items) * BLOCKS, gl.num_programs(0)):
        entry = items + 4 + item // BLOCKS * 4
        t = gl.load(entry)
        part = gl.load(entry + 1)
        begin = gl.load(entry + 2)
        end = gl.load(entry + 3)
        row = gl.where(part < 0, t, part).to(gl.int64)
        _weigh_item(
            q, q_rope, k, k_rope, bias, weights, factors, full, empty, weighed, added, query + t.to(gl.int64) * query_row,
            out, parts, sums, begin, end, item % BLOCKS * _H, row, part < 0, scale, done, before, HEADS,
        )  # fmt: skip
        done += (end - begin + (_K - 1)) // _K
        before += 1


@gluon.jit
def _add_dense(
    k: gl.shared_memory_descriptor, weights: gl.shared_memory_descriptor, factors: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor, weighed: gl.shared_memory_descriptor, added: gl.shared_memory_descriptor,
    items: gl.tensor, out: gl.tensor, parts: gl.tensor, first: gl.tensor, HEADS: gl.constexpr,
) -> None:  # fmt: skip
    """Right halves of a program's share of the dense items."""
    BLOCKS: gl.constexpr = (HEADS + _H - 1) // _H
    done = first * 0
    before = first * 0
    for item in range(first, gl.load(items) * BLOCKS, gl.num_programs(0)):
        entry = items + 4 + item // BLOCKS * 4
        t = gl.load(entry)
        part = gl.load(entry + 1)
        begin = gl.load(entry + 2)
        end = gl.load(entry + 3)
        row = gl.where(part < 0, t, part).to(gl.int64)
        _add_item(
            k, weights, factors, empty, weighed, added, out, parts, begin, end, item % BLOCKS * _H, row, part < 0, done,
            before, HEADS,
        )  # fmt: skip
        done += (end - begin + (_K - 1)) // _K
        before += 1


@_RolesKernel
def dense_roles(
    query: gl.tensor, plane: gl.tensor, block_table: gl.tensor, request: gl.tensor, items: gl.tensor, out: gl.tensor,
    parts: gl.tensor, sums: gl.tensor, scale: gl.tensor, query_row: gl.tensor, page_stride: gl.tensor,
    token_stride: gl.tensor, table_row: gl.tensor, HEADS: gl.constexpr, CHUNK: gl.constexpr, DEPTH: gl.constexpr,
    TOUCH: gl.constexpr, READERS: gl.constexpr, ADDING: gl.constexpr, REGISTERS: gl.constexpr, EARLY: gl.constexpr,
) -> None:  # fmt: skip
    """A share of the items that `items_kernel` of latent_kernels wrote, times blocks of heads."""
    _turn(EARLY)
    BLOCKS: gl.constexpr = (HEADS + _H - 1) // _H
    first = gl.program_id(0)
    q, q_rope, k, k_rope, bias, weights, factors, full, empty, weighed, added = _buffers()
    gl.warp_specialize(
        [
            (
                _weigh_dense,
                (
                    q, q_rope, k, k_rope, bias, weights, factors, full, empty, weighed, added, query, items, out, parts, sums,
                    first, scale, query_row, HEADS,
                ),
            ),
            (
                _add_dense,
                (k, weights, factors, empty, weighed, added, items, out, parts, first, HEADS),
            ),
            (
                _fill_dense,
                (
                    k, k_rope, bias, full, empty, plane, block_table, request, items, first, page_stride, token_stride,
                    table_row, BLOCKS, CHUNK, DEPTH, TOUCH, READERS,
                ),
            ),
        ],
        [4, READERS],
        [ADDING, REGISTERS],
    )  # fmt: skip
