"""The detokenizer's texts, joined, are the decoded tokens up to the first stop, however tokens are grouped."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer

SCRIPTS = [
    "a",
    "b",
    " ",
    "\n",
    "é",
    "e\u0301",
    "ñ",
    "中",
    "ع",
    "👩\u200d👩\u200d👧",
    "🇫🇷",
    "🏽",
    "\ufffd",
    "\u200b",
]


@cache
def byte_vocabulary() -> Tokenizer:
    """One token a byte, a few longer ones that break characters apart, and two control tokens."""
    from server.text.tokenizer import _ALPHABET

    letters = {byte: letter for letter, byte in _ALPHABET.items()}
    tokens = [letters[byte] for byte in range(256)]
    for piece in (b"ab", b"\xf0\x9f", b"\x91\xa9\xe2", b"a\xf0\x9f", b"\x80\x8da", "中".encode()):
        tokens.append("".join(letters[byte] for byte in piece))
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<|end|>", special=True), AddedToken("<think>", special=False)])
    return Tokenizer(backend, eos_token_ids=[len(tokens)])


@cache
def fallback_vocabulary() -> Tokenizer:
    """A vocabulary like SentencePiece's: word marks, and byte tokens for characters without a token of their own."""
    tokens = ["<unk>", "</s>", "\u2581", "\u2581a", "a", "b", "\u2581ab", "é", "中"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Backend(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_tokens([AddedToken("</s>", special=True)])
    return Tokenizer(backend, eos_token_ids=[1])


VOCABULARIES = {"bytes": byte_vocabulary, "fallback": fallback_vocabulary}


def grouped(data: st.DataObject, ids: list[int]) -> list[list[int]]:
    groups, rest = [], ids
    while rest:
        count = data.draw(st.integers(0, len(rest)), label="tokens in this push")
        groups.append(rest[:count])
        rest = rest[count:]
    return groups


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Find the first stop by its definition: read character by character until a stop is complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return end - len(longest), longest
    return None


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@given(data=st.data(), skip_special=st.booleans())
def test_any_tokens_in_any_groups_give_the_decoded_whole(
    vocabulary: str, data: st.DataObject, skip_special: bool
) -> None:
    tokenizer = VOCABULARIES[vocabulary]()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24), label="ids")
    detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
    out = [detokenizer.push(group) for group in grouped(data, ids)]
    assert "".join(out) + detokenizer.finish() == tokenizer.decode(ids, skip_special=skip_special)
    assert detokenizer.stopped is None
    assert detokenizer.tokens_consumed == len(ids)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@given(data=st.data())
def test_a_text_that_goes_on_is_what_it_adds(vocabulary: str, data: st.DataObject) -> None:
    tokenizer = VOCABULARIES[vocabulary]()
    tokens = st.integers(2, 8) if vocabulary == "fallback" else st.integers(97, 122)
    before = data.draw(st.lists(tokens, min_size=1, max_size=12), label="before")
    ids = data.draw(st.lists(tokens, max_size=12), label="ids")
    detokenizer = Detokenizer(tokenizer, after=before)
    out = [detokenizer.push(group) for group in grouped(data, ids)]
    assert tokenizer.decode(before) + "".join(out) + detokenizer.finish() == tokenizer.decode(before + ids)


def test_a_stop_string_may_begin_with_the_first_space() -> None:
    detokenizer = Detokenizer(fallback_vocabulary(), stop=[" a"], after=[3])
    assert detokenizer.push([3, 5]) == ""
    assert detokenizer.stopped == " a"
    assert Detokenizer(fallback_vocabulary(), after=[3, 9 + 0xC3]).push([3]) == " a"


@given(data=st.data(), parts=st.lists(st.one_of(st.sampled_from(SCRIPTS), st.text(max_size=4)), max_size=12))
def test_complete_characters_never_show_as_replacements(data: st.DataObject, parts: list[str]) -> None:
    text = "".join(parts)
    ids = list(text.encode("utf-8"))  # the first 256 tokens are the bytes
    detokenizer = Detokenizer(byte_vocabulary())
    out = ""
    for group in grouped(data, ids):
        out += detokenizer.push(group)
        assert text.startswith(out)
    assert out + detokenizer.finish() == text


@pytest.mark.parametrize("include", [False, True])
@given(
    data=st.data(),
    text=st.one_of(st.text("ab", max_size=20), st.text("aé中👩\u200d", max_size=14)),
    stops=st.lists(st.text("abé中👩", min_size=1, max_size=4), min_size=1, max_size=4),
)
@settings(max_examples=150)
def test_text_ends_before_the_first_stop(
    include: bool, data: st.DataObject, text: str, stops: list[str]
) -> None:
    ids = list(text.encode("utf-8"))
    detokenizer = Detokenizer(byte_vocabulary(), stop=stops, include_stop=include)
    out = "".join(detokenizer.push(group) for group in grouped(data, ids)) + detokenizer.finish()
    found = first_stop(text, stops)
    if found is None:
        assert (out, detokenizer.stopped, detokenizer.tokens_consumed) == (text, None, len(ids))
        return
    start, stop = found
    assert detokenizer.stopped == stop
    assert out == (text[: start + len(stop)] if include else text[:start])
    assert detokenizer.tokens_consumed == len(text[: start + len(stop)].encode("utf-8"))
    assert detokenizer.push(ids) == ""
    assert detokenizer.finish() == ""


@given(data=st.data(), text=st.text(max_size=40), stops=st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_the_default_models_vocabulary(
    tokenizer: Tokenizer, data: st.DataObject, text: str, stops: list[str]
) -> None:
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    detokenizer = Detokenizer(tokenizer, stop=stops)
    out = "".join(detokenizer.push(group) for group in grouped(data, ids)) + detokenizer.finish()
    found = first_stop(whole, stops)
    assert out == (whole if found is None else whole[: found[0]])


def test_a_stop_that_overlaps_itself() -> None:
    detokenizer = Detokenizer(byte_vocabulary(), stop=["aab"])
    assert [detokenizer.push([byte]) for byte in b"xaaab!"] == ["x", "", "", "a", "", ""]
    assert detokenizer.stopped == "aab"
    assert detokenizer.tokens_consumed == 5


def test_text_is_held_only_while_it_may_become_a_stop() -> None:
    detokenizer = Detokenizer(byte_vocabulary(), stop=["\n\nUser:"])
    assert [detokenizer.push(list(piece)) for piece in (b"Hi\n", b"\nUs", b"e it", b"\n")] == [
        "Hi",
        "",
        "\n\nUse it",
        "",
    ]
    assert detokenizer.finish() == "\n"


def test_half_a_character_at_the_end_becomes_a_replacement() -> None:
    detokenizer = Detokenizer(byte_vocabulary())
    assert detokenizer.push(list("é👩".encode()[:-1])) == "é"
    assert detokenizer.finish() == "\ufffd"


def test_bytes_that_can_never_become_a_character_are_not_held() -> None:
    detokenizer = Detokenizer(byte_vocabulary())
    assert detokenizer.push([0xFF]) == "\ufffd"
    assert detokenizer.push([ord("a")]) == "a"


def test_control_tokens_are_left_out_unless_asked_for() -> None:
    tokenizer = byte_vocabulary()
    (end,) = tokenizer.eos_token_ids
    assert Detokenizer(tokenizer).push([97, end, 98]) == "ab"
    assert Detokenizer(tokenizer, skip_special=False).push([97, end, 98]) == "a<|end|>b"
    assert Detokenizer(tokenizer).push([end + 1]) == "<think>"


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one character"):
        Detokenizer(byte_vocabulary(), stop=["a", ""])
