"""What an answer says about its request, beside the answer itself."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class Notice(BaseModel):
    """Something of the request that had no effect."""

    code: str = Field(description="Such as `unknown_field`.")
    message: str
    param: str | None = Field(default=None, description="The field that is concerned.")


FINGERPRINT: Any = Field(
    description="Changes when the server's version, the model or how it computes changes."
)
NOTICES: Any = Field(
    default=None, description="What of the request had no effect. In a stream: in its first event."
)
STOP_REASON: Any = Field(
    default=None, description="The stop string, or the token of stop_token_ids, that ended the choice."
)
