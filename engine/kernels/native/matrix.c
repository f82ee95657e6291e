// Products with packed weights; see matrix.h. Those with integers are in integers.c, those with bfloat16 here.
#include "matrix.h"

#include "integers.h"
#include "pool.h"

// WORD: bytes of a pair of inputs x 16 outputs; ROWS: the most rows that are multiplied with a tile at once, so that
// their sums fit the registers; AHEAD: how many bytes ahead of their use weights are prefetched; TAKEN: how many bytes of
// weights a thread takes at once for a few rows.
enum { WORD = 64, ROWS = 8, AHEAD = 8192, TAKEN = 1 << 16 };

static inline size_t tile_bytes(int kind, int inputs) {
    return dsa_is_integer(kind) ? dsa_tile_bytes(kind, inputs) : (size_t)inputs / 2 * WORD;
}

int dsa_needs_integers(const struct dsa_matrix *w) {
    for (; w; w = w->next)
        if (dsa_is_integer(w->kind)) return 1;
    return 0;
}

void dsa_finish_row(struct dsa_rows *rows, int at) {
    if (!rows->integers) return;
    const int groups = rows->inputs / DSA_GROUP;
    const bf16 *x = rows->values + (size_t)at * rows->inputs;
    for (int g = 0; g < groups; g++, x += DSA_GROUP) {
        float values[DSA_GROUP];
        for (int i = 0; i < DSA_GROUP; i++) values[i] = wide(x[i]);
        dsa_integer_set_group(rows, at, g, values);
    }
}

void dsa_set_group(struct dsa_rows *rows, int at, int group, const float *x) {
    bf16 *out = rows->values + (size_t)at * rows->inputs + group * DSA_GROUP;
#ifdef DSA_AVX512
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x)));
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

int dsa_product_unit(const struct dsa_matrix *w, int rows) {
    const int tiles = (int)(TAKEN / tile_bytes(w->kind, w->inputs));
    return rows >= 2 * ROWS || tiles < 1 ? 1 : tiles;
}

void dsa_product(const struct dsa_matrix *w, const struct dsa_rows *x, float *out, size_t stride, int first, int last) {
    for (int t = first; t < last; t++) {
        int within = t;
        const struct dsa_matrix *part = part_of(w, &within, DSA_LANES);
        product_tile(part, x, out + (size_t)t * DSA_LANES, stride, within);
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

// --- products for callers from Python, on all threads ---

// CACHED: how many activations are multiplied with a tile at once, so that they stay in the second-level cache from
// tile to tile.
enum { CACHED = 1 << 18, MOST_ROWS = 1024 };

struct linear_job {
    const struct dsa_matrix *weight;
    struct dsa_rows rows;
    bf16 *narrow;
    float *wide;
};

static void store(const struct linear_job *job, int row, int output, const float *from) {
    const int outputs = dsa_outputs(job->weight), count = outputs - output < DSA_LANES ? outputs - output : DSA_LANES;
    const size_t at = (size_t)row * outputs + output;
    if (job->wide) {
        memcpy(job->wide + at, from, count * sizeof(float));
        return;
    }
#ifdef DSA_AVX512
    if (count == DSA_LANES) {
        _mm256_storeu_si256((void *)(job->narrow + at), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from)));
        return;
    }
#endif
    for (int i = 0; i < count; i++) job->narrow[at + i] = narrow(from[i]);
}

static void linear_part(void *arg, int thread, int threads) {
    struct linear_job *job = arg;
    const struct dsa_rows *all = &job->rows;
    const int inputs = all->inputs, groups = inputs / DSA_GROUP;
    int first, last;
    dsa_share(all->count, 1, thread, threads, &first, &last);
    for (int r = first; r < last; r++) dsa_finish_row(&job->rows, r);
    int step = CACHED / inputs / ROWS * ROWS;
    step = step < 8 * ROWS ? 8 * ROWS : step > MOST_ROWS ? MOST_ROWS : step;
    _Alignas(64) float out[MOST_ROWS * DSA_LANES];
    for (int row = 0; row < all->count; row += step) {
        const int count = all->count - row < step ? all->count - row : step;
        struct dsa_rows some = {
            .values = all->values + (size_t)row * inputs,
            .count = count,
            .inputs = inputs,
        };
        if (all->integers) {
            some.integers = all->integers + (size_t)row * 2 * inputs;
            some.scales = all->scales + (size_t)row * groups;
            some.integer_sums = all->integer_sums + (size_t)row * groups;
            some.begins = all->begins + (size_t)row * 2 * groups;
        }
        const int unit = dsa_product_unit(job->weight, count);
        dsa_barrier(); // rows are finished, and of the rows before nothing is left to take
        while (dsa_take(0, dsa_tiles(job->weight), unit, thread, threads, &first, &last))
            for (int t = first; t < last; t++) {
                int within = t;
                const struct dsa_matrix *part = part_of(job->weight, &within, DSA_LANES);
                product_tile(part, &some, out, DSA_LANES, within);
                for (int r = 0; r < count; r++) store(job, row + r, t * DSA_LANES, out + r * DSA_LANES);
            }
    }
}

// Bytes of scratch that `dsa_linear` needs.
int64_t dsa_linear_scratch(const struct dsa_matrix *weight, int count) {
    const int64_t groups = (int64_t)count * (weight->inputs / DSA_GROUP);
    return dsa_needs_integers(weight) ? groups * (4 + 4 + 8 + 2 * DSA_GROUP) : 0;
}

// x [count, inputs] bfloat16 -> [count, outputs]: to `wide` in float32, or if that is NULL to `narrow` in bfloat16.
void dsa_linear(const struct dsa_matrix *weight, bf16 *x, int count, uint8_t *scratch, bf16 *narrow, float *wide) {
    struct linear_job job = {weight, {.values = x, .count = count, .inputs = weight->inputs}, narrow, wide};
    const size_t groups = (size_t)count * (size_t)(weight->inputs / DSA_GROUP);
    if (dsa_needs_integers(weight)) {
        job.rows.scales = (float *)(void *)scratch;
        job.rows.integer_sums = job.rows.scales + groups;
        job.rows.begins = (int32_t *)(void *)(job.rows.integer_sums + groups);
        job.rows.integers = (int8_t *)(void *)(job.rows.begins + 2 * groups);
    }
    dsa_parallel(linear_part, &job);
}

// Unpack the weights of `outputs` [count] to out [count, inputs].
void dsa_rows_of(const struct dsa_matrix *weight, const int64_t *outputs, int count, float *out) {
    for (int i = 0; i < count; i++) dsa_weights(weight, (int)outputs[i], out + (size_t)i * weight->inputs);
}
