"""Which rows are dense. This is the only place with the rule "while the context is at most index_top_k".

The row at position p has a context of p + 1 tokens: the earlier ones and its own. A sparse row reads the `index_top_k`
tokens of its context that the indexer rates best. A context of at most `index_top_k` tokens would be selected whole,
so the row is dense. This is exact, not an approximation: the row gives what dense attention gives.

Other modules ask this one to cut work (`engine.plan.tiles`), to count its cost (`engine.plan.cost`), to share pages
(`engine.plan.prefix`), and to tell the kernels how many tokens each row selects (`engine.attention.batch`).
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from engine.protocol import IndexTopK

Mask = TypeVar("Mask", covariant=True)


class Contexts(Protocol[Mask]):
    """An array or a tensor of integers."""

    def __le__(self, other: int, /) -> Mask:
        """Compare element by element."""
        ...


def dense_mask(contexts: Contexts[Mask], index_top_k: int) -> Mask:
    """Which rows are dense: contexts [...] of integers, an array or a tensor -> [...] bool of the same kind."""
    return contexts <= index_top_k


def is_dense(context: int, index_top_k: IndexTopK) -> bool:
    """Whether a row that sees `context` tokens, its own included, reads all of them."""
    return index_top_k is None or dense_mask(context, index_top_k)


def row_index_top_k(context: int, index_top_k: IndexTopK) -> int:
    """How many tokens a row selects out of `context`; 0: the row is dense and selects nothing."""
    return 0 if index_top_k is None or is_dense(context, index_top_k) else index_top_k


def dense_rows(start: int, num_rows: int, index_top_k: IndexTopK) -> int:
    """How many of a request's rows at positions `start` to `start + num_rows - 1` are dense. They come first."""
    if index_top_k is None:
        return num_rows
    return max(0, min(num_rows, index_top_k - start))
