// Products with integer weights; see integers.h. Numbers of 4 to 8 bits and activations of 16 are multiplied as integers,
// so a group's sum is exact. The packed layout is the same on every processor; what depends on it is in integers_avx512.h
// and integers_any.h.
#include "integers.h"

#include <math.h>

#include "amx.h"

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

// Without AVX-512 activations are whole, and of four neighbours 0 and 2 come first: bytes of weights become pairs of 16 bits
// by a mask and by a shift.
#define IN_ORDER(i) ((i) / 4 * 4 + ((i) % 4 == 1 ? 2 : (i) % 4 == 2 ? 1 : (i) % 4))

// The largest absolute value of a group is MOST. It is 127 * 256, so that the upper halves are from -127 to 127.
#define MOST 32512.0f

void dsa_integer_set_group(struct dsa_rows *rows, int at, int group, const float *x) {
    const size_t place = (size_t)at * (rows->inputs / DSA_GROUP) + group;
    int32_t sums[2];
    float most;
#ifdef DSA_AVX512
    int8_t *upper = rows->integers + 2 * place * DSA_GROUP, *lower = upper + DSA_GROUP;
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
    int16_t *stored = (int16_t *)(void *)rows->integers + place * DSA_GROUP;
    uint32_t largest = 0; // absolute values have the same order as their bits, and not-a-number is the largest
    for (int i = 0; i < DSA_GROUP; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    memcpy(&most, &largest, sizeof most);
    const float step = most > 0 ? MOST / most : 0.0f;
    int32_t whole[DSA_GROUP];
#ifdef __AVX2__
    for (int i = 0; i < DSA_GROUP; i += 8)
        _mm256_storeu_si256((void *)(whole + i), _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(step))));
#else
    for (int i = 0; i < DSA_GROUP; i++) {
        float number = x[i] * step;
        whole[i] = (int32_t)lrintf(number >= -MOST ? number <= MOST ? number : MOST : -MOST);
    }
#endif
    for (int half = 0; half < 2; half++) {
        sums[half] = 0;
        for (int i = 0; i < 16; i++) sums[half] += whole[16 * half + i];
    }
    for (int i = 0; i < DSA_GROUP; i++) stored[IN_ORDER(i)] = (int16_t)whole[i];
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
#include "integers_avx512.h"
#else
#include "integers_any.h"
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

#ifdef DSA_AVX512
#define SPLIT(KIND) \
    case DSA_##KIND: \
        for (int g = first; g < last; g++, out += 2 * DSA_SPLIT) split_group(DSA_##KIND, weights, groups, g, out); \
        break;

void dsa_integer_split(int kind, const uint8_t *weights, int groups, int first, int last, uint8_t *out) {
    switch (kind) {
        SPLIT(Q4)
        SPLIT(Q8)
        SPLIT(Q4_K)
        SPLIT(Q5_K)
        SPLIT(Q6_K)
    }
}
#endif

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
