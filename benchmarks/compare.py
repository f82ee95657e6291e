"""Compares this server with llama.cpp, OpenVINO GenAI and vLLM on the same cores. docs/measured.md explains the settings of each.

`python -m benchmarks.compare --out DIR` runs `dsa bench` suite by suite. Options, or the environment variables
LLAMA_SERVER, OPENVINO_PYTHON, VLLM_PYTHON and VLLM_MODEL, say where the other servers are. A server that is not named is left out.
Contexts and prompts follow from the positions of the model (`Lengths`). With a large model `--suites long --rounds 1` is the
shortest that has everything: each server is asked once a length, and the time to the first token, the decode rate and the
memory are those of the same request. `long` has this server with dense attention, too, as `dsa dense`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from engine.checkpoint.source import open_source
from engine.config import PAGE_SIZE
from engine.models import read_model
from lab.bench.errors import BenchError
from lab.bench.servers import cores
from lab.tool import DSA
from server.hub.models import DEFAULT_MODEL, ModelError, resolve


class Lengths(NamedTuple):
    """Contexts that fit a model with so many positions, from nearly none to nearly all.

    With 8,192 positions they are those that `dsa bench` has by default. With 32,768 they are 512, 8,192 and 30,720.
    """

    positions: int

    @property
    def longest(self) -> int:
        """A prompt that leaves room for a question and an answer; whole pages."""
        return (self.positions - max(self.positions // 16, 1024)) // PAGE_SIZE * PAGE_SIZE

    @property
    def contexts(self) -> tuple[int, ...]:
        """Of a stream that decodes."""
        return self.positions // 64, self.positions // 4, self.longest

    @property
    def prompts(self) -> tuple[int, ...]:
        """That are read cold. The shortest fills a step of a CPU."""
        return max(self.positions // 64, 512), self.positions // 4, self.longest

    @property
    def requests(self) -> tuple[int, ...]:
        """Of whole requests: the prompts alone where a model has so many positions that each takes minutes."""
        if self.positions > 1 << 14:
            return self.prompts
        eighth = self.positions // 8
        return eighth, 2 * eighth, 4 * eighth, 6 * eighth, 8 * eighth - 192


class Peers(NamedTuple):
    """The places of the other servers, and the settings that all servers share."""

    llama_server: str | None
    vllm_python: str | None
    vllm_model: str | None
    model: str  # as `dsa serve` takes it
    weights: Path
    cpus: str
    threads: int
    openvino_python: str | None = None
    overlay: Path | None = None  # the indexer; None: the one that belongs to the model
    positions: int = 8192  # of the model

    def dsa(self, name: str = "dsa") -> list[str]:
        """Return the arguments for this server with its defaults."""
        overlay = [] if self.overlay is None else ["--overlay", str(self.overlay)]
        return _serve(name, [*DSA, "serve", self.model, *overlay, "--ledger", "none"])

    def dense(self) -> list[str]:
        """Return the arguments for this server where every request asks for dense attention."""
        return [*self.dsa("dsa dense"), "--fields", 'dsa dense={"dsa": {"top_k": "dense"}}']

    def llama(self, slots: int, tokens: int, *, flash: bool, name: str = "llama.cpp") -> list[str]:
        """Return the arguments for llama-server on the same file; each slot has room for `tokens` tokens.

        Its cache of prompts in main memory is off: it copies the old content of a slot, which cold prompts never need.
        """
        if self.llama_server is None:
            return []
        command = [
            self.llama_server, "-m", str(self.weights), "-t", str(self.threads), "-np", str(slots),
            "-c", str(slots * tokens), "-fa", "on" if flash else "off", "-cram", "0",
        ]  # fmt: skip
        return _serve(name, command)

    def openvino(self) -> list[str]:
        """Return the arguments for OpenVINO GenAI on the same file. It answers one request at a time (`benchmarks.openvino_server`)."""
        if self.openvino_python is None:
            return []
        command = [
            self.openvino_python, str(Path(__file__).with_name("openvino_server.py")), "--model", str(self.weights),
            "--threads", str(self.threads),
        ]  # fmt: skip
        return _serve("OpenVINO", command)

    def vllm(self) -> list[str]:
        """Return the arguments for vLLM for CPUs: the same weights in bfloat16, room for 32 streams of 1.2K tokens and more."""
        if self.vllm_python is None or self.vllm_model is None:
            return []
        command = [
            "env", "VLLM_CPU_KVCACHE_SPACE=2", f"VLLM_CPU_OMP_THREADS_BIND={self.cpus}", "HF_HUB_OFFLINE=1",
            "VLLM_NO_USAGE_STATS=1", self.vllm_python, "-m", "vllm.entrypoints.openai.api_server",
            "--model", self.vllm_model, "--max-model-len", str(self.positions), "--max-num-seqs", "32",
        ]  # fmt: skip
        return _serve("vLLM", command)


def suites(peers: Peers) -> dict[str, list[str]]:
    """Return the arguments of each suite: name -> arguments."""
    room, lengths = peers.positions, Lengths(peers.positions)
    one, flash = peers.llama(1, room, flash=False), peers.llama(1, room, flash=True, name="llama.cpp -fa on")
    many = peers.llama(32, 1280, flash=False)
    own, vllm, openvino = peers.dsa(), peers.vllm(), peers.openvino()
    single = own + one + flash + openvino + vllm
    return {
        "decode": ["--contexts", _list(lengths.contexts), *single],
        "prefill": ["--lengths", _list(lengths.prompts), *single],
        "concurrency": ["--streams", "1,8,32", *own, *many, *vllm],
        "prefix": ["--prefixes", str(lengths.longest), *own, *one, *flash, *vllm],
        # The slowest are last: a run that is cut off keeps the others.
        "long": ["--contexts", _list(lengths.requests), *own, *peers.dense(), *openvino, *flash, *one, *vllm],
        "overhead": own,
    }


def _list(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _serve(name: str, command: Sequence[str]) -> list[str]:
    return ["--serve", f"{name}={shlex.join(command)} --port {{port}}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; return the exit status of the first that fails, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, environ = parser.add_argument, os.environ
    add("--out", type=Path, required=True, metavar="DIR", help="where SUITE.json and SUITE.png go")
    add("--suites", default=None, metavar="NAME,NAME", help="which; all of them if left out")
    add("--llama-server", default=environ.get("LLAMA_SERVER"), metavar="FILE", help="llama.cpp's program")
    add(
        "--openvino-python",
        default=environ.get("OPENVINO_PYTHON"),
        metavar="FILE",
        help="a Python that has openvino-genai",
    )
    add(
        "--vllm-python", default=environ.get("VLLM_PYTHON"), metavar="FILE", help="a Python that has vllm-cpu"
    )
    add(
        "--vllm-model",
        default=environ.get("VLLM_MODEL"),
        metavar="DIR",
        help="made by benchmarks.peer_weights",
    )
    add(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help="whose file both this server and llama.cpp read (%(default)s)",
    )
    add("--overlay", type=Path, metavar="FILE", help="this server's indexer; the model's own if left out")
    add(
        "--cpus",
        default="1",
        help="cores of the servers; the client takes the others, and with all of them it is beside the servers (%(default)s)",
    )
    add("--threads", type=int, help="as many as --cpus names, if left out")
    add("--rounds", type=int, default=3, help="samples of each case of each server (%(default)s)")
    options = parser.parse_args(arguments)
    if (options.vllm_python is None) != (options.vllm_model is None):
        parser.error("--vllm-python and --vllm-model belong together")
    try:
        files = resolve(options.model, overlay=options.overlay)
        pinned_to = cores(options.cpus)
    except (ModelError, BenchError) as error:
        parser.error(str(error))
    threads = len(pinned_to) if options.threads is None else options.threads
    found = suites(
        Peers(
            options.llama_server, options.vllm_python, options.vllm_model, options.model,
            files.weights, options.cpus, threads, options.openvino_python, options.overlay,
            read_model(open_source(files.weights)).shape(None).max_positions,
        )
    )  # fmt: skip
    chosen = list(found) if options.suites is None else options.suites.split(",")
    if unknown := [name for name in chosen if name not in found]:
        parser.error(f"--suites names {unknown[0]!r}; expected some of {', '.join(found)}")
    shared = ["--out", str(options.out), "--cpus", options.cpus, "--rounds", str(options.rounds)]
    for name in chosen:
        code = subprocess.run([*DSA, "bench", name, options.model, *shared, *found[name]]).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
