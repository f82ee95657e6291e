"""Which request holds which pages. Takes, shares and gives back pages, and finds them by their content.

The allocator only counts the holders of a page, and the prefix cache only knows contents. This module keeps the two
consistent for requests. It also keeps the pages of failed requests out of the prefix cache. Integers only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from engine.config import PAGE_SIZE
from engine.plan.pages import PageAllocator, pages_for
from engine.plan.prefix import PrefixCache
from engine.plan.request import Request


class Holdings:
    """The pages of all requests.

    Args:
        num_pages: how many pages exist; at least 1.
        prefix_caching: whether full pages are kept, so that later requests find them by their content.
    """

    def __init__(self, num_pages: int, *, prefix_caching: bool) -> None:
        self._caching = prefix_caching
        self._prefix = PrefixCache()
        self._tainted: list[int] = []
        self.pages = PageAllocator(num_pages, on_evict=self._prefix.forget)
        self.prefix_queries = 0  # tokens looked up, at each admission
        self.prefix_hits = 0  # tokens found

    def admit(self, request: Request, now: float) -> bool:
        """Start a waiting request from its longest cached prefix. Return False if its known tokens do not fit."""
        hits: tuple[int, ...] = ()
        reads_cache = self._caching and request.num_reusable > 0
        if reads_cache:
            hits = self._prefix.lookup(request.keys, request.num_reusable // PAGE_SIZE)
        unheld = sum(self.pages.references(page_id) == 0 for page_id in hits)
        if self.pages.num_available - unheld < pages_for(request.num_tokens) - len(hits):
            return False
        self.pages.retain(hits)
        request.admit(hits, len(hits) * PAGE_SIZE, now)
        if reads_cache:
            self.prefix_queries += request.num_tokens
            self.prefix_hits += request.num_computed
        return True

    def extend(self, request: Request, count: int) -> bool:
        """Take pages for `count` more tokens. Return False and change nothing if too few pages are available."""
        missing = pages_for(request.num_planned + count) - len(request.page_ids)
        if not missing:  # most steps of a decode need no new page
            return True
        pages = self.pages.allocate(missing)
        if pages is None:
            return False
        request.take_pages(pages)
        return True

    def trim(self, request: Request) -> None:
        """Give back the pages beyond the planned rows: only drafts were computed in them."""
        kept = pages_for(request.num_planned)
        if kept < len(request.page_ids):
            self.pages.release(request.drop_pages(kept))

    def register(self, request: Request) -> None:
        """Register the request's newly full pages in the prefix cache."""
        if not self._caching:
            return
        for index in range(request.num_registered, request.num_computed // PAGE_SIZE):
            page_id = request.page_ids[index]
            if self._prefix.register(request.keys, index, page_id):
                self.pages.keep(page_id)
            request.num_registered = index + 1

    def distrust(self, request: Request) -> None:
        """Drop from the prefix cache all pages that a faulty request computed or read.

        If one of the pages holds the cause of the fault (not-a-number, for example), every later hit would fail too.
        """
        for page_id in request.page_ids:
            self._prefix.forget(page_id)
            self.pages.unkeep(page_id)

    def taint(self, request: Request) -> None:
        """Mark a faulty request's pages for wiping, except pages that other requests hold or may find by content."""
        known = self._prefix.page_ids
        free = (page for page in request.page_ids if not self.pages.references(page) and page not in known)
        self._tainted.extend(page_id for page_id in free if page_id not in self._tainted)

    def take_tainted(self) -> tuple[int, ...]:
        """Return the marked pages once: the next step zeroes them before it writes."""
        tainted = tuple(self._tainted)
        self._tainted.clear()
        return tainted

    def check(self, requests: Iterable[Request]) -> None:
        """Verify the books against `requests`, which are all requests that hold pages.

        Raises:
            RuntimeError: they disagree.
        """
        holders = Counter(page_id for request in requests for page_id in request.page_ids)
        self.pages.check(holders, self._prefix.page_ids)
