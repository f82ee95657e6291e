// Softmax attention in one pass over the context with a running maximum (Milakov and Gimelshein, arXiv 1805.02867;
// FlashAttention, arXiv 2205.14135). 64 keys and values are repacked once for all rows of the block: as pairs of
// bfloat16 for vdpbf16ps or AMX, which have float32 sums, or else as float32.
#include "dense.h"

#include <math.h>

#include "amx.h"
#include "scratch.h"

// UNIT: rows of the inner product, BLOCK: with AMX; ROWS: queries of a block, a multiple of both.
enum { UNIT = 6, BLOCK = 16, ROWS = 96 };

int dsa_dense_rows(int G) { return G > ROWS / 2 ? 1 : ROWS / G; }

#ifdef DSA_AVX512

int dsa_dense_known(int D) { return D % 32 == 0 && D <= 256; }

typedef bf16 factor;    // of a query or weight
typedef uint32_t panel; // a pair of what it is multiplied with
enum { DEPTH = 2 };     // how many numbers a panel's element has

static void set_factors(factor *out, const bf16 *x, int n) { memcpy(out, x, sizeof(bf16) * (size_t)n); }

// c[UNIT][16 n] = a[UNIT][pairs] b[pairs][16 n], added to c with `add`. a and b are pairs of bfloat16; each lane of b
// has one pair.
static inline __attribute__((always_inline)) void product(int n, int add, const factor *a, int a_row, const panel *b,
                                                          int b_row, int pairs, float *c, int c_row) {
    __m512 sums[UNIT][4];
    for (int i = 0; i < UNIT; i++)
        for (int j = 0; j < n; j++) sums[i][j] = add ? _mm512_loadu_ps(c + i * c_row + 16 * j) : _mm512_setzero_ps();
    for (int k = 0; k < pairs; k++) {
        __m512bh right[4];
        for (int j = 0; j < n; j++) right[j] = (__m512bh)_mm512_loadu_si512(b + (int64_t)k * b_row + 16 * j);
        for (int i = 0; i < UNIT; i++) {
            int32_t pair;
            memcpy(&pair, a + i * a_row + 2 * k, 4);
            __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
            for (int j = 0; j < n; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], right[j], left);
        }
    }
    for (int i = 0; i < UNIT; i++)
        for (int j = 0; j < n; j++) _mm512_storeu_ps(c + i * c_row + 16 * j, sums[i][j]);
}

// Transpose 16 rows of 16 numbers of 32 bits.
static inline __attribute__((always_inline)) void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

// Repack 64 tokens, each a key and a value: keys as [D / 2][64 tokens] pairs of dims, values as [32][D] pairs of tokens.
static void repack(const bf16 *const tokens[PAGE], int D, panel *keys, panel *values) {
    for (int c = 0; c < PAGE; c += 16)
        for (int part = 0; part < D; part += 32) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(tokens[c + i] + part);
            transpose(r);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(keys + (part / 2 + i) * PAGE + c, r[i]);
        }
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int c = 0; c < PAGE; c += 2)
        for (int part = 0; part < D; part += 32) {
            __m512i a = _mm512_loadu_si512(tokens[c] + D + part);
            __m512i b = _mm512_loadu_si512(tokens[c + 1] + D + part);
            __m512i l = _mm512_unpacklo_epi16(a, b), h = _mm512_unpackhi_epi16(a, b); // within 128 bits, ordered below
            _mm512_storeu_si512(values + c / 2 * D + part, _mm512_permutex2var_epi64(l, low, h));
            _mm512_storeu_si512(values + c / 2 * D + part + 16, _mm512_permutex2var_epi64(l, high, h));
        }
}

// Turn one query's scores x [64] of a page into weights; `visible` has a bit for each token that the query may see.
// Returns the factor for the sums so far.
static inline float soften(const float *x, uint64_t visible, float scale, float *most, float *total, factor *out) {
    __m512 y[4], largest = _mm512_set1_ps(*most);
    for (int i = 0; i < 4; i++) {
        __mmask16 in = (__mmask16)(visible >> (16 * i));
        y[i] = _mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), _mm512_set1_ps(scale));
        y[i] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), in, y[i]);
        largest = _mm512_max_ps(y[i], largest);
    }
    float now = _mm512_reduce_max_ps(largest);
    __m512 edge = _mm512_set1_ps(now), sum = _mm512_setzero_ps();
    for (int i = 0; i < 4; i++) y[i] = exp_negative16(_mm512_sub_ps(y[i], edge));
    for (int i = 0; i < 4; i += 2) {
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y[i + 1], y[i]);
        _mm512_storeu_si512(out + 16 * i, both);
        // Sum the rounded weights.
        sum = _mm512_add_ps(sum, (__m512)_mm512_slli_epi32(both, 16));
        sum = _mm512_add_ps(sum, (__m512)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
    }
    float shrink = now > *most ? exp_negative(*most - now) : 1.0f;
    *total = *total * shrink + _mm512_reduce_add_ps(sum);
    *most = now;
    return shrink;
}

static uint64_t permitted(const uint8_t *allowed) {
    __m512i bytes = _mm512_loadu_si512(allowed);
    return _mm512_test_epi8_mask(bytes, bytes);
}

#else // any processor, in float32, in vectors of 16 that the compiler splits for it

int dsa_dense_known(int D) { return D % 16 == 0 && D <= 256; }

typedef float factor, panel;
enum { DEPTH = 1 };

static void set_factors(factor *out, const bf16 *x, int n) {
    for (int i = 0; i < n; i++) out[i] = wide(x[i]);
}

// c[UNIT][16 n] = a[UNIT][count] b[count][16 n], added to c with `add`.
static inline __attribute__((always_inline)) void product(int n, int add, const factor *a, int a_row, const panel *b, int b_row,
                                                          int count, float *c, int c_row) {
    for (int j = 0; j < n; j++, b += 16, c += 16) {
        v16f sums[UNIT];
        for (int i = 0; i < UNIT; i++) sums[i] = add ? load_16(c + i * c_row) : (v16f){0};
        for (int k = 0; k < count; k++) {
            const v16f right = load_16(b + (int64_t)k * b_row);
            for (int i = 0; i < UNIT; i++) sums[i] += a[i * a_row + k] * right;
        }
        for (int i = 0; i < UNIT; i++) memcpy(c + i * c_row, &sums[i], sizeof sums[i]);
    }
}

// Unpack 64 tokens, each a key and a value: keys as [D][64 tokens], values as [64 tokens][D].
static void repack(const bf16 *const tokens[PAGE], int D, panel *keys, panel *values) {
    for (int i = 0; i < D; i++)
        for (int c = 0; c < PAGE; c++) keys[i * PAGE + c] = wide(tokens[c][i]);
    for (int c = 0; c < PAGE; c++)
        for (int i = 0; i < D; i++) values[c * D + i] = wide(tokens[c][D + i]);
}

// Turn one query's scores x [64] of a page into weights; `visible` has a bit for each token that the query may see.
// Returns the factor for the sums so far.
static inline float soften(float *x, uint64_t visible, float scale, float *most, float *total, factor *out) {
    v16f largest = (v16f){0} + *most, sum = {0};
    if (visible != ~0ull)
        for (int c = 0; c < PAGE; c++)
            if (!(visible >> c & 1)) x[c] = -INFINITY;
    for (int c = 0; c < PAGE; c += 16) {
        const v16f y = load_16(x + c) * scale;
        largest = chosen_16(y > largest, y, largest);
    }
    const float now = most_16(largest);
    for (int c = 0; c < PAGE; c += 16) {
        const v16f y = exp_negative_16(load_16(x + c) * scale - now);
        memcpy(out + c, &y, sizeof y);
        sum += y;
    }
    const float shrink = now > *most ? exp_negative(*most - now) : 1.0f;
    *total = *total * shrink + sum_16(sum);
    *most = now;
    return shrink;
}

static uint64_t permitted(const uint8_t *allowed) {
    uint64_t bits = 0;
    for (int c = 0; c < PAGE; c++) bits |= (uint64_t)(allowed[c] != 0) << c;
    return bits;
}

#endif

// A bit for each token of the page at `start` that a query may see.
static uint64_t seen(int64_t position, const uint8_t *allowed, int64_t window, int64_t start) {
    if (allowed) return permitted(allowed + start);
    int64_t count = position - start + 1;
    uint64_t bits = count >= PAGE ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1;
    int64_t hidden = window ? position - window + 1 - start : 0; // so many are before the window
    return hidden >= PAGE ? 0 : hidden <= 0 ? bits : bits & ~((1ull << hidden) - 1);
}

// c[rows][columns] = a[rows][count] b[count][columns], added to c with `add`.
static void multiply(int amx, int rows, int columns, int add, const factor *a, int a_row, const panel *b, int b_row, int count,
                     float *c, int c_row) {
#ifdef DSA_AMX
    if (amx) {
        dsa_amx_multiply(rows, columns, count, add, a, a_row, b, b_row, c, c_row);
        return;
    }
#endif
    (void)amx;
    for (int i = 0; i < rows; i += UNIT, a += UNIT * a_row, c += UNIT * c_row) {
        int j = 0;
        for (; j + 64 <= columns; j += 64)
            if (add) product(4, 1, a, a_row, b + j, b_row, count, c + j, c_row);
            else product(4, 0, a, a_row, b + j, b_row, count, c + j, c_row);
        for (; j + 32 <= columns; j += 32) product(2, add, a, a_row, b + j, b_row, count, c + j, c_row);
        if (j < columns) product(1, add, a, a_row, b + j, b_row, count, c + j, c_row);
    }
}

// The tokens that a block reads, 64 at a time, and what its rows see of them.
struct reading {
    // Every position of pages first to last - 1, of which a row sees those up to its own; or those that `allowed` permits.
    const int64_t *positions;
    const uint8_t *allowed;
    int64_t context, window;
    // Or positions in any order: `chosen` [count], and a bit of `visible` [rows][words] for each.
    const int32_t *chosen;
    int64_t count, words;
    const uint64_t *visible;
    int64_t first, last; // of 64 tokens each
};

// Where the 64 tokens begin, at one KV head. After the last chosen one it is repeated, which no row sees.
static void find(const struct dsa_block *b, const struct reading *from, int64_t page, const bf16 *tokens[PAGE]) {
    const int64_t token = (int64_t)b->Hkv * 2 * b->D, own = (int64_t)b->head * 2 * b->D;
    for (int i = 0; i < PAGE; i++) {
        int64_t position = page * PAGE + i;
        if (from->chosen) position = from->chosen[position < from->count ? position : from->count - 1];
        const char *at = (const char *)b->plane + b->block_table[position / PAGE] * b->page_stride;
        tokens[i] = (const bf16 *)(const void *)at + position % PAGE * token + own;
    }
}

static uint64_t seen_by(const struct reading *from, int row, int64_t page) {
    if (from->chosen) return from->visible[row * from->words + page];
    return seen(from->positions[row], from->allowed ? from->allowed + row * from->context : 0, from->window, page * PAGE);
}

static void attend_block(const struct dsa_block *b, const struct reading *from) {
    const int rows = b->rows, G = b->G, D = b->D;
    const int count = rows * G, amx = dsa_amx_rows(count), unit = amx ? BLOCK : UNIT;
    const int padded = (count + unit - 1) / unit * unit;
    const int size = (int)sizeof(factor);
    char *at = dsa_scratch(padded * ((size + 4) * (D + PAGE) + 8) + 8 / DEPTH * PAGE * D + 1024);
    panel *keys = (panel *)(void *)at;                          // [D / DEPTH][64]
    panel *values = keys + PAGE * D / DEPTH;                    // [64 / DEPTH][D]
    float *scores = (float *)(void *)(values + PAGE * D / DEPTH); // [padded][64]
    float *sums = scores + padded * PAGE;                       // [padded][D]
    factor *q = (factor *)(void *)(sums + padded * D);          // [padded][D]
    factor *weights = q + padded * D;                           // [padded][64]
    float *most = (float *)(void *)(weights + padded * PAGE);   // [padded]
    float *totals = most + padded;                              // [padded]
    memset(sums, 0, sizeof(float) * (size_t)(padded * D));
    memset(q + count * D, 0, sizeof(factor) * (size_t)((padded - count) * D));
    memset(weights, 0, sizeof(factor) * (size_t)(padded * PAGE));
    for (int r = 0; r < rows; r++) set_factors(q + r * G * D, b->query + r * b->row_size, G * D);
    for (int i = 0; i < count; i++) {
        most[i] = -1e30f; // not -inf: -inf minus -inf is not-a-number
        totals[i] = 0.0f;
    }
    if (amx) dsa_amx_begin();
    for (int64_t page = from->first; page < from->last; page++) {
        const bf16 *tokens[PAGE];
        find(b, from, page, tokens);
        repack(tokens, D, keys, values);
        multiply(amx, padded, PAGE, 0, q, D, keys, PAGE, D / DEPTH, scores, PAGE);
        for (int r = 0; r < rows; r++) {
            const uint64_t visible = seen_by(from, r, page);
            for (int i = r * G; i < (r + 1) * G; i++) {
                if (!visible) {
                    memset(weights + i * PAGE, 0, sizeof(factor) * PAGE);
                    continue;
                }
                float shrink = soften(scores + i * PAGE, visible, b->scale, most + i, totals + i, weights + i * PAGE);
                if (shrink != 1.0f)
                    for (int j = 0; j < D; j++) sums[i * D + j] *= shrink;
            }
        }
        multiply(amx, padded, D, 1, weights, PAGE, values, D, PAGE / DEPTH, sums, D);
    }
    if (amx) dsa_amx_end();
    for (int i = 0; i < count; i++)
        for (int j = 0; j < D; j++) b->out[i / G * b->row_size + i % G * D + j] = narrow(sums[i * D + j] / totals[i]);
}

void dsa_dense_block(const struct dsa_block *block, const int64_t *positions, const uint8_t *allowed, int64_t context,
                     int64_t window) {
    int64_t furthest = 0, nearest = 0;
    for (int r = 0; r < block->rows; r++)
        if (positions[r] > furthest) furthest = positions[r];
    if (allowed) furthest = context - 1;
    else if (window) {
        nearest = furthest;
        for (int r = 0; r < block->rows; r++)
            if (positions[r] - window + 1 < nearest) nearest = positions[r] - window + 1;
        if (nearest < 0) nearest = 0;
    }
    const struct reading from = {positions, allowed, context, window, .first = nearest / PAGE, .last = furthest / PAGE + 1};
    attend_block(block, &from);
}

void dsa_chosen_block(const struct dsa_block *block, const int32_t *chosen, int count, const uint64_t *visible, int64_t words) {
    const struct reading from = {.chosen = chosen, .count = count, .words = words, .visible = visible,
                                 .last = (count + PAGE - 1) / PAGE};
    attend_block(block, &from);
}
