// A part of integers.c: how AVX2, or any other processor in vectors that the compiler splits for it, unpacks groups and
// multiplies them. AVX2 has no products of unsigned and signed bytes that keep their sums whole, but vpmaddwd multiplies 16
// bits, so activations are multiplied in one piece.

typedef _Float16 v16h __attribute__((vector_size(32)));
typedef uint8_t v16b __attribute__((vector_size(16)));
typedef int8_t v16c __attribute__((vector_size(16)));

static inline v16f halves(const uint8_t *at) {
    v16h stored;
    memcpy(&stored, at, sizeof stored);
    return __builtin_convertvector(stored, v16f);
}

static inline v16f small(const uint8_t *at, int is_signed) {
    v16b stored;
    memcpy(&stored, at, sizeof stored);
    return is_signed ? __builtin_convertvector((v16c)stored, v16f) : __builtin_convertvector(stored, v16f);
}

// The scales of group g of a tile; or its scale, and what is subtracted: minus Q4's offset, the 128 that Q8's numbers have
// too much.
__attribute__((always_inline)) static inline void scales_of(int kind, const uint8_t *tile, int groups, int g, v16f out[2]) {
    if (!is_super(kind)) {
        out[0] = halves(tile + SCALES * g);
        out[1] = kind == DSA_Q4 ? -halves(tile + SCALES * (groups + g)) : 128.0f * out[0];
        return;
    }
    const uint8_t *block = tile + (unsigned)g / GROUPS * block_bytes(kind), *at = block + HEAD + 32 * ((unsigned)g % GROUPS);
    const v16f d = halves(block);
    out[0] = d * small(at, kind == DSA_Q6_K);
    out[1] = (kind == DSA_Q6_K ? d : halves(block + 32)) * small(at + 16, kind == DSA_Q6_K);
}

// Unpack group g of a tile.
static void make_plain(int kind, const uint8_t *tile, int groups, int g, uint8_t *out) {
    const uint8_t *w = numbers_of(kind, tile, groups, g), *more = w + NIBBLES;
    if (kind == DSA_Q8) memcpy(out, w, BYTES);
    else
        for (int i = 0; i < 4; i++)
            for (int o = 0; o < 64; o++) {
                out[128 * i + o] = w[64 * i + o] & 15;
                out[128 * i + 64 + o] = w[64 * i + o] >> 4;
            }
    if (kind == DSA_Q5_K || kind == DSA_Q6_K)
        for (int j = 0; j < 8; j++)
            for (int o = 0; o < 64; o++)
                out[64 * j + o] |= kind == DSA_Q5_K ? (more[o] >> j & 1) << 4
                                                    : (more[64 * (j / 4) + o] >> (2 * (j % 4)) & 3) << 4;
    v16f scales[2];
    scales_of(kind, tile, groups, g, scales);
    memcpy(out + BYTES, scales, sizeof scales);
}

// PLAIN: the "kind" of a group that make_plain has unpacked.
enum { PLAIN = -1 };

// sums[r][o] += the products of words first to first + 3 of a group at w with 16 inputs of each row, exactly. `kind` is a
// constant where this is inlined.
#ifdef __AVX2__
typedef __m256i sums_t[2];

static inline __m256i load(const uint8_t *at) { return _mm256_loadu_si256((const void *)at); }

// Bits `from` to `from` + 7 of each 16, moved to `to` on.
static inline __m256i moved(__m256i bits, int from, int to) {
    return from > to ? _mm256_srli_epi16(bits, from - to) : _mm256_slli_epi16(bits, to - from);
}

// The numbers of word j for outputs 8 h to 8 h + 7, as pairs of 16 bits: of inputs 0 and 2, of inputs 1 and 3.
__attribute__((always_inline)) static inline void unpack(int kind, const uint8_t *w, int j, int h, __m256i out[2]) {
    if (kind == PLAIN || kind == DSA_Q8) {
        const __m256i bytes = load(w + 64 * j + 32 * h);
        out[0] = _mm256_and_si256(bytes, _mm256_set1_epi16(255));
        out[1] = _mm256_srli_epi16(bytes, 8);
        return;
    }
    const __m256i both = load(w + 64 * (j / 2) + 32 * h), low = _mm256_set1_epi16(15), fifth = _mm256_set1_epi16(16);
    out[0] = _mm256_and_si256(moved(both, 4 * (j % 2), 0), low);
    out[1] = _mm256_and_si256(moved(both, 8 + 4 * (j % 2), 0), low);
    if (kind == DSA_Q5_K) {
        const __m256i bits = load(w + NIBBLES + 32 * h);
        out[0] = _mm256_or_si256(out[0], _mm256_and_si256(moved(bits, j, 4), fifth));
        out[1] = _mm256_or_si256(out[1], _mm256_and_si256(moved(bits, 8 + j, 4), fifth));
    }
    if (kind == DSA_Q6_K) {
        const __m256i bits = load(w + NIBBLES + 64 * (j / 4) + 32 * h), upper = _mm256_set1_epi16(48);
        out[0] = _mm256_or_si256(out[0], _mm256_and_si256(moved(bits, 2 * (j % 4), 4), upper));
        out[1] = _mm256_or_si256(out[1], _mm256_and_si256(moved(bits, 8 + 2 * (j % 4), 4), upper));
    }
}

__attribute__((always_inline)) static inline void dot16(int kind, const uint8_t *w, int first, const int16_t *x, size_t row,
                                                        int rows, sums_t *sums) {
#pragma clang loop unroll(full)
    for (int j = 0; j < 4; j++) {
        __m256i a[2], b[2];
        unpack(kind, w, first + j, 0, a);
        unpack(kind, w, first + j, 1, b);
#pragma clang loop unroll(full)
        for (int r = 0; r < rows; r++) {
            int32_t pairs[2];
            memcpy(pairs, x + r * row + 4 * j, sizeof pairs);
            const __m256i x0 = _mm256_set1_epi32(pairs[0]), x1 = _mm256_set1_epi32(pairs[1]);
            // Two products of 8 and 16 bits, and sixteen of these sums, fit 32 bits.
            const __m256i here = _mm256_add_epi32(_mm256_madd_epi16(a[0], x0), _mm256_madd_epi16(a[1], x1));
            const __m256i there = _mm256_add_epi32(_mm256_madd_epi16(b[0], x0), _mm256_madd_epi16(b[1], x1));
            sums[r][0] = _mm256_add_epi32(sums[r][0], here);
            sums[r][1] = _mm256_add_epi32(sums[r][1], there);
        }
    }
}

static inline v16i taken(const sums_t sums) {
    v16i all;
    memcpy(&all, sums, sizeof all);
    return all;
}
#else
typedef v16i sums_t;

static inline void dot16(int kind, const uint8_t *w, int first, const int16_t *x, size_t row, int rows, sums_t *sums) {
    (void)kind; // always unpacked
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < 4; j++)
            for (int o = 0; o < DSA_LANES; o++)
                for (int b = 0; b < 4; b++)
                    sums[r][o] += w[64 * (first + j) + 4 * o + b] * x[r * row + IN_ORDER(4 * j + b)];
}

static inline v16i taken(const sums_t sums) { return sums; }
#endif

// AT_ONCE: rows whose sums fit the registers.
enum { AT_ONCE = 4 };

// Add the products of one group with some rows to `total`. `numbers`: the group's kind, or PLAIN.
__attribute__((always_inline)) static inline void add_group(int numbers, const uint8_t *w, const v16f *scales, const struct run *run,
                                                            int kind, int g, int first, int rows, v16f *total) {
    const size_t groups = (size_t)run->all_groups, row = groups * DSA_GROUP;
    const int16_t *x = (const int16_t *)(const void *)run->x + first * row + (size_t)g * DSA_GROUP;
    sums_t sums[AT_ONCE];
    memset(sums, 0, sizeof sums);
    dot16(numbers, w, 0, x, row, rows, sums);
    if (kind == DSA_Q6_K) {
        for (int r = 0; r < rows; r++) {
            const size_t at = (first + r) * groups + g;
            total[r] += run->scales[at] * (__builtin_convertvector(taken(sums[r]) + run->begins[2 * at], v16f) * scales[0]);
        }
        memset(sums, 0, sizeof sums);
    }
    dot16(numbers, w, 4, x + 16, row, rows, sums);
    for (int r = 0; r < rows; r++) {
        const size_t at = (first + r) * groups + g;
        if (kind == DSA_Q6_K)
            total[r] += run->scales[at] * (__builtin_convertvector(taken(sums[r]) + run->begins[2 * at + 1], v16f) * scales[1]);
        else
            total[r] += run->scales[at] * __builtin_convertvector(taken(sums[r]), v16f) * scales[0] - scales[1] * run->sums[at];
    }
}

// Prefetch what a tile has AHEAD bytes after group g, each byte once: the hardware's prefetcher stops at each page.
static inline __attribute__((always_inline)) void fetch(int kind, const uint8_t *tile, int groups, int g, const uint8_t *w) {
    const size_t share = is_super(kind) ? group_bytes(kind) : head_bytes(kind, groups) / (size_t)groups + group_bytes(kind);
    const uint8_t *ahead = (is_super(kind) ? w : tile + (size_t)g * share) + AHEAD;
    for (size_t line = 0; line < share; line += 64) __builtin_prefetch(ahead + line, 0, 1);
    if (is_super(kind) && g % GROUPS == 0)
        for (size_t line = 0; line < HEAD + SMALL; line += 64) __builtin_prefetch(ahead - HEAD - SMALL + line, 0, 1);
}

__attribute__((always_inline)) static inline void multiply(const struct run *run, int kind, int plain, int add, int rows) {
    v16f total[ROWS];
    for (int r = 0; r < rows; r++) {
        total[r] = (v16f){0};
        if (add) memcpy(&total[r], run->out + r * run->stride, sizeof total[r]);
    }
    for (int g = 0; g < run->groups; g++) {
        v16f scales[2];
        const uint8_t *w = run->weights + (size_t)g * UNPACKED;
        int numbers = PLAIN;
#ifdef __AVX2__
        if (!plain) {
            w = numbers_of(kind, run->weights, run->all_groups, g), numbers = kind;
            scales_of(kind, run->weights, run->all_groups, g, scales);
            fetch(kind, run->weights, run->all_groups, g, w);
        }
#else
        uint8_t unpacked[UNPACKED];
        if (!plain) make_plain(kind, run->weights, run->all_groups, g, unpacked), w = unpacked;
#endif
        if (numbers == PLAIN) memcpy(scales, w + BYTES, sizeof scales);
        for (int first = 0; first < rows; first += AT_ONCE)
            add_group(numbers, w, scales, run, kind, g, first, rows - first < AT_ONCE ? rows - first : AT_ONCE, total + first);
    }
    for (int r = 0; r < rows; r++) memcpy(run->out + r * run->stride, &total[r], sizeof total[r]);
}
