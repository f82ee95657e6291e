"""What a request wants to know of log-probabilities, checked."""

from __future__ import annotations

from collections.abc import Sequence

from server.generation.prompts import Prompt, check_ids
from server.http.protocol.completions import CompletionBody
from server.http.protocol.errors import bad_request
from server.http.protocol.sampling import GenerationBody


def logprob_start(body: CompletionBody, prompts: Sequence[Prompt]) -> int:
    """The first prompt token whose log-probability is reported.

    Raises:
        ApiError: none are asked for, or a prompt ends before it.
    """
    start = body.logprob_start_len or 0
    if body.logprob_start_len is not None and not (body.echo and body.logprobs is not None):
        raise bad_request(
            "logprob_start_len says where a prompt's log-probabilities begin; ask for those with echo true and "
            "logprobs",
            param="logprob_start_len",
        )
    shortest = min(len(prompt.token_ids) for prompt in prompts)
    if start > shortest:
        raise bad_request(
            f"logprob_start_len is {start}, but a prompt has only {shortest} tokens",
            param="logprob_start_len",
        )
    return start


def check_counts(body: GenerationBody, most: int, size: int) -> None:
    """Check how many alternatives a body asks for.

    Args:
        body: of the request.
        most: the most that the server reports; -1: any number.
        size: of the model's vocabulary.

    Raises:
        ApiError: a field asks for more.
    """
    for name in ("top_logprobs", "logprobs", "prompt_logprobs"):
        count = getattr(body, name, None)
        if count is None or isinstance(count, bool) or most == -1 or 0 <= count <= most:
            continue
        if count == -1 and most >= size:
            continue
        said = f"{name} must be at most {most} on this server; --max-logprobs sets it"
        if count == -1:
            said = f"{name} is -1, which is all {size} tokens of the vocabulary; it {said.removeprefix(f'{name} ')}"
        raise bad_request(said, param=name)


def whole_count(count: int, size: int) -> int:
    """How many alternatives a count is: -1 is all, and there are no more than the vocabulary has."""
    return size if count == -1 else min(count, size)


def named_tokens(body: GenerationBody, size: int, logprobs: int | None) -> tuple[int, ...]:
    """The tokens whose log-probabilities are reported at each place of the answer, in place of the likeliest ones.

    Args:
        body: of the request.
        size: of the model's vocabulary.
        logprobs: how many of the likeliest ones are asked for.

    Raises:
        ApiError: an id is not one of the model, or both are asked for.
    """
    named = tuple(dict.fromkeys(body.logprob_token_ids or ()))
    check_ids(named, "logprob_token_ids", size)
    if named and logprobs:
        raise bad_request(
            "logprob_token_ids names the alternatives, and so many likeliest ones are asked for, too; send one of them",
            param="logprob_token_ids",
        )
    return named
