"""Turns text into token ids and back. Only this module decides which tokens are control tokens.

A control token ends a turn, names a role or otherwise steers the model. Text that a client wrote
must never become one: `encode` leaves such text as ordinary characters unless told otherwise.
`server.text.loading` builds a tokenizer from a checkpoint's files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer as Backend

LONG_TEXT = 8192
"""A text with more characters takes long to encode, so callers do it in a thread."""

_MARKER = re.compile(r"<[|｜].+[|｜]>|</?think>", re.DOTALL)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizerError(ValueError):
    """A tokenizer's files cannot be read, or a text cannot be encoded; the message says why."""


def _byte_alphabet() -> dict[str, int]:
    """The 256 printable characters that stand for bytes in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_ALPHABET = _byte_alphabet()
BYTES = tuple(sorted(_ALPHABET, key=_ALPHABET.__getitem__))
"""The characters that stand for bytes 0 to 255, in order."""


class Tokenizer:
    """Encodes and decodes with one checkpoint's vocabulary. Safe to share between threads.

    Attributes:
        vocab_size: one more than the largest token id.
        eos_token_ids: tokens that end a generation.
        bos_token_id: the token that begins a sequence, if the vocabulary names one. The checkpoint's
            convention (`adds_bos`) says whether `encode` puts it in front.
        special_ids: tokens that `decode` leaves out.
        control_tokens: the control tokens, text -> id.
        control_ids: the ids of the control tokens.
        byte_level: every token is a string of bytes, independent of its neighbours.
        longest: the bytes of the longest token, which bound the text of so many tokens; None where a token may stand for
            any length of text.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        eos_token_ids: Iterable[int],
        bos_token_id: int | None = None,
        adds_bos: bool = False,
    ) -> None:
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._bytes: dict[int, bytes] = {}
        self._wholes: dict[int, str | None] = {}
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.bos_token_id = bos_token_id
        self.adds_bos = adds_bos and bos_token_id is not None
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        # Some checkpoints (DeepSeek's) do not flag their role and reasoning markers as special. These are
        # recognised by the shape of their text.
        self.control_tokens = {
            token.content: token_id
            for token_id, token in added.items()
            if token.content and (token.special or _MARKER.fullmatch(token.content))
        }
        self.control_ids = frozenset(self.control_tokens.values())
        description = json.loads(backend.to_str())
        self.byte_level = _is_byte_level(description["decoder"])
        self._plain = self._without_control_tokens(description)
        self.longest: int | None = None
        if self.byte_level:
            self.longest = max((len(self.raw(token_id)) for token_id in range(self.vocab_size)), default=0)
        unknown = [token_id for token_id in self.eos_token_ids if not 0 <= token_id < self.vocab_size]
        if unknown:
            raise TokenizerError(f"the end-of-sequence token {unknown[0]} is not in the vocabulary")

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Return the ids of `text`.

        Args:
            text: what to encode.
            add_bos: begin with the beginning-of-sequence token if that is the checkpoint's convention.
            parse_special: read control tokens that the text spells out as control tokens. Use it only
                for text that no client wrote.

        Raises:
            TokenizerError: the text is not valid Unicode (it has half of a surrogate pair).
        """
        backend = self._backend if parse_special else self._plain
        try:
            if len(text) > LONG_TEXT:  # unlike `encode`, this releases the interpreter's lock
                ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
            else:
                ids = backend.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
                raise TokenizerError(
                    "the text has half of a surrogate pair, which is not a character"
                ) from error
            raise
        if not parse_special and not self.control_ids.isdisjoint(ids):
            ids = [part for token_id in ids for part in self._as_plain(token_id)]
        if add_bos and self.adds_bos and self.bos_token_id is not None:
            return [self.bos_token_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`; bytes that are not a character become U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_text(self, token_id: int) -> str:
        """Return one token's text; a part of a character shows as U+FFFD."""
        return self.raw(token_id).decode("utf-8", errors="replace")

    def piece(self, token_id: int) -> str:
        """Return one token as the vocabulary writes it, such as `Ġhello`; "" for an id that it does not have."""
        piece: str | None = self._backend.id_to_token(token_id)
        return piece or ""

    def token_bytes(self, token_id: int) -> list[int]:
        """Return one token's bytes. A character may need the bytes of several neighbouring tokens."""
        return list(self.raw(token_id))

    def raw(self, token_id: int) -> bytes:
        """Return one token's bytes, b"" for an id that the vocabulary does not have."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._compute_raw(token_id)
        return known

    def whole(self, token_id: int) -> str | None:
        """Return one token's text; None if its bytes are not whole characters."""
        try:
            return self._wholes[token_id]
        except KeyError:
            try:
                text = self.raw(token_id).decode()
            except UnicodeDecodeError:
                text = None
            self._wholes[token_id] = text
            return text

    def is_byte(self, token_id: int) -> bool:
        """Whether the token stands for one byte in a vocabulary that is not byte-level ("<0x0A>")."""
        token = None if self.byte_level else self._backend.id_to_token(token_id)
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def _compute_raw(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        if self.byte_level:
            # The decoder does the same: a token with a character outside the alphabet is plain text.
            values = [_ALPHABET.get(character, -1) for character in token]
            return token.encode() if -1 in values else bytes(values)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return str(token).replace("\u2581", " ").encode()

    def _without_control_tokens(self, description: dict[str, object]) -> Backend:
        """A copy of the backend that reads every control token as ordinary text."""
        added = description["added_tokens"]
        assert isinstance(added, list)
        for token in added:
            token["special"] = token["content"] in self.control_tokens
        plain = Backend.from_str(json.dumps(description))
        plain.encode_special_tokens = True
        return plain

    def _as_plain(self, token_id: int) -> list[int]:
        # Merges can produce the exact text of a control token; then its characters are encoded one by one.
        if token_id not in self.control_ids:
            return [token_id]
        ids: list[int] = []
        for character in self.token_text(token_id):
            ids += self._plain.encode(character, add_special_tokens=False).ids
        return [part for part in ids if part not in self.control_ids]


def _is_byte_level(decoder: dict[str, object] | None) -> bool:
    if decoder is None:
        return False
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    assert isinstance(parts, list)
    return [part["type"] for part in parts] == ["ByteLevel"]
