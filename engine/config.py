"""The engine's settings. The server's command line reads them once and sends them in `Start`; they never change."""

from __future__ import annotations

from typing import Literal

import msgspec

PAGE_SIZE = 64
"""Tokens in a page. DeepSeek's kernels (FlashMLA, DeepGEMM) have pages of 64 on CUDA, so all pages here have 64."""

DEFAULT_DRAFT_TOKENS = {"off": 0, "ngram": 4, "mtp": 1}
"""Drafts for each request in a step if only a drafter is set. An MTP layer was trained for one draft."""


PlainDtype = Literal["auto", "float32", "bfloat16"]
"""The dtype to compute in, and to hold what has no narrower format. auto: the dtype that suits the device."""


SparseForm = Literal["auto", "gather", "mask"]
"""How sparse rows are attended (`engine.plan.tiles`). auto: the cheaper form."""


Drafter = Literal["off", "ngram", "mtp"]
"""What drafts tokens. off: nothing; ngram: repetitions in the text; mtp: the checkpoint's MTP layer."""


CacheDtype = Literal["auto", "bf16", "fp8"]
"""The number format of cached latents. auto: FP8 if the checkpoint's weights are in FP8, else the model's dtype."""


IndexerDtype = Literal["auto", "bf16", "fp8", "int8"]
"""The number format of index keys and queries. auto: as for `CacheDtype`, but 8-bit integers for a llama model with
native kernels."""


KernelChoice = Literal["auto", "native", "torch", "triton", "reference"]
"""The backend that computes attention. auto: native on a CPU that the compiled kernels are made for, triton on CUDA where
it is installed, else torch."""


WeightDtype = Literal["auto", "plain", "fp8"]
"""How weights that are stored in FP8 blocks are held. plain: in the model's dtype; auto: fp8 on CUDA, else plain."""


LoadFormat = Literal["auto", "dummy"]
"""Where weights come from. auto: the checkpoint's files; dummy: random numbers, for which config.json is enough."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the engine loads, and how it runs.

    Raises:
        ValueError: a setting is out of range or contradicts another; the message says what to change.
    """

    weights: str  # a .gguf file, or a folder with config.json and safetensors
    overlay: str | None = None  # an indexer overlay (safetensors) laid over the checkpoint
    load_format: LoadFormat = "auto"
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    dtype: PlainDtype = "auto"
    max_model_len: int | None = None  # positions of one request; None: what the checkpoint was trained for
    kv_cache_bytes: int | None = (
        None  # None, here and in the next two: `engine.step.sizes` chooses by the device
    )
    token_budget: int | None = None  # tokens computed in one step, prefill and decode together
    max_running: int | None = None  # requests in one step
    prefix_caching: bool = True
    score_budget_bytes: int = 64 << 20  # the most bytes of arrays of one tile of attention work
    threads: int | None = None  # CPU threads of each rank; None: the ranks share torch's number
    tensor_parallel: int = 1  # devices that compute the model together, with a process for each
    nodes: int = 1  # hosts that share the devices evenly; all but the first run `engine.parallel.node`
    leader: str | None = None  # HOST:PORT where the first host listens, only there, and the others join
    node_secret_file: str | None = None  # a file with what all nodes know, and nobody else
    sparse_form: SparseForm = "auto"
    batch_invariant: bool = False  # a row's bits depend neither on other rows nor on how its prompt is cut
    drafter: Drafter = "off"
    speculative_tokens: int | None = None  # drafts for each request in a step; None: DEFAULT_DRAFT_TOKENS
    cost_calibration: str | None = None  # a file of `dsa calibrate`; None: costs are assumed

    profile_dir: str | None = None  # the folder for traces of steps; None: no step is traced
    profile_after: int = 20  # steps before the first trace
    profile_steps: int = 20  # steps of each trace

    weight_dtype: WeightDtype = "auto"
    kv_cache_dtype: CacheDtype = "auto"
    indexer_dtype: IndexerDtype = "auto"
    kernels: KernelChoice = "auto"

    def __post_init__(self) -> None:
        if self.token_budget is not None and self.token_budget < (self.max_running or 1):
            raise ValueError(
                f"token_budget ({self.token_budget}) must be at least max_running ({self.max_running}), "
                "so that every running request can decode one token a step"
            )
        positive = "max_running kv_cache_bytes score_budget_bytes tensor_parallel nodes profile_steps".split()
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
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
        elif self.node_secret_file is not None:
            raise ValueError("node_secret_file is for several nodes; with one node leave it out")
        if self.load_format == "dummy" and self.overlay is not None:
            raise ValueError(
                "load_format is dummy, so the weights are random and no overlay fits them; leave the overlay out"
            )
        if self.profile_after < 0:
            raise ValueError(f"profile_after must be at least 0, not {self.profile_after}")
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
        """How many ranks each host has."""
        return self.tensor_parallel // self.nodes

    @property
    def draft_tokens(self) -> int:
        """Drafts for each request in a step; 0 without a drafter."""
        return self.speculative_tokens or DEFAULT_DRAFT_TOKENS[self.drafter]


def host_and_port(address: str) -> tuple[str, int]:
    """Split HOST:PORT, or [HOST]:PORT if the host is an IPv6 address.

    Raises:
        ValueError: `address` is not of this form.
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
