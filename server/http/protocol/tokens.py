"""The wire format of /tokenize and /detokenize, which is vLLM's."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from server.http.protocol.base import WHOLES, Body, TokenId
from server.http.protocol.chat import MAX_MESSAGES, ChatMessage, TemplateOptions
from server.http.protocol.notices import Notice
from server.http.protocol.sampling import ModelName
from server.http.protocol.tools import MAX_TOOLS, Tool


class TokenizeBody(Body):
    """A text, or a conversation."""

    model: ModelName | None = None
    prompt: str | None = Field(default=None, description="A text; or send `messages`.")
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="Begin with the token that begins a sequence. A template writes its own."
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="End a conversation with the opening of the answer; default: true."
    )
    continue_final_message: bool | None = Field(
        default=None, description="Leave the last message open, so that an answer continues it."
    )
    return_token_strs: bool | None = Field(
        default=None, description="Return each token as the vocabulary writes it, too."
    )


class Tokenized(BaseModel):
    """The token ids."""

    count: int
    max_model_len: int | None = Field(description="Null while the model loads.")
    tokens: list[int]
    token_strs: list[str] | None = None
    warnings: list[Notice] | None = None


class TokenizerInfo(BaseModel):
    """What a client needs that counts tokens or writes prompts by itself."""

    tokenizer_class: str = Field(
        default="PreTrainedTokenizerFast", description="The kind, in transformers' words."
    )
    vocab_size: int = Field(description="One more than the largest token id.")
    bos_token: str | None = Field(description="The token that begins a sequence, if there is one.")
    bos_token_id: int | None
    eos_token: str | None = Field(description="The first of the tokens that end an answer.")
    eos_token_id: int | None
    add_bos_token: bool = Field(description="Whether a text begins with `bos_token`.")
    chat_template: str | None = Field(
        description="Null where the chat format is code, or the model has none."
    )


class DetokenizeBody(Body):
    """Token ids."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1 << 20), WHOLES]


class Detokenized(BaseModel):
    """The text."""

    prompt: str
    warnings: list[Notice] | None = None
