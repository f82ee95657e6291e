"""The prefix cache: what is shared, what is not, and that no digest decides alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import PAGE_SIZE
from engine.plan.prefix import HashFunction, PageKeys, PrefixCache, same_content, sha256, sparsity_salt


def keys_of(*fills: int, index_top_k: int | None = None, hash_function: HashFunction = sha256) -> PageKeys:
    """Keys of a request whose page i is filled with one repeated token id."""
    tokens = [fill for fill in fills for _ in range(PAGE_SIZE)]
    return PageKeys(tokens, index_top_k=index_top_k, hash_function=hash_function)


def register_all(cache: PrefixCache, keys: PageKeys, page_ids: Sequence[int]) -> list[bool]:
    return [cache.register(keys, index, page_id) for index, page_id in enumerate(page_ids)]


def test_the_longest_known_run_is_found() -> None:
    cache = PrefixCache()
    assert register_all(cache, keys_of(1, 2, 3), (10, 11, 12)) == [True, True, True]
    assert cache.lookup(keys_of(1, 2, 3), 3) == (10, 11, 12)
    assert cache.lookup(keys_of(1, 2, 3), 2) == (10, 11)
    assert cache.lookup(keys_of(1, 2, 9), 3) == (10, 11)
    assert cache.lookup(keys_of(1, 9, 3), 3) == (10,)
    assert cache.lookup(keys_of(2, 3), 2) == ()  # same tokens, but not after a 1


def test_only_requests_with_one_salt_share_pages() -> None:
    def salted(salt: str) -> PageKeys:
        return PageKeys([1] * 2 * PAGE_SIZE, index_top_k=None, cache_salt=salt)

    cache = PrefixCache()
    register_all(cache, salted("a"), (10, 11))
    assert cache.lookup(salted("a"), 2) == (10, 11)
    assert cache.lookup(salted("b"), 2) == cache.lookup(salted(""), 2) == ()
    assert register_all(cache, salted("b"), (20, 21)) == [True, True]
    one = PageKeys([1] * PAGE_SIZE, index_top_k=None, cache_salt="a", hash_function=lambda data: b"")
    other = PageKeys([1] * PAGE_SIZE, index_top_k=None, cache_salt="b", hash_function=lambda data: b"")
    assert not same_content(one.key(0), other.key(0))


def test_a_run_ends_at_a_forgotten_page_and_resumes_when_it_is_back() -> None:
    cache = PrefixCache()
    register_all(cache, keys_of(1, 2, 3), (10, 11, 12))
    cache.forget(11)
    cache.forget(11)  # nothing to forget
    assert cache.page_ids == {10, 12}
    assert cache.lookup(keys_of(1, 2, 3), 3) == (10,)
    assert cache.register(keys_of(1, 2, 3), 1, 7)
    assert cache.lookup(keys_of(1, 2, 3), 3) == (10, 7, 12)


def test_the_first_page_with_a_content_stays() -> None:
    cache = PrefixCache()
    first, second = keys_of(1, 2), keys_of(1, 2)
    register_all(cache, first, (10, 11))
    assert register_all(cache, second, (20, 21)) == [False, False]
    assert cache.register(first, 0, 10)  # again: still the one
    assert cache.page_ids == {10, 11}
    assert second.key(1) is first.key(1)  # chains meet in one object


def test_keys_that_follow_an_adopted_key_chain_to_it() -> None:
    cache = PrefixCache()
    before, owner = keys_of(1, 2, 3), keys_of(1, 2, 3)
    before.key(2)
    register_all(cache, owner, (10, 11, 12))
    assert cache.lookup(before, 1) == (10,)
    assert before.key(2).parent is before.key(1)
    assert before.key(1).parent is owner.key(0)


def test_everything_in_a_key_changes_its_digest() -> None:
    """A compare would decide anyway, but keys with one digest displace each other."""
    keys = [
        keys_of(1, 2),
        keys_of(1, 3),
        keys_of(2, 2),
        keys_of(1, 2, index_top_k=1),
        keys_of(1, 2, index_top_k=2),
    ]
    assert len({key.key(1).digest for key in keys}) == len(keys)
    assert keys_of(1, 2, index_top_k=64).key(0).digest == keys[0].key(0).digest


def test_a_page_cannot_hold_two_contents() -> None:
    cache = PrefixCache()
    cache.register(keys_of(1), 0, 10)
    with pytest.raises(RuntimeError, match="known to hold something else"):
        cache.register(keys_of(2), 0, 10)


def test_keys_exist_for_full_pages_only_and_follow_a_growing_request() -> None:
    tokens = [5] * (PAGE_SIZE - 1)
    keys = PageKeys(tokens, index_top_k=None)
    with pytest.raises(IndexError, match="not one of the full pages of 63 tokens"):
        keys.key(0)
    tokens.append(5)
    assert keys.key(0).token_ids == (5,) * PAGE_SIZE
    with pytest.raises(IndexError, match="not one of the full pages"):
        keys.key(-1)
    assert len(keys) == 1


def test_salt_begins_where_a_row_sees_more_than_top_k() -> None:
    assert sparsity_salt(128, None) is None
    assert sparsity_salt(128, 129) is None
    assert sparsity_salt(128, 128) is None
    assert sparsity_salt(128, 127) == 127
    assert sparsity_salt(64, 1) == 1


@pytest.mark.parametrize(
    ("writer", "reader", "shared"),
    [
        (None, None, 4),
        (None, 256, 4),  # never more context than index_top_k: dense
        (None, 255, 3),
        (None, 100, 1),
        (None, 63, 0),
        (100, None, 1),
        (100, 100, 4),
        (100, 101, 1),
        (100, 200, 1),
        (200, 210, 3),
        (200, 1000, 3),
        (256, 1000, 4),
        (10, 11, 0),
    ],
)
def test_pages_are_shared_up_to_the_smaller_top_k(
    writer: int | None, reader: int | None, shared: int
) -> None:
    cache = PrefixCache()
    register_all(cache, keys_of(1, 2, 3, 4, index_top_k=writer), (10, 11, 12, 13))
    assert cache.lookup(keys_of(1, 2, 3, 4, index_top_k=reader), 4) == (10, 11, 12, 13)[:shared]


def one_for_all(data: bytes) -> bytes:
    return b"same"


@pytest.mark.parametrize(
    "other",
    [
        keys_of(2, hash_function=one_for_all),
        keys_of(1, index_top_k=8, hash_function=one_for_all),
    ],
    ids=["tokens", "salt"],
)
def test_a_collision_is_a_miss(other: PageKeys) -> None:
    cache = PrefixCache()
    keys = keys_of(1, hash_function=one_for_all)
    assert cache.register(keys, 0, 10)
    assert keys.key(0).digest == other.key(0).digest
    assert cache.lookup(other, 1) == ()
    assert not cache.register(other, 0, 11)  # the place is taken: it stays unknown, and harmless
    assert cache.page_ids == {10}
    assert cache.lookup(keys_of(1, hash_function=one_for_all), 1) == (10,)


def test_a_collision_of_parents_is_a_miss_too() -> None:
    """Same digest and same tokens in this page, but another page before it."""

    def last_page_only(data: bytes) -> bytes:
        return data[-PAGE_SIZE * 8 :]

    cache = PrefixCache()
    keys = keys_of(1, 7, hash_function=last_page_only)
    cache.register(keys, 1, 11)
    other = keys_of(2, 7, hash_function=last_page_only)
    cache.register(other, 0, 20)
    assert keys.key(1).digest == other.key(1).digest
    assert cache.lookup(other, 2) == (20,)


def test_long_chains_are_compared_and_dropped_without_recursion() -> None:
    left, right = keys_of(*range(3000)), keys_of(*range(3000))
    assert same_content(left.key(2999), right.key(2999))
    assert not same_content(left.key(2999), right.key(2998))
    assert not same_content(left.key(2999), None)


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.lists(st.integers(0, 1), min_size=1, max_size=5),
            st.sampled_from([None, 64, 130, 190]),
            st.integers(0, 4),  # which page to forget afterwards
        ),
        max_size=12,
    ),
    hash_bytes=st.sampled_from([0, 1, 32]),
)
def test_every_hit_is_the_same_content(
    requests: list[tuple[list[int], int | None, int]], hash_bytes: int
) -> None:
    """Against plain prefixes as identity, with hashes from perfect to constant."""
    cache = PrefixCache()
    content: dict[int, object] = {}
    next_page = 0

    def short(data: bytes) -> bytes:
        return sha256(data)[:hash_bytes]

    for fills, index_top_k, forget in requests:

        def identity(index: int, fills: list[int] = fills, index_top_k: int | None = index_top_k) -> object:
            salts = [sparsity_salt((page + 1) * PAGE_SIZE, index_top_k) for page in range(index + 1)]
            return fills[: index + 1], salts

        keys = keys_of(*fills, index_top_k=index_top_k, hash_function=short)
        hits = cache.lookup(keys, len(fills))
        for index, page_id in enumerate(hits):
            assert content[page_id] == identity(index)
        if hash_bytes == 32 and len(hits) < len(fills):
            assert identity(len(hits)) not in content.values()  # nothing known was missed
        for index in range(len(hits), len(fills)):
            if cache.register(keys, index, next_page):
                content[next_page] = identity(index)
            next_page += 1
        assert cache.page_ids == content.keys()
        if forget in content:
            cache.forget(forget)
            del content[forget]
