"""Runs a model's whole step in one native call: decodes, drafts, chunks of prompts.

The C code (`engine/kernels/native/step.c`) computes what `GqaModel.forward` does. It keeps the residual stream in
float32, where torch rounds to bfloat16, so results differ from torch's by these roundings.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.batch import Batch
from engine.attention.indexer import KEY_NORM_EPS
from engine.kernels import native
from engine.kernels.native.packed import Descriptor, PackedWeight
from engine.layers.linear import Held
from engine.layers.rope import RotaryTable
from engine.memory.arena import Arena
from engine.memory.planes import PagedCache
from engine.memory.quantised import GROUP, Quantised, quantise_8bit
from engine.models.gqa.config import GqaConfig
from engine.models.gqa.layer import GqaLayer
from engine.protocol import IndexerInfo

FEW_ROWS = 32
"""A request with at most so many rows in a step costs as much as so many lone rows; with more it is a chunk."""

_MATRICES = ("qkv", "o", "gate_up", "down", "index_query", "index_key", "index_weights")
_VECTORS = (
    "input_norm", "post_norm", "qkv_bias", "o_bias", "gate_up_bias", "down_bias", "q_norm", "k_norm",
    "key_norm_weight", "key_norm_bias",
)  # fmt: skip
_ROWS = ("token_ids", "positions", "request", "index_top_k", "block_table", "out", "flaws")
_ADAPTER = ("qkv_down", "qkv_up", "o_down", "o_up")


class _Layer(ctypes.Structure):
    """`struct dsa_layer` of step.h."""

    _fields_ = (
        *((name, Descriptor) for name in (*_MATRICES, *_ADAPTER)),
        *((name, ctypes.c_void_p) for name in (*_VECTORS, "kv_plane", "index_plane")),
        ("window", ctypes.c_int64),
    )


class _Model(ctypes.Structure):
    """`struct dsa_model` of step.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("layers", "embed", "norm", "cos", "sin", "index_cos", "index_sin")
        ),
        ("page_stride", ctypes.c_int64),
        ("index_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("num_layers", "hidden", "intermediate", "heads", "kv_heads")),
        *((name, ctypes.c_int32) for name in ("head_dim", "index_heads", "index_dim", "index_rope")),
        ("adapter_rank", ctypes.c_int32),
        ("integers", ctypes.c_int32),
        ("integer_keys", ctypes.c_int32),
        ("alike", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("key_norm_eps", ctypes.c_float),
    )


class _Step(ctypes.Structure):
    """`struct dsa_step` of step.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _ROWS),
        ("pages", ctypes.c_int64),
        ("rows", ctypes.c_int32),
        ("longest", ctypes.c_int32),
    )


class Wired(Protocol):
    """The attributes of a model that `NativeStep` reads."""

    config: GqaConfig
    indexer: IndexerInfo | None
    embed: Held
    head_weight: Held
    norm: Tensor
    layers: list[GqaLayer]
    rotary: RotaryTable
    index_rotary: RotaryTable | None
    batch_invariant: bool


@dataclass(frozen=True)
class _Laid:
    """The model's description for C, with the addresses of one cache."""

    storage: int  # the address where the cache begins
    layers: ctypes.Array[_Layer]
    model: _Model


class NativeStep:
    """The native form of one model."""

    def __init__(self, model: Wired, library: ctypes.CDLL) -> None:
        """Describe for C a `model` that `of` has accepted."""
        self._model = model
        self._library = library
        self._library.dsa_step_scratch.restype = ctypes.c_int64
        self._kept: list[Any] = []  # keeps alive the float32 copies that the C code reads
        self._adapters = _pack_adapters(model)
        self._laid: _Laid | None = None
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @classmethod
    def of(cls, model: Wired) -> NativeStep | None:
        """Return the native form; None if there is no library, or if it cannot compute this model."""
        library = native.library()
        c, indexer = model.config, model.indexer
        packed = isinstance(model.embed, PackedWeight)
        whole = c.head_dim % 2 == 0 and not any(
            size % 32 for size in (c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim)
        )
        fits = indexer is None or (indexer.head_dim <= 512 and indexer.head_dim % 4 == 0)
        return cls(model, library) if library is not None and packed and whole and fits else None

    def forward(self, batch: Batch, cache: PagedCache) -> Tensor:
        """Compute the batch's rows and write them to the cache. Return the hidden states, [T, E] bfloat16."""
        laid = self._laid
        storage = cache.plane(0, "kv").data_ptr()
        if laid is None or laid.storage != storage:
            self._laid = laid = self._lay(cache, storage)
        rows = len(batch.token_ids)
        longest = int(batch.positions.max()) + 1
        needed = self._library.dsa_step_scratch(ctypes.byref(laid.model), rows, longest)
        if needed + 64 > len(self._scratch):
            self._scratch = torch.empty(needed + needed // 4 + 64, dtype=torch.uint8)
        out = torch.empty(rows, self._model.config.hidden_size, dtype=torch.bfloat16)
        step = _Step(
            batch.token_ids.data_ptr(),
            batch.positions.data_ptr(),
            batch.request.data_ptr(),
            batch.index_top_k.data_ptr(),
            batch.block_table.data_ptr(),
            out.data_ptr(),
            batch.flaws.data_ptr(),
            batch.block_table.shape[1],
            rows,
            longest,
        )
        at = self._scratch.data_ptr()
        self._library.dsa_step(ctypes.byref(laid.model), ctypes.byref(step), ctypes.c_void_p(at + -at % 64))
        return out

    def _lay(self, cache: PagedCache, storage: int) -> _Laid:
        m, c, indexer = self._model, self._model.config, self._model.indexer
        self._kept.clear()
        layers = (_Layer * c.num_layers)(*(self._layer(i, cache) for i in range(c.num_layers)))
        kv = cache.plane(0, "kv")
        assert isinstance(m.embed, PackedWeight)
        cos, sin = self._rotation(m.rotary)
        index_cos, index_sin = (0, 0) if m.index_rotary is None else self._rotation(m.index_rotary)
        keys = None if indexer is None else cache.plane(0, "index_key")
        model = _Model(
            ctypes.addressof(layers),
            ctypes.addressof(m.embed.descriptor),
            self._float(m.norm),
            cos,
            sin,
            index_cos,
            index_sin,
            kv.stride(0) * kv.element_size(),
            0 if keys is None else keys.stride(0) * keys.element_size(),
            c.num_layers,
            c.hidden_size,
            c.intermediate_size,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            0 if indexer is None else indexer.num_heads,
            0 if indexer is None else indexer.head_dim,
            0 if indexer is None else indexer.rope_dim,
            0 if indexer is None else -(-indexer.adapter_rank // GROUP) * GROUP,
            int(any(_packed(part).needs_integers for layer in m.layers for part in _products(layer))),
            int(keys is not None and keys.dtype is torch.uint8),
            int(m.batch_invariant),
            c.rms_norm_eps,
            KEY_NORM_EPS,
        )
        return _Laid(storage, layers, model)

    def _layer(self, i: int, cache: PagedCache) -> _Layer:
        layer = self._model.layers[i]
        indexer = None if layer.indexer is None else layer.indexer.weights
        matrices = [_packed(part).descriptor for part in _products(layer)]
        if indexer is None:
            matrices += [Descriptor()] * 3
        matrices += [part.descriptor for part in self._adapters[i]] or [Descriptor()] * len(_ADAPTER)
        vectors = (
            layer.input_norm, layer.post_norm, layer.qkv_bias, layer.o_bias, layer.gate_up_bias, layer.down_bias,
            layer.q_norm, layer.k_norm,
            *((None, None) if indexer is None else (indexer.k_norm_weight, indexer.k_norm_bias)),
        )  # fmt: skip
        return _Layer(
            *matrices,
            *(0 if vector is None else self._float(vector) for vector in vectors),
            cache.plane(i, "kv").data_ptr(),
            0 if indexer is None else cache.plane(i, "index_key").data_ptr(),
            layer.window or 0,
        )

    def _float(self, tensor: Tensor) -> int:
        """Make and keep a float32 copy; return its address."""
        copy = tensor.float().contiguous()
        self._kept.append(copy)
        return copy.data_ptr()

    def _rotation(self, table: RotaryTable) -> tuple[int, int]:
        cos, sin = table.all()
        return self._float(cos), self._float(sin)


def _pack_adapters(model: Wired) -> list[list[PackedWeight]]:
    """Pack each layer's adapter, in the order of `_ADAPTER`; empty without an adapter.

    Beside weights of 4 bits it is packed in 8 bits, because every row with a selection reads all of it.
    """
    parts: list[list[Quantised | Tensor]] = []
    for layer in model.layers:
        assert isinstance(layer.qkv, PackedWeight)
        exact = layer.qkv.kind == "bf16"
        parts.append([])
        for fix in layer.adapter or ():
            missing = -fix.rank % GROUP
            padded = F.pad(fix.a, (0, 0, 0, missing)), F.pad(fix.b, (0, missing))
            parts[-1].extend(part if exact else quantise_8bit(part) for part in padded)
    arena = Arena([PackedWeight.bytes_of(part) for layer in parts for part in layer])
    packed = [
        [PackedWeight.of(part, arena.take(PackedWeight.bytes_of(part))) for part in layer] for layer in parts
    ]
    if model.batch_invariant:
        return [[weight.for_alike_rows() for weight in layer] for layer in packed]
    return packed


def _products(layer: GqaLayer) -> list[Held]:
    """The layer's matrices in the order of `_MATRICES`; without an indexer the first four."""
    own = [layer.qkv, layer.o, layer.gate_up, layer.down]
    if layer.indexer is None:
        return own
    w = layer.indexer.weights
    return [*own, w.wq, w.wk, w.weights_proj]


def _packed(weight: Held) -> PackedWeight:
    assert isinstance(weight, PackedWeight)
    return weight
