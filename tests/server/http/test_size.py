"""The count of a body's values against what the parser finds, also where a body is looked at piece by piece."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.http import size

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 10**20) | st.text(alphabet='a"\\,1[{é'),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(alphabet='b"\\'), inner, max_size=4),
    max_leaves=40,
)


def counted(value: Any) -> tuple[int, int]:
    """Strings, names, lists and objects; numbers."""
    if isinstance(value, str):
        return 1, 0
    if isinstance(value, bool) or value is None:
        return 0, 0
    if isinstance(value, int):
        return 0, 1
    inner = [counted(one) for one in (value.values() if isinstance(value, dict) else value)]
    names = len(value) if isinstance(value, dict) else 0
    return 1 + names + sum(one for one, _ in inner), sum(one for _, one in inner)


@given(JSON, st.sampled_from([2, 3, 7, 1 << 16]), st.booleans())
def test_every_value_is_counted(value: Any, piece: int, spaces: bool) -> None:
    """One more than is allowed is too many, and no fewer."""
    raw = json.dumps(value, separators=None if spaces else (",", ":")).encode()
    values, numbers = counted(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(size, "_PIECE", piece)
        patch.setattr(size, "MAX_VALUES", values)
        assert size.too_many(raw) is None
        if values:
            patch.setattr(size, "MAX_VALUES", values - 1)
            assert "strings, lists and objects" in (size.too_many(raw) or "")
            patch.setattr(size, "MAX_VALUES", values)
        patch.setattr(size, "MAX_NUMBERS", numbers - 1)
        assert not numbers or "numbers" in (size.too_many(raw) or "")


def test_a_long_list_of_numbers_is_counted_once() -> None:
    raw = b"[" + b",".join(b"%d" % n for n in range(200_000)) + b"]"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(size, "MAX_NUMBERS", 200_000)
        assert size.too_many(raw) is None
        patch.setattr(size, "MAX_NUMBERS", 199_999)
        assert "numbers" in (size.too_many(raw) or "")


@pytest.mark.parametrize("raw", [b'{"a', b'{"a\\', b'["' + b"x" * 70_000, b'["' + b"\\" * 70_001])
def test_a_string_without_an_end_ends_the_count(raw: bytes) -> None:
    assert size.too_many(raw) is None
