"""Turns texts and conversations into the token ids of this model, and ids into text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from engine.client import EngineState, EngineStatus
from engine.protocol import ModelInfo
from server.chat import ChatFormat, PromptError, encode_chat
from server.generation.conversation import Conversation, read_conversation
from server.http.protocol.chat import ChatCompletionBody
from server.http.protocol.errors import ENGINE, ApiError, bad_request, unavailable
from server.http.protocol.tokens import DetokenizeBody, TokenizeBody, TokenizerInfo
from server.text.tokenizer import LONG_TEXT, Tokenizer, TokenizerError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, and the text that is shown for it where it is echoed."""

    token_ids: tuple[int, ...]
    text: str


MAX_COUNTED = 2 << 20
"""Characters of a text that is only counted, by /tokenize or count_tokens, where no model's context is a bound."""


class Prompts:
    """Makes prompts for one model, given its names, tokenizer and chat format."""

    def __init__(self, names: Sequence[str], text: Tokenizer, chat: ChatFormat) -> None:
        self._names = names
        self._text = text
        self._chat = chat

    def check_name(self, model: str | None) -> None:
        """Refuse a request that names another model."""
        if model is not None and model not in self._names:
            raise model_not_found(model, self._names)

    async def written(
        self,
        said: Conversation,
        *,
        add_generation_prompt: bool = True,
        open_end: bool = False,
        context: int | None = None,
    ) -> list[int]:
        """Return the token ids that a conversation becomes.

        Args:
            said: the conversation.
            add_generation_prompt: end with the opening of the answer.
            open_end: end where the text of the last message ends, so that the answer continues it.
            context: refuse what cannot be so few tokens; None: refuse nothing for its length.

        Raises:
            ApiError: the model's format cannot write the conversation.
        """
        length = sum(len(message["content"]) for message in said.messages)
        self._check_length(length, context)
        try:
            return await _apart(
                length,
                lambda: encode_chat(
                    self._chat.with_variables(said.variables),
                    self._text,
                    said.messages,
                    add_generation_prompt,
                    tools=said.tools,
                    thinking=said.thinking,
                    open_end=open_end,
                ),
            )
        except (PromptError, TokenizerError) as error:
            raise bad_request(str(error), param="messages") from None

    async def text(
        self,
        source: str | list[int],
        param: str,
        *,
        echo: bool = False,
        add_bos: bool = True,
        size: int | None = None,
        context: int | None = None,
    ) -> Prompt:
        """Return the prompt that a text, or a list of token ids, is.

        Args:
            source: the text or the ids.
            param: the field's name, for errors.
            echo: the prompt's text is shown.
            add_bos: begin a text as the model's tokenizer begins one.
            size: the bound of ids; None is the tokenizer's.
            context: refuse a text that cannot be so few tokens; None: refuse none for its length.

        Raises:
            ApiError: the text is not valid Unicode, or an id is not one of the model.
        """
        if isinstance(source, str):
            self._check_length(len(source), context)
            try:
                token_ids = await _apart(len(source), lambda: self._text.encode(source, add_bos=add_bos))
            except TokenizerError as error:
                raise bad_request(f"{param} cannot be read: {error}", param=param) from None
            return Prompt(tuple(token_ids), source if echo else "")
        check_ids(source, param, size or self._text.vocab_size)
        return Prompt(tuple(source), self._text.decode(source, skip_special=False) if echo else "")

    def _check_length(self, length: int, context: int | None) -> None:
        """Refuse a text of `length` characters that is certain to be too long, before it is tokenized.

        Without a context the text is only counted, or the end of it is used.
        """
        longest = self._text.longest
        if context is None and length > MAX_COUNTED:
            raise bad_request(
                f"the text has {length} characters, but this server takes at most {MAX_COUNTED} at a time; send it in parts",
                code="text_too_long",
            )
        if context is not None and longest is not None and length > context * longest:
            raise bad_request(
                f"the prompt has {length} characters, but this model's context is {context} tokens, which have at most "
                f"{context * longest}; shorten the prompt",
                code="context_length_exceeded",
            )

    async def chat(self, body: ChatCompletionBody) -> list[int]:
        """Return the token ids of the prompt that a chat becomes.

        Raises:
            ApiError: the model's format cannot write it; the message says what to change.
        """
        self.check_name(body.model)
        said = read_conversation(body, self._chat)
        open_end, opens = prompt_end(said.messages, body.add_generation_prompt, body.continue_final_message)
        return await self.written(said, add_generation_prompt=opens, open_end=open_end)

    async def tokenize(self, body: TokenizeBody) -> Sequence[int]:
        """Return the token ids of a text, or of the prompt that a conversation becomes.

        Raises:
            ApiError: there is neither or both, or the model's format cannot write the conversation.
        """
        self.check_name(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("send either prompt or messages", param="prompt")
        if body.messages is None:
            prompt = await self.text(
                body.prompt or "", "prompt", add_bos=body.add_special_tokens is not False
            )
            return prompt.token_ids
        fields = body.model_dump(include={"add_generation_prompt", "continue_final_message"})
        token_ids = await self.chat(
            ChatCompletionBody.model_construct(
                messages=body.messages,
                tools=body.tools,
                chat_template_kwargs=body.chat_template_kwargs,
                **fields,
            )
        )
        if body.add_special_tokens and self._text.adds_bos and self._text.bos_token_id is not None:
            token_ids = [self._text.bos_token_id, *token_ids]
        return token_ids

    def detokenize(self, body: DetokenizeBody) -> str:
        """Return the text of token ids, with control tokens written out.

        Raises:
            ApiError: an id is not one of the model's vocabulary.
        """
        self.check_name(body.model)
        check_ids(body.tokens, "tokens", self._text.vocab_size)
        return self._text.decode(body.tokens, skip_special=False)

    def describe(self) -> TokenizerInfo:
        """Say what the tokenizer and the chat format are."""
        text = self._text
        bos, eos = text.bos_token_id, next(iter(text.eos_token_ids), None)
        return TokenizerInfo(
            vocab_size=text.vocab_size,
            bos_token=None if bos is None else text.token_text(bos),
            bos_token_id=bos,
            eos_token=None if eos is None else text.token_text(eos),
            eos_token_id=eos,
            add_bos_token=text.adds_bos,
            chat_template=self._chat.source,
        )


def check_ids(token_ids: Sequence[int], param: str, size: int, *, keys: bool = False) -> None:
    """Refuse token ids outside a vocabulary of `size`.

    Raises:
        ApiError: one is outside. With `keys` it is named as the key of an object, else as the element of a list.
    """
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < size):
        return
    for position, token_id in enumerate(token_ids):
        if not 0 <= token_id < size:
            where = f"{param}.{token_id}" if keys else f"{param}[{position}]"
            raise bad_request(
                f"{where} is not a token id of this model; its vocabulary has {size}, so ids go from 0 to {size - 1}",
                param=param,
            )


def model_not_found(name: str, served: Sequence[str]) -> ApiError:
    """The 404 for a request that names another model."""
    shown = name if name.isprintable() and len(name) <= 128 else "that"
    return ApiError(
        404,
        f"the model {shown!r} is not served here; this server has {' and '.join(map(repr, served))}",
        param="model",
        code="model_not_found",
    )


def loaded_model(status: EngineStatus) -> ModelInfo:
    """Return the model that the engine has loaded.

    Raises:
        ApiError: the engine takes no requests now.
    """
    if status.state is not EngineState.READY or status.model is None:
        raise unavailable(why_not_ready(status), code="engine_unavailable", kind=ENGINE)
    return status.model


def why_not_ready(status: EngineStatus) -> str:
    """One sentence that says why an engine takes no requests."""
    reason = status.message or f"the engine is {status.state.value}"
    loading = status.loading
    if loading is not None and status.state in (EngineState.STARTING, EngineState.DOWN):
        progress = f"{loading.done} of {loading.total}" if loading.total else ""
        stage = "" if loading.stage in reason else f"loading: {loading.stage}"
        details = " ".join(part for part in (stage, progress) if part)
        reason += f" ({details})" if details else ""
    return reason


def prompt_end(
    messages: Sequence[dict[str, Any]],
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
) -> tuple[bool, bool]:
    """Return how a prompt ends: whether its last message is left open, and whether the answer's turn is opened.

    Raises:
        ApiError: the two contradict each other, or there is no message to continue.
    """
    if not continue_final_message:
        return False, add_generation_prompt is not False
    if add_generation_prompt:
        raise bad_request(
            "continue_final_message goes on with the last message, so add_generation_prompt must be false or null",
            param="add_generation_prompt",
        )
    if messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1]:
        raise bad_request(
            "continue_final_message needs a last message of role 'assistant' without tool calls",
            param="continue_final_message",
        )
    return True, False


async def _apart(size: int, work: Callable[[], T]) -> T:
    """Do work on a text of `size` characters: in a thread if it is long, so that the event loop goes on."""
    return await asyncio.to_thread(work) if size > LONG_TEXT else work()
