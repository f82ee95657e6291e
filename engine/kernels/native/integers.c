// Products with integer weights; see integers.h. Numbers of 4 to 8 bits and activations of 16 are multiplied as integers,
// so a group's sum is exact. vpdpbusd multiplies bytes, so the halves of activations are multiplied one after the other. The file has over 400 lines because its two forms (AVX-512, and any processor) must keep the
// same layout.
#include "integers.h"

#include <math.h>

// SUPER: inputs of a super-block; GROUPS of it; ROWS: rows that are multiplied with a tile at once; FEW: with more rows a
// panel of PANEL groups is unpacked once for all of them (measured); AHEAD: how many bytes ahead weights are prefetched.
enum { SUPER = 256, GROUPS = 8, HEAD = 64, SMALL = 256, SCALES = 32, NIBBLES = 256, ROWS = 8, FEW = 16, PANEL = 32, AHEAD = 8192 };

// UNPACKED: bytes of a group after unpacking: a byte for each number, then two rows of 16 float32 (scale and offset, or
// the scales of both halves).
enum { BYTES = 512, UNPACKED = BYTES + 128 };

static inline int is_super(int kind) { return kind == DSA_Q4_K || kind == DSA_Q5_K || kind == DSA_Q6_K; }

static inline size_t group_bytes(int kind) {
    return kind == DSA_Q8 ? BYTES : NIBBLES + (kind == DSA_Q5_K ? 64 : kind == DSA_Q6_K ? 128 : 0);
}

static inline size_t block_bytes(int kind) { return HEAD + SMALL + GROUPS * group_bytes(kind); }

// Bytes before the numbers of a tile of Q4 or Q8.
static inline size_t head_bytes(int kind, int groups) {
    return (size_t)((kind == DSA_Q4 ? 2 * SCALES : SCALES) * groups + 63) / 64 * 64;
}

size_t dsa_tile_bytes(int kind, int inputs) {
    const int groups = inputs / DSA_GROUP;
    if (is_super(kind)) return (size_t)(inputs / SUPER) * block_bytes(kind);
    return head_bytes(kind, groups) + (size_t)groups * group_bytes(kind);
}

// Where the numbers of group g begin, in a tile of `groups` groups.
static inline const uint8_t *numbers_of(int kind, const uint8_t *tile, int groups, int g) {
    const unsigned n = (unsigned)g;
    if (is_super(kind)) return tile + n / GROUPS * block_bytes(kind) + HEAD + SMALL + n % GROUPS * group_bytes(kind);
    return tile + head_bytes(kind, groups) + n * group_bytes(kind);
}

static void set_group(struct dsa_rows *rows, size_t at, const int32_t *sums, float scale) {
    rows->scales[at] = scale;
    rows->integer_sums[at] = scale * (float)(sums[0] + sums[1]);
    rows->begins[2 * at] = -32 * sums[0]; // Q6_K's numbers are stored with 32 added
    rows->begins[2 * at + 1] = -32 * sums[1];
}

// The largest absolute value of a group is MOST. It is 127 * 256, so that the upper halves are from -127 to 127.
#define MOST 32512.0f

void dsa_integer_set_group(struct dsa_rows *rows, int at, int group, const float *x) {
    const size_t place = (size_t)at * (rows->inputs / DSA_GROUP) + group;
    int8_t *upper = rows->integers + 2 * place * DSA_GROUP, *lower = upper + DSA_GROUP;
    int32_t sums[2];
    float most;
#ifdef DSA_AVX512
    __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
    if (_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q)) most = NAN; // a maximum may lose not-a-number, and no row may
    const __m512 step = _mm512_set1_ps(most > 0 ? MOST / most : 0.0f);
    for (int i = 0; i < 2; i++) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(i ? b : a, step));
        __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
        _mm_storeu_si128((void *)(upper + 16 * i), _mm512_cvtsepi32_epi8(high));
        _mm_storeu_si128((void *)(lower + 16 * i), _mm512_cvtsepi32_epi8(_mm512_sub_epi32(whole, _mm512_slli_epi32(high, 8))));
        sums[i] = _mm512_reduce_add_epi32(whole);
    }
#else
    most = 0;
    for (int i = 0; i < DSA_GROUP; i++) {
        float size = fabsf(x[i]);
        if (!(size <= most)) most = size; // not-a-number stays: nothing is at most that
        if (size != size) break;
    }
    const float step = most > 0 ? MOST / most : 0.0f;
    sums[0] = sums[1] = 0;
    for (int i = 0; i < DSA_GROUP; i++) {
        float number = x[i] * step;
        number = number >= -MOST ? number <= MOST ? number : MOST : -MOST;
        int32_t whole = (int32_t)lrintf(number), high = (whole + 128) >> 8;
        upper[i] = (int8_t)high;
        lower[i] = (int8_t)(whole - 256 * high);
        sums[i / 16] += whole;
    }
#endif
    set_group(rows, place, sums, most / MOST);
}

// A run of groups of one tile, and the rows to multiply it with. `weights` are a whole tile, or unpacked groups.
struct run {
    const uint8_t *weights;
    int groups, all_groups; // of the run; of a row
    const int8_t *x;        // the first row's, from the run's first input on
    const float *scales, *sums;
    const int32_t *begins;
    float *out;
    size_t stride;
};

#ifdef DSA_AVX512

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

#else // AVX2, or any processor

#ifdef __AVX2__
#include <immintrin.h>
#endif

static inline float half(const uint8_t *at) {
    _Float16 stored;
    memcpy(&stored, at, sizeof stored);
    return (float)stored;
}

static void make_plain(int kind, const uint8_t *tile, int groups, int g, uint8_t *out) {
    const uint8_t *w = numbers_of(kind, tile, groups, g), *more = w + NIBBLES;
    float scales[2][DSA_LANES];
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
    const uint8_t *block = tile + g / GROUPS * block_bytes(kind), *small = block + HEAD + 32 * (g % GROUPS);
    for (int o = 0; o < DSA_LANES; o++) {
        if (!is_super(kind)) {
            scales[0][o] = half(tile + SCALES * g + 2 * o);
            // What is subtracted: minus Q4's offset; the 128 that Q8's numbers have too much.
            scales[1][o] = kind == DSA_Q4 ? -half(tile + SCALES * (groups + g) + 2 * o) : 128.0f * scales[0][o];
            continue;
        }
        const float d = half(block + 2 * o);
        scales[0][o] = d * (kind == DSA_Q6_K ? (float)(int8_t)small[o] : (float)small[o]);
        scales[1][o] =
            kind == DSA_Q6_K ? d * (float)(int8_t)small[16 + o] : half(block + 32 + 2 * o) * (float)small[16 + o];
    }
    memcpy(out + BYTES, scales, sizeof scales);
}

// sums[o] += the products of four words with 16 inputs. `large`: numbers are up to 255, not below 64.
static inline void dot16(const uint8_t *w, const int8_t *x, int large, int32_t *sums) {
#ifdef __AVX2__
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i a = _mm256_loadu_si256((const void *)sums), b = _mm256_loadu_si256((const void *)(sums + 8));
    for (int j = 0; j < 4; j++) {
        int32_t all;
        memcpy(&all, x + 4 * j, sizeof all);
        const __m256i inputs = _mm256_set1_epi32(all);
        // Two products of numbers below 64 fit 16 bits.
        __m256i p = _mm256_loadu_si256((const void *)(w + 64 * j));
        __m256i q = _mm256_loadu_si256((const void *)(w + 64 * j + 32));
        if (large) { // two of their products do not fit 16 bits, so every second number is taken alone
            const __m256i even = _mm256_set1_epi16(255);
            a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(p, even), inputs), ones));
            b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(q, even), inputs), ones));
            p = _mm256_andnot_si256(even, p);
            q = _mm256_andnot_si256(even, q);
        }
        p = _mm256_maddubs_epi16(p, inputs);
        q = _mm256_maddubs_epi16(q, inputs);
        a = _mm256_add_epi32(a, _mm256_madd_epi16(p, ones));
        b = _mm256_add_epi32(b, _mm256_madd_epi16(q, ones));
    }
    _mm256_storeu_si256((void *)sums, a);
    _mm256_storeu_si256((void *)(sums + 8), b);
#else
    (void)large;
    for (int j = 0; j < 4; j++)
        for (int o = 0; o < DSA_LANES; o++)
            for (int b = 0; b < 4; b++) sums[o] += w[64 * j + 4 * o + b] * x[4 * j + b];
#endif
}

__attribute__((always_inline)) static inline void multiply(const struct run *run, int kind, int plain, int add, int rows) {
    const size_t groups = (size_t)run->all_groups;
    float total[ROWS][DSA_LANES] = {{0}};
    uint8_t unpacked[UNPACKED];
    if (add)
        for (int r = 0; r < rows; r++) memcpy(total[r], run->out + r * run->stride, sizeof total[r]);
    for (int g = 0; g < run->groups; g++) {
        if (!plain) make_plain(kind, run->weights, run->all_groups, g, unpacked);
        const uint8_t *w = plain ? run->weights + (size_t)g * UNPACKED : unpacked;
        float scales[2][DSA_LANES];
        memcpy(scales, w + BYTES, sizeof scales);
        for (int r = 0; r < rows; r++) {
            const size_t at = r * groups + g;
            const int8_t *x = run->x + 2 * at * DSA_GROUP, *y = x + DSA_GROUP;
            const float scale = run->scales[at], sum = run->sums[at];
            int32_t sums[2][DSA_LANES] = {{0}}, lower[2][DSA_LANES] = {{0}};
            dot16(w, x, kind == DSA_Q8, sums[0]);
            dot16(w, y, kind == DSA_Q8, lower[0]);
            dot16(w + 256, x + 16, kind == DSA_Q8, sums[kind == DSA_Q6_K]);
            dot16(w + 256, y + 16, kind == DSA_Q8, lower[kind == DSA_Q6_K]);
            for (int h = 0; h < 2; h++)
                for (int o = 0; o < DSA_LANES; o++) sums[h][o] = 256 * sums[h][o] + lower[h][o];
            for (int o = 0; o < DSA_LANES; o++)
                if (kind == DSA_Q6_K)
                    total[r][o] += scale * ((float)(sums[0][o] + run->begins[2 * at]) * scales[0][o] +
                                            (float)(sums[1][o] + run->begins[2 * at + 1]) * scales[1][o]);
                else
                    total[r][o] += scale * (float)sums[0][o] * scales[0][o] - scales[1][o] * sum;
        }
    }
    for (int r = 0; r < rows; r++) memcpy(run->out + r * run->stride, total[r], sizeof total[r]);
}

#endif

// Multiply a run with any number of rows.
__attribute__((always_inline)) static inline void multiply_rows(struct run run, int count, int kind, int plain, int add) {
    for (; count >= ROWS; count -= ROWS) {
        multiply(&run, kind, plain, add, ROWS);
        run.x += (size_t)2 * ROWS * run.all_groups * DSA_GROUP;
        run.scales += (size_t)ROWS * run.all_groups;
        run.sums += (size_t)ROWS * run.all_groups;
        run.begins += (size_t)2 * ROWS * run.all_groups;
        run.out += ROWS * run.stride;
    }
    switch (count) {
    case 7: multiply(&run, kind, plain, add, 7); break;
    case 6: multiply(&run, kind, plain, add, 6); break;
    case 5: multiply(&run, kind, plain, add, 5); break;
    case 4: multiply(&run, kind, plain, add, 4); break;
    case 3: multiply(&run, kind, plain, add, 3); break;
    case 2: multiply(&run, kind, plain, add, 2); break;
    case 1: multiply(&run, kind, plain, add, 1); break;
    }
}

// Multiply a run with many rows: each panel of the tile is unpacked once for all of them.
__attribute__((always_inline)) static inline void multiply_plain(struct run run, int count, int kind) {
    _Alignas(64) uint8_t plain[PANEL * UNPACKED];
    const int groups = run.groups;
    const uint8_t *packed = run.weights;
    run.weights = plain;
    for (int first = 0; first < groups; first += PANEL) {
        run.groups = groups - first < PANEL ? groups - first : PANEL;
        for (int g = 0; g < run.groups; g++) make_plain(kind, packed, groups, first + g, plain + g * UNPACKED);
        if (first == 0) multiply_rows(run, count, kind, 1, 0);
        else multiply_rows(run, count, kind, 1, 1);
        run.x += 2 * PANEL * DSA_GROUP;
        run.scales += PANEL;
        run.sums += PANEL;
        run.begins += 2 * PANEL;
    }
}

#define FORMS(KIND) \
    __attribute__((noinline)) static void few_##KIND(struct run run, int count) { multiply_rows(run, count, DSA_##KIND, 0, 0); } \
    __attribute__((noinline)) static void many_##KIND(struct run run, int count) { multiply_plain(run, count, DSA_##KIND); }

FORMS(Q4)
FORMS(Q8)
FORMS(Q4_K)
FORMS(Q5_K)
FORMS(Q6_K)

void dsa_integer_tile(int kind, const uint8_t *weights, const struct dsa_rows *x, float *out, size_t stride) {
    static void (*const FEW_ROWS[])(struct run, int) = {0, few_Q4, few_Q8, few_Q4_K, few_Q5_K, few_Q6_K};
    static void (*const MANY_ROWS[])(struct run, int) = {0, many_Q4, many_Q8, many_Q4_K, many_Q5_K, many_Q6_K};
    const int groups = x->inputs / DSA_GROUP;
    struct run run = {weights, groups, groups, x->integers, x->scales, x->integer_sums, x->begins, out, stride};
    (x->count > FEW ? MANY_ROWS : FEW_ROWS)[kind](run, x->count);
}

void dsa_integer_weights(int kind, const uint8_t *weights, int lane, int inputs, float *out) {
    _Alignas(64) uint8_t plain[UNPACKED];
    for (int g = 0; g < inputs / DSA_GROUP; g++) {
        make_plain(kind, weights, inputs / DSA_GROUP, g, plain);
        for (int i = 0; i < DSA_GROUP; i++, out++) {
            const int number = plain[64 * (i / 4) + 4 * lane + i % 4];
            float scales[2];
            memcpy(&scales[0], plain + BYTES + 4 * lane, sizeof(float));
            memcpy(&scales[1], plain + BYTES + 64 + 4 * lane, sizeof(float));
            if (kind == DSA_Q6_K) *out = scales[i / 16] * (float)(number - 32);
            else if (kind == DSA_Q8) *out = scales[0] * (float)(number - 128);
            else *out = scales[0] * (float)number - scales[1];
        }
    }
}
