"""The wire format of /v1/messages, which is Anthropic's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from server.http.protocol.base import (
    TAG,
    WHOLE,
    AtLeastOne,
    Body,
    CacheControl,
    Label,
    Neutral,
    tag_of_list,
)
from server.http.protocol.chat import MAX_MESSAGES, ChoiceWarning
from server.http.protocol.notices import NOTICES, Notice
from server.http.protocol.sampling import MAX_STOPS, ModelName, SparsityOptions, StopText
from server.http.protocol.structured import OutputFormat
from server.http.protocol.tools import MAX_TOOLS, CalledName, CallId, Name
from server.http.protocol.usage import COST, CostUsage, SparsityUsage

MAX_BLOCKS = 1024

# ---- request ------------------------------------------------------------------------------------


class TextBlock(Body):
    """A piece of text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl = None
    citations: Annotated[Any, Neutral([], advice="must be empty: citations are not part of the prompt")] = (
        None
    )


class ToolUseBlock(Body):
    """A call in an earlier answer."""

    type: Literal["tool_use"]
    id: CallId
    name: CalledName
    input: dict[str, Any]
    cache_control: CacheControl = None


class ThinkingBlock(Body):
    """Reasoning of an earlier answer."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = Field(default=None, description="It is not checked: answers have an empty one.")


def _kinds_tag(value: Any) -> str | None:
    return tag_of_list(value, text=f"{TAG}text", empty=f"{TAG}blocks", kinds=((object, f"{TAG}blocks"),))


def _block_tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"{TAG}{kind}" if kind in ("text", "tool_use", "tool_result", "thinking") else None


_CONTENT = Discriminator(
    _kinds_tag,
    custom_error_type="content",
    custom_error_message='must be a string or a list of blocks like {{"type": "text", "text": "..."}}',
)

TextContent = Annotated[
    Annotated[str, Tag(f"{TAG}text")]
    | Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS), Tag(f"{TAG}blocks")],
    _CONTENT,
]


class ToolResultBlock(Body):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: TextContent | None = None
    is_error: bool | None = Field(default=None, description="The model reads `Error: ` before the content.")
    cache_control: CacheControl = None


Block = Annotated[
    Annotated[TextBlock, Tag(f"{TAG}text")]
    | Annotated[ToolUseBlock, Tag(f"{TAG}tool_use")]
    | Annotated[ToolResultBlock, Tag(f"{TAG}tool_result")]
    | Annotated[ThinkingBlock, Tag(f"{TAG}thinking")],
    Discriminator(
        _block_tag,
        custom_error_type="block",
        custom_error_message="must be a block of type 'text', 'tool_use', 'tool_result' or 'thinking': this server "
        "reads text only",
    ),
]


class InputMessage(Body):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Annotated[str, Tag(f"{TAG}text")]
        | Annotated[list[Block], Field(max_length=MAX_BLOCKS), Tag(f"{TAG}blocks")],
        _CONTENT,
    ]


class ClientTool(Body):
    """A tool that the client runs."""

    type: Literal["custom"] | None = Field(default=None, description="This server runs no tools itself.")
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = Field(
        default=None, description="True: the input of every call follows the whole schema."
    )
    cache_control: CacheControl = None


class ToolUseChoice(Body):
    """Whether a tool is called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = Field(default=None, description="With `tool`: which.")
    disable_parallel_tool_use: bool | None = Field(
        default=None, description="True: the answer ends with its first call."
    )


class ThinkingSwitch(Body):
    """Whether the model reasons before it answers."""

    type: Literal["enabled", "disabled", "adaptive"] = Field(
        description="`adaptive` leaves it to the model's format."
    )
    budget_tokens: AtLeastOne | None = Field(
        default=None, description="After so many tokens of reasoning the server ends it."
    )
    display: Annotated[
        Any, Neutral("summarized", advice="must be 'summarized' or null: reasoning is shown as it is")
    ] = None


class MessagesMetadata(Body):
    """Labels."""

    user_id: Label | None = Field(default=None, description="A label; it changes nothing.")


class OutputConfig(Body):
    """The form of the text."""

    format: OutputFormat | None = Field(default=None, description="What the text must be.")


class CountTokensBody(Body):
    """A conversation."""

    model: ModelName | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: TextContent | None = None
    tools: Annotated[list[ClientTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolUseChoice | None = None
    thinking: ThinkingSwitch | None = None


class MessagesBody(CountTokensBody):
    """What to answer, and how."""

    max_tokens: AtLeastOne
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Annotated[int, Field(ge=-1, lt=2**31), WHOLE] | None = None
    stop_sequences: Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(
        default=None, description="The older name of output_config.format."
    )
    metadata: MessagesMetadata | None = None
    service_tier: Annotated[
        Any,
        Neutral("auto", "standard_only", advice="must be 'auto', 'standard_only' or null: there is one tier"),
    ] = None
    dsa: SparsityOptions | None = Field(default=None, description="Sparse attention, for this request only.")


# ---- response -----------------------------------------------------------------------------------


class TextOut(BaseModel):
    """Text for the user."""

    type: Literal["text"]
    text: str


class ThinkingOut(BaseModel):
    """What the model thought."""

    type: Literal["thinking"]
    thinking: str
    signature: str = Field(description="Empty: this server does not sign.")


class ToolUseOut(BaseModel):
    """A call."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


OutputBlock = TextOut | ThinkingOut | ToolUseOut

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessagesUsage(BaseModel):
    """Token counts. The prompt is `input_tokens` and `cache_read_input_tokens` together."""

    input_tokens: int = Field(description="Prompt tokens that were computed.")
    cache_creation_input_tokens: int
    cache_read_input_tokens: int = Field(description="Prompt tokens whose keys and values were reused.")
    output_tokens: int
    dsa: SparsityUsage | None = None
    cost: float | None = COST
    cost_details: CostUsage | None = None


class OutputMessage(BaseModel):
    """The answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[OutputBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessagesUsage
    warnings: list[Notice | ChoiceWarning] | None = NOTICES


class TokenCount(BaseModel):
    """How long a prompt is."""

    input_tokens: int
    warnings: list[Notice] | None = NOTICES


class MessageStart(BaseModel):
    """The answer begins."""

    type: Literal["message_start"]
    message: OutputMessage


class BlockStart(BaseModel):
    """A block begins, empty."""

    type: Literal["content_block_start"]
    index: int
    content_block: OutputBlock


class TextAdded(BaseModel):
    """More of a text block."""

    type: Literal["text_delta"]
    text: str


class ThinkingAdded(BaseModel):
    """More of a thinking block."""

    type: Literal["thinking_delta"]
    thinking: str


class InputAdded(BaseModel):
    """More of the JSON text of a call's input."""

    type: Literal["input_json_delta"]
    partial_json: str


class BlockDelta(BaseModel):
    """A block grows."""

    type: Literal["content_block_delta"]
    index: int
    delta: TextAdded | ThinkingAdded | InputAdded


class BlockStop(BaseModel):
    """A block is complete."""

    type: Literal["content_block_stop"]
    index: int


class MessageEnd(BaseModel):
    """Why an answer ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageChange(BaseModel):
    """The answer's end and its usage."""

    type: Literal["message_delta"]
    delta: MessageEnd
    usage: MessagesUsage
    warnings: list[ChoiceWarning] | None = None


class MessageStop(BaseModel):
    """The last event."""

    type: Literal["message_stop"]


class MessageEvent(BaseModel):
    """One event of a stream."""

    event: MessageStart | BlockStart | BlockDelta | BlockStop | MessageChange | MessageStop
