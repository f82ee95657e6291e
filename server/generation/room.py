"""How many tokens of a model's context a prompt and its answer may take."""

from __future__ import annotations

from engine.protocol import ModelInfo
from server.generation.prompts import Prompt
from server.http.protocol.errors import bad_request
from server.http.protocol.sampling import GenerationBody
from server.text.tokenizer import Tokenizer


def context_of(body: GenerationBody, model: ModelInfo) -> int | None:
    """How many tokens a prompt may have at most; None: it is cut."""
    return model.max_model_len if body.truncate_prompt_tokens is None else None


def cut(
    prompt: Prompt, body: GenerationBody, model: ModelInfo, text: Tokenizer, max_tokens: int | None
) -> Prompt:
    """Return the end of a prompt, as long as `truncate_prompt_tokens` says.

    Raises:
        ApiError: it says nothing possible.
    """
    length = body.truncate_prompt_tokens
    if length is None:
        return prompt
    if not length:
        raise bad_request("truncate_prompt_tokens must be -1, or at least 1", param="truncate_prompt_tokens")
    if length < 0:
        length = model.max_model_len - (max_tokens or 1)
    if length < 1 or len(prompt.token_ids) <= length:
        return prompt
    token_ids = prompt.token_ids[-length:]
    return Prompt(token_ids, text.decode(token_ids) if prompt.text else "")


def room_of(
    prompt: Prompt, model: ModelInfo, text: Tokenizer, max_tokens: int | None, default: int | None
) -> int:
    """Return how many tokens the engine may generate after a prompt.

    Args:
        prompt: to check.
        model: that is loaded.
        text: its tokenizer.
        max_tokens: the request's limit; None: it has none.
        default: the limit of a request without one; None: the context's end.

    Raises:
        ApiError: the prompt is not one of this model, or there is no room.
    """
    length, context = len(prompt.token_ids), model.max_model_len
    if not length:
        raise bad_request("the prompt is empty; send at least one token", param="prompt")
    if max(prompt.token_ids) >= model.vocab_size:  # a tokenizer may have more tokens than its model
        token_id = next(token_id for token_id in prompt.token_ids if token_id >= model.vocab_size)
        raise bad_request(
            f"the prompt has the token {text.token_text(token_id)!r}, whose id {token_id} is not one of "
            f"this model's vocabulary, from 0 to {model.vocab_size - 1}; leave it out",
            param="prompt",
        )
    if length >= context:
        raise bad_request(
            f"the prompt has {length} tokens and needs room for at least one more, but this model's "
            f"context is {context} tokens; shorten the prompt",
            code="context_length_exceeded",
        )
    if max_tokens is None:
        return min(default or context, context - length)
    if length + max_tokens > context:
        raise bad_request(
            f"the prompt has {length} tokens and max_tokens is {max_tokens}, together "
            f"{length + max_tokens}, but this model's context is {context} tokens; shorten the prompt or "
            f"set max_tokens to at most {context - length}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return max(max_tokens, 1)  # 0: the prompt is only scored; the engine still generates one token


def check_least(body: GenerationBody, room: int) -> None:
    """Refuse a `min_tokens` for which an answer has no room.

    Raises:
        ApiError: it has none.
    """
    if (body.min_tokens or 0) > room:
        raise bad_request(
            f"min_tokens is {body.min_tokens}, but the answer has room for {room} tokens", param="min_tokens"
        )
