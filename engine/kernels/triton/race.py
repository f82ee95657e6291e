"""The draw of `engine.sampler` in kernels: weights, `engine.filters`' edge, `engine.race`'s winner.

Letters: T rows, V tokens, cut into C chunks. A row's parameters are ten columns of 64 bits (see `engine.kernels.triton.sampling`).

What is added up over tokens is added as integers (weights in steps of 2^-40), so that neither the order in which programs
run nor the rows beside one can change a bit. The CPU adds float32 numbers, whose last digits differ; so do those of exp.
As the race is made for that, only a near tie could come out otherwise.
"""

from __future__ import annotations

import triton.language as tl

from engine.kernels.triton.kernel import kernel

# Columns; the first four are int64, the others float64.
KEY = tl.constexpr(0)
TOP_K = tl.constexpr(1)
SLOT = tl.constexpr(2)
BIASES = tl.constexpr(3)
TEMPERATURE = tl.constexpr(4)
TOP_P = tl.constexpr(5)
MIN_P = tl.constexpr(6)
REPETITION = tl.constexpr(7)
FREQUENCY = tl.constexpr(8)
PRESENCE = tl.constexpr(9)
COLUMNS = tl.constexpr(10)

_NOTICEABLE = tl.constexpr(2.0**-13)  # engine.filters.NOTICEABLE
_NOTICEABLE_KEY = tl.constexpr(0x39000000)  # its bits
_ABOVE_ALL = tl.constexpr(0x3F800001)  # of the number after 1
_SECOND = tl.constexpr(1 << 40)  # engine.race._SECOND
_STEP = tl.constexpr(2.0**40)
_REST_STEP = tl.constexpr(2.0**48)  # the rest's weights are below 2^-13 each


@kernel
def hashed(key: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """SplitMix64's output number `ids` from `key`, both uint64."""
    bits = key + ids * 0x9E3779B97F4A7C15
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@kernel
def noise(key: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """`engine.race.exponential_noise`: float64, of a key and token ids in int64."""
    bits = hashed(key.to(tl.uint64, bitcast=True), ids.to(tl.uint64, bitcast=True))
    uniform = ((bits >> 11).to(tl.int64, bitcast=True).to(tl.float64) + 0.5) * (2.0**-53)
    return -tl.log(uniform)


@kernel
def weights_of(logits: tl.tensor, best: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """exp((logits - best) / temperature), float32."""
    return tl.exp(tl.div_rn(logits - best, tl.zeros_like(logits) + temperature))


@kernel
def _filtered(whole: tl.tensor, real: tl.tensor, VOCAB: tl.constexpr) -> tl.tensor:
    """Whether a row, whose columns these are, has a filter."""
    top_k = tl.load(whole + TOP_K)
    narrow = (top_k > 0) & (top_k < VOCAB)
    return narrow | (tl.load(real + TOP_P) < 1.0) | (tl.load(real + MIN_P) > 0.0)


@kernel
def _largest(values: tl.tensor, ids: tl.tensor, OTHERWISE: tl.constexpr) -> tl.tuple:
    """The largest and the least of the ids that have it."""
    best = tl.max(values, 0)
    return best, tl.min(tl.where(values == best, ids, OTHERWISE), 0)


@kernel
def survey(
    logits: tl.tensor,
    changed: tl.tensor,
    whole: tl.tensor,
    real: tl.tensor,
    bias_ids: tl.tensor,
    bias_values: tl.tensor,
    history: tl.tensor,
    bad: tl.tensor,
    peaks: tl.tensor,
    sums: tl.tensor,
    bests: tl.tensor,
    best_ids: tl.tensor,
    counters: tl.tensor,
    row_stride: tl.tensor,
    bias_stride: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANGED: tl.constexpr,
    LOGPROBS: tl.constexpr,
) -> None:
    """A program a row and chunk, which stores of its chunk, [T, C] each.

    Whether a number is not finite (`bad`), the largest number and the sum of exp(x - it), before penalties (`peaks`,
    `sums`), and the best after them with its first id (`bests`, `best_ids`). With CHANGED also the logits after bias and
    penalties, [T, V].
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = at < VOCAB
    x = tl.load(logits + row * row_stride + at, mask=inside, other=float("-inf")).to(tl.float32)
    place = row * tl.num_programs(1) + chunk
    # Neither NaN nor an infinity is below infinity in magnitude.
    tl.store(bad + place, tl.max((inside & ~(tl.abs(x) < float("inf"))).to(tl.int32), 0))
    if chunk == 0:
        tl.store(counters + row, 0)
    if LOGPROBS:
        peak = tl.max(x, 0)
        tl.store(peaks + place, peak)
        tl.store(sums + place, tl.sum(tl.exp(x - peak), 0))
    if CHANGED:
        count = tl.load(whole + row * COLUMNS + BIASES).to(tl.int32)
        for i in range(count):
            token = tl.load(bias_ids + row * bias_stride + i)
            x = tl.where(at == token, x + tl.load(bias_values + row * bias_stride + i), x)
        slot = tl.load(whole + row * COLUMNS + SLOT)
        if slot >= 0:
            note = tl.load(history + slot * VOCAB + at, mask=inside, other=0)
            by = tl.load(real + row * COLUMNS + REPETITION).to(tl.float32)
            repeated = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + by), x * by)
            x = tl.where(note > 0, repeated, x)  # a penalty of 1 changes nothing
            times = note >> 1
            presence = tl.load(real + row * COLUMNS + PRESENCE)
            frequency = tl.load(real + row * COLUMNS + FREQUENCY)
            less = presence + frequency * times.to(tl.float64)
            x = tl.where(times > 0, (x.to(tl.float64) - less).to(tl.float32), x)
        tl.store(changed + row * VOCAB + at, x, mask=inside)
    best, token = _largest(x, at, VOCAB)
    tl.store(bests + place, best)
    tl.store(best_ids + place, token)


@kernel
def first_race(
    logits: tl.tensor,
    whole: tl.tensor,
    real: tl.tensor,
    bests: tl.tensor,
    masses: tl.tensor,
    rests: tl.tensor,
    ratios: tl.tensor,
    runners: tl.tensor,
    counters: tl.tensor,
    candidate_weights: tl.tensor,
    candidate_ids: tl.tensor,
    row_stride: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    FILTERS: tl.constexpr,
) -> None:
    """A program a row and chunk, of rows that are drawn from.

    Without filters the chunk's noticeable tokens race (`ratios`, `runners`), and the others' weights are added up
    (`rests`). With filters all weights are added up (`masses`), and the noticeable tokens are put together with those of
    the row's other chunks, [T, CAPACITY], in any order; `counters` says how many there are, if there is room or not.
    """
    row = tl.program_id(0).to(tl.int64)
    whole += row * COLUMNS
    real += row * COLUMNS
    temperature = tl.load(real + TEMPERATURE).to(tl.float32)
    if temperature > 0:
        chunk = tl.program_id(1)
        chunks = tl.num_programs(1)
        place = row * chunks + chunk
        each = tl.arange(0, CHUNKS_BLOCK)
        best = tl.max(tl.load(bests + row * chunks + each, mask=each < chunks, other=float("-inf")), 0)
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row * row_stride + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
        weights = weights_of(x, best, temperature)
        likely = weights > _NOTICEABLE
        some = tl.sum(likely.to(tl.int32), 0)
        filtered = False
        if FILTERS:
            filtered = _filtered(whole, real, VOCAB)
        if filtered:
            tl.store(masses + place, tl.sum((weights * _STEP).to(tl.int64), 0))
            if some > 0:
                before = tl.atomic_add(counters + row, some)
                into = before + tl.cumsum(likely.to(tl.int32), 0) - 1
                kept = likely & (into < CAPACITY)
                tl.store(candidate_weights + row * CAPACITY + into, weights, mask=kept)
                tl.store(candidate_ids + row * CAPACITY + into, at, mask=kept)
        else:
            tl.store(rests + place, tl.sum(tl.where(likely, 0.0, weights * _REST_STEP).to(tl.int64), 0))
            ratio = tl.load(real + TEMPERATURE) * 0.0 - 1.0  # nobody
            token = VOCAB
            if some > 0:
                own = weights.to(tl.float64) / noise(tl.load(whole + KEY), at.to(tl.int64))
                ratio, token = _largest(tl.where(likely, own, -1.0), at, VOCAB)
            tl.store(ratios + place, ratio)
            tl.store(runners + place, token)


@kernel
def _some_weights(
    first: tl.tensor,
    length: tl.tensor,
    everyone: tl.tensor,
    stored: tl.tensor,
    logits: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Weights number `first` and on of a row's candidates, or of all its tokens; 0 where there are no more."""
    at = first + tl.arange(0, BLOCK)
    if everyone:
        x = tl.load(logits + at, mask=at < length, other=float("-inf")).to(tl.float32)
        weights = weights_of(x, best, temperature)
    else:
        weights = tl.load(stored + at, mask=at < length, other=0.0)
    return weights


@kernel
def _enough(key: tl.tensor, weights: tl.tensor, MASS: tl.constexpr) -> tl.tensor:
    """1, or a weight's mass, where a weight is at least the one with bits `key`."""
    enough = weights.to(tl.int32, bitcast=True) >= key
    if MASS:
        return tl.where(enough, (weights * _STEP).to(tl.int64), 0)
    else:  # noqa: RET505 - what a constant decides is compiled only as an else
        return enough.to(tl.int32)


@kernel
def _above(
    key: tl.tensor,
    held: tl.tensor,
    length: tl.tensor,
    everyone: tl.tensor,
    stored: tl.tensor,
    logits: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    BLOCK: tl.constexpr,
    MASS: tl.constexpr,
) -> tl.tensor:
    """How many weights are at least the one with bits `key`, or what they add up to; `held` are the first of them."""
    total = _enough(key, held, MASS)
    for first in range(BLOCK, length, BLOCK):
        weights = _some_weights(first, length, everyone, stored, logits, best, temperature, BLOCK)
        total += _enough(key, weights, MASS)
    return tl.sum(total, 0)


@kernel
def _least_above(
    key: tl.tensor,
    held: tl.tensor,
    length: tl.tensor,
    everyone: tl.tensor,
    stored: tl.tensor,
    logits: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The bits of the least weight that is at least the one with bits `key`; `held` are the first."""
    keys = held.to(tl.int32, bitcast=True)
    least = tl.where(keys >= key, keys, _ABOVE_ALL)
    for first in range(BLOCK, length, BLOCK):
        weights = _some_weights(first, length, everyone, stored, logits, best, temperature, BLOCK)
        keys = weights.to(tl.int32, bitcast=True)
        least = tl.minimum(least, tl.where(keys >= key, keys, _ABOVE_ALL))
    return tl.min(least, 0)


@kernel
def filtered_race(
    logits: tl.tensor,
    whole: tl.tensor,
    real: tl.tensor,
    bests: tl.tensor,
    masses: tl.tensor,
    counters: tl.tensor,
    candidate_weights: tl.tensor,
    candidate_ids: tl.tensor,
    winners: tl.tensor,
    row_stride: tl.tensor,
    chunks: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program a row that has filters: the edge by bisection over the bits of a weight, and the race of who stays.

    First among the candidates; where those do not tell, or are too many to be kept, among all tokens.
    """
    row = tl.program_id(0).to(tl.int64)
    whole += row * COLUMNS
    real += row * COLUMNS
    temperature = tl.load(real + TEMPERATURE).to(tl.float32)
    if (temperature > 0) & _filtered(whole, real, VOCAB):
        logits += row * row_stride
        stored = candidate_weights + row * CAPACITY
        each = tl.arange(0, CHUNKS_BLOCK)
        own = each < chunks
        best = tl.max(tl.load(bests + row * chunks + each, mask=own, other=float("-inf")), 0)
        mass = tl.sum(tl.load(masses + row * chunks + each, mask=own, other=0), 0)
        candidates = tl.load(counters + row)
        top_k = tl.load(whole + TOP_K)
        top_p = tl.load(real + TOP_P)
        everyone = candidates > CAPACITY
        length = tl.where(everyone, VOCAB, candidates)
        edge = 0
        decided = False
        while not decided:
            held = _some_weights(0, length, everyone, stored, logits, best, temperature, BLOCK)
            floor = tl.where(everyone, 1, _NOTICEABLE_KEY)
            total = mass
            edge = 0
            decided = True
            if top_k > 0:
                count = length
                if everyone:
                    count = _above(1, held, length, everyone, stored, logits, best, temperature, BLOCK, False)
                if top_k <= count:
                    low = floor
                    high = _ABOVE_ALL + tl.zeros_like(low)
                    while high - low > 1:
                        middle = (low + high) // 2
                        count = _above(
                            middle, held, length, everyone, stored, logits, best, temperature, BLOCK, False
                        )
                        if count >= top_k:
                            low = middle
                            high = tl.where(count == top_k, low, high)
                        else:
                            high = middle
                    edge = _least_above(low, held, length, everyone, stored, logits, best, temperature, BLOCK)
                    total = _above(
                        edge, held, length, everyone, stored, logits, best, temperature, BLOCK, True
                    )
                else:
                    decided = everyone
            if decided & (top_p < 1.0):
                target = top_p * total.to(tl.float64)
                low = tl.maximum(floor, edge)
                reached = _above(low, held, length, everyone, stored, logits, best, temperature, BLOCK, True)
                if reached.to(tl.float64) >= target:
                    high = _ABOVE_ALL + tl.zeros_like(low)
                    while high - low > 1:
                        middle = (low + high) // 2
                        reached = _above(
                            middle, held, length, everyone, stored, logits, best, temperature, BLOCK, True
                        )
                        if reached.to(tl.float64) >= target:
                            low = middle
                        else:
                            high = middle
                    edge = low
                else:
                    decided = everyone | (edge > 0)
            least = tl.load(real + MIN_P).to(tl.float32).to(tl.int32, bitcast=True)
            edge = tl.maximum(edge, least)
            decided = decided & (everyone | (edge > _NOTICEABLE_KEY))
            if not decided:
                everyone = everyone | True
                length = VOCAB + tl.zeros_like(length)
        key = tl.load(whole + KEY)
        edge = tl.maximum(edge, 1)  # a weight of 0 never runs
        ratio = top_p * 0.0 - 1.0
        winner = VOCAB + tl.zeros_like(length)
        for first in range(0, length, BLOCK):
            weights = _some_weights(first, length, everyone, stored, logits, best, temperature, BLOCK)
            stays = weights.to(tl.int32, bitcast=True) >= edge
            ids = first + tl.arange(0, BLOCK)
            if not everyone:
                ids = tl.load(candidate_ids + row * CAPACITY + ids, mask=ids < length, other=VOCAB)
            ratios = weights.to(tl.float64) / noise(key, ids.to(tl.int64))
            here, token = _largest(tl.where(stays, ratios, -1.0), ids, VOCAB)
            ahead = (here > ratio) | ((here == ratio) & (token < winner))
            winner = tl.where(ahead, token, winner)
            ratio = tl.where(ahead, here, ratio)
        tl.store(winners + row, winner)


@kernel
def _rest_wins(
    key: tl.tensor, rests: tl.tensor, ratios: tl.tensor, chunks: tl.tensor, CHUNKS_BLOCK: tl.constexpr
) -> tl.tensor:
    """Whether the tokens that run as one win a row's first race."""
    each = tl.arange(0, CHUNKS_BLOCK)
    rest = tl.sum(tl.load(rests + each, mask=each < chunks, other=0), 0).to(tl.float64) * (1.0 / _REST_STEP)
    ratio = tl.max(tl.load(ratios + each, mask=each < chunks, other=-1.0), 0)
    return (rest > 0) & (rest / noise(key, tl.zeros_like(key) - 1) > ratio)


@kernel
def second_race(
    logits: tl.tensor,
    whole: tl.tensor,
    real: tl.tensor,
    bests: tl.tensor,
    rests: tl.tensor,
    ratios: tl.tensor,
    second_ratios: tl.tensor,
    second_runners: tl.tensor,
    row_stride: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    FILTERS: tl.constexpr,
) -> None:
    """A program a row and chunk: where the rest won the first race, its tokens race in turn."""
    row = tl.program_id(0).to(tl.int64)
    whole += row * COLUMNS
    real += row * COLUMNS
    temperature = tl.load(real + TEMPERATURE).to(tl.float32)
    runs = temperature > 0
    if FILTERS:
        runs = runs & ~_filtered(whole, real, VOCAB)
    if runs:
        chunk = tl.program_id(1)
        chunks = tl.num_programs(1)
        key = tl.load(whole + KEY)
        if _rest_wins(key, rests + row * chunks, ratios + row * chunks, chunks, CHUNKS_BLOCK):
            each = tl.arange(0, CHUNKS_BLOCK)
            best = tl.max(tl.load(bests + row * chunks + each, mask=each < chunks, other=float("-inf")), 0)
            at = chunk * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(logits + row * row_stride + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
            weights = weights_of(x, best, temperature)
            own = weights.to(tl.float64) / noise(key, at.to(tl.int64) + _SECOND)
            runs_here = (weights > 0) & (weights <= _NOTICEABLE)
            ratio, token = _largest(tl.where(runs_here, own, -1.0), at, VOCAB)
            tl.store(second_ratios + row * chunks + chunk, ratio)
            tl.store(second_runners + row * chunks + chunk, token)


@kernel
def settle(
    logits: tl.tensor,
    whole: tl.tensor,
    real: tl.tensor,
    bad: tl.tensor,
    peaks: tl.tensor,
    sums: tl.tensor,
    bests: tl.tensor,
    best_ids: tl.tensor,
    rests: tl.tensor,
    ratios: tl.tensor,
    runners: tl.tensor,
    second_ratios: tl.tensor,
    second_runners: tl.tensor,
    winners: tl.tensor,
    tokens: tl.tensor,
    finite: tl.tensor,
    shifts: tl.tensor,
    logprobs: tl.tensor,
    row_stride: tl.tensor,
    chunks: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    DRAWN: tl.constexpr,
    FILTERS: tl.constexpr,
    LOGPROBS: tl.constexpr,
) -> None:
    """A program a row: its token from what its chunks say, whether it is finite, and the token's log-probability.

    `shifts` [T, 2] keeps the largest logit and the logarithm of the sum, for the other tokens' log-probabilities.
    """
    row = tl.program_id(0).to(tl.int64)
    whole += row * COLUMNS
    real += row * COLUMNS
    each = tl.arange(0, CHUNKS_BLOCK)
    own = each < chunks
    place = row * chunks + each
    good = tl.max(tl.load(bad + place, mask=own, other=0), 0) == 0
    best = tl.load(bests + place, mask=own, other=float("-inf"))
    _best, token = _largest(best, tl.load(best_ids + place, mask=own, other=VOCAB), VOCAB)
    if DRAWN and tl.load(real + TEMPERATURE).to(tl.float32) > 0:
        filtered = False
        if FILTERS:
            filtered = _filtered(whole, real, VOCAB)
        if filtered:
            token = tl.load(winners + row)
        else:
            ratio = tl.load(ratios + place, mask=own, other=-1.0)
            _ratio, token = _largest(ratio, tl.load(runners + place, mask=own, other=VOCAB), VOCAB)
            key = tl.load(whole + KEY)
            if _rest_wins(key, rests + row * chunks, ratios + row * chunks, chunks, CHUNKS_BLOCK):
                ratio = tl.load(second_ratios + place, mask=own, other=-1.0)
                ids = tl.load(second_runners + place, mask=own, other=VOCAB)
                top, second = _largest(ratio, ids, VOCAB)
                token = tl.where(top >= 0, second, token)
    good = good & (token < VOCAB)
    token = tl.where(good, token, 0)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(finite + row, good)
    if LOGPROBS:
        peak = tl.load(peaks + place, mask=own, other=float("-inf"))
        highest = tl.max(peak, 0)
        total = tl.sum(tl.load(sums + place, mask=own, other=0.0) * tl.exp(peak - highest), 0)
        shift = tl.log(total)
        tl.store(shifts + row * 2, highest)
        tl.store(shifts + row * 2 + 1, shift)
        tl.store(logprobs + row, tl.load(logits + row * row_stride + token).to(tl.float32) - highest - shift)
