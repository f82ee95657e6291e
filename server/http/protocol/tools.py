"""The wire format of tools: the tools in a request, and the calls in an answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, StringConstraints, Tag

from server.http.protocol.base import TAG, Body, Natural

MAX_TOOLS = 256
MAX_CALLS = 256

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
CallId = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class FunctionTool(Body):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON schema; default: none.")
    strict: bool | None = Field(
        default=None, description="True: the arguments of every call follow the whole schema."
    )


class Tool(Body):
    """A tool."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Body):
    """A function by its name."""

    name: Name


class NamedTool(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


def _choice_tag(value: Any) -> str:
    return f"{TAG}tool" if isinstance(value, dict) else f"{TAG}word"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(f"{TAG}word")]
    | Annotated[NamedTool, Tag(f"{TAG}tool")],
    Discriminator(_choice_tag),
]


CalledName = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class CalledFunction(Body):
    """What was called. A model may call a tool by a name that no tool could have."""

    name: CalledName
    arguments: str = Field(description="A JSON object, as text.")


class PastCall(Body):
    """A call in an earlier answer."""

    id: CallId
    type: Literal["function"]
    function: CalledFunction
    index: Natural | None = Field(default=None, description="As streams have it; unused.")


# ---- response -----------------------------------------------------------------------------------


class FunctionCall(BaseModel):
    """What is called."""

    name: str
    arguments: str = Field(description="The model's text, which should be a JSON object.")


class ToolCall(BaseModel):
    """A call."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class FunctionDelta(BaseModel):
    """What is new in a call."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(BaseModel):
    """A call that begins, or more of its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta
