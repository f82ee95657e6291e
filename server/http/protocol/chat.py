"""The wire format of /v1/chat/completions."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Discriminator, Field, StringConstraints, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.http.protocol.base import (
    TAG,
    AtLeastOne,
    Body,
    CacheControl,
    Label,
    LogprobCount,
    Neutral,
    tag_of_list,
)
from server.http.protocol.notices import FINGERPRINT, NOTICES, STOP_REASON, Notice
from server.http.protocol.sampling import GenerationBody
from server.http.protocol.token_ids import PROMPT_IDS, PROMPT_LOGPROBS, TOKEN_IDS, PromptLogprobs
from server.http.protocol.tools import (
    MAX_CALLS,
    MAX_TOOLS,
    CallId,
    PastCall,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
)
from server.http.protocol.usage import RunningUsage, Usage

MAX_MESSAGES = 4096

# ---- request ------------------------------------------------------------------------------------


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"] = Field(description="This server reads text only.")
    text: str
    cache_control: CacheControl = None


def _content_tag(value: Any) -> str | None:
    return tag_of_list(value, text=f"{TAG}text", empty=f"{TAG}parts", kinds=((object, f"{TAG}parts"),))


MessageContent = Annotated[
    Annotated[str, Tag(f"{TAG}text")]
    | Annotated[list[TextPart], Field(min_length=1, max_length=1024), Tag(f"{TAG}parts")],
    Discriminator(
        _content_tag,
        custom_error_type="content",
        custom_error_message='must be a string or a list of parts like {{"type": "text", "text": "..."}}',
    ),
]

_NO_FUNCTIONS = "functions are the older name of tools; send tools and tool_choice"


ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_ROLE_SCHEMA = {
    "type": "string",
    "anyOf": [{"enum": list(ROLES)}, {"pattern": f"^{_ROLE.pattern}$", "maxLength": 32}],
}


def _check_role(role: str) -> str:
    if not _ROLE.fullmatch(role):
        raise PydanticCustomError("role", "must be 'system', 'developer', 'user', 'assistant' or 'tool'")
    return role


class ChatMessage(Body):
    """One message of the conversation."""

    role: Annotated[
        str, StringConstraints(max_length=32), AfterValidator(_check_role), WithJsonSchema(_ROLE_SCHEMA)
    ] = Field(
        description="`system`, `developer` (which is `system`), `user`, `assistant` or `tool` (the result of a call, where "
        "the model's format has calls); or another that the model's template writes."
    )
    content: MessageContent | None = Field(
        default=None, description="Only a message with tool calls may do without."
    )
    name: Label | None = Field(
        default=None,
        description="The answer's `warnings` say so where the model's prompt has no place for it.",
    )
    cache_control: CacheControl = None
    # Client libraries add the next three fields when they send an answer back.
    refusal: Annotated[Any, Neutral(advice="must be null: write the refusal in the content")] = None
    annotations: Annotated[
        Any, Neutral([], advice="must be empty: annotations are not part of the prompt")
    ] = None
    audio: Annotated[Any, Neutral(advice="must be null: this server reads text only")] = None
    tool_calls: Annotated[list[PastCall], Field(max_length=MAX_CALLS)] | None = None
    tool_call_id: CallId | None = Field(default=None, description="Whose result a tool message is.")
    reasoning_content: str | None = Field(
        default=None, description="Of an earlier answer; the model's format decides how long it is kept."
    )
    reasoning: str | None = Field(default=None, description="Another name of `reasoning_content`.")
    function_call: Annotated[Any, Neutral(advice=f"must be null: {_NO_FUNCTIONS}")] = None

    @property
    def thoughts(self) -> str:
        """The reasoning, by either name."""
        return self.reasoning_content or self.reasoning or ""

    def text(self) -> str:
        """The content as one string; each part begins on a new line."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content)


class ThinkingOptions(Body):
    """Whether the model reasons before it answers; as DeepSeek's interface has it."""

    type: Literal["enabled", "disabled"]
    budget_tokens: AtLeastOne | None = Field(
        default=None, description="After so many tokens of reasoning the server ends it."
    )


_PLAIN_VALUE = re.compile(r"[\w .,:+-]{0,64}")


def _check_variables(variables: dict[str, Any]) -> dict[str, Any]:
    for name, value in variables.items():
        switch = name in ("thinking", "enable_thinking")
        if not (value is None or isinstance(value, bool)) and (
            switch
            or not isinstance(value, int | float | str)
            or (isinstance(value, str) and not _PLAIN_VALUE.fullmatch(value))
        ):
            may = "true or false" if switch else "true, false, a number or a short plain text"
            raise PydanticCustomError("template_variable", "{name} must be {may}", {"name": name, "may": may})
    return variables


TemplateOptions = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Any],
    Field(
        max_length=32,
        description="Variables of the model's own chat template; `thinking` and `enable_thinking` are the switch of "
        "reasoning. One that the template does not have has no effect, and the answer's `warnings` say so.",
    ),
    AfterValidator(_check_variables),
]


Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16),
]


Effort = Annotated[
    Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"],
    Field(
        description="`none` and `minimal` switch thinking off, the others on. How long the model thinks is its own "
        "choice; bound it with a thinking budget."
    ),
]


class ChatCompletionBody(GenerationBody):
    """What to answer, and how."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: AtLeastOne | None = Field(
        default=None, description="The older name of max_completion_tokens."
    )
    max_completion_tokens: AtLeastOne | None = Field(
        default=None,
        description="At most so many tokens; default: the server's (8192 for DeepSeek and GLM, else 1024, unless set).",
    )
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None

    metadata: Metadata | None = Field(default=None, description="Labels; they change nothing.")
    safety_identifier: Label | None = Field(default=None, description="A label; it changes nothing.")
    prompt_cache_key: Label | None = Field(
        default=None, description="A label; it changes nothing, because there is one cache."
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="False: the answer ends with its first call."
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = Field(
        default=None,
        description="`required` and a name open the call for the model; `none` leaves the tools out of the prompt.",
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="End the prompt with the opening of the answer; default: true."
    )
    continue_final_message: bool | None = Field(
        default=None, description="The answer continues the last message, which is the assistant's."
    )
    echo: bool | None = Field(
        default=None,
        description="With continue_final_message: the answer begins with the text that it continues.",
    )
    thinking: ThinkingOptions | None = None
    thinking_token_budget: AtLeastOne | None = Field(
        default=None, description="Another name of thinking.budget_tokens."
    )
    chat_template_kwargs: TemplateOptions | None = None
    reasoning_effort: Effort | None = None

    audio: Annotated[Any, Neutral(advice="must be null: this server writes text only")] = None
    function_call: Annotated[Any, Neutral("none", "auto", advice=f"must be null: {_NO_FUNCTIONS}")] = None
    functions: Annotated[Any, Neutral([], advice=f"must be empty: {_NO_FUNCTIONS}")] = None
    modalities: Annotated[
        Any, Neutral(["text"], advice="must be ['text'] or null: this server writes text only")
    ] = None
    moderation: Annotated[Any, Neutral(advice="must be null: this server does not moderate")] = None
    prediction: Annotated[Any, Neutral(advice="must be null: this server takes no predicted output")] = None
    prompt_cache_options: Annotated[
        Any, Neutral(advice="must be null: prompts are cached without options")
    ] = None
    prompt_cache_retention: Annotated[
        Any, Neutral("in_memory", advice="must be 'in_memory' or null: the prompt cache lives in memory")
    ] = None
    service_tier: Annotated[
        Any, Neutral("auto", "default", advice="must be 'auto', 'default' or null: there is one service tier")
    ] = None
    store: Annotated[Any, Neutral(False, advice="must be false or null: this server stores nothing")] = None
    verbosity: Annotated[
        Any, Neutral("medium", advice="must be 'medium' or null: ask for a length in a message instead")
    ] = None
    web_search_options: Annotated[
        Any, Neutral(advice="must be null: this server does not search the web")
    ] = None


# ---- response -----------------------------------------------------------------------------------


OTHER_NAME = Field(
    default=None, description="The name of `reasoning_content` with `--reasoning-field reasoning`."
)


class TopLogprob(BaseModel):
    """One alternative at a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """One generated token and its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a choice's tokens."""

    content: list[ChatTokenLogprob]


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str | None = Field(description="Null where there is nothing but calls.")
    refusal: None
    reasoning_content: str | None = None
    reasoning: str | None = OTHER_NAME
    tool_calls: list[ToolCall] | None = None


class ChoiceWarning(BaseModel):
    """How the model broke its own format. Nothing of what it wrote is lost."""

    code: str = Field(description="Such as `truncated_tool_call` or `invalid_arguments`.")
    message: str
    tool_call: int | None = Field(description="Which of the choice's calls is concerned.")
    raw: str | None = Field(description="The model's text, where it is nowhere else in the choice.")


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None = STOP_REASON
    token_ids: list[int] | None = TOKEN_IDS
    warnings: list[ChoiceWarning] | None = None


class ChatCompletion(BaseModel):
    """The response when `stream` is false."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str = FINGERPRINT
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = PROMPT_IDS
    prompt_logprobs: PromptLogprobs | None = PROMPT_LOGPROBS
    warnings: list[Notice] | None = NOTICES


class MessageDelta(BaseModel):
    """What is new in an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    reasoning: str | None = OTHER_NAME
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """What is new in one choice."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: str | int | None = STOP_REASON
    token_ids: list[int] | None = TOKEN_IDS
    warnings: list[ChoiceWarning] | None = None


class ChatCompletionChunk(BaseModel):
    """One event when `stream` is true."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str = FINGERPRINT
    choices: list[ChatChunkChoice]
    usage: Usage | RunningUsage | None = None
    prompt_token_ids: list[int] | None = PROMPT_IDS
    warnings: list[Notice] | None = NOTICES
