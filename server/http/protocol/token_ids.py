"""What an answer says about its tokens by their ids, as vLLM has it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class PromptLogprob(BaseModel):
    """A prompt token, or an alternative to it."""

    logprob: float
    rank: int = Field(description="1 is the most likely token.")
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of the prompt: the token and its alternatives, by their ids. Nothing is known of the first."""

PROMPT_IDS: Any = Field(
    default=None, description="With `return_token_ids`: the prompt. In a stream: in its first event."
)
PROMPT_LOGPROBS: Any = Field(
    default=None, description="With `prompt_logprobs`: of each prompt token; the first has none."
)
TOKEN_IDS: Any = Field(
    default=None,
    description="With `return_token_ids`: what the model wrote, with the stop token that ended it.",
)
