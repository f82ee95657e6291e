"""Text to ids and back, and where control tokens come from."""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from server.text.loading import has_tokenizer, load_tokenizer, stand_in
from server.text.splitting import PRE_TOKENIZERS
from server.text.tokenizer import Tokenizer, TokenizerError


def folder_with(tmp_path: Path, backend: Backend, **files: Any) -> Path:
    backend.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def letters(*added: AddedToken, merges: list[tuple[str, str]] | None = None) -> Backend:
    """A byte-level vocabulary of single bytes, plus added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [left + right for left, right in merges or []]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *words])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges or []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(added))
    return backend


def test_the_default_models_facts(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos_token_ids == (2, 0)  # <|im_end|> as the file says, <|endoftext|> by its name
    assert tokenizer.bos_token_id == 1
    assert tokenizer.special_ids == frozenset(range(17))
    assert tokenizer.encode("Hi", add_bos=True) == tokenizer.encode(
        "Hi", add_bos=False
    )  # add_bos_token false


def test_digits_stand_alone_and_spaces_belong_to_words(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.token_text(token_id) for token_id in tokenizer.encode("In 2024, Hello  world's end")]
    assert pieces == ["In", " ", "2", "0", "2", "4", ",", " Hello", " ", " world", "'s", " end"]


@given(st.text())
def test_decoding_undoes_encoding(tokenizer: Tokenizer, text: str) -> None:
    known = {bytes([byte]) for byte in range(256)} & {tokenizer.raw(i) for i in range(tokenizer.vocab_size)}
    kept = "".join(c for c in text if all(bytes([b]) in known for b in c.encode()))
    assert tokenizer.decode(tokenizer.encode(kept), skip_special=False) == kept


@given(
    st.lists(
        st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<file_sep>", "<", "|>", "a", " "])
    )
)
def test_text_never_becomes_a_control_token(tokenizer: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert tokenizer.control_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text


def test_control_tokens_are_read_when_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|im_start|>a<|im_end|>", parse_special=True) == [1, 81, 2]
    assert tokenizer.decode([1, 81, 2]) == "a"
    assert tokenizer.decode([1, 81, 2], skip_special=False) == "<|im_start|>a<|im_end|>"


@given(st.integers(0, 49151))
def test_a_tokens_text_and_bytes_agree(tokenizer: Tokenizer, token_id: int) -> None:
    assert bytes(tokenizer.token_bytes(token_id)).decode(errors="replace") == tokenizer.token_text(token_id)
    assert tokenizer.token_text(token_id) == tokenizer.decode([token_id], skip_special=False)


def test_a_token_that_does_not_exist_is_empty(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_text(1 << 20) == ""
    assert tokenizer.token_bytes(-1) == []


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        tokenizer.encode("a\ud83d")


def test_threads_may_share_a_tokenizer(tokenizer: Tokenizer) -> None:
    texts = [f"text {n} <|im_end|> {'é' * n}" for n in range(64)]
    expected = [(tokenizer.encode(t), tokenizer.encode(t, parse_special=True)) for t in texts]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda t: (tokenizer.encode(t), tokenizer.encode(t, parse_special=True)), texts)
        )
    assert found == expected


def test_role_markers_are_control_tokens_even_if_not_flagged(tmp_path: Path) -> None:
    backend = letters(
        AddedToken("<｜end▁of▁sentence｜>", special=True),
        AddedToken("<｜User｜>", special=False),
        AddedToken("<think>", special=False),
        AddedToken("<br>", special=False),
    )
    tokenizer = load_tokenizer(
        folder_with(tmp_path, backend, tokenizer_config={"eos_token": "<｜end▁of▁sentence｜>"})
    )
    assert sorted(tokenizer.control_tokens) == ["<think>", "<｜User｜>", "<｜end▁of▁sentence｜>"]
    assert len(tokenizer.encode("<｜User｜>")) > 1
    assert tokenizer.encode("<｜User｜>", parse_special=True) == [257]
    assert len(tokenizer.encode("<think>")) > 1  # text of a client must not begin reasoning
    assert tokenizer.encode("<br>") == [259]
    assert tokenizer.decode([257]) == "<｜User｜>"  # not special: decoding shows it, as everywhere


def test_merges_that_lead_to_a_control_token_are_undone(tmp_path: Path) -> None:
    backend = letters(merges=[("<", "s"), ("<s", ">")])
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer = load_tokenizer(folder_with(tmp_path, backend, config={"eos_token_id": 0}))
    ids = tokenizer.encode("<s>")
    assert tokenizer.control_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == "<s>"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"add_bos_token": True}, True),
        ({"add_bos_token": False}, False),
        ({}, False),  # no post-processor in tokenizer.json
    ],
)
def test_bos_follows_the_checkpoints_convention(
    tmp_path: Path, config: dict[str, Any], expected: bool
) -> None:
    backend = letters(AddedToken("<s>", special=True), AddedToken("</s>", special=True))
    config |= {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    tokenizer = load_tokenizer(folder_with(tmp_path, backend, tokenizer_config=config))
    assert tokenizer.bos_token_id == 256
    assert (tokenizer.encode("a")[0] == 256) is expected
    assert tokenizer.encode("a", add_bos=False) != [256]


def test_end_tokens_come_from_every_file_that_names_them(tmp_path: Path) -> None:
    backend = letters(
        AddedToken("<a>", special=True), AddedToken("<b>", special=True), AddedToken("<c>", special=True)
    )
    folder = folder_with(
        tmp_path,
        backend,
        generation_config={"eos_token_id": [256, 257]},
        config={"eos_token_id": 256},
        tokenizer_config={"eos_token": "<c>"},
    )
    assert load_tokenizer(folder).eos_token_ids == (256, 257, 258)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@given(text=st.text())
def test_every_way_of_splitting_keeps_the_text(name: str, text: str) -> None:
    splitting = PRE_TOKENIZERS[name]()
    whole = splitting.normalizer.normalize_str(text) if splitting.normalizer else text
    pieces = "".join(piece for piece, _ in splitting.pre_tokenizer.pre_tokenize_str(whole))
    assert decoders.ByteLevel().decode([pieces]) == whole


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-2", ["It", "'s", " 1234", "!!", "\n\n", "\n", "DON", "'", "T"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "!!", "\n\n", "\n", "DON", "'", "T"]),
        ("llama-bpe", ["It", "'s", " ", "123", "4", "!!\n\n\n", "DON", "'T"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "!!\n\n\n", "DON", "'T"]),
        ("deepseek-v3", ["It", "'s", " ", "123", "4", "!!\n\n\n", "DON", "'T"]),
    ],
)
def test_how_text_is_split(name: str, expected: list[str]) -> None:
    pieces = PRE_TOKENIZERS[name]().pre_tokenizer.pre_tokenize_str("It's 1234!!\n\n\nDON'T")
    assert [decoders.ByteLevel().decode([piece]) for piece, _ in pieces] == expected


def test_missing_and_damaged_files_are_named(tmp_path: Path, default_model: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(tmp_path)
    letters().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="end-of-sequence"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 100000}')
    with pytest.raises(TokenizerError, match="not in the vocabulary"):
        load_tokenizer(tmp_path)
    file = tmp_path / "x.gguf"
    file.write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match="not a GGUF file"):
        load_tokenizer(file)
    with default_model.open("rb") as whole:
        file.write_bytes(whole.read(100_000))
    with pytest.raises(TokenizerError, match="damaged or cut short"):
        load_tokenizer(file)


def test_normalized_text_is_no_way_around(tmp_path: Path) -> None:
    backend = letters(AddedToken("<|end|>", special=True, normalized=True))
    backend.normalizer = normalizers.Replace(Regex("＜"), "<")
    tokenizer = load_tokenizer(folder_with(tmp_path, backend, config={"eos_token_id": 256}))
    assert tokenizer.control_ids.isdisjoint(tokenizer.encode("＜|end|>"))


def test_a_stand_in_is_as_large_as_the_models_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 1000, "eos_token_id": 1}))
    assert not has_tokenizer(tmp_path)
    made = stand_in(tmp_path)
    assert (made.vocab_size, made.eos_token_ids, made.byte_level) == (1000, (1,), True)
    text = "t300 and Grüße \n"
    assert made.encode(text) == list(text.encode())
    assert made.decode(made.encode(text)) == text
    assert made.decode([72, 105, 300, 999]) == "Hi t300 t999"
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 101}))
    with pytest.raises(TokenizerError, match="its vocab_size 101 is too small for a token of each byte"):
        stand_in(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 300, "eos_token_id": None}))
    assert stand_in(tmp_path).eos_token_ids == (299,)


def test_encoding_a_long_text_lets_other_threads_run() -> None:
    tokenizer = Tokenizer(letters(), eos_token_ids=[])
    text = "one two " * 100_000
    ids: list[int] = []
    encoding = threading.Thread(target=lambda: ids.extend(tokenizer.encode(text)))
    encoding.start()
    turns = 0
    while encoding.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 10
    assert ids == tokenizer.encode("one two ") * 100_000
