"""Latent attention by warps with roles: it compiles for Hopper anywhere, and is tried on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from engine.kernels.triton import latent_attention
from engine.kernels.triton.latent_attention import roles_for
from tests.engine.kernels.triton.batches import EDGES, Batch
from tests.engine.kernels.triton.test_latent_attention import attend, check, operands
from tests.kit import ROOT

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
BYTES_OF_A_BLOCK = 232_448
"""Shared memory that a program may have on compute capability 9.0 (CUDA C++ programming guide, technical
specifications)."""

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from engine.kernels.triton import latent_roles

POINTERS = {"query": "*bf16", "plane": "*u8", "out": "*bf16", "parts": "*fp32", "sums": "*fp32", "scale": "fp32"}
TABLES = ("positions", "index_top_k", "tokens", "block_table", "request", "items")
for kernel in (latent_roles.sparse_roles, latent_roles.dense_roles):
    options = {**latent_roles.OPTIONS, "HEADS": 128, "EARLY": True}
    warps = options.pop("num_warps")
    signature, constants, known = {}, {}, {}
    for number, name in enumerate(kernel.arg_names):
        if name in options:
            signature[name], constants[number,] = "constexpr", options[name]
        else:
            signature[name] = POINTERS.get(name, "*i32" if name in TABLES else "i32")
            if name not in ("scale", "splits"):
                known[number,] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, constants, known)
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).metadata.shared)
"""


@pytest.mark.process
def test_the_kernels_compile_and_fit_a_multiprocessor(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {
        **os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", str(program)], env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    sizes = [int(line) for line in done.stdout.split()]
    assert len(sizes) == 2
    assert max(sizes) <= BYTES_OF_A_BLOCK


@pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
@pytest.mark.parametrize("heads", [16, 130])
def test_edges(device: torch.device, heads: int) -> None:
    batch = Batch(EDGES, 3, device, spare=2)
    query, plane, selected = operands(batch, (heads, 512, 64), "fp8", torch.bfloat16, 110)
    assert roles_for(query.to(device), plane.to(device), 512) is not None
    check(batch, attend(batch, query, plane, selected, 512), query, plane, selected, 512)
    check(batch, attend(batch, query, plane, None, 512), query, plane, None, 512)


@pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
def test_rows_in_splits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items of several programs; the same bits each time."""
    monkeypatch.setattr(latent_attention, "DENSE_SPLIT", 64)
    batch = Batch(EDGES * 3, 3, device)
    query, plane, _ = operands(batch, (128, 512, 64), "fp8", torch.bfloat16, 110)
    first = attend(batch, query, plane, None, 512)
    check(batch, first, query, plane, None, 512)
    assert torch.equal(attend(batch, query, plane, None, 512), first)


def test_other_operands_take_the_other_form(device: torch.device) -> None:
    query = torch.zeros(1, 2, 576, device=device)
    assert roles_for(query, torch.zeros(1, 64, 576, device=device), 512) is None
    assert roles_for(query, torch.zeros(1, 64, 656, dtype=torch.uint8, device=device), 512) is None
