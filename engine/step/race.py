"""The exponential race: draws one token of a distribution, with a random number for each token.

Token i has an Exp(1) number e_i. It wins if p_i / e_i is the largest, which happens with probability p_i
(another form of Gumbel-max). The last digits of the logits change with the batch around the row. The race hardly
depends on them: only a near tie for the win can flip. The inverse of the CDF has many edges between tokens, and each
of them can flip. Also, two distributions that race with the same numbers mostly draw the same token, which
speculation uses (`engine.step.speculation`).

e_i is a hash of (seed, place in the output, i), so the numbers of a few tokens need not those of all. The many
tokens that hardly ever win race as one, with their summed weight and a number of their own. If they win, a second
race among them decides. The distribution is the same.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

REST = np.array([-1])
"""The token id of the tokens that race as one."""

_SECOND = 1 << 40
"""Added to token ids in the second race, which must not use the numbers of the first."""


def stream_key(seed: int, index: int) -> int:
    """What the numbers of a request's `index`-th token are counted from: 64 bits of a SHA-256 of seed and index."""
    digest = hashlib.sha256(seed.to_bytes(8, "little") + index.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:8], "little")


def exponential_noise(seed: int, index: int, token_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """The Exp(1) numbers of tokens for a request's `index`-th output token: [N], each above 0.

    They are the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) over a counter, which starts at
    `stream_key`.
    """
    key = np.uint64(stream_key(seed, index))
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64
        bits = key + token_ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    # (53 random bits + 0.5) * 2**-53 is never 0 and never 1.
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    noise: NDArray[np.float64] = -np.log(uniform)
    return noise


def race(
    weights: NDArray[np.float32],
    places: NDArray[np.int64],
    rest: float,
    seed: int,
    index: int,
    token_ids: NDArray[np.int64] | None = None,
) -> int:
    """Return the id of the token that wins.

    Args:
        weights: [V], in proportion to each token's probability.
        places: [N] ascending, at least one: the tokens that race one by one.
        rest: the summed weight of all other tokens if these race too, else 0.
        seed: the request's seed.
        index: how many tokens the request has generated before.
        token_ids: [V], ascending, whose weights these are; None: of all tokens.
    """

    def ids(of: NDArray[np.int64]) -> NDArray[np.int64]:
        return of if token_ids is None else token_ids[of]

    runners = ids(places)
    own = weights[places] / exponential_noise(seed, index, runners)
    best = int(own.argmax())
    if rest <= 0 or rest / exponential_noise(seed, index, REST)[0] <= own[best]:
        return int(runners[best])
    others = np.setdiff1d(np.flatnonzero(weights), places, assume_unique=True)
    if not len(others):  # `rest` is only a rounding error of the sum: there are no other tokens
        return int(runners[best])
    late = ids(others)
    return int(late[(weights[others] / exponential_noise(seed, index, late + _SECOND)).argmax()])
