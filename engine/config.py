"""The engine's settings: read once by the server's command line, sent in `Start`, never changed."""

from __future__ import annotations

from typing import Literal

import msgspec

PAGE_SIZE = 64
"""Tokens a page. DeepSeek's kernels (FlashMLA, DeepGEMM) page by 64 on CUDA, and so does everything here."""

DEFAULT_DRAFT_TOKENS = {"off": 0, "ngram": 4, "mtp": 1}
"""Guesses a request a step, where only a drafter is named: the MTP layer was trained for one."""


PlainDtype = Literal["auto", "float32", "bfloat16"]
"""Of what is stored in no narrower form: auto is what suits the device."""


SparseForm = Literal["auto", "gather", "mask"]
"""How rows longer than top_k are attended."""


Drafter = Literal["off", "ngram", "mtp"]
"""What guesses tokens ahead: nothing, the text's own repetitions, or the checkpoint's MTP layer."""


CacheDtype = Literal["auto", "bf16", "fp8"]
"""Of cached latents; auto is FP8 where the checkpoint's weights are."""


IndexerDtype = Literal["auto", "bf16", "fp8", "int8"]
"""Of index keys and queries; auto as for latents, and 8-bit integers for a llama model with native kernels."""


KernelChoice = Literal["auto", "native", "torch", "triton", "reference"]
"""What computes attention: auto is native on a CPU that the compiled kernels are made for, triton on CUDA where it is
installed, torch elsewhere."""


WeightDtype = Literal["auto", "plain", "fp8"]
"""Of weights that are stored in FP8 blocks: plain is the model's dtype; auto is fp8 on CUDA, plain on the CPU."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to load and how to run it.

    Raises:
        ValueError: from `__post_init__`, in a sentence that says what to change.
    """

    weights: str  # a .gguf file, or a folder with config.json and safetensors
    overlay: str | None = None  # an indexer overlay (safetensors) laid over the checkpoint
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    dtype: PlainDtype = "auto"
    max_model_len: int | None = None  # None: what the checkpoint was trained for
    kv_cache_bytes: int = 1 << 30
    token_budget: int = 512  # tokens computed in one step, prefill and decode together
    max_running: int = 64  # requests in one step
    prefix_caching: bool = True
    score_budget_bytes: int = 64 << 20  # upper bound of one tile of index or attention scores
    threads: int | None = None  # CPU threads of each rank; None: what torch finds, shared by the ranks
    tensor_parallel: int = 1  # devices that compute the model together, a process each
    nodes: int = 1  # hosts that those are on, as many on each; all but the first run `engine.parallel.node`
    leader: str | None = None  # HOST:PORT of the first, where the others join; it listens there alone
    sparse_form: SparseForm = "auto"
    drafter: Drafter = "off"
    speculative_tokens: int | None = None  # guesses a request a step; None: as many as suit the drafter
    cost_calibration: str | None = None  # a file of `dsa calibrate`; None: assumed from the model's shape

    weight_dtype: WeightDtype = "auto"
    kv_cache_dtype: CacheDtype = "auto"
    indexer_dtype: IndexerDtype = "auto"
    kernels: KernelChoice = "auto"

    def __post_init__(self) -> None:
        if self.token_budget < self.max_running:
            raise ValueError(
                f"token_budget ({self.token_budget}) must be at least max_running ({self.max_running}), "
                "so that every running request can decode one token a step"
            )
        for name in ("max_running", "kv_cache_bytes", "score_budget_bytes", "tensor_parallel", "nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.tensor_parallel % self.nodes:
            raise ValueError(
                f"tensor_parallel is {self.tensor_parallel}, which {self.nodes} nodes cannot share evenly; make it a "
                "multiple of nodes, as many as they have devices together"
            )
        if (self.nodes > 1) != (self.leader is not None):
            raise ValueError(
                f"nodes is {self.nodes} and leader is {self.leader}; several nodes need the leader's HOST:PORT, and one "
                "node has none"
            )
        if self.leader is not None:
            host_and_port(self.leader)
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, not {self.threads}")
        if self.speculative_tokens is not None and self.drafter == "off":
            raise ValueError(
                f"speculative_tokens is {self.speculative_tokens}, but drafter is off; set drafter to ngram or mtp, "
                "or leave speculative_tokens out"
            )
        if self.speculative_tokens is not None and self.speculative_tokens < 1:
            raise ValueError(f"speculative_tokens must be at least 1, not {self.speculative_tokens}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError(
                f"max_model_len must be at least 2 (a prompt token and an output token), not {self.max_model_len}"
            )

    @property
    def devices_a_node(self) -> int:
        """Ranks on each host."""
        return self.tensor_parallel // self.nodes

    @property
    def draft_tokens(self) -> int:
        """Guesses a request a step; 0 without a drafter."""
        return self.speculative_tokens or DEFAULT_DRAFT_TOKENS[self.drafter]


def host_and_port(address: str) -> tuple[str, int]:
    """Both parts of HOST:PORT, or [HOST]:PORT where the host is an IPv6 address.

    Raises:
        ValueError: it is not that.
    """
    host, colon, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if (
        not colon
        or not bare
        or not port.isdecimal()
        or not 0 < int(port) < 65536
        or (":" in bare) != (bare != host)
    ):
        raise ValueError(
            f"leader is {address!r}; expected HOST:PORT, such as 10.0.0.1:7000 or [fd00::1]:7000"
        )
    return bare, int(port)
