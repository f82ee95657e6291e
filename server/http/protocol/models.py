"""The objects of /v1/models and the health endpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class DefaultSampling(BaseModel):
    """How a token is chosen where a request does not say it. What is null is off."""

    temperature: float
    top_p: float
    top_k: int | None = Field(description="Of how many of the likeliest tokens; null: of all.")
    min_p: float | None
    repetition_penalty: float | None


class ModelObject(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When this server started, in seconds since 1970.")
    owned_by: str = "dsa-serve"
    root: str = Field(description="The name in answers; `id` may be another name of the same model.")
    parent: None = None
    max_model_len: int | None = Field(
        description="Tokens that prompt and output together may have; null while the model loads."
    )
    default_sampling: DefaultSampling
    random_weights: bool = Field(
        default=False,
        description="Whether the weights are random numbers (--load-format dummy), so that answers mean nothing.",
    )
    batch_invariant: bool = Field(
        default=False,
        description="Whether the same prompt gives the same tokens in any company, to the bit (--batch-invariant).",
    )


class ModelList(BaseModel):
    """Every name of the one model that is served."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class LoadingProgress(BaseModel):
    """How far the model is loaded."""

    stage: str
    done: int
    total: int


class Version(BaseModel):
    """The version of the server."""

    version: str


class Load(BaseModel):
    """How much work there is."""

    server_load: int = Field(description="Choices that wait or run.")


class Liveness(BaseModel):
    """The process answers."""

    state: Literal["alive"] = "alive"


class Readiness(BaseModel):
    """Whether requests are taken now, and why not."""

    ready: bool
    state: str = Field(
        description="`ready`, `starting`, `down`, `failed`, `stopped`, `stalled`, `ledger` or `draining`."
    )
    model: str
    reason: str | None = Field(description="One sentence when not ready.")
    loading: LoadingProgress | None
    warnings: list[str] = Field(
        default_factory=list, description="What an operator has to look at, though requests are taken."
    )
