"""What a request used, as clients see it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class PromptTokensDetails(BaseModel):
    """Where the prompt's tokens came from."""

    cached_tokens: int = Field(description="Prompt tokens whose keys and values were reused.")


class CompletionTokensDetails(BaseModel):
    """What the output's tokens are."""

    reasoning_tokens: int = Field(description="Tokens of reasoning.")


class SparsityUsage(BaseModel):
    """How attention ran."""

    top_k: int | Literal["dense"] = Field(description="Earlier tokens that each token could attend to.")
    requested: int | None = Field(default=None, description="What was asked for, where it was not granted.")
    note: str | None = Field(default=None, description="Why it was not granted.")


class Usage(BaseModel):
    """Token counts, summed over the choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = Field(
        default=None, description="Only where the model's chat format has reasoning."
    )
    dsa: SparsityUsage
