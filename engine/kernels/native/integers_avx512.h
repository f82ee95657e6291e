// A part of integers.c: how a processor with AVX-512 unpacks groups and multiplies them. vpdpbusd multiplies bytes, so the
// halves of activations are multiplied one after the other.

typedef __m512i word;

static inline __m512 halves(const uint8_t *at) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)at)); }

static inline __m512 small(const uint8_t *at, int is_signed) {
    __m128i bytes = _mm_loadu_si128((const void *)at);
    return _mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
}

static inline __m512i four(const int8_t *x) { // four neighbouring inputs, in every lane
    int32_t all;
    memcpy(&all, x, sizeof all);
    return _mm512_set1_epi32(all);
}

// The eight words of a group, a byte for each number.
__attribute__((always_inline)) static inline void unpack(int kind, const uint8_t *w, word out[8]) {
    if (kind == DSA_Q8) {
        for (int j = 0; j < 8; j++) out[j] = _mm512_loadu_si512(w + 64 * j);
        return;
    }
    const __m512i low = _mm512_set1_epi8(15), fifth = _mm512_set1_epi8(16), upper = _mm512_set1_epi8(48);
    for (int i = 0; i < 4; i++) {
        __m512i both = _mm512_loadu_si512(w + 64 * i);
        out[2 * i] = _mm512_and_si512(both, low);
        out[2 * i + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    }
    if (kind == DSA_Q5_K) {
        const __m512i bits = _mm512_loadu_si512(w + NIBBLES);
        // (bits & 16) | number, with bit j of each byte moved to bit 4.
        out[0] = _mm512_ternarylogic_epi32(_mm512_slli_epi16(bits, 4), fifth, out[0], 0xea);
        out[1] = _mm512_ternarylogic_epi32(_mm512_slli_epi16(bits, 3), fifth, out[1], 0xea);
        out[2] = _mm512_ternarylogic_epi32(_mm512_slli_epi16(bits, 2), fifth, out[2], 0xea);
        out[3] = _mm512_ternarylogic_epi32(_mm512_slli_epi16(bits, 1), fifth, out[3], 0xea);
        out[4] = _mm512_ternarylogic_epi32(bits, fifth, out[4], 0xea);
        out[5] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(bits, 1), fifth, out[5], 0xea);
        out[6] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(bits, 2), fifth, out[6], 0xea);
        out[7] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(bits, 3), fifth, out[7], 0xea);
    }
    if (kind == DSA_Q6_K)
        for (int h = 0; h < 2; h++) {
            const __m512i bits = _mm512_loadu_si512(w + NIBBLES + 64 * h);
            word *o = out + 4 * h;
            o[0] = _mm512_ternarylogic_epi32(_mm512_slli_epi16(bits, 4), upper, o[0], 0xea);
            o[1] = _mm512_ternarylogic_epi32(_mm512_slli_epi16(bits, 2), upper, o[1], 0xea);
            o[2] = _mm512_ternarylogic_epi32(bits, upper, o[2], 0xea);
            o[3] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(bits, 2), upper, o[3], 0xea);
        }
}

// Add one group to the sums of each row. `one`: its scale, or that of its first half; `two`: its offset, or the scale of
// its second half.
__attribute__((always_inline)) static inline void add_group(int kind, const word w[8], __m512 one, __m512 two,
                                                            const struct run *run, int g, int rows, __m512 *total) {
    const size_t groups = (size_t)run->all_groups;
#pragma clang loop unroll(full)
    for (int r = 0; r < rows; r++) {
        const size_t at = r * groups + g;
        const int8_t *x = run->x + 2 * at * DSA_GROUP, *y = x + DSA_GROUP; // upper and lower halves
        const __m512i zero = _mm512_setzero_si512();
        // Of upper halves and lower halves; with Q6_K of half the inputs each.
        __m512i a = zero, b = zero, c = zero, d = zero;
        if (kind == DSA_Q6_K) {
            b = _mm512_set1_epi32(run->begins[2 * at]);
            d = _mm512_set1_epi32(run->begins[2 * at + 1]);
        }
        for (int j = 0; j < 4; j++) {
            a = _mm512_dpbusd_epi32(a, w[j], four(x + 4 * j));
            b = _mm512_dpbusd_epi32(b, w[j], four(y + 4 * j));
        }
        if (kind == DSA_Q6_K || rows == 1) {
            for (int j = 4; j < 8; j++) {
                c = _mm512_dpbusd_epi32(c, w[j], four(x + 4 * j));
                d = _mm512_dpbusd_epi32(d, w[j], four(y + 4 * j));
            }
        } else {
            for (int j = 4; j < 8; j++) {
                a = _mm512_dpbusd_epi32(a, w[j], four(x + 4 * j));
                b = _mm512_dpbusd_epi32(b, w[j], four(y + 4 * j));
            }
        }
        if (kind != DSA_Q6_K && rows == 1) {
            a = _mm512_add_epi32(a, c);
            b = _mm512_add_epi32(b, d);
        }
        a = _mm512_add_epi32(_mm512_slli_epi32(a, 8), b);
        if (kind == DSA_Q6_K) c = _mm512_add_epi32(_mm512_slli_epi32(c, 8), d);
        const __m512 scale = _mm512_set1_ps(run->scales[at]);
        if (kind == DSA_Q6_K) {
            __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(a), one);
            sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(c), two, sum);
            total[r] = _mm512_fmadd_ps(sum, scale, total[r]);
        } else {
            __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(a), scale);
            total[r] = _mm512_fmadd_ps(sum, one, total[r]);
            total[r] = _mm512_fnmadd_ps(two, _mm512_set1_ps(run->sums[at]), total[r]);
        }
    }
}

// The scales of group g of a tile.
__attribute__((always_inline)) static inline void scales_of(int kind, const uint8_t *tile, int groups, int g, __m512 *one,
                                                            __m512 *two) {
    if (!is_super(kind)) {
        *one = halves(tile + SCALES * g);
        // What is subtracted: minus Q4's offset; the 128 that Q8's numbers have too much.
        *two = kind == DSA_Q4 ? _mm512_sub_ps(_mm512_setzero_ps(), halves(tile + SCALES * (groups + g)))
                              : _mm512_mul_ps(*one, _mm512_set1_ps(128.0f));
        return;
    }
    const uint8_t *block = tile + (unsigned)g / GROUPS * block_bytes(kind), *at = block + HEAD + 32 * ((unsigned)g % GROUPS);
    const __m512 d = halves(block);
    *one = _mm512_mul_ps(d, small(at, kind == DSA_Q6_K));
    *two = _mm512_mul_ps(kind == DSA_Q6_K ? d : halves(block + 32), small(at + 16, kind == DSA_Q6_K));
}

// Unpack group g of a tile, or of a super-block, and add it to the sums: it is group `at` of the run.
__attribute__((always_inline)) static inline void add_packed(int kind, const uint8_t *tile, int groups, int g,
                                                             const struct run *run, int at, int rows, __m512 *total) {
    const uint8_t *w = numbers_of(kind, tile, groups, g);
    word words[8];
    __m512 one, two;
    // Every byte ahead once, the scales among them: the hardware's prefetcher stops at each page.
    const size_t share = is_super(kind) ? group_bytes(kind) : head_bytes(kind, 2) / 2 + group_bytes(kind);
    const uint8_t *ahead = (is_super(kind) ? w : tile + g * share) + AHEAD;
    for (size_t line = 0; line < share; line += 64) __builtin_prefetch(ahead + line, 0, 1);
    unpack(kind, w, words);
    scales_of(kind, tile, groups, g, &one, &two);
    add_group(kind, words, one, two, run, at, rows, total);
}

// Multiply a run with `rows` rows. `plain`: the groups were unpacked. `add`: add to the content of `out`. All four are
// constants where this is inlined.
__attribute__((always_inline)) static inline void multiply(const struct run *run, int kind, int plain, int add, int rows) {
    __m512 total[ROWS];
    for (int r = 0; r < rows; r++) total[r] = add ? _mm512_loadu_ps(run->out + r * run->stride) : _mm512_setzero_ps();
    const uint8_t *w = run->weights;
    if (plain) {
        for (int g = 0; g < run->groups; g++, w += UNPACKED) {
            word words[8];
            for (int j = 0; j < 8; j++) words[j] = _mm512_loadu_si512(w + 64 * j);
            add_group(kind, words, _mm512_loadu_ps(w + BYTES), _mm512_loadu_ps(w + BYTES + 64), run, g, rows, total);
        }
    } else if (is_super(kind)) {
        for (int first = 0; first < run->groups; first += GROUPS, w += block_bytes(kind)) {
            for (size_t line = 0; line < HEAD + SMALL; line += 64) __builtin_prefetch(w + AHEAD + line, 0, 1);
            for (int g = 0; g < GROUPS; g++) add_packed(kind, w, GROUPS, g, run, first + g, rows, total);
        }
    } else {
        for (int g = 0; g < run->groups; g++) add_packed(kind, w, run->all_groups, g, run, g, rows, total);
    }
    for (int r = 0; r < rows; r++) _mm512_storeu_ps(run->out + r * run->stride, total[r]);
}

// Unpack group g of a tile.
__attribute__((always_inline)) static inline void make_plain(int kind, const uint8_t *tile, int groups, int g, uint8_t *out) {
    word words[8];
    __m512 one, two;
    unpack(kind, numbers_of(kind, tile, groups, g), words);
    scales_of(kind, tile, groups, g, &one, &two);
    for (int j = 0; j < 8; j++) _mm512_storeu_si512(out + 64 * j, words[j]);
    _mm512_storeu_ps(out + BYTES, one);
    _mm512_storeu_ps(out + BYTES + 64, two);
}

// The upper halves of float32 in two vectors, as pairs.
static inline __m512i pairs(__m512i even, __m512i odd) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    return _mm512_ternarylogic_epi32(upper, odd, _mm512_srli_epi32(even, 16), 0xea); // (upper & odd) | even
}

// Unpack group g of a tile to two tiles of bfloat16; see dsa_integer_split. Upper halves are cut, which keeps not-a-number, and
// lower ones are rounded.
__attribute__((always_inline)) static inline void split_group(int kind, const uint8_t *tile, int groups, int g, uint8_t *out) {
    word words[8];
    __m512 one, two;
    const __m512i byte = _mm512_set1_epi32(255), upper = _mm512_set1_epi32((int)0xffff0000), half = _mm512_set1_epi32(0x8000);
    const uint8_t *numbers = numbers_of(kind, tile, groups, g);
    for (size_t line = 0; line < group_bytes(kind); line += 64) __builtin_prefetch(numbers + AHEAD + line, 0, 1);
    unpack(kind, numbers, words);
    scales_of(kind, tile, groups, g, &one, &two);
    for (int j = 0; j < 8; j++) {
        const __m512 scale = kind == DSA_Q6_K && j >= 4 ? two : one;
        const __m512 minus = kind == DSA_Q6_K ? _mm512_mul_ps(scale, _mm512_set1_ps(32.0f)) : two;
        for (int h = 0; h < 2; h++, out += 64) {
            const __m512i even = _mm512_and_si512(h ? _mm512_srli_epi32(words[j], 16) : words[j], byte);
            const __m512i odd = h ? _mm512_srli_epi32(words[j], 24) : _mm512_and_si512(_mm512_srli_epi32(words[j], 8), byte);
            const __m512 a = _mm512_fmsub_ps(scale, _mm512_cvtepi32_ps(even), minus);
            const __m512 b = _mm512_fmsub_ps(scale, _mm512_cvtepi32_ps(odd), minus);
            const __m512i c = (__m512i)_mm512_sub_ps(a, (__m512)_mm512_and_si512((__m512i)a, upper));
            const __m512i d = (__m512i)_mm512_sub_ps(b, (__m512)_mm512_and_si512((__m512i)b, upper));
            _mm512_store_si512(out, pairs((__m512i)a, (__m512i)b));
            _mm512_store_si512(out + DSA_SPLIT, pairs(_mm512_add_epi32(c, half), _mm512_add_epi32(d, half)));
        }
    }
}
