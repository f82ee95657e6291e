"""Encodes prompts in which only the format writes control tokens, whatever the messages contain.

A template writes messages and control tokens into one string, and the tokenizer cannot know who
wrote "<|im_end|>". So before rendering, the guard replaces each control token in a message by
an unguessable word. After rendering it puts the control token back, as ordinary text. A template may
also make a control token out of pieces (it joins two parts, or cuts something out of the middle). To
find this, the guard renders again with messages in which no control token can begin. If the format
then writes other control tokens than before, these came from the messages, and the guard refuses them.

Some markers of a format are ordinary text to the tokenizer, so their ids do not show who wrote them.
If a message contains such a marker, it is encoded letter by letter: its text is the same, but its
tokens differ from those of the format's own marker.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from server.chat.errors import PromptError
from server.chat.format import ChatFormat
from server.text.tokenizer import Tokenizer

JsonObjects = Sequence[Mapping[str, Any]]


def encode_chat(
    chat_format: ChatFormat,
    tokenizer: Tokenizer,
    messages: JsonObjects,
    add_generation_prompt: bool = True,
    *,
    tools: JsonObjects = (),
    thinking: bool | None = None,
    open_end: bool = False,
) -> list[int]:
    """Return the prompt's token ids. No text in `messages` or `tools` becomes a control token.

    With `open_end` the prompt ends where the text of the last message ends, so that an answer continues it.

    Raises:
        PromptError: the format cannot express the messages, or they try to make control tokens.
        TokenizerError: the messages are not valid Unicode.
    """
    try:
        return _encode_chat(
            chat_format, tokenizer, messages, add_generation_prompt, tools, thinking, open_end=open_end
        )
    except RecursionError:
        raise PromptError("the messages have values that are nested too deeply") from None


def _encode_chat(
    chat_format: ChatFormat,
    tokenizer: Tokenizer,
    messages: JsonObjects,
    add_generation_prompt: bool,
    tools: JsonObjects,
    thinking: bool | None,
    *,
    open_end: bool,
) -> list[int]:
    end = f"x{secrets.token_hex(16)}x"

    def render(messages: JsonObjects, tools: JsonObjects) -> str:
        if open_end:
            last = messages[-1]
            messages = [*messages[:-1], {**last, "content": f"{last['content']}{end}"}]
        text = chat_format.render(
            messages, tools=tools, thinking=thinking, add_generation_prompt=add_generation_prompt
        )
        if not open_end:
            return text
        text, found, _ = text.rpartition(end)
        if not found:
            raise PromptError(
                "the model's chat format does not write the last message, so nothing can continue it"
            )
        return text

    messages = chat_format.decode(messages)
    plain = {marker for message in messages for marker in chat_format.plain_markers(message["role"])}
    control = _any_of(tokenizer.control_tokens)
    every = _any_of([*tokenizer.control_tokens, *plain])
    first_letters = {marker[0] for marker in (*tokenizer.control_tokens, *plain)}
    words = _Words(plain)
    if not any(letter in text for text in _texts([messages, tools]) for letter in first_letters):
        return _encode(tokenizer, control, words, render(messages, tools))

    def hide(role: str, value: Any) -> Any:
        own = _any_of([*tokenizer.control_tokens, *chat_format.plain_markers(role)])
        return _map_texts(value, lambda original: own.sub(words.hide, original))

    text = render([hide(message["role"], message) for message in messages], hide("system", tools))
    harmless = _harmless_letter(first_letters)
    letters = re.compile("[" + re.escape("".join(sorted(first_letters))) + "]")
    certain = render(
        *(_map_texts(value, lambda text: letters.sub(harmless, text)) for value in (messages, tools))
    )
    if every.findall(text) != every.findall(certain):
        raise PromptError(
            "the messages contain text that would become a control token of the model's chat format"
        )
    return _encode(tokenizer, control, words, text)


def _any_of(markers: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(markers, key=len, reverse=True))) or r"(?!)")


class _Words:
    """Replaces control tokens by words: a random word with a number, which JSON and trimming do not change."""

    def __init__(self, plain: Collection[str] = ()) -> None:
        self._plain = plain
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

    def pieces(self, text: str) -> Iterator[str]:
        """Yield the pieces to encode separately: runs of text, and each letter of a plain marker."""
        begin = 0
        for match in self._word.finditer(text):
            hidden = self.used[int(match[1])]
            if hidden in self._plain:
                yield self.show(text[begin : match.start()])
                yield from hidden
                begin = match.end()
        yield self.show(text[begin:])


def _encode(tokenizer: Tokenizer, control: re.Pattern[str], words: _Words, text: str) -> list[int]:
    """Encode a rendered prompt. Every control token that its text spells out is the format's own."""
    if not words.used:
        ids = tokenizer.encode(text, add_bos=False, parse_special=True)
        own = [tokenizer.control_tokens[token] for token in control.findall(text)]
        if [token_id for token_id in ids if token_id in tokenizer.control_ids] == own:
            return ids
        # Normalization or merges made a control token out of ordinary text: encode the text between separately.
    ids = []
    position = 0
    for match in control.finditer(text):
        ids += _encode_plain(tokenizer, words, text[position : match.start()])
        ids.append(tokenizer.control_tokens[match[0]])
        position = match.end()
    return ids + _encode_plain(tokenizer, words, text[position:])


def _encode_plain(tokenizer: Tokenizer, words: _Words, text: str) -> list[int]:
    return [token_id for piece in words.pieces(text) for token_id in tokenizer.encode(piece, add_bos=False)]


def _texts(value: Any) -> list[str]:
    """Every string inside `value`, with the keys of objects."""
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
