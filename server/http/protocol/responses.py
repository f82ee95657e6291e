"""The wire format of /v1/responses, which is OpenAI's newer one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from server.http.protocol.base import TAG, WHOLE, AtLeastOne, Body, Label, LogprobCount, Neutral, tag_of_list
from server.http.protocol.chat import MAX_MESSAGES, ChoiceWarning, Effort, Metadata
from server.http.protocol.notices import NOTICES, Notice
from server.http.protocol.sampling import ModelName, SparsityOptions
from server.http.protocol.structured import ResponseTextFormat
from server.http.protocol.tools import MAX_TOOLS, CalledName, CallId, FunctionTool, Name
from server.http.protocol.usage import (
    COST,
    CompletionTokensDetails,
    CostUsage,
    PromptTokensDetails,
    SparsityUsage,
)

MAX_PARTS = 1024

# ---- request ------------------------------------------------------------------------------------


class ContentPart(Body):
    """A piece of a message."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"] = Field(
        description="This server reads text only."
    )
    text: str
    # Of an answer that is sent back.
    annotations: Annotated[
        Any, Neutral([], advice="must be empty: annotations are not part of the prompt")
    ] = None
    logprobs: list[Any] | None = Field(
        default=None, description="Of an earlier answer; not part of the prompt."
    )


def _text_tag(value: Any) -> str | None:
    return tag_of_list(value, text=f"{TAG}text", empty=f"{TAG}parts", kinds=((object, f"{TAG}parts"),))


ItemContent = Annotated[
    Annotated[str, Tag(f"{TAG}text")]
    | Annotated[list[ContentPart], Field(max_length=MAX_PARTS), Tag(f"{TAG}parts")],
    Discriminator(
        _text_tag,
        custom_error_type="content",
        custom_error_message='must be a string or a list of parts like {{"type": "input_text", "text": "..."}}',
    ),
]

ItemId = Annotated[str | None, Field(description="As answers have it; unused.")]
ItemStatus = Annotated[
    Literal["in_progress", "completed", "incomplete"] | None,
    Field(description="As answers have it; unused."),
]


class MessageItem(Body):
    """A message."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: ItemContent
    id: ItemId = None
    status: ItemStatus = None
    phase: Label | None = Field(default=None, description="As answers have it; unused.")


class CallItem(Body):
    """A call in an earlier answer."""

    type: Literal["function_call"]
    call_id: CallId
    name: CalledName
    arguments: str
    id: ItemId = None
    status: ItemStatus = None


class ResultItem(Body):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: ItemContent
    id: ItemId = None
    status: ItemStatus = None


class ReasoningItem(Body):
    """Reasoning of an earlier answer."""

    type: Literal["reasoning"]
    content: Annotated[list[ContentPart], Field(max_length=MAX_PARTS)] | None = None
    summary: Annotated[list[ContentPart], Field(max_length=MAX_PARTS)] | None = Field(
        default=None, description="Read where there is no content."
    )
    encrypted_content: Annotated[
        Any, Neutral("", advice="must be null: this server does not encrypt reasoning; send its content")
    ] = None
    id: ItemId = None
    status: ItemStatus = None


_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def _item_tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"{TAG}{kind}" if kind in _ITEMS else f"{TAG}message" if kind is None else None


InputItem = Annotated[
    Annotated[MessageItem, Tag(f"{TAG}message")]
    | Annotated[CallItem, Tag(f"{TAG}function_call")]
    | Annotated[ResultItem, Tag(f"{TAG}function_call_output")]
    | Annotated[ReasoningItem, Tag(f"{TAG}reasoning")],
    Discriminator(
        _item_tag,
        custom_error_type="item",
        custom_error_message="must be an item of type 'message', 'function_call', 'function_call_output' or "
        "'reasoning'",
    ),
]

ResponseInput = Annotated[
    Annotated[str, Tag(f"{TAG}text")]
    | Annotated[list[InputItem], Field(max_length=MAX_MESSAGES), Tag(f"{TAG}items")],
    Discriminator(
        lambda value: tag_of_list(
            value, text=f"{TAG}text", empty=f"{TAG}items", kinds=((object, f"{TAG}items"),)
        ),
        custom_error_type="input",
        custom_error_message="must be a string or a list of items",
    ),
]


class ResponseTool(FunctionTool):
    """A function that the model may call."""

    type: Literal["function"] = Field(description="This server runs no tools itself.")


class NamedResponseTool(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    name: Name


ResponseToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(f"{TAG}word")]
    | Annotated[NamedResponseTool, Tag(f"{TAG}tool")],
    Discriminator(lambda value: f"{TAG}tool" if isinstance(value, dict | Body) else f"{TAG}word"),
]


class ReasoningOptions(Body):
    """Whether the model reasons before it answers."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        default=None, description="It has no effect: reasoning is shown as it is, not summarised."
    )
    generate_summary: Annotated[Any, Neutral(advice="must be null: reasoning is shown as it is")] = None


class TextOptions(Body):
    """The form of the text."""

    format: ResponseTextFormat | None = Field(default=None, description="What the text must be.")
    verbosity: Annotated[
        Any, Neutral("medium", advice="must be 'medium' or null: ask for a length in a message instead")
    ] = None


class ResponseStreamOptions(Body):
    """What a stream carries besides events."""

    include_obfuscation: Annotated[
        Any, Neutral(False, advice="must be false or null: events are not padded")
    ] = None


Extra = Literal[
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "message.input_image.image_url",
    "message.output_text.logprobs",
]


class ResponseBody(Body):
    """What to answer, and how."""

    model: ModelName | None = Field(
        default=None, description="The model that is served, which is also the default."
    )
    input: ResponseInput = ""
    instructions: str | None = Field(
        default=None, description="The system message of this response; later ones do not inherit it."
    )
    previous_response_id: Label | None = Field(
        default=None, description="Go on after this response, which must be stored here still."
    )
    store: bool | None = Field(
        default=None,
        description="False: the response is not kept. Default: it is, until newer ones displace it.",
    )
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: AtLeastOne | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Annotated[int, Field(ge=-1, lt=2**31), WHOLE] | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = Field(
        default=None, description="False: the answer ends with its first call."
    )
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    include: Annotated[list[Extra], Field(max_length=16)] | None = Field(
        default=None,
        description="`message.output_text.logprobs` adds log-probabilities. None of the others exists here: reasoning comes "
        "in clear, and the server runs no tools.",
    )
    metadata: Metadata | None = Field(default=None, description="Labels; they change nothing.")
    user: Label | None = Field(default=None, description="A label; it changes nothing.")
    safety_identifier: Label | None = Field(default=None, description="A label; it changes nothing.")
    prompt_cache_key: Label | None = Field(
        default=None, description="A label; it changes nothing, because there is one cache."
    )
    max_tool_calls: AtLeastOne | None = Field(
        default=None, description="It limits tools that the server runs, and there are none."
    )
    dsa: SparsityOptions | None = Field(default=None, description="Sparse attention, for this request only.")
    background: bool | None = Field(
        default=None,
        description="The answer is made while nobody waits: GET /v1/responses/{id} returns it when it is there.",
    )
    enable_response_messages: bool | None = Field(
        default=None,
        description="The response has its prompt and its output as text and token ids, as vLLM has them.",
    )
    conversation: Annotated[Any, Neutral(advice="must be null: use previous_response_id")] = None
    prompt: Annotated[Any, Neutral(advice="must be null: this server has no prompt templates")] = None
    prompt_cache_retention: Annotated[
        Any, Neutral("in_memory", advice="must be 'in_memory' or null: the prompt cache lives in memory")
    ] = None
    service_tier: Annotated[
        Any, Neutral("auto", "default", advice="must be 'auto', 'default' or null: there is one service tier")
    ] = None
    top_logprobs: LogprobCount | None = Field(
        default=None, description="Log-probabilities, with so many alternatives."
    )
    truncation: Annotated[
        Any, Neutral("disabled", advice="must be 'disabled' or null: leave out old items yourself")
    ] = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer has log-probabilities."""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())


# ---- response -----------------------------------------------------------------------------------


class ResponseTokens(BaseModel):
    """Token counts."""

    input_tokens: int
    input_tokens_details: PromptTokensDetails
    output_tokens: int
    output_tokens_details: CompletionTokensDetails
    total_tokens: int
    dsa: SparsityUsage
    cost: float | None = COST
    cost_details: CostUsage | None


class ResponseFault(BaseModel):
    """Why a response failed."""

    code: str
    message: str


class RawMessage(BaseModel):
    """A text as the model reads or writes it, with its control tokens."""

    type: Literal["raw_message_tokens"] = "raw_message_tokens"
    message: str
    tokens: list[int]


class ResponseObject(BaseModel):
    """The response."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    model: str
    output: list[dict[str, Any]] = Field(description="Items: reasoning, messages and calls, in their order.")
    error: ResponseFault | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    previous_response_id: str | None
    store: bool
    max_output_tokens: int | None
    temperature: float | None
    top_p: float | None
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    reasoning: dict[str, Any]
    text: dict[str, Any]
    truncation: Literal["disabled"]
    background: bool
    metadata: dict[str, str]
    user: str | None
    usage: ResponseTokens | None
    input_messages: list[RawMessage] | None = Field(
        default=None, description="With enable_response_messages: the prompt."
    )
    output_messages: list[RawMessage] | None = Field(
        default=None, description="With enable_response_messages: the output."
    )
    warnings: list[Notice | ChoiceWarning] | None = NOTICES


class ResponseEvent(BaseModel):
    """One event of a stream, as OpenAI has them: `type` says which, and what further fields it has."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int


class ResponseDeleted(BaseModel):
    """A response is no longer stored."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
