"""What a request used, as clients see it."""

from __future__ import annotations

from typing import Any, Literal

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


COST: Any = Field(
    default=None, description="What is charged, in US dollars; `cost_details` has the exact amount."
)


class CostUsage(BaseModel):
    """What the request costs. Amounts are whole nano-units: billionths of the currency."""

    amount: int = Field(description="What is charged, by the price table.")
    currency: Literal["USD"]
    unit: Literal["nano"]
    price_version: str = Field(description="The version of the price table that held at arrival.")
    metered_amount: int = Field(description="The request's share of the device's time, at its hourly price.")
    dense_equivalent_amount: int = Field(description="The same, had attention been dense; an estimate.")
    effective_top_k: int | Literal["dense"]


class RunningUsage(BaseModel):
    """Token counts so far, summed over the choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


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
    cost: float | None = COST
    cost_details: CostUsage | None = None
