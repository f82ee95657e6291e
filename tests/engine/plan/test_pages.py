"""The page allocator: states, order of eviction, and refusals."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import PAGE_SIZE
from engine.plan.pages import PageAllocator, pages_for


def make(num_pages: int) -> tuple[PageAllocator, list[int]]:
    evicted: list[int] = []
    return PageAllocator(num_pages, on_evict=evicted.append), evicted


def take(pages: PageAllocator, count: int) -> tuple[int, ...]:
    page_ids = pages.allocate(count)
    assert page_ids is not None
    return page_ids


@pytest.mark.parametrize(
    ("tokens", "pages"), [(0, 0), (1, 1), (PAGE_SIZE, 1), (PAGE_SIZE + 1, 2), (10 * PAGE_SIZE, 10)]
)
def test_pages_for_rounds_up(tokens: int, pages: int) -> None:
    assert pages_for(tokens) == pages


def test_allocation_is_all_or_nothing() -> None:
    pages, _ = make(3)
    first = take(pages, 2)
    assert pages.allocate(2) is None
    assert (pages.num_used, pages.num_free) == (2, 1)
    assert sorted(first + take(pages, 1)) == [0, 1, 2]
    assert pages.allocate(0) == ()


def test_free_pages_go_before_cached_ones_and_the_oldest_cached_goes_first() -> None:
    pages, evicted = make(4)
    a, b, c, d = take(pages, 4)
    for page_id in (a, b, c):
        pages.keep(page_id)
    for page_id in (b, d, a, c):
        pages.release([page_id])
    assert (pages.num_cached, pages.num_free) == (3, 1)
    pages.retain([b])  # a hit, released again: now the newest
    pages.release([b])
    assert take(pages, 1) == (d,)
    assert evicted == []
    assert take(pages, 3) == (a, c, b)
    assert evicted == [a, c, b]


def test_the_end_of_a_block_table_is_evicted_before_its_start() -> None:
    pages, evicted = make(3)
    table = take(pages, 3)
    for page_id in table:
        pages.keep(page_id)
    pages.release(table)
    take(pages, 3)
    assert evicted == list(reversed(table))


def test_a_page_is_shared_until_its_last_holder_releases_it() -> None:
    pages, _ = make(1)
    (page,) = take(pages, 1)
    pages.retain([page])
    pages.release([page])
    assert pages.references(page) == 1
    assert pages.allocate(1) is None
    pages.release([page])
    assert (pages.num_used, pages.num_cached, pages.num_free) == (0, 0, 1)


def test_an_evicted_page_is_no_longer_kept() -> None:
    pages, evicted = make(1)
    (page,) = take(pages, 1)
    pages.keep(page)
    pages.release([page])
    pages.release(take(pages, 1))
    assert evicted == [page]
    assert (pages.num_cached, pages.num_free) == (0, 1)


def test_an_unkept_page_becomes_free() -> None:
    pages, evicted = make(1)
    (page,) = take(pages, 1)
    pages.keep(page)
    pages.unkeep(page)
    pages.release([page])
    assert (pages.num_cached, pages.num_free) == (0, 1)
    take(pages, 1)
    assert evicted == []


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        make(0)
    pages, _ = make(2)
    with pytest.raises(ValueError, match="cannot allocate -1"):
        pages.allocate(-1)
    (page,) = take(pages, 1)
    pages.release([page])
    with pytest.raises(RuntimeError, match="released before"):
        pages.release([page])
    with pytest.raises(RuntimeError, match="cannot be retained"):
        pages.retain([page])
    with pytest.raises(RuntimeError, match="cannot be kept"):
        pages.keep(page)
    with pytest.raises(RuntimeError, match="by eviction only"):
        pages.unkeep(page)


def test_check_finds_books_that_disagree() -> None:
    pages, _ = make(2)
    (page,) = take(pages, 1)
    pages.check({page: 1}, set())
    with pytest.raises(RuntimeError, match="counts 1 holders but has 0"):
        pages.check({}, set())
    with pytest.raises(RuntimeError, match="differ from pages in the prefix cache"):
        pages.check({page: 1}, {page})
    pages._free.append(page)
    with pytest.raises(RuntimeError, match="in two states"):
        pages.check({page: 1}, set())


@settings(max_examples=150, deadline=None)
@given(num_pages=st.integers(1, 8), data=st.data())
def test_any_history_agrees_with_a_plain_model(num_pages: int, data: st.DataObject) -> None:
    """Block tables come and go; the model keeps holders, what is kept and the LRU order as plain lists."""
    pages, evicted = make(num_pages)
    tables: list[tuple[int, ...]] = []
    kept: set[int] = set()
    cached: list[int] = []  # oldest first

    for action in data.draw(st.lists(st.sampled_from("akrrsu"), max_size=40)):
        holders = Counter(page_id for table in tables for page_id in table)
        if action == "a":
            count = data.draw(st.integers(0, num_pages))
            free = num_pages - len(holders) - len(cached)
            got = pages.allocate(count)
            assert (got is None) == (count > free + len(cached))
            if got is not None:
                assert len(set(got)) == count
                assert not holders.keys() & set(got)
                expected, cached = cached[: max(0, count - free)], cached[max(0, count - free) :]
                assert [*evicted] == expected
                kept -= set(expected)
                tables.append(got)
        elif action == "k" and holders:
            page_id = data.draw(st.sampled_from(sorted(holders)))
            pages.keep(page_id)
            kept.add(page_id)
        elif action == "u" and holders:
            page_id = data.draw(st.sampled_from(sorted(holders)))
            pages.unkeep(page_id)
            kept.discard(page_id)
        elif action == "s" and (kept or holders):
            page_id = data.draw(st.sampled_from(sorted(kept | set(holders))))
            pages.retain([page_id])
            cached = [other for other in cached if other != page_id]
            tables.append((page_id,))
        elif action == "r" and tables:
            table = tables.pop(data.draw(st.integers(0, len(tables) - 1)))
            pages.release(table)
            holders.subtract(table)
            cached += [page_id for page_id in reversed(table) if holders[page_id] == 0 and page_id in kept]
        evicted.clear()
        pages.check(Counter(page_id for table in tables for page_id in table), kept)
        assert list(pages._cached) == cached
        assert pages.num_used + pages.num_cached + pages.num_free == num_pages
