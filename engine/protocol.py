"""The messages between the server process and the engine process.

Messages are frozen msgspec structs, encoded as msgpack, one message a frame (see `engine.channel`). Both sides
decode into these types, so a malformed message is an error when it is read, and no object is ever half filled.
Messages have token ids only. The server handles text, stop strings and end-of-sequence tokens; an
end-of-sequence token is one of `stop_token_ids` here.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any, Literal

import msgspec

from engine.config import EngineConfig

BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Upper bounds of `EngineStats.batch_size_counts_total`; one more entry counts larger batches."""

IndexTopK = int | None
"""How many tokens of its context a row of attention may read: at least 1, or None, which is all of them (dense)."""

SELECTION_FLAWS = ("empty", "short", "outside", "repeated")
"""What can be wrong with the tokens that a layer selects for a row: there is none; there are fewer than there should be; one
lies outside of the row's context; one occurs twice."""

FinishReason = Literal["stop", "length", "abort", "error"]
"""Why a request ended: a stop token, its token limit, an abort by the server, or a fault of the request."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of everything that crosses the socket; the class name is the tag on the wire."""


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the parts of messages."""


# ---- server to engine ---------------------------------------------------------------------------


SMALLEST_TEMPERATURE = 2.0**-126
"""The smallest normal number of float32, in which logits are divided by it. A smaller one may be 0 there."""


class SamplingParams(Value, frozen=True, kw_only=True):
    """How to choose each next token. The server has validated the values; the comments state their ranges.

    `seed` is always set (the server draws one if the client gave none). So a request that is recomputed
    after a preemption gives the same text.
    """

    max_tokens: int  # >= 1; prompt + max_tokens <= max_model_len
    seed: int  # 0 <= seed < 2**64
    temperature: float = 1.0  # 0, which is greedy, or at least SMALLEST_TEMPERATURE
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0 switches it off
    min_p: float = 0.0  # [0, 1]
    presence_penalty: float = 0.0  # [-2, 2], over the tokens generated so far
    frequency_penalty: float = 0.0  # [-2, 2], over the tokens generated so far
    repetition_penalty: float = 1.0  # > 0, over prompt and generated tokens
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0  # stop tokens are not drawn before so many tokens; <= max_tokens
    logprobs: int | None = None  # alternatives to report per generated token; None reports nothing
    logprob_token_ids: tuple[int, ...] = ()  # with `logprobs`: report these tokens in place of the likeliest
    prompt_logprobs: int | None = None  # per prompt token; a cached prefix of these is not reused
    prompt_logprobs_start: int = 0  # >= 0; the first prompt token that gets a log-probability


def has_penalty(params: SamplingParams) -> bool:
    """Whether a draw looks at the tokens before it."""
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)


class Grammar(Value, frozen=True, kw_only=True):
    """What the text of an answer's tokens must be. The server has checked that it compiles (`engine.grammar`)."""

    text: str  # in llguidance's variant of Lark
    after: tuple[int, ...] = ()  # it begins after the first of these tokens; empty: with the first token


class Vocabulary(Value, frozen=True, kw_only=True):
    """The tokens that grammars are about. The engine knows no other text."""

    tokens: tuple[bytes, ...]  # the text of each token id
    special: tuple[int, ...]  # control tokens: no text that a grammar describes has one
    ends: tuple[int, ...]  # at least one: the tokens that end an answer


class Submit(Message, frozen=True, kw_only=True):
    """Start a request."""

    request_id: str  # made by the server, unique for the life of the engine process
    prompt_token_ids: tuple[int, ...]  # >= 1 token, each in [0, vocab_size)
    sampling: SamplingParams
    index_top_k: IndexTopK
    grammar: Grammar | None = None  # its stop tokens have to hold a token that ends an answer
    cache_salt: str = ""  # only requests with the same salt share cached pages
    priority: int = 0  # lower is earlier


class Abort(Message, frozen=True, kw_only=True):
    """End a request now. The engine ignores unknown ids, because the request may have just finished."""

    request_id: str


class Start(Message, frozen=True, kw_only=True):
    """The first message: what to load and how to run."""

    config: EngineConfig
    vocabulary: Vocabulary | None = None  # None: requests cannot have a grammar


class Stop(Message, frozen=True, kw_only=True):
    """Exit after the current step; requests that still run end with `abort`."""


ToEngine = Start | Submit | Abort | Stop


# ---- engine to server ---------------------------------------------------------------------------


class IndexerInfo(Value, frozen=True, kw_only=True):
    """The lightning indexer: the checkpoint's own, or the overlay's."""

    num_heads: int
    head_dim: int
    rope_dim: int
    default_index_top_k: int  # the value that its training and evaluation justify
    source: str  # file name of the overlay, or `checkpoint`
    adapter_rank: int = 0  # rank of the corrections on rows with a selection; 0: there are none


class ModelInfo(Value, frozen=True, kw_only=True):
    """The model that was loaded."""

    architecture: str
    num_layers: int
    num_parameters: int
    vocab_size: int
    max_model_len: int  # positions that one request may use, prompt and output together
    device: str
    dtype: str
    indexer: IndexerInfo | None  # None: attention is always dense, whatever index_top_k says
    random_weights: bool = False  # of no checkpoint: for benchmarks, and what the model says means nothing
    cost_model: Literal["assumed", "measured"] = "assumed"  # the origin of the cost model's coefficients
    batch_invariant: bool = False  # the same prompt gives the same tokens in any company, to the bit


class Capacity(Value, frozen=True, kw_only=True):
    """The engine's limits: cache pages, tokens in a step, running requests."""

    num_pages: int
    page_size: int  # tokens a page
    page_bytes: int
    token_budget: int  # tokens a step
    max_running: int


class Loading(Message, frozen=True, kw_only=True):
    """Progress of loading, before `Ready`."""

    stage: str
    done: int
    total: int


class Ready(Message, frozen=True, kw_only=True):
    """The engine takes requests from now on."""

    model: ModelInfo
    capacity: Capacity


class Failed(Message, frozen=True, kw_only=True):
    """The engine could not start, or met a fault that it cannot survive. The process then ends."""

    message: str


class TokenLogprob(Value, frozen=True, kw_only=True, gc=False):
    """Log-probability (nats, before temperature and penalties) of one token and its alternatives."""

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first, or in the order asked for


class Work(Value, frozen=True, kw_only=True, array_like=True):
    """What a request has used of the machine so far. Counts of tokens are those of one layer.

    The seconds are measured: a step's time is divided over its requests in proportion to modelled work, so the
    seconds of all requests sum to the engine's busy seconds. The `dense_` seconds are the time that the same
    steps would have taken if this request's attention had been dense.
    """

    rows: int = 0  # tokens computed, recomputation included
    selected_tokens: int = 0  # (row, token) pairs that attention read
    index_pairs: int = 0  # (row, token) pairs that the indexer scored
    kv_rows_read: int = 0  # tokens whose keys and values were read; once for a tile whose rows share them
    flops: int = 0
    cache_bytes: int = 0  # bytes of the paged cache, read and written
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    dense_prefill_seconds: float = 0.0
    dense_decode_seconds: float = 0.0

    @property
    def device_seconds(self) -> float:
        """The request's share of the engine's busy time, in seconds."""
        return self.prefill_seconds + self.decode_seconds

    @property
    def dense_seconds(self) -> float:
        """The share that dense attention would have had, in seconds."""
        return self.dense_prefill_seconds + self.dense_decode_seconds


def add_work(*works: Work) -> Work:
    """Sum `works` field by field."""
    return Work(**{name: sum(getattr(work, name) for work in works) for name in Work.__struct_fields__})


class RequestUsage(Value, frozen=True, kw_only=True):
    """What a request has used so far. Times are in seconds on the engine's clock."""

    prompt_tokens: int
    cached_tokens: int  # prompt tokens whose pages were reused at first admission
    completion_tokens: int
    preemptions: int
    index_top_k: IndexTopK  # effective: None where the model has no indexer
    queue_seconds: float  # submit to first scheduled
    prefill_seconds: float  # first scheduled to first token
    decode_seconds: float  # first token to end
    work: Work = Work()


class Delta(Value, frozen=True, kw_only=True, array_like=True, gc=False):
    """New tokens of one request. Only the last delta of a request has a finish reason.

    A step has one for each of its requests, so it is written without the names of its fields.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None  # one a token, if asked for
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # once, for the whole prompt; [0] is None
    finish_reason: FinishReason | None = None
    error: str | None = None  # with finish_reason "error"
    usage: RequestUsage | None = None  # with the first token, and with any finish reason


class EngineStats(Value, frozen=True, kw_only=True):
    """Gauges of this moment, and counters since the engine process started (their names end in `_total`)."""

    running: int = 0
    waiting: int = 0
    pages_used: int = 0  # held by at least one request
    pages_cached: int = 0  # held by no request; the content is kept for prefix hits
    pages_free: int = 0  # without useful content
    steps_total: int = 0
    prefill_tokens_total: int = 0  # prompt tokens computed, recomputation included
    decode_tokens_total: int = 0
    preemptions_total: int = 0
    prefix_queries_total: int = 0  # tokens looked up
    prefix_hits_total: int = 0  # tokens found
    draft_tokens_total: int = 0  # drafts that were verified
    draft_lengths_total: tuple[int, ...] = ()  # [n]: steps in which n drafts were right: n + 1 tokens
    busy_seconds_total: float = 0.0  # time that steps took
    index_seconds_total: float = 0.0  # modelled: the part that scoring and selecting took
    dense_seconds_total: float = 0.0  # modelled: the steps' time with dense attention
    selected_tokens_total: int = 0  # (row, token) pairs that attention read
    index_pairs_total: int = 0  # (row, token) pairs that the indexer scored
    kv_rows_read_total: int = 0
    flops_total: int = 0
    cache_bytes_total: int = 0
    batch_requests_total: int = 0  # requests summed over steps
    batch_size_counts_total: tuple[int, ...] = ()  # steps by number of requests; see `BATCH_BOUNDS`
    nonfinite_logits_total: int = 0  # requests that ended because their logits were not finite
    invalid_selections_total: tuple[int, ...] = ()  # requests that ended because of one, by `SELECTION_FLAWS`
    failed_steps_total: int = 0  # steps that raised; every request in one ends with an error


def add_counters(one: EngineStats, other: EngineStats) -> EngineStats:
    """Sum the counters (the fields that end in `_total`); the gauges of the result are 0."""
    sums: dict[str, Any] = {}
    for name in EngineStats.__struct_fields__:
        if name.endswith("_total"):
            a, b = getattr(one, name), getattr(other, name)
            if isinstance(a, tuple):
                sums[name] = tuple(x + y for x, y in zip_longest(a, b, fillvalue=0))
            else:
                sums[name] = a + b
    return EngineStats(**sums)


class StepOutput(Message, frozen=True, kw_only=True):
    """The deltas that one step produced, and now and then the engine's state after it."""

    deltas: tuple[Delta, ...]
    stats: EngineStats | None = None  # None: the newest that were told still serve
    progress: tuple[tuple[str, Work], ...] = ()  # now and then: what live requests have used so far


ToServer = Loading | Ready | Failed | StepOutput
