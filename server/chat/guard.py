"""Prompts in which only the format writes control tokens, whatever the messages contain.

A template writes messages and control tokens into one string, and the tokenizer cannot tell who
wrote "<|im_end|>". So before rendering, each control token that a message contains is replaced by
an unguessable word; afterwards the words are put back as ordinary text. A template may also make a
control token out of pieces (two parts joined, something cut out of the middle). That is found by
rendering once more with messages in which no control token can begin: if the format then writes
other control tokens than before, the messages made the difference, and they are refused.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from server.chat.errors import PromptError
from server.text.tokenizer import Tokenizer


class _Format(Protocol):
    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str: ...


def encode_chat(
    chat_format: _Format,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
) -> list[int]:
    """Return the prompt's token ids. No text in `messages` becomes a control token.

    Raises:
        PromptError: the format cannot express the messages, or they try to make control tokens.
        TokenizerError: the messages are not valid Unicode.
    """

    def render(conversation: Sequence[Mapping[str, Any]]) -> str:
        return chat_format.render(conversation, add_generation_prompt=add_generation_prompt)

    first_letters = {token[0] for token in tokenizer.control_tokens}
    longest_first = sorted(tokenizer.control_tokens, key=len, reverse=True)
    control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    words = _Words()
    if not any(letter in text for text in _texts(messages) for letter in first_letters):
        return _encode(tokenizer, control, words, render(messages))

    text = render(_map_texts(messages, lambda original: control.sub(words.hide, original)))
    harmless = _harmless_letter(first_letters)
    letters = re.compile("[" + re.escape("".join(sorted(first_letters))) + "]")
    certain = render(_map_texts(messages, lambda original: letters.sub(harmless, original)))
    if control.findall(text) != control.findall(certain):
        raise PromptError(
            "the messages contain text that would become a control token of the model's chat format"
        )
    return _encode(tokenizer, control, words, text)


class _Words:
    """Stand-ins for control tokens: a random word with a number, which survives JSON and trimming."""

    def __init__(self) -> None:
        self._secret = secrets.token_hex(16)
        self._word = re.compile(f"x{self._secret}n([0-9]+)x")
        self.used: list[str] = []

    def hide(self, match: re.Match[str]) -> str:
        self.used.append(match[0])
        return f"x{self._secret}n{len(self.used) - 1}x"

    def show(self, text: str) -> str:
        shown = self._word.sub(lambda match: self.used[int(match[1])], text)
        if self._secret in shown:
            raise PromptError(
                "the model's chat template changes text that looks like a control token; leave it out"
            )
        return shown


def _encode(tokenizer: Tokenizer, control: re.Pattern[str], words: _Words, text: str) -> list[int]:
    """Encode a prompt in which every control token that is written out is the format's own."""
    if not words.used:
        ids = tokenizer.encode(text, add_bos=False, parse_special=True)
        own = [tokenizer.control_tokens[token] for token in control.findall(text)]
        if [token_id for token_id in ids if token_id in tokenizer.control_ids] == own:
            return ids
        # Normalization or merges made one of ordinary text: encode that text for itself.
    ids = []
    position = 0
    for match in control.finditer(text):
        ids += tokenizer.encode(words.show(text[position : match.start()]), add_bos=False)
        ids.append(tokenizer.control_tokens[match[0]])
        position = match.end()
    return ids + tokenizer.encode(words.show(text[position:]), add_bos=False)


def _texts(value: Any) -> list[str]:
    """Every string inside messages, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in _texts(part)]
    if isinstance(value, Sequence):
        return [text for part in value for text in _texts(part)]
    return []


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_texts(key, change): _map_texts(part, change) for key, part in value.items()}
    if isinstance(value, Sequence):
        return [_map_texts(part, change) for part in value]
    return value


def _harmless_letter(first_letters: set[str]) -> str:
    """A letter that begins no control token."""
    return next(letter for letter in string.ascii_letters + "\ue000" if letter not in first_letters)
