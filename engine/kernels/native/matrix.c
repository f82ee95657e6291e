// Products with packed weights; see matrix.h. Those with integers are in integers.c, those with bfloat16 here.
#include "matrix.h"

#include "amx.h"
#include "integers.h"
#include "pool.h"

// WORD: bytes of a pair of inputs x 16 outputs; ROWS: the most rows that are multiplied with a tile at once, so that
// their sums fit the registers; AHEAD: how many bytes ahead of their use weights are prefetched.
enum { WORD = 64, ROWS = 8, AHEAD = 8192 };

static inline size_t tile_bytes(int kind, int inputs) {
    return dsa_is_integer(kind) ? dsa_tile_bytes(kind, inputs) : (size_t)inputs / 2 * WORD;
}

int dsa_needs_integers(const struct dsa_matrix *w) {
    for (; w; w = w->next)
        if (dsa_is_integer(w->kind)) return 1;
    return 0;
}

// Where group g of row `at` is in `upper` and `lower`.
static inline size_t place_of(const struct dsa_rows *rows, int at, int g) {
    const size_t block = (size_t)(at / DSA_BLOCK) * (rows->inputs / DSA_GROUP) + g;
    return (block * DSA_BLOCK + at % DSA_BLOCK) * DSA_GROUP;
}

void dsa_finish_row(struct dsa_rows *rows, int at) {
    const int groups = rows->inputs / DSA_GROUP;
    const bf16 *x = rows->values + (size_t)at * rows->inputs;
    if (rows->upper) { // the rows were rounded before, so nothing is left for `lower`
        for (int g = 0; g < groups; g++)
            memcpy(rows->upper + place_of(rows, at, g), x + g * DSA_GROUP, DSA_GROUP * sizeof(bf16));
        return;
    }
    if (!rows->integers) return;
    for (int g = 0; g < groups; g++, x += DSA_GROUP) {
        float values[DSA_GROUP];
        for (int i = 0; i < DSA_GROUP; i++) values[i] = wide(x[i]);
        dsa_integer_set_group(rows, at, g, values);
    }
}

#ifdef DSA_AVX512

static inline __m512i nearest(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

// Set one group of row `at` as two bfloat16 for each number.
static void split_group(struct dsa_rows *rows, int at, int group, __m512 a, __m512 b) {
    const size_t place = place_of(rows, at, group);
    const __m512i near = nearest(a, b);
    _mm512_storeu_si512(rows->upper + place, near);
    if (!rows->lower) return;
    const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(near));
    const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(near, 1));
    const __m512 c = _mm512_sub_ps(a, (__m512)_mm512_slli_epi32(first, 16));
    const __m512 d = _mm512_sub_ps(b, (__m512)_mm512_slli_epi32(second, 16));
    _mm512_storeu_si512(rows->lower + place, nearest(c, d));
}

#endif

void dsa_set_group(struct dsa_rows *rows, int at, int group, const float *x) {
    bf16 *out = rows->values + (size_t)at * rows->inputs + group * DSA_GROUP;
#ifdef DSA_AVX512
    const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    if (rows->upper) {
        split_group(rows, at, group, a, b);
        return;
    }
    _mm512_storeu_si512(out, nearest(a, b));
#else
    for (int i = 0; i < DSA_GROUP; i++) out[i] = narrow(x[i]);
#endif
    if (rows->integers) dsa_integer_set_group(rows, at, group, x);
}

void dsa_set_row(struct dsa_rows *rows, int at, const float *x) {
    for (int g = 0; g < rows->inputs / DSA_GROUP; g++) dsa_set_group(rows, at, g, x + g * DSA_GROUP);
}

// A tile of bfloat16, and the rows to multiply it with.
struct run {
    const uint8_t *numbers;
    const uint8_t *ahead; // what to prefetch; NULL for nothing
    int groups;
    const bf16 *values; // the first row's
    float *out;         // of the first row
    size_t stride;      // from row to row of `out`
};

#ifdef DSA_AVX512

static inline __m512bh pair(const bf16 *x) { // two neighbouring inputs, in every lane
    int32_t both;
    memcpy(&both, x, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
}

// Multiply a run with `rows` rows; both are constants where this is inlined. Each of few rows has several sums in turn,
// because one sum would have to wait for its own last addition; `alike`: one, as each of many rows has.
__attribute__((always_inline)) static inline void multiply(const struct run *run, int alike, int rows) {
    const int chains = alike ? 1 : rows == 1 ? 4 : rows <= 3 ? 2 : 1;
    const size_t inputs = (size_t)run->groups * DSA_GROUP;
    const bf16 *x = run->values;
    const uint8_t *w = run->numbers;
    __m512 total[ROWS];
    for (int r = 0; r < rows; r++) total[r] = _mm512_setzero_ps();
    for (int g = 0; g < run->groups; g++, x += DSA_GROUP, w += DSA_GROUP / 2 * WORD) {
        if (run->ahead)
            for (size_t line = 0; line < DSA_GROUP / 2; line++)
                __builtin_prefetch(run->ahead + (g * (DSA_GROUP / 2) + line) * WORD, 0, 1);
        __m512 part[ROWS];
        for (int i = 0; i < rows * chains; i++) part[i] = _mm512_setzero_ps();
        for (int i = 0; i < DSA_GROUP / 2; i++) {
            __m512bh value = (__m512bh)_mm512_loadu_si512(w + WORD * i);
            for (int r = 0; r < rows; r++) {
                __m512 *sum = &part[r * chains + i % chains];
                *sum = _mm512_dpbf16_ps(*sum, value, pair(x + r * inputs + 2 * i));
            }
        }
        for (int r = 0; r < rows; r++) {
            __m512 sum = part[r * chains];
            for (int c = 1; c < chains; c++) sum = _mm512_add_ps(sum, part[r * chains + c]);
            total[r] = _mm512_add_ps(total[r], sum);
        }
    }
    for (int r = 0; r < rows; r++) _mm512_storeu_ps(run->out + r * run->stride, total[r]);
}

#else // any processor, in vectors of 8 that the compiler splits for it

enum { TOGETHER = 4 }; // rows whose sums fit the registers

__attribute__((always_inline)) static inline void multiply_few(const struct run *run, const bf16 *x, int rows, float *out) {
    const size_t inputs = (size_t)run->groups * DSA_GROUP;
    v8f total[TOGETHER][2] = {0};
    for (int g = 0; g < run->groups; g++, x += DSA_GROUP) {
        v8f part[TOGETHER][2] = {0};
        for (int line = 0; run->ahead && line < DSA_GROUP / 2; line++)
            __builtin_prefetch(run->ahead + (g * (DSA_GROUP / 2) + line) * WORD, 0, 1);
        for (int i = 0; i < DSA_GROUP / 2; i++) {
            const uint8_t *at = run->numbers + (g * (DSA_GROUP / 2) + i) * WORD;
            const v8u a = load_8(at), b = load_8(at + WORD / 2);
            for (int r = 0; r < rows; r++) {
                uint32_t both; // neighbouring inputs, in every lane
                memcpy(&both, x + r * inputs + 2 * i, sizeof both);
                const v8f even = evens((v8u){0} + both), odd = odds((v8u){0} + both);
                part[r][0] += evens(a) * even + odds(a) * odd;
                part[r][1] += evens(b) * even + odds(b) * odd;
            }
        }
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < 2; h++) total[r][h] += part[r][h];
    }
    for (int r = 0; r < rows; r++) memcpy(out + r * run->stride, total[r], sizeof total[r]);
}

// Each row has one sum, beside any number of other rows.
__attribute__((always_inline)) static inline void multiply(const struct run *run, int alike, int rows) {
    const size_t inputs = (size_t)run->groups * DSA_GROUP;
    (void)alike;
    struct run part = *run;
    for (int first = 0; first < rows; first += TOGETHER, part.ahead = 0)
        multiply_few(&part, run->values + first * inputs, rows - first < TOGETHER ? rows - first : TOGETHER,
                     run->out + first * run->stride);
}

#endif

// Multiply a run with any number of rows.
__attribute__((always_inline)) static inline void multiply_rows(struct run run, int alike, int count) {
    for (; count >= ROWS; count -= ROWS) {
        multiply(&run, alike, ROWS);
        run.ahead = 0;
        run.values += (size_t)ROWS * run.groups * DSA_GROUP;
        run.out += ROWS * run.stride;
    }
    switch (count) {
    case 7: multiply(&run, alike, 7); break;
    case 6: multiply(&run, alike, 6); break;
    case 5: multiply(&run, alike, 5); break;
    case 4: multiply(&run, alike, 4); break;
    case 3: multiply(&run, alike, 3); break;
    case 2: multiply(&run, alike, 2); break;
    case 1: multiply(&run, alike, 1); break;
    }
}

// Multiply tile t of one part with all rows. `out` is the place of the tile's first output in the first row.
static void product_tile(const struct dsa_matrix *w, const struct dsa_rows *x, float *out, size_t stride, int t) {
    const uint8_t *at = w->data + (size_t)t * tile_bytes(w->kind, w->inputs);
    if (dsa_is_integer(w->kind)) {
        dsa_integer_tile(w->kind, at, x, out, stride);
        return;
    }
    struct run run = {
        .numbers = at,
        .ahead = at + AHEAD, // the hardware's prefetcher stops at each page
        .groups = w->inputs / DSA_GROUP,
        .values = x->values,
        .out = out,
        .stride = stride,
    };
    if (w->alike) multiply_rows(run, 1, x->count);
    else multiply_rows(run, 0, x->count);
}

// The part that has tile *t or output *t, by `size` of a tile or 1. *t becomes its number in the part.
static const struct dsa_matrix *part_of(const struct dsa_matrix *w, int *t, int size) {
    for (; w->next; w = w->next) {
        const int count = w->outputs / size;
        if (*t < count) break;
        *t -= count;
    }
    return w;
}

int dsa_product_unit(const struct dsa_matrix *w, const struct dsa_rows *rows) {
    return rows->upper ? dsa_amx_unit(dsa_tiles(w), dsa_threads()) : 1;
}

void dsa_product(const struct dsa_matrix *w, const struct dsa_rows *x, float *out, size_t stride, int first, int last) {
    for (int t = first, count = 1; t < last; t += count) {
        int within = t;
        const struct dsa_matrix *part = part_of(w, &within, DSA_LANES);
        if (!x->upper) {
            product_tile(part, x, out + (size_t)(t - first) * DSA_LANES, stride, within);
            continue;
        }
        const int rest = (part->outputs + DSA_LANES - 1) / DSA_LANES - within;
        const size_t bytes = tile_bytes(part->kind, part->inputs);
        count = rest < last - t ? rest : last - t;
        dsa_amx_product(part->kind, part->data + within * bytes, bytes, count, x, out + (size_t)(t - first) * DSA_LANES, stride);
    }
}

void dsa_weights(const struct dsa_matrix *w, int output, float *out) {
    w = part_of(w, &output, 1);
    const int lane = output % DSA_LANES;
    const uint8_t *tile = w->data + (size_t)(output / DSA_LANES) * tile_bytes(w->kind, w->inputs);
    if (dsa_is_integer(w->kind)) {
        dsa_integer_weights(w->kind, tile, lane, w->inputs, out);
        return;
    }
    for (int i = 0; i < w->inputs; i++) {
        bf16 stored;
        memcpy(&stored, tile + WORD * (i / 2) + 4 * lane + 2 * (i % 2), sizeof stored);
        out[i] = wide(stored);
    }
}
