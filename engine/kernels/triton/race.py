"""The draw of `engine.step.sampler` in kernels: weights, `engine.step.filters`' edge, `engine.step.race`'s winner.

More than 400 lines, because the kernels are stages of one draw, and each reads what the one before it left.

Letters: T rows, V tokens, cut into C chunks. A row's parameters are ten columns of 64 bits (see `engine.kernels.triton.sampling`).

What is added up over tokens is added as integers (weights in steps of 2^-38), so that neither the order in which programs
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

_NOTICEABLE = tl.constexpr(2.0**-13)  # engine.step.filters.NOTICEABLE
_NOTICEABLE_KEY = tl.constexpr(0x39000001)  # the bits of the number after it
_ABOVE_ALL = tl.constexpr(0x3F800001)  # of the number after 1
_SECOND = tl.constexpr(1 << 40)  # engine.step.race._SECOND
_STEP = tl.constexpr(2.0**38)
_COUNT_AT = tl.constexpr(50)  # above a chunk's mass in such steps there is room for a count
_ONE = tl.constexpr(1 << 50)  # of that count
_BELOW_COUNT = tl.constexpr((1 << 50) - 1)
GROUP = tl.constexpr(64)  # tokens whose largest weight `prepare` looks at


@kernel
def hashed(key: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """SplitMix64's output number `ids` from `key`, both uint64."""
    bits = key + ids * 0x9E3779B97F4A7C15
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@kernel
def noise(key: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """`engine.step.race.exponential_noise`: float64, of a key and token ids in int64."""
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
    masses: tl.tensor,
    groups: tl.tensor,
    masks: tl.tensor,
    mask_of: tl.tensor,
    row_stride: tl.tensor,
    bias_stride: tl.tensor,
    mask_stride: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANGED: tl.constexpr,
    MASKED: tl.constexpr,
    DRAWN: tl.constexpr,
    FILTERS: tl.constexpr,
    LOGPROBS: tl.constexpr,
) -> None:
    """A program a row and chunk, which stores of its chunk, [T, C] each.

    Whether a number is not finite (`bad`), the largest number and the sum of exp(x - it), before penalties (`peaks`,
    `sums`), and the best after them with its first id (`bests`, `best_ids`). With CHANGED or MASKED also the logits after
    bias, penalties and mask, [T, V]: a token that the row's mask leaves out has -inf, and so a weight of 0. With DRAWN the
    weights' sum, of which the chunk's best has 1 (`masses`); and with FILTERS the best of each GROUP tokens,
    [T, C * CHUNK / GROUP].
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = at < VOCAB
    x = tl.load(logits + row * row_stride + at, mask=inside, other=float("-inf")).to(tl.float32)
    place = row * tl.num_programs(1) + chunk
    # Neither NaN nor an infinity is below infinity in magnitude.
    tl.store(bad + place, tl.max((inside & ~(tl.abs(x) < float("inf"))).to(tl.int32), 0))
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
    if MASKED:
        mask = tl.load(mask_of + row)
        if mask >= 0:
            words = tl.load(masks + mask * mask_stride + at // 32, mask=inside, other=0)
            x = tl.where((words >> (at % 32)) & 1 != 0, x, float("-inf"))
    if CHANGED or MASKED:
        tl.store(changed + row * VOCAB + at, x, mask=inside)
    best, token = _largest(x, at, VOCAB)
    tl.store(bests + place, best)
    tl.store(best_ids + place, token)
    if DRAWN:
        temperature = tl.load(real + row * COLUMNS + TEMPERATURE).to(tl.float32)
        if temperature > 0:
            above = tl.where(best > float("-inf"), best, 0.0)  # a mask may leave out all of a chunk
            tl.store(masses + place, tl.sum(weights_of(x, above, temperature), 0))
    if FILTERS:
        each = tl.arange(0, CHUNK // GROUP)
        own = tl.max(tl.reshape(x, [CHUNK // GROUP, GROUP]), 1)
        tl.store(groups + place * (CHUNK // GROUP) + each, own)


@kernel
def prepare(
    whole: tl.tensor,
    real: tl.tensor,
    bests: tl.tensor,
    groups: tl.tensor,
    peaks: tl.tensor,
    floors: tl.tensor,
    counters: tl.tensor,
    chunks: tl.tensor,
    num_groups: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
    FILTERS: tl.constexpr,
) -> None:
    """A program a row: its best logit (`peaks`), and who of it is kept as a candidate (`floors`).

    That is -1 where nothing is drawn, else the bits of a weight: the first above 2^-13, or with top_k one that hardly more
    than k tokens reach. If k groups of tokens have a member of at least some weight, k tokens have it, and few more where
    there are many groups; so such a weight is looked for among the groups' best.
    """
    row = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, CHUNKS_BLOCK)
    best = tl.max(tl.load(bests + row * chunks + each, mask=each < chunks, other=float("-inf")), 0)
    temperature = tl.load(real + row * COLUMNS + TEMPERATURE).to(tl.float32)
    floor = tl.where(temperature > 0, _NOTICEABLE_KEY, -1)
    if FILTERS and temperature > 0:
        top_k = tl.load(whole + row * COLUMNS + TOP_K)
        if (top_k > 0) & (top_k < VOCAB) & (top_k <= num_groups):
            group = tl.arange(0, GROUPS_BLOCK)
            x = tl.load(groups + row * num_groups + group, mask=group < num_groups, other=float("-inf"))
            keys = weights_of(x, best, temperature).to(tl.int32, bitcast=True)
            low = tl.zeros_like(floor)
            high = low + _ABOVE_ALL
            while high - low > 1:
                middle = (low + high) // 2
                count = tl.sum((keys >= middle).to(tl.int32), 0)
                if count >= top_k:
                    low = middle
                    high = tl.where(count <= 2 * top_k + 32, low, high)
                else:
                    high = middle
            floor = tl.where(low > 0, low, floor)
    tl.store(peaks + row, best)
    tl.store(floors + row, floor)
    tl.store(counters + row, 0)


@kernel
def collect(
    logits: tl.tensor,
    real: tl.tensor,
    bests: tl.tensor,
    masses: tl.tensor,
    peaks: tl.tensor,
    floors: tl.tensor,
    rests: tl.tensor,
    counters: tl.tensor,
    candidate_weights: tl.tensor,
    candidate_ids: tl.tensor,
    row_stride: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPACITY: tl.constexpr,
) -> None:
    """A program a row and chunk, of rows that are drawn from.

    Candidates are put together with those of the row's other chunks, [T, CAPACITY], in any order; `counters` says how many
    there are, whether there is room or not. The others' weights are added up, `rests` [T, C]. A chunk without candidates is
    known by its best, and is not read again.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    place = row * tl.num_programs(1) + chunk
    floor = tl.load(floors + row)
    if floor >= 0:
        temperature = tl.load(real + row * COLUMNS + TEMPERATURE).to(tl.float32)
        peak = tl.load(peaks + row)
        own_best = weights_of(tl.load(bests + place), peak, temperature)
        if own_best.to(tl.int32, bitcast=True) >= floor:
            at = chunk * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(logits + row * row_stride + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
            weights = weights_of(x, peak, temperature)
            likely = weights.to(tl.int32, bitcast=True) >= floor
            both = tl.sum(tl.where(likely, _ONE, (weights * _STEP).to(tl.int64)), 0)
            tl.store(rests + place, both & _BELOW_COUNT)
            before = tl.atomic_add(counters + row, (both >> _COUNT_AT).to(tl.int32))
            into = before + tl.cumsum(likely.to(tl.int32), 0) - 1
            kept = likely & (into < CAPACITY)
            tl.store(candidate_weights + row * CAPACITY + into, weights, mask=kept)
            tl.store(candidate_ids + row * CAPACITY + into, at, mask=kept)
        else:
            tl.store(rests + place, (tl.load(masses + place) * own_best * _STEP).to(tl.int64))


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
def _rest_wins(key: tl.tensor, rest: tl.tensor, ratio: tl.tensor) -> tl.tensor:
    """Whether the tokens that run as one, of this weight in steps, beat the best of the others."""
    one = rest.to(tl.float64) * (1.0 / _STEP)
    return (rest > 0) & (one / noise(key, tl.zeros_like(key) - 1) > ratio)


@kernel
def choose(
    logits: tl.tensor,
    whole: tl.tensor,
    real: tl.tensor,
    peaks: tl.tensor,
    floors: tl.tensor,
    rests: tl.tensor,
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
    FILTERS: tl.constexpr,
) -> None:
    """A program a row: who won, `winners`; where the tokens that run as one did, -1 less who is next.

    With filters the edge is found by bisection over the bits of a weight, first among the candidates, and where those do
    not tell, or are too many to be kept, among all tokens. Without, all candidates stay. Those who stay race. A crowd of
    candidates without filters is left to `race_on`: -1 less VOCAB, who is nobody.
    """
    row = tl.program_id(0).to(tl.int64)
    floor_of_row = tl.load(floors + row)
    if floor_of_row >= 0:
        whole += row * COLUMNS
        real += row * COLUMNS
        logits += row * row_stride
        stored = candidate_weights + row * CAPACITY
        temperature = tl.load(real + TEMPERATURE).to(tl.float32)
        best = tl.load(peaks + row)
        candidates = tl.load(counters + row)
        each = tl.arange(0, CHUNKS_BLOCK)
        rest = tl.sum(tl.load(rests + row * chunks + each, mask=each < chunks, other=0), 0)
        everyone = candidates > CAPACITY
        length = tl.where(everyone, VOCAB, candidates)
        held = _some_weights(0, length, everyone, stored, logits, best, temperature, BLOCK)
        edge = floor_of_row
        filtered = False
        if FILTERS:
            filtered = _filtered(whole, real, VOCAB)
            if filtered:
                top_k = tl.load(whole + TOP_K)
                top_k = tl.where(top_k < VOCAB, top_k, 0)
                top_p = tl.load(real + TOP_P)
                least = tl.load(real + MIN_P).to(tl.float32).to(tl.int32, bitcast=True)
                decided = False
                while not decided:
                    floor = tl.where(everyone, 1, floor_of_row)
                    edge = tl.zeros_like(floor)
                    count = length
                    if everyone:
                        count = _above(
                            1, held, length, everyone, stored, logits, best, temperature, BLOCK, False
                        )
                    if (top_k > 0) & (top_k <= count):
                        low = floor
                        high = tl.zeros_like(low) + _ABOVE_ALL
                        while high - low > 1:
                            middle = (low + high) // 2
                            reached = _above(
                                middle, held, length, everyone, stored, logits, best, temperature, BLOCK, False
                            )  # fmt: skip
                            if reached >= top_k:
                                low = middle
                                high = tl.where(reached == top_k, low, high)
                            else:
                                high = middle
                        edge = _least_above(
                            low, held, length, everyone, stored, logits, best, temperature, BLOCK
                        )
                    decided = everyone | (top_k <= 0) | (edge > 0)
                    if decided & (top_p < 1.0):
                        low = tl.maximum(floor, edge)
                        mass = _above(
                            low, held, length, everyone, stored, logits, best, temperature, BLOCK, True
                        )
                        # Who stays by top_k is all there is, else also those who are no candidates.
                        total = mass + tl.where(everyone | (edge > 0), 0, rest)
                        target = top_p * total.to(tl.float64)
                        if mass.to(tl.float64) >= target:
                            high = tl.zeros_like(low) + _ABOVE_ALL
                            while high - low > 1:
                                middle = (low + high) // 2
                                mass = _above(
                                    middle, held, length, everyone, stored, logits, best, temperature, BLOCK, True
                                )  # fmt: skip
                                if mass.to(tl.float64) >= target:
                                    low = middle
                                else:
                                    high = middle
                            edge = low
                        else:
                            decided = everyone | (edge > 0)
                    edge = tl.maximum(edge, least)
                    decided = everyone | (decided & (edge >= floor))
                    if not decided:
                        everyone = everyone | True
                        length = tl.zeros_like(length) + VOCAB
                        held = _some_weights(0, length, everyone, stored, logits, best, temperature, BLOCK)
                edge = tl.maximum(edge, 1)  # a weight of 0 never runs
        key = tl.load(whole + KEY)
        ratio = rest.to(tl.float64) * 0.0 - 1.0
        winner = tl.zeros_like(length) + VOCAB
        crowd = everyone & (not filtered)
        length = tl.where(crowd, 0, length)
        for first in range(0, length, BLOCK):
            weights = _some_weights(first, length, everyone, stored, logits, best, temperature, BLOCK)
            ids = first + tl.arange(0, BLOCK)
            if not everyone:
                ids = tl.load(candidate_ids + row * CAPACITY + ids, mask=ids < length, other=VOCAB)
            stays = weights.to(tl.int32, bitcast=True) >= edge
            ratios = weights.to(tl.float64) / noise(key, ids.to(tl.int64))
            here, token = _largest(tl.where(stays, ratios, -1.0), ids, VOCAB)
            ahead = (here > ratio) | ((here == ratio) & (token < winner))
            winner = tl.where(ahead, token, winner)
            ratio = tl.where(ahead, here, ratio)
        if not filtered:
            winner = tl.where(crowd | _rest_wins(key, rest, ratio), -1 - winner, winner)
        tl.store(winners + row, winner)


@kernel
def race_on(
    logits: tl.tensor,
    whole: tl.tensor,
    real: tl.tensor,
    peaks: tl.tensor,
    floors: tl.tensor,
    winners: tl.tensor,
    first_ratios: tl.tensor,
    first_runners: tl.tensor,
    ratios: tl.tensor,
    runners: tl.tensor,
    row_stride: tl.tensor,
    chunks: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Some programs a row, a chunk after the other: where the tokens that run as one won, they race in turn.

    [T, programs] `ratios`, -1 where nobody ran, and `runners`. Of a crowd also the first race, `first_ratios` and
    `first_runners`; the second then is for the case that it is needed.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(floors + row) >= 0:
        winner = tl.load(winners + row)
        if winner < 0:
            peak = tl.load(peaks + row)
            temperature = tl.load(real + row * COLUMNS + TEMPERATURE).to(tl.float32)
            key = tl.load(whole + row * COLUMNS + KEY)
            crowd = winner == -1 - VOCAB
            first_ratio = key.to(tl.float64) * 0.0 - 1.0
            ratio = first_ratio
            first_runner = tl.zeros_like(winner) + VOCAB
            runner = first_runner
            for chunk in range(tl.program_id(1), chunks, tl.num_programs(1)):  # so that ids ascend
                at = chunk * CHUNK + tl.arange(0, CHUNK)
                x = tl.load(logits + row * row_stride + at, mask=at < VOCAB, other=float("-inf")).to(
                    tl.float32
                )
                weights = weights_of(x, peak, temperature)
                likely = weights > _NOTICEABLE
                wide = weights.to(tl.float64)
                if crowd:
                    own = tl.where(likely, wide / noise(key, at.to(tl.int64)), -1.0)
                    here, token = _largest(own, at, VOCAB)
                    first_runner = tl.where(here > first_ratio, token, first_runner)
                    first_ratio = tl.where(here > first_ratio, here, first_ratio)
                own = tl.where((weights > 0) & ~likely, wide / noise(key, at.to(tl.int64) + _SECOND), -1.0)
                here, token = _largest(own, at, VOCAB)
                runner = tl.where(here > ratio, token, runner)
                ratio = tl.where(here > ratio, here, ratio)
            place = row * tl.num_programs(1) + tl.program_id(1)
            tl.store(first_ratios + place, first_ratio)
            tl.store(first_runners + place, first_runner)
            tl.store(ratios + place, ratio)
            tl.store(runners + place, runner)


@kernel
def settle(
    logits: tl.tensor,
    bad: tl.tensor,
    chunk_peaks: tl.tensor,
    sums: tl.tensor,
    bests: tl.tensor,
    best_ids: tl.tensor,
    whole: tl.tensor,
    floors: tl.tensor,
    rests: tl.tensor,
    winners: tl.tensor,
    first_ratios: tl.tensor,
    first_runners: tl.tensor,
    ratios: tl.tensor,
    runners: tl.tensor,
    tokens: tl.tensor,
    finite: tl.tensor,
    shifts: tl.tensor,
    logprobs: tl.tensor,
    row_stride: tl.tensor,
    chunks: tl.tensor,
    programs: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    DRAWN: tl.constexpr,
    LOGPROBS: tl.constexpr,
) -> None:
    """A program a row: its token, whether all its logits are finite, and the token's log-probability.

    `shifts` [T, 2] keeps the largest logit and the logarithm of the sum, for the other tokens' log-probabilities.
    """
    row = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, CHUNKS_BLOCK)
    own = each < chunks
    place = row * chunks + each
    good = tl.max(tl.load(bad + place, mask=own, other=0), 0) == 0
    best = tl.load(bests + place, mask=own, other=float("-inf"))
    _best, token = _largest(best, tl.load(best_ids + place, mask=own, other=VOCAB), VOCAB)
    if DRAWN and tl.load(floors + row) >= 0:
        token = tl.load(winners + row)
        if token < 0:
            ran = each < programs
            at = row * programs + each
            second = True
            token = -1 - token
            if token == VOCAB:
                ratio = tl.load(first_ratios + at, mask=ran, other=-1.0)
                top, token = _largest(ratio, tl.load(first_runners + at, mask=ran, other=VOCAB), VOCAB)
                rest = tl.sum(tl.load(rests + place, mask=own, other=0), 0)
                second = _rest_wins(tl.load(whole + row * COLUMNS + KEY), rest, top)
            ratio = tl.load(ratios + at, mask=ran, other=-1.0)
            top, runner = _largest(ratio, tl.load(runners + at, mask=ran, other=VOCAB), VOCAB)
            token = tl.where(second & (top >= 0), runner, token)  # nobody ran: a rounding error had won
    good = good & (token < VOCAB)
    token = tl.where(good, token, 0)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(finite + row, good)
    if LOGPROBS:
        peak = tl.load(chunk_peaks + place, mask=own, other=float("-inf"))
        highest = tl.max(peak, 0)
        total = tl.sum(tl.load(sums + place, mask=own, other=0.0) * tl.exp(peak - highest), 0)
        shift = tl.log(total)
        tl.store(shifts + row * 2, highest)
        tl.store(shifts + row * 2 + 1, shift)
        tl.store(logprobs + row, tl.load(logits + row * row_stride + token).to(tl.float32) - highest - shift)
