"""Builds tokenizers from a checkpoint's files: the metadata of a .gguf file, or the JSON files of a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel as ByteLevelSplit

from server.text.gguf import GGUFError, read_metadata
from server.text.splitting import PRE_TOKENIZERS
from server.text.tokenizer import BYTES, Tokenizer, TokenizerError

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # GGUF's token types that matter here
_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_END_TEXTS = frozenset(
    (
        "<|im_end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<｜end▁of▁sentence｜>",
    )
)
"""Control tokens with these names end a generation. A GGUF file names only one end token, but a chat model has
several (end of a turn, end of a document)."""


def load_tokenizer(weights: Path) -> Tokenizer:
    """Read the tokenizer of a .gguf file, or of a folder with tokenizer.json.

    Raises:
        TokenizerError: the tokenizer is missing, damaged, or of a kind that is not known.
    """
    return from_gguf(weights) if weights.is_file() else from_folder(weights)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer."""
    return (folder / "tokenizer.json").is_file()


def stand_in(folder: Path) -> Tokenizer:
    """Make a tokenizer as large as the vocabulary of a folder's config.json, for a model with random weights.

    The first 256 ids are the bytes, and every other id is a word of its own, such as " t300". Text becomes its bytes.

    Raises:
        TokenizerError: config.json is damaged, or has no vocabulary of 256 or more tokens.
    """
    config = read_json(folder / "config.json")
    size = config.get("vocab_size")
    if not isinstance(size, int) or size < len(BYTES):
        raise TokenizerError(
            f"{folder} has no tokenizer.json, and its vocab_size {size!r} is too small for a token of each byte; put a "
            f"tokenizer.json there, or set vocab_size to {len(BYTES)} or more"
        )
    words = [*BYTES, *(f"\u0120t{index}" for index in range(len(BYTES), size))]
    backend = Backend(BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = ByteLevelSplit(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevel()
    eos = config.get("eos_token_id")
    ends = [
        one for one in (eos if isinstance(eos, list) else [eos]) if isinstance(one, int) and 0 <= one < size
    ]
    return Tokenizer(backend, eos_token_ids=ends or [size - 1])


def from_gguf(path: Path) -> Tokenizer:
    """Build the tokenizer that a .gguf file describes.

    Raises:
        TokenizerError: the file is not GGUF, or the kind of its vocabulary is not known.
    """
    try:
        metadata = read_metadata(path)
    except (GGUFError, OSError) as error:
        raise TokenizerError(str(error)) from error
    facts = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    if facts.get("model") != "gpt2":
        raise TokenizerError(
            f"{path.name} has a vocabulary of kind {facts.get('model')!r}; only byte-level BPE ('gpt2') can be read "
            "from GGUF: use the checkpoint's folder with its tokenizer.json instead"
        )
    pre = facts.get("pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"{path.name} splits text in a way named {pre!r}, which is none of "
            f"{', '.join(PRE_TOKENIZERS)}: use the checkpoint's folder with its tokenizer.json instead"
        )
    try:
        tokens: list[str] = facts["tokens"]
        merges = [tuple(merge.split(" ", 1)) for merge in facts["merges"]]
        types: list[int] = facts.get("token_type", [1] * len(tokens))
    except KeyError as error:
        raise TokenizerError(
            f"{path.name} has no tokenizer.ggml.{error.args[0]}, so its vocabulary is incomplete"
        ) from None
    splitting = PRE_TOKENIZERS[pre]()
    try:
        model = BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=splitting.ignore_merges,
        )
    except Exception as error:  # `tokenizers` raises plain Exception
        raise TokenizerError(f"the vocabulary of {path.name} does not fit together: {error}") from error
    backend = Backend(model)
    if splitting.normalizer is not None:
        backend.normalizer = splitting.normalizer
    backend.pre_tokenizer = splitting.pre_tokenizer
    backend.decoder = ByteLevel()
    added = [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)
    named = [facts[key] for key in _EOS_KEYS if key in facts]
    by_text = _ids(
        backend, [token.content for token in added if token.special and token.content in _END_TEXTS]
    )
    return Tokenizer(
        backend,
        eos_token_ids=[*named, *by_text],
        bos_token_id=facts.get("bos_token_id"),
        adds_bos=facts.get("add_bos_token", splitting.add_bos),
    )


def from_folder(folder: Path) -> Tokenizer:
    """Build the tokenizer of a checkpoint folder from tokenizer.json and the configs beside it.

    Raises:
        TokenizerError: tokenizer.json is missing or damaged, or no file names an end token.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(f"{folder} has no tokenizer.json, so its text cannot be turned into tokens")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # `tokenizers` raises plain Exception
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    config = read_json(folder / "tokenizer_config.json")
    eos: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        eos += value if isinstance(value, list) else [value] if value is not None else []
    eos += _ids(backend, [config.get("eos_token")])
    if not eos:
        raise TokenizerError(
            f"no file in {folder} names an end-of-sequence token (eos_token_id in generation_config.json), "
            "so nothing would ever end a generation"
        )
    bos: int | None = next(iter(_ids(backend, [config.get("bos_token")])), None)
    if bos is None:
        bos = read_json(folder / "config.json").get("bos_token_id")
    adds_bos = config.get("add_bos_token")
    if adds_bos is None:  # then the post-processor in tokenizer.json decides
        adds_bos = bos is not None and backend.encode("", add_special_tokens=True).ids[:1] == [bos]
    return Tokenizer(backend, eos_token_ids=eos, bos_token_id=bos, adds_bos=adds_bos)


def token_content(token: Any) -> str | None:
    """The text of a token in tokenizer_config.json, which is a string or an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; it is empty if there is no file.

    Raises:
        TokenizerError: the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} should hold a JSON object")
    return value


def _ids(backend: Backend, tokens: Iterable[Any]) -> list[int]:
    contents = [token_content(token) for token in tokens]
    ids = [backend.token_to_id(content) for content in contents if content is not None]
    return [token_id for token_id in ids if token_id is not None]
