"""Automatic prefix caching: an index from the content of full pages to the pages that hold it.

A `PageKey` names a page's content: its tokens, its sparsity salt and the key of the page before it. So a key stands
for a whole prefix. A chained SHA-256 digest finds a candidate, and then the hashed contents are compared. A digest
never decides alone, so a collision costs a miss and never gives a wrong answer. The states of pages are the
allocator's (`engine.plan.pages`).
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.config import PAGE_SIZE
from engine.plan.sparsity import row_index_top_k
from engine.protocol import IndexTopK

HashFunction = Callable[[bytes], bytes]


def sha256(data: bytes) -> bytes:
    """The hash function in production. Tests pass weaker ones."""
    return hashlib.sha256(data).digest()


def sparsity_salt(page_end: int, index_top_k: IndexTopK) -> int | None:
    """Return the sparsity that is part of a page's key: None if all rows of the page are dense, else `index_top_k`.

    `page_end` is the page's last position + 1: the context length of its last row. If that row is dense
    (`engine.plan.sparsity`), all rows of the page and of the pages before it are. Then its keys and values are those of
    dense attention, and requests share it whatever their `index_top_k`. Otherwise its content depends on `index_top_k`,
    and only requests with the same number share it. Keys are chained, so the pages after a salted page depend on its
    salt, too.
    """
    return row_index_top_k(page_end, index_top_k) or None


@dataclass(frozen=True, slots=True, eq=False)
class PageKey:
    """The identity of one full page's content. Compare keys with `same_content`."""

    parent: PageKey | None = field(repr=False)  # the page before; None for the first
    salt: int | str | None  # a sparsity; of the root of a request with a salt of its own, that
    token_ids: tuple[int, ...]
    digest: bytes


def same_content(left: PageKey | None, right: PageKey | None) -> bool:
    """Whether two keys stand for the same content; digests are not compared.

    It walks towards the first page until both chains meet in one object. Keys that `adopt` replaced by the cache's own
    objects meet at once.
    """
    while left is not right:
        if left is None or right is None:
            return False
        if left.token_ids != right.token_ids or left.salt != right.salt:
            return False
        left, right = left.parent, right.parent
    return True


class PageKeys:
    """The keys of one request's full pages. Each key is computed once, at its first use.

    Args:
        token_ids: the request's own list. It may grow at its end but must not change otherwise.
        index_top_k: how many tokens a row selects; None: all rows are dense.
        hash_function: makes the digests; its collisions cost speed, never correctness.
        cache_salt: only requests with the same salt have keys of the same content; "": those without.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        *,
        index_top_k: IndexTopK,
        hash_function: HashFunction = sha256,
        cache_salt: str = "",
    ) -> None:
        self._token_ids = token_ids
        self._index_top_k = index_top_k
        self._hash_function = hash_function
        self._root = None  # stands before the first page
        if cache_salt:
            self._root = PageKey(None, cache_salt, (), hash_function(cache_salt.encode()))
        self._keys: list[PageKey] = []

    def __len__(self) -> int:
        """The number of keys that are computed."""
        return len(self._keys)

    def key(self, index: int) -> PageKey:
        """The key of page `index`, which holds positions `[64 index, 64 index + 64)`.

        Raises:
            IndexError: the request does not have that many full pages.
        """
        if index < 0 or (index + 1) * PAGE_SIZE > len(self._token_ids):
            raise IndexError(f"page {index} is not one of the full pages of {len(self._token_ids)} tokens")
        while len(self._keys) <= index:
            self._keys.append(self._make(len(self._keys)))
        return self._keys[index]

    def adopt(self, index: int, key: PageKey) -> None:
        """Replace a computed key by the cache's own object of the same content.

        Later keys are computed again and chain to that object, so that chains meet at once and share memory.
        """
        if self._keys[index] is not key:
            self._keys[index:] = [key]

    def _make(self, index: int) -> PageKey:
        parent = self._keys[index - 1] if index else self._root
        end = (index + 1) * PAGE_SIZE
        tokens = tuple(self._token_ids[end - PAGE_SIZE : end])
        salt = sparsity_salt(end, self._index_top_k)
        above = parent.digest if parent else b""
        # The length comes first, so that different keys never give the same bytes. index_top_k is at least 1.
        header = struct.pack("<qq", len(above), salt or 0)
        digest = self._hash_function(header + above + array("q", tokens).tobytes())
        return PageKey(parent, salt, tokens, digest)


class PrefixCache:
    """Maps the content of a page to the one page that holds it."""

    def __init__(self) -> None:
        self._pages: dict[bytes, int] = {}  # digest -> page
        self._keys: dict[int, PageKey] = {}  # page -> key

    @property
    def page_ids(self) -> set[int]:
        """Every page whose content is known."""
        return set(self._keys)

    def lookup(self, keys: PageKeys, max_pages: int) -> tuple[int, ...]:
        """Return the pages of the longest known prefix, at most `max_pages`. The caller must retain them.

        A caller that needs logits leaves out at least one token: `max_pages <= (num_tokens - 1) // 64`.

        Raises:
            IndexError: the request has fewer than `max_pages` full pages.
        """
        page_ids: list[int] = []
        for index in range(max_pages):
            page_id = self._find(keys.key(index))
            if page_id is None:
                break
            keys.adopt(index, self._keys[page_id])
            page_ids.append(page_id)
        return tuple(page_ids)

    def register(self, keys: PageKeys, index: int, page_id: int) -> bool:
        """Record that `page_id` holds page `index` of a request, with all its rows computed.

        Returns True if this page now stands for that content. It returns False if another page already does (two
        requests computed the same content at once, and the first page stays), or if another content has the digest.

        Raises:
            RuntimeError: the index says that the page holds another content.
            IndexError: the request does not have that many full pages.
        """
        key = keys.key(index)
        known = self._find(key)
        if known is not None:
            keys.adopt(index, self._keys[known])
            return known == page_id
        if page_id in self._keys:
            raise RuntimeError(f"page {page_id} cannot be registered: it is known to hold something else")
        if key.digest in self._pages:
            return False
        self._pages[key.digest] = page_id
        self._keys[page_id] = key
        return True

    def forget(self, page_id: int) -> None:
        """Drop a page from the index if it is there, because its content is gone or cannot be trusted."""
        key = self._keys.pop(page_id, None)
        if key is not None:
            del self._pages[key.digest]

    def _find(self, key: PageKey) -> int | None:
        page_id = self._pages.get(key.digest)
        if page_id is None or not same_content(self._keys[page_id], key):
            return None
        return page_id
