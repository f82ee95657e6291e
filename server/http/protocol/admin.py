"""The objects of /admin: settings that may change while the server runs, and who changed what."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from server.http.protocol.base import AtLeastOne, Body
from server.http.protocol.sampling import TopK

LogLevel = Literal["debug", "info", "warning", "error"]


class SettingsBody(Body):
    """What to change. A field that is not sent stays; null is the setting's `none` where it has one."""

    max_queue: AtLeastOne = Field(default=1, description="As --max-queue.")
    max_queue_tokens: AtLeastOne | None = Field(default=None, description="As --max-queue-tokens.")
    max_queue_seconds: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="As --max-queue-seconds."
    )
    request_seconds: Annotated[float, Field(ge=0)] = Field(default=0, description="As --request-seconds.")
    max_n: AtLeastOne = Field(default=1, description="As --max-n.")
    max_prompts: AtLeastOne = Field(default=1, description="As --max-prompts.")
    max_tokens: AtLeastOne | None = Field(
        default=None, description="As --max-tokens; null: up to the end of the context."
    )
    top_k: TopK | None = Field(
        default=None, description="As --top-k; null: what the indexer was trained for."
    )
    min_priority: Annotated[int, Field(ge=-(2**31), le=0)] = Field(
        default=0, description="As --min-priority."
    )
    log_level: LogLevel = Field(default="info", description="The least that is logged.")
    prices: dict[str, Any] | None = Field(
        default=None, description="A whole price table, as in the file of --prices, with a new version."
    )


class SettingsNow(BaseModel):
    """The settings that are in force, and may change."""

    max_queue: int
    max_queue_tokens: int | None
    max_queue_seconds: float | None
    request_seconds: float
    max_n: int
    max_prompts: int
    max_tokens: int | None
    top_k: int | Literal["dense"] | None
    min_priority: int
    log_level: str
    price_version: str


class Change(BaseModel):
    """One setting that was changed."""

    at: datetime
    key: str = Field(description="The name of the admin's key.")
    request_id: str
    setting: str
    old: Any
    new: Any


class ChangeList(BaseModel):
    """The newest changes since the start, the newest last. The log has all of them."""

    object: Literal["list"] = "list"
    data: list[Change]
