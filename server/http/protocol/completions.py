"""The wire format of /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from server.http.protocol.base import TAG, WHOLES, AtLeastOne, LogprobCount, Natural, TokenId, tag_of_list
from server.http.protocol.notices import FINGERPRINT, NOTICES, STOP_REASON, Notice
from server.http.protocol.sampling import GenerationBody
from server.http.protocol.token_ids import PROMPT_IDS, PROMPT_LOGPROBS, TOKEN_IDS, PromptLogprobs
from server.http.protocol.usage import RunningUsage, Usage

# ---- request ------------------------------------------------------------------------------------


def _prompt_tag(value: Any) -> str | None:
    kinds = ((str, f"{TAG}texts"), (int, f"{TAG}ids"), (float, f"{TAG}ids"), (list, f"{TAG}id_lists"))
    return tag_of_list(value, text=f"{TAG}text", empty=f"{TAG}texts", kinds=kinds)


PromptField = Annotated[
    Annotated[str, Tag(f"{TAG}text")]
    | Annotated[list[str], Field(min_length=1), Tag(f"{TAG}texts")]
    | Annotated[list[TokenId], Field(min_length=1), WHOLES, Tag(f"{TAG}ids")]
    | Annotated[
        list[Annotated[list[TokenId], Field(min_length=1), WHOLES]],
        Field(min_length=1),
        Tag(f"{TAG}id_lists"),
    ],
    Discriminator(
        _prompt_tag,
        custom_error_type="prompt",
        custom_error_message="must be a string, a list of strings, a list of token ids, or a list of such lists",
    ),
]


class CompletionBody(GenerationBody):
    """What to continue, and how."""

    prompt: PromptField
    echo: bool | None = Field(default=None, description="Put the prompt in front of the text.")
    logprobs: LogprobCount | None = Field(
        default=None,
        description="Report log-probabilities, with so many alternatives; with echo, of the prompt too.",
    )
    logprob_start_len: Natural | None = Field(
        default=None,
        description="The first prompt token to report one of; what is cached of the prompt before it is not computed "
        "again.",
    )
    best_of: AtLeastOne | None = Field(
        default=None, description="Must be n: choose among the answers yourself."
    )
    suffix: str | None = Field(
        default=None,
        description="What follows the text. The model's vocabulary must have marks for filling in the middle.",
    )

    def prompts(self) -> list[str | list[int]]:
        """The prompts; each is a text or a list of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        token_ids = [part for part in self.prompt if isinstance(part, int)]
        return [token_ids] if token_ids else [part for part in self.prompt if not isinstance(part, int)]


# ---- response -----------------------------------------------------------------------------------


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a choice's tokens, one entry a token in each list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Where each token begins in the choice's text.")


class CompletionChoice(BaseModel):
    """One continuation, or in a stream what is new in it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = STOP_REASON
    prompt_token_ids: list[int] | None = PROMPT_IDS
    token_ids: list[int] | None = TOKEN_IDS
    prompt_logprobs: PromptLogprobs | None = PROMPT_LOGPROBS


class Completion(BaseModel):
    """The response, and one event of it when `stream` is true."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str = FINGERPRINT
    choices: list[CompletionChoice]
    usage: Usage | RunningUsage | None = None
    warnings: list[Notice] | None = NOTICES
