// Products with packed weights for callers from Python, on all threads.
#include "amx.h"
#include "matrix.h"
#include "pool.h"

// CACHED: how many activations are multiplied with a tile at once, so that they stay in the second-level cache from
// tile to tile. UNIT: a multiple of the rows that are multiplied at once. TILES: so many are multiplied at once with AMX.
enum { CACHED = 1 << 18, MOST_ROWS = 1024, UNIT = 8, TILES = 2, AMX_STEP = MOST_ROWS / TILES };

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
    int step = CACHED / inputs / UNIT * UNIT;
    step = step < 8 * UNIT ? 8 * UNIT : step > MOST_ROWS ? MOST_ROWS : step;
    if (all->upper) step = AMX_STEP;
    const int tiles = all->upper ? TILES : 1, width = tiles * DSA_LANES;
    _Alignas(64) float out[MOST_ROWS * DSA_LANES];
    for (int row = 0; row < all->count; row += step) {
        const int count = all->count - row < step ? all->count - row : step;
        struct dsa_rows some = {
            .values = all->values + (size_t)row * inputs,
            .count = count,
            .inputs = inputs,
        };
        if (all->upper) {
            some.upper = all->upper + (size_t)row * inputs;
        } else if (all->integers) {
            some.integers = all->integers + (size_t)row * 2 * inputs;
            some.scales = all->scales + (size_t)row * groups;
            some.integer_sums = all->integer_sums + (size_t)row * groups;
            some.begins = all->begins + (size_t)row * 2 * groups;
        }
        const int unit = dsa_product_unit(job->weight, &some);
        dsa_barrier(); // rows are finished
        dsa_share(dsa_tiles(job->weight), unit, thread, threads, &first, &last);
        for (int t = first; t < last; t += tiles) {
            const int end = t + tiles < last ? t + tiles : last;
            dsa_product(job->weight, &some, out, (size_t)width, t, end);
            for (int r = 0; r < count; r++)
                for (int i = t; i < end; i++)
                    store(job, row + r, i * DSA_LANES, out + r * width + (i - t) * DSA_LANES);
        }
    }
}

static int uses_amx(const struct dsa_matrix *weight, int count) { return !weight->alike && dsa_amx_rows(count); }

// Bytes of scratch that `dsa_linear` needs.
int64_t dsa_linear_scratch(const struct dsa_matrix *weight, int count) {
    const int64_t groups = (int64_t)count * (weight->inputs / DSA_GROUP);
    if (uses_amx(weight, count)) return (int64_t)sizeof(bf16) * (count + DSA_BLOCK - 1) * weight->inputs;
    return dsa_needs_integers(weight) ? groups * (4 + 4 + 8 + 2 * DSA_GROUP) : 0;
}

// x [count, inputs] bfloat16 -> [count, outputs]: to `wide` in float32, or if that is NULL to `narrow` in bfloat16.
void dsa_linear(const struct dsa_matrix *weight, bf16 *x, int count, uint8_t *scratch, bf16 *narrow, float *wide) {
    struct linear_job job = {weight, {.values = x, .count = count, .inputs = weight->inputs}, narrow, wide};
    const size_t groups = (size_t)count * (size_t)(weight->inputs / DSA_GROUP);
    if (uses_amx(weight, count)) {
        job.rows.upper = (bf16 *)(void *)scratch;
    } else if (dsa_needs_integers(weight)) {
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
