"""The fields that every generating endpoint shares."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, StringConstraints, Tag
from pydantic_core import PydanticCustomError

from server.http.protocol.base import (
    MAX_INTEGER,
    TAG,
    WHOLE,
    WHOLES,
    AtLeastOne,
    Body,
    Label,
    LogprobCount,
    Natural,
    Neutral,
    TokenId,
    tag_of_list,
)
from server.http.protocol.structured import (
    Choices,
    GrammarText,
    Pattern,
    ResponseFormat,
    Schema,
    StructuredOutputs,
)

MAX_STOPS = 16
MAX_BAD_WORDS = 64
MAX_STOP_TOKENS = 128
MAX_BIASES = 1024
MAX_NAMED_LOGPROBS = 128

StopText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,8}")


def _check_key(key: str) -> str:
    if not _TOKEN_ID.fullmatch(key):
        raise PydanticCustomError("token_id", "must be a token id, written as a decimal number")
    return key


ModelName = Annotated[str, StringConstraints(min_length=1, max_length=512)]


def _stop_tag(value: Any) -> str | None:
    return tag_of_list(value, text=f"{TAG}one", empty=f"{TAG}many", kinds=((object, f"{TAG}many"),))


StopField = Annotated[
    Annotated[StopText, Tag(f"{TAG}one")]
    | Annotated[list[StopText], Field(max_length=MAX_STOPS), Tag(f"{TAG}many")],
    Discriminator(
        _stop_tag,
        custom_error_type="stop",
        custom_error_message="must be a string or a list of strings",
    ),
]


def _top_k_tag(value: Any) -> str | None:
    return (
        f"{TAG}word" if isinstance(value, str) else f"{TAG}count" if isinstance(value, int | float) else None
    )


TopK = Annotated[
    Annotated[AtLeastOne, Tag(f"{TAG}count")] | Annotated[Literal["dense"], Tag(f"{TAG}word")],
    Discriminator(
        _top_k_tag,
        custom_error_type="top_k",
        custom_error_message="must be a number of tokens or 'dense'",
    ),
]


class SparsityOptions(Body):
    """How much of the context attention may read."""

    top_k: TopK = Field(
        description=(
            "How many earlier tokens each token attends to, chosen by the indexer; "
            "`dense` attends to all. At most the model's context length."
        ),
    )


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool | None = Field(
        default=None, description="End with a chunk that has no choices and the usage of the request."
    )
    continuous_usage_stats: bool | None = Field(
        default=None, description="With include_usage: every chunk tells the tokens so far."
    )
    include_obfuscation: Annotated[
        Any, Neutral(False, advice="must be false or null: chunks are not padded")
    ] = None


class GenerationBody(Body):
    """How to generate. The defaults are the model's own, as GET /v1/models says, else OpenAI's."""

    model: ModelName | None = Field(
        default=None, description="The model that is served, which is also the default."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: AtLeastOne | None = Field(default=None, description="Choices for each prompt.")
    max_tokens: Natural | None = Field(
        default=None,
        description="At most so many tokens; default: the server's (8192 for DeepSeek and GLM, else 1024, unless set).",
    )
    min_tokens: Natural | None = Field(
        default=None, description="No stop token or stop string ends the answer before so many tokens."
    )
    temperature: float | None = Field(
        default=None,
        ge=0,
        le=2,
        description="0 is greedy. Default: the model's own, as GET /v1/models says, else 1.",
    )
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Annotated[int, Field(ge=-1, lt=2**31), WHOLE] | None = Field(
        default=None, description="Sample from the k most likely tokens; 0 or -1: from all."
    )
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100, description="1 switches it off.")
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, AfterValidator(_check_key)],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(
                max_length=MAX_BIASES,
                json_schema_extra={"propertyNames": {"pattern": f"^({_TOKEN_ID.pattern})$"}},
            ),
        ]
        | None
    ) = Field(default=None, description="Token id, written as a string, to what is added to its logit.")
    stop: StopField | None = None
    bad_words: (
        Annotated[
            list[Annotated[str, StringConstraints(min_length=1, max_length=128)]],
            Field(max_length=MAX_BAD_WORDS),
        ]
        | None
    ) = Field(default=None, description="Texts that are nowhere in the answer.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS), WHOLES] | None = None
    ignore_eos: bool | None = Field(default=None, description="Generate on after end-of-sequence tokens.")
    include_stop_str_in_output: bool | None = Field(
        default=None,
        description="The text ends with the stop string, or the stop token's text, that ended it.",
    )
    skip_special_tokens: bool | None = Field(
        default=None, description="False: control tokens that have no meaning in an answer show as text."
    )
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_INTEGER), WHOLE] | None = Field(
        default=None,
        description="Only the last so many tokens of a prompt are used; -1: as many as the context has room for.",
    )
    prompt_logprobs: LogprobCount | None = Field(
        default=None,
        description="Report log-probabilities of the prompt, with so many alternatives; not in streams.",
    )
    logprob_token_ids: (
        Annotated[list[TokenId], Field(min_length=1, max_length=MAX_NAMED_LOGPROBS), WHOLES] | None
    ) = Field(
        default=None,
        description="Report the log-probabilities of these tokens at each place of the answer, in this order, in place of the "
        "likeliest ones.",
    )
    return_tokens_as_token_ids: bool | None = Field(
        default=None, description="Log-probabilities name tokens by their ids, as `token_id:123`."
    )
    return_token_ids: bool | None = Field(default=None, description="The answer has its tokens' ids, too.")
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = Field(
        default=None, description="Only requests with the same salt share cached prompts."
    )
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31), WHOLE] | None = Field(
        default=None,
        description="Lower is earlier; default: 0. The server says how low a request may go, by default 0.",
    )
    timeout: float | None = Field(
        default=None,
        gt=0,
        description="Seconds from its arrival after which the request ends with an error; the header X-Request-Timeout says the same.",
    )
    seed: Annotated[int, Field(ge=-MAX_INTEGER - 1, le=MAX_INTEGER), WHOLE] | None = None
    response_format: ResponseFormat | None = Field(
        default=None, description="What the answer's text must be."
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="The same, as vLLM has it."
    )
    guided_json: Schema | None = Field(default=None, description="The older name of structured_outputs.json.")
    guided_regex: Pattern | None = Field(
        default=None, description="The older name of structured_outputs.regex."
    )
    guided_choice: Choices | None = Field(
        default=None, description="The older name of structured_outputs.choice."
    )
    guided_grammar: GrammarText | None = Field(
        default=None, description="The older name of structured_outputs.grammar."
    )
    dsa: SparsityOptions | None = Field(default=None, description="Sparse attention, for this request only.")
    user: Label | None = Field(default=None, description="A label; it changes nothing.")
