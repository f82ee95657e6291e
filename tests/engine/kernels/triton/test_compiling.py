"""Kernels are compiled by other processes into Triton's cache. A compiler of Triton's needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kit import ROOT

PROGRAM = """
from triton.backends.compiler import GPUTarget
from engine.kernels.triton import embed
from engine.kernels.triton.compiling import Compilers, KernelOrder, compilers_at_work

if __name__ == "__main__":
    compilers, begun = Compilers(1), []
    submit = compilers._pool.submit
    compilers._pool.submit = lambda *work: begun.append(work) or submit(*work)
    assert compilers_at_work() is None
    signature = {"token_ids": "*i32", "drawn": "*i64", "table": "*bf16", "out": "*bf16", "SIZE": "constexpr", "BLOCK": "constexpr"}
    with compilers.together():
        assert compilers_at_work() is compilers
        for size in (576, 1536, 576):
            constexprs = {(4,): size, (5,): 2048}
            if not compilers.knows(size):
                compilers.order(
                    KernelOrder("engine.kernels.triton.embed", "_embed", signature, constexprs, {}, {}, GPUTarget("cuda", 90, 32))
                )
        compilers.order(KernelOrder("engine.kernels.triton.embed", "nobody", {}, {}, {}, {}, GPUTarget("cuda", 90, 32)))
    print(len(compilers._known), len(begun))
    compilers.close()
"""


@pytest.mark.process
def test_orders_lie_compiled_in_the_cache(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {
        **os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    for ordered in (3, 1):  # the second time the cache has all but the one that there is not
        done = subprocess.run(
            [sys.executable, "-P", str(program)], env=environment, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        assert "a kernel is compiled later: AttributeError" in done.stderr
        assert done.stdout == f"2 {ordered}\n"
        assert len(list((tmp_path / "cache").rglob("_embed.cubin"))) == 2
