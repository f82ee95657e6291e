"""How fast FP8 weights come from files to a device, and how much memory of the host that takes.

    python -m benchmarks.gpu.loading [--device cuda] [--gigabytes 8] [--folder DIR] [--out DIR]

Writes a folder of DeepSeek-V3.2's experts as DeepSeek publishes them (FP8 blocks with scales, files of 4 GB), then loads it
in processes of their own: `streamed` (engine.checkpoint.stream) and `in turn`, from a cold page cache as far as the system
drops it when asked, and from a warm one. GB/s are those of `load`; host memory is the process's peak without the files'
own pages (RssAnon, and page-locked buffers with it), above what it was before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint import loader
from engine.checkpoint.loader import Weight, load
from engine.checkpoint.safetensors import SafetensorsSource
from engine.memory.blocks import E4M3, BlockWeight
from lab.bench.crowd import environment

HIDDEN, INNER = 7168, 2048
EXPERT = 3 * HIDDEN * INNER
FILE_BYTES = 4_000_000_000
WAYS = ("in turn", "streamed")


def experts(count: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes of the matrices of so many experts."""
    for x in range(count):
        for part, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
            yield f"model.layers.0.mlp.experts.{x}.{part}_proj.weight", shape


def table(count: int) -> dict[str, Weight]:
    """The parameters of so many experts, as a model has them, in layers of 64 experts."""
    names = [name for name, _ in experts(count)]
    made = {}
    for first in range(0, count, 64):
        own = names[3 * first : 3 * (first + 64)]
        gate_up, down = tuple(n for n in own if "down" not in n), tuple(n for n in own if "down" in n)
        for key, group, rows, columns in (("gate_up", gate_up, INNER, HIDDEN), ("down", down, HIDDEN, INNER)):
            made[f"{first}.{key}"] = Weight(
                group, (rows * len(group), columns), rows=(rows,) * len(group), may_stay_fp8=True
            )
    return made


def write(folder: Path, count: int) -> None:
    """Write the files. Their numbers are random bytes without NaN."""
    block = torch.randint(0, 0x7F, (EXPERT // 3,), dtype=torch.uint8)
    tensors: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    size = 0

    def flush() -> None:
        nonlocal size
        file = f"model-{len(set(where.values())) + 1:05}.safetensors"
        save_file(tensors, folder / file)
        where.update(dict.fromkeys(tensors, file))
        tensors.clear()
        size = 0

    for i, (name, shape) in enumerate(experts(count)):
        tensors[name] = block.roll(i).view(shape).view(E4M3)
        tensors[name + "_scale_inv"] = torch.full((shape[0] // 128, shape[1] // 128), 2.0 ** (i % 5))
        size += EXPERT // 3
        if size >= FILE_BYTES:
            flush()
    if tensors:
        flush()
    kind = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "deepseek_v32", "quantization_config": kind})
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def forget(folder: Path) -> None:
    """Ask the system to drop the files' pages; it keeps those that are not on the disk yet."""
    for path in folder.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


class Peak:
    """Watches this process's memory in a thread: its own pages, and shared ones, as page-locked buffers are."""

    def __init__(self) -> None:
        self._before, self.most, self._over = _memory(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.most = max(self.most, _memory() - self._before)

    def end(self) -> int:
        """Return the bytes above those at the start."""
        self._over.set()
        self._thread.join()
        return self.most


def _memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(1024 * int(one.split()[1]) for one in lines if one.startswith(("RssAnon", "RssShmem")))


def once(folder: Path, device: torch.device, way: str) -> dict[str, Any]:
    """Load the folder in this process."""
    loader.STREAMED = (device.type if way == "streamed" else "none",)
    source = SafetensorsSource(folder)
    wanted = table(len(source.names()) // 3)
    if device.type == "cuda":
        torch.zeros(1, device=device)  # the context
    peak = Peak()
    began = time.perf_counter()
    found, report = load(wanted, source, dtype=torch.bfloat16, device=device, fp8=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    host = peak.end() - (report.num_bytes if device.type == "cpu" else 0)
    last = found[next(reversed(wanted))]
    assert isinstance(last, BlockWeight)
    direct = source.read_blocks(next(reversed(wanted.values())).names[-1])
    same = torch.equal(
        last.values[-direct.shape[0] :].cpu().view(torch.uint8), direct.values.view(torch.uint8)
    )
    return {"way": way, "bytes": report.num_bytes, "seconds": seconds, "host_bytes": host, "same": same}


def main() -> None:
    """Write the files, load them, print and write loading.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--folder", type=Path, help="where a folder for the files is made and deleted")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--once", choices=WAYS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.once:
        print(json.dumps(once(asked.folder, torch.device(asked.device), asked.once)))
        return
    folder = Path(tempfile.mkdtemp(dir=asked.folder))
    found: list[dict[str, Any]] = []
    try:
        began = time.perf_counter()
        write(folder, max(1, round(asked.gigabytes * 1e9 / EXPERT)))
        print(f"written in {time.perf_counter() - began:.1f} s", flush=True)
        for cache in ("cold", "warm"):
            for way in WAYS:
                if cache == "cold":
                    forget(folder)
                row = {"cache": cache} | _child(folder, asked.device, way)
                found.append(row)
                print(
                    f"{cache:5} {way:9} {row['bytes'] / row['seconds'] / 1e9:6.2f} GB/s, host memory {row['host_bytes'] / 1e6:,.0f} MB, same {row['same']}",
                    flush=True,
                )
    finally:
        shutil.rmtree(folder)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "loading.json").write_text(json.dumps(found, indent=1) + "\n")


def _child(folder: Path, device: str, way: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-P",
        "-m",
        "benchmarks.gpu.loading",
        "--folder",
        str(folder),
        "--device",
        device,
        "--once",
        way,
    ]
    done = subprocess.run(command, env=environment(), check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


if __name__ == "__main__":
    main()
