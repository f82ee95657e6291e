"""Counts the holders of each page of the KV cache, and keeps free pages and cached pages for reuse.

A page is in exactly one of three states:

- used: at least one request holds it;
- cached: no request holds it, but the prefix cache knows its content, so a request may use it again;
- free: no request holds it and its content is worthless.

Only the allocator decides a page's state. The prefix cache is an index beside it: `on_evict` tells it of every
eviction, and code that registers a page there also calls `keep` here. Integers only: the memory of the pages is in
`engine.memory.planes`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from engine.config import PAGE_SIZE


def pages_for(num_tokens: int) -> int:
    """How many pages `num_tokens` tokens need; the last page may be partly filled."""
    return -(-num_tokens // PAGE_SIZE)


class PageAllocator:
    """Hands out pages `0` to `num_pages - 1`, counts their holders and reclaims them.

    Args:
        num_pages: how many pages exist; at least 1.
        on_evict: called with the id of each cached page that loses its content, before `allocate` returns it.

    Raises:
        ValueError: `num_pages` is less than 1.
    """

    def __init__(self, num_pages: int, *, on_evict: Callable[[int], None]) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, not {num_pages}")
        self._on_evict = on_evict
        self._references = [0] * num_pages
        self._kept: set[int] = set()  # pages whose content the prefix cache knows, held or not
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is the warmest

    @property
    def num_pages(self) -> int:
        """Pages that exist."""
        return len(self._references)

    @property
    def num_used(self) -> int:
        """Pages held by at least one request."""
        return self.num_pages - len(self._cached) - len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages held by nobody whose content is kept for prefix hits."""
        return len(self._cached)

    @property
    def num_free(self) -> int:
        """Pages held by nobody whose content is worthless."""
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out: free and cached together."""
        return len(self._free) + len(self._cached)

    def references(self, page_id: int) -> int:
        """How many holders the page has."""
        return self._references[page_id]

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """Take `count` pages, each with one holder: free pages first, then the least recently used cached pages.

        Returns None, and changes nothing, if fewer than `count` pages are available.

        Raises:
            ValueError: `count` is negative.
        """
        if count < 0:
            raise ValueError(f"cannot allocate {count} pages; count must be at least 0")
        if count > self.num_available:
            return None
        page_ids = []
        for _ in range(count):
            if self._free:
                page_id = self._free.pop()
            else:
                page_id, _ = self._cached.popitem(last=False)
                self._kept.remove(page_id)
                self._on_evict(page_id)
            self._references[page_id] = 1
            page_ids.append(page_id)
        return tuple(page_ids)

    def retain(self, page_ids: Sequence[int]) -> None:
        """Add one holder to each page, as for a prefix hit. Each page must be used or cached.

        Raises:
            RuntimeError: a page is free, so its content is not the one that the caller expects.
        """
        for page_id in page_ids:
            if self._references[page_id] == 0:
                if page_id not in self._cached:
                    raise RuntimeError(f"page {page_id} is free and cannot be retained; allocate it instead")
                del self._cached[page_id]
            self._references[page_id] += 1

    def release(self, page_ids: Sequence[int]) -> None:
        """Remove one holder from each page of a block table, last page first.

        Pages without a holder become cached (as most recently used) if kept, else free. Because of the order, the
        end of a prefix is evicted before its start, which other requests are more likely to share.

        Raises:
            RuntimeError: a page has no holder: it was released twice.
        """
        for page_id in reversed(page_ids):
            if self._references[page_id] == 0:
                raise RuntimeError(
                    f"page {page_id} has no holder and cannot be released; it was released before"
                )
            self._references[page_id] -= 1
            if self._references[page_id] == 0:
                if page_id in self._kept:
                    self._cached[page_id] = None
                else:
                    self._free.append(page_id)

    def keep(self, page_id: int) -> None:
        """Note that the prefix cache now knows the content of a used page. Idempotent.

        Raises:
            RuntimeError: nobody holds the page, so it may be overwritten at any time.
        """
        if self._references[page_id] == 0:
            raise RuntimeError(f"page {page_id} has no holder, so its content cannot be kept")
        self._kept.add(page_id)

    def unkeep(self, page_id: int) -> None:
        """Note that the prefix cache no longer knows a used page, so that its last release frees it. Idempotent.

        Raises:
            RuntimeError: nobody holds the page; only an eviction frees a cached page.
        """
        if self._references[page_id] == 0:
            raise RuntimeError(f"page {page_id} has no holder; cached pages are given up by eviction only")
        self._kept.discard(page_id)

    def check(self, holders: Mapping[int, int], kept: set[int]) -> None:
        """Compare the books with the caller's: `holders` of each page (0 if absent), and `kept`, the indexed pages.

        Raises:
            RuntimeError: the books disagree, or a page is in two states or in none.
        """
        used = {page_id for page_id, references in enumerate(self._references) if references > 0}
        listed = [*used, *self._cached, *self._free]
        if sorted(listed) != list(range(self.num_pages)):
            raise RuntimeError(f"pages are in two states or in none: {used=} {self._cached=} {self._free=}")
        for page_id, references in enumerate(self._references):
            if references != holders.get(page_id, 0):
                raise RuntimeError(
                    f"page {page_id} counts {references} holders but has {holders.get(page_id, 0)}"
                )
        if self._kept != kept:
            raise RuntimeError(f"pages kept {self._kept} differ from pages in the prefix cache {kept}")
        if not self._cached.keys() <= self._kept or not self._kept.isdisjoint(self._free):
            raise RuntimeError(f"cached pages must be kept and free ones not: {self._cached=} {self._free=}")
