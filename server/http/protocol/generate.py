"""The wire format of /inference/v1/generate, which is vLLM's: token ids in, token ids out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from server.http.protocol.base import WHOLES, Body, Label, Neutral, TokenId
from server.http.protocol.notices import NOTICES, Notice
from server.http.protocol.sampling import GenerationBody, ModelName
from server.http.protocol.usage import Usage


class GenerateSampling(GenerationBody):
    """How to generate: the fields of /v1/completions."""

    detokenize: bool | None = Field(
        default=None, description="False: text plays no part, so there are no stop strings."
    )


class GenerateBody(Body):
    """What to continue, and how."""

    model: ModelName | None = None
    token_ids: Annotated[list[TokenId], Field(min_length=1), WHOLES]
    sampling_params: GenerateSampling
    stream: Annotated[Any, Neutral(False, advice="must be false or null: /v1/completions streams")] = None
    request_id: Label | None = Field(default=None, description="A label; it changes nothing.")
    cache_salt: str | None = Field(
        default=None, min_length=1, max_length=512, description="As in /v1/completions."
    )
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None


class GenerateChoice(BaseModel):
    """One continuation."""

    index: int
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


class Generated(BaseModel):
    """The response."""

    request_id: str
    choices: list[GenerateChoice]
    usage: Usage
    warnings: list[Notice] | None = NOTICES
