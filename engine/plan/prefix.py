"""Which full pages hold which content: automatic prefix caching.

A page's content is named by a `PageKey`: its tokens, its sparsity salt, its namespace and the key of the
page before it, so a key stands for a whole prefix. A chained SHA-256 digest finds a candidate, and a
compare of what was hashed decides: no digest ever decides alone, so a collision costs a miss and never a
wrong answer. This is an index only: page states are the allocator's (`engine.plan.pages`).
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
    """The hash in production. Tests inject worse ones."""
    return hashlib.sha256(data).digest()


def sparsity_salt(page_end: int, index_top_k: IndexTopK) -> int | None:
    """What a page's key must know of the request's sparsity: None if nothing, else `index_top_k`.

    `page_end` is the page's last position + 1: the context length of its last row. Where that row is dense, every row
    of the page (and of the pages before it) is. Then the hidden states, and hence the keys and values, are those of
    dense attention, and the page is shared by dense requests and by every `index_top_k` that is large enough. Beyond
    that, rows read a choice of `index_top_k` tokens, and their content belongs to that `index_top_k` alone. Dense
    requests (`index_top_k` None) are never salted. As keys are chained, what follows a salted page inherits its salt.
    """
    return row_index_top_k(page_end, index_top_k) or None


@dataclass(frozen=True, slots=True, eq=False)
class PageKey:
    """The full identity of one full page's content. Compare with `same_content`."""

    parent: PageKey | None = field(repr=False)  # the page before; None for the first
    namespace: str
    salt: int | None
    token_ids: tuple[int, ...]
    digest: bytes


def same_content(left: PageKey | None, right: PageKey | None) -> bool:
    """Whether two keys stand for the same content, digests aside.

    Walks towards the first page until the chains meet in one object, which is at once for keys that were
    made canonical by `PrefixCache`.
    """
    while left is not right:
        if left is None or right is None:
            return False
        if left.token_ids != right.token_ids or left.salt != right.salt or left.namespace != right.namespace:
            return False
        left, right = left.parent, right.parent
    return True


class PageKeys:
    """The keys of one request's full pages, computed once each and only when asked for.

    Args:
        token_ids: the request's own list, which may grow at its end but must not change otherwise.
        namespace: prefixes are shared only inside one namespace.
        index_top_k: how many earlier tokens attention may read; None is dense.
        hash_function: of which a collision may cost speed, never correctness.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        *,
        namespace: str,
        index_top_k: IndexTopK,
        hash_function: HashFunction = sha256,
    ) -> None:
        self._token_ids = token_ids
        self._namespace = namespace
        self._top_k = index_top_k
        self._hash_function = hash_function
        self._keys: list[PageKey] = []

    def __len__(self) -> int:
        """Keys computed so far."""
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

        Later keys are computed anew and chain to that object, so that chains meet at once and share their
        memory.
        """
        if self._keys[index] is not key:
            self._keys[index:] = [key]

    def _make(self, index: int) -> PageKey:
        parent = self._keys[index - 1] if index else None
        end = (index + 1) * PAGE_SIZE
        tokens = tuple(self._token_ids[end - PAGE_SIZE : end])
        salt = sparsity_salt(end, self._top_k)
        namespace = self._namespace.encode()
        above = parent.digest if parent else b""
        # Lengths first, so that no two different keys are ever the same bytes. A index_top_k is at least 1.
        header = struct.pack("<qqq", len(namespace), len(above), salt or 0)
        digest = self._hash_function(header + namespace + above + array("q", tokens).tobytes())
        return PageKey(parent, self._namespace, salt, tokens, digest)


class PrefixCache:
    """From page content to the one page that holds it."""

    def __init__(self) -> None:
        self._pages: dict[bytes, int] = {}  # by digest
        self._keys: dict[int, PageKey] = {}  # by page

    @property
    def page_ids(self) -> set[int]:
        """Every page whose content is known."""
        return set(self._keys)

    def lookup(self, keys: PageKeys, max_pages: int) -> tuple[int, ...]:
        """The pages of the longest known prefix, at most `max_pages`; they are the caller's to retain.

        A caller that needs logits leaves at least one token out: `max_pages <= (num_tokens - 1) // 64`.

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
        """Make known that `page_id` holds page `index` of a request, all of its rows computed.

        Returns whether this page now stands for that content. It does not if another page already does
        (two requests computed it at once: the first one stays), nor if another content has the digest.

        Raises:
            RuntimeError: the page is known to hold something else, which was never forgotten.
            IndexError: the request has no such full page.
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
        """Drop a page from the index, if it is there: its content is gone or not to be trusted."""
        key = self._keys.pop(page_id, None)
        if key is not None:
            del self._pages[key.digest]

    def _find(self, key: PageKey) -> int | None:
        page_id = self._pages.get(key.digest)
        if page_id is None or not same_content(self._keys[page_id], key):
            return None
        return page_id
