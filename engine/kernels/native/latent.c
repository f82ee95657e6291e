// Multi-head latent attention and the index scores of a DeepSeek layer, for processors that multiply bfloat16.
//
// All heads of a row read the same vectors: a latent is the key and value of 128 heads, and 64 heads score an index
// key. So the lanes of a register are heads. A token's numbers are broadcast, a pair at a time, and multiplied with
// the same pair of 16 heads' queries. Only a block's values are copied from the cache, because their pairs are two
// tokens. The softmax runs over tokens in each lane, so no sum crosses lanes before the end.
//
// One file, though long: its three operations inline the same products.
//
// Position c of a request lies in page `table[c / 64]` at offset c % 64.
//
// The file has over 400 lines because its three kernels share the packing, the products and the softmax.
#include <stdatomic.h>
#include <stdint.h>

#include "pool.h"
#include "scratch.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

enum {
    PAGE_TOKENS = 64,
    LANES = 16,
    MOST = 4,    // registers of heads at once: 64 heads
    TOKENS = 6,  // tokens at once: 4 x 6 sums and their operands fill the 32 registers
    BLOCK = 96,  // tokens between two updates of the softmax; their scores and weights fit the first-level cache
    NUMBERS = 4, // numbers of a value at once
};

static const float LOG2_E = 1.44269504f; // the softmax uses powers of 2
static const float LOWEST = -1e30f;      // the largest score before the first; finite, so that differences are numbers

#define INLINE static inline __attribute__((always_inline))

INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// 2^x with a relative error of at most 2^-21. It is 0 for -infinity, and not-a-number for not-a-number.
INLINE __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x); // in this order not-a-number stays
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.535336188e-4f); // Cephes' exp2f (S. Moshier)
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.339887440e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618437357e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550332548e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402264791e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931472028e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

INLINE __m512i rounded(__m512 x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); }
INLINE __m512 widened(__m512i low) { return _mm512_castsi512_ps(_mm512_slli_epi32(low, 16)); }

// Pack the queries of heads `first` to `first` + count - 1 as [pairs][16 nz]: a register has one pair of 16 heads.
// Unused lanes are 0.
static void pack_queries(const uint16_t *query, int dim, int first, int count, int nz, uint32_t *packed) {
    for (int k = 0; k < dim / 2; k++)
        for (int h = 0; h < LANES * nz; h++) {
            const uint16_t *at = query + (long)(first + h) * dim + 2 * k;
            packed[k * LANES * nz + h] = h < count ? at[0] | (uint32_t)at[1] << 16 : 0;
        }
}

INLINE void clear(int nz, __m512 sums[TOKENS][MOST]) {
    for (int j = 0; j < TOKENS; j++)
        for (int z = 0; z < nz; z++) sums[j][z] = _mm512_setzero_ps();
}

// sums[j][z] += query . tokens[j]. It prefetches the tokens of `next`, unless that is NULL.
INLINE void products(int nz, const uint32_t *query, const uint32_t *const *tokens, const uint32_t *const *next,
                     int pairs, __m512 sums[TOKENS][MOST]) {
    for (int k = 0; k < pairs; k++) {
        __m512i q[MOST];
        for (int z = 0; z < nz; z++) q[z] = _mm512_load_si512(query + (k * nz + z) * LANES);
        if (next && k % 16 == 0)
            for (int j = 0; j < TOKENS; j++) _mm_prefetch((const char *)(next[j] + k), _MM_HINT_T0);
        for (int j = 0; j < TOKENS; j++) {
            __m512i token = _mm512_set1_epi32((int)tokens[j][k]);
            for (int z = 0; z < nz; z++) sums[j][z] = dot(sums[j][z], q[z], token);
        }
    }
}

// ---- attention -----------------------------------------------------------------------------------------------

struct attention {
    const uint16_t *query; // [rows][heads][dim]
    const uint16_t *plane;
    long page_stride; // numbers
    const int64_t *tables;
    long pages; // length of a table
    const int64_t *selected; // [rows][width] positions, -1 for none; if NULL, `allowed` is used:
    const uint8_t *allowed;  // [rows][width] booleans, one for each position
    long width, rows, rows_a_request;
    int heads, dim, rank;
    float scale;
    uint16_t *out; // [rows][heads][rank]
    int nz;        // registers of heads in a task
    atomic_long *next;
};

// A thread's memory: the scores of a block of tokens, their weights, and the values.
struct memory {
    _Alignas(64) float scores[BLOCK * LANES * MOST];         // [token][lane]
    _Alignas(64) uint32_t weights[BLOCK / 2 * LANES * MOST]; // [pair of tokens][lane]
    const uint32_t *tokens[BLOCK + TOKENS];
    const uint16_t *values[BLOCK + TOKENS];
    uint32_t *query; // [dim / 2][lane]
    uint32_t *pairs; // [value dims / 16][BLOCK / 2][16] values of two tokens
    float *out;      // [value dims][lane]
};

// Lay out the memory for queries of `dim` numbers, values of `rank` numbers, and `width` lanes.
static struct memory *open_memory(int dim, int rank, int width) {
    const int64_t query = dsa_whole(sizeof(uint32_t) * (int64_t)(dim / 2) * width);
    const int64_t pairs = dsa_whole(sizeof(uint32_t) * (int64_t)rank * (BLOCK / 2));
    const int64_t out = dsa_whole(sizeof(float) * (int64_t)rank * width), own = dsa_whole(sizeof(struct memory));
    char *at = dsa_scratch(own + query + pairs + out);
    struct memory *m = (struct memory *)at;
    m->query = (uint32_t *)(at + own);
    m->pairs = (uint32_t *)(at + own + query);
    m->out = (float *)(at + own + query + pairs);
    return m;
}

// Continue the softmax with the `count` (even) tokens of m->scores. For each lane: `now` is the largest score with
// them, `most` the largest score before, `total` the sum of weights. `out` is [value dims][lane].
INLINE void weigh(struct memory *m, int nz, int count, int rank, const __m512 *now, __m512 *most, __m512 *total,
                  float *out) {
    const int width = LANES * nz;
    __m512 shrink[MOST];
    for (int z = 0; z < nz; z++) {
        shrink[z] = power_of_two(_mm512_sub_ps(most[z], now[z]));
        total[z] = _mm512_mul_ps(total[z], shrink[z]);
        most[z] = now[z];
    }
    for (int t = 0; t < count; t += 2)
        for (int z = 0; z < nz; z++) {
            const float *s = m->scores + t * width + z * LANES;
            __m512i one = rounded(power_of_two(_mm512_sub_ps(_mm512_load_ps(s), most[z])));
            __m512i two = rounded(power_of_two(_mm512_sub_ps(_mm512_load_ps(s + width), most[z])));
            // Sum the rounded weights, which are the ones that are multiplied.
            total[z] = _mm512_add_ps(total[z], _mm512_add_ps(widened(one), widened(two)));
            _mm512_store_si512(m->weights + t / 2 * width + z * LANES, _mm512_or_si512(one, _mm512_slli_epi32(two, 16)));
        }
    for (int t = 0; t < count; t += 2)
        for (int r = 0; r < rank; r += LANES) {
            __m512i one = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(m->values[t] + r)));
            __m512i two = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(m->values[t + 1] + r)));
            _mm512_store_si512(m->pairs + (r / LANES * (BLOCK / 2) + t / 2) * LANES,
                               _mm512_or_si512(one, _mm512_slli_epi32(two, 16)));
        }
    for (int r = 0; r < rank; r += NUMBERS) {
        const uint32_t *pairs = m->pairs + r / LANES * (BLOCK / 2) * LANES + r % LANES;
        __m512 sums[NUMBERS][MOST];
        for (int j = 0; j < NUMBERS; j++)
            for (int z = 0; z < nz; z++)
                sums[j][z] = _mm512_mul_ps(_mm512_load_ps(out + (r + j) * width + z * LANES), shrink[z]);
        for (int t = 0; t < count / 2; t++) {
            __m512i weights[MOST];
            for (int z = 0; z < nz; z++) weights[z] = _mm512_load_si512(m->weights + t * width + z * LANES);
            for (int j = 0; j < NUMBERS; j++) {
                __m512i value = _mm512_set1_epi32((int)pairs[t * LANES + j]);
                for (int z = 0; z < nz; z++) sums[j][z] = dot(sums[j][z], weights[z], value);
            }
        }
        for (int j = 0; j < NUMBERS; j++)
            for (int z = 0; z < nz; z++) _mm512_store_ps(out + (r + j) * width + z * LANES, sums[j][z]);
    }
}

// Collect the next tokens of a row, at most BLOCK. `at` is where the search goes on. Returns how many there are.
static int collect(const struct attention *a, long row, long *at, const uint32_t **tokens) {
    const int64_t *table = a->tables + row / a->rows_a_request * a->pages;
    int count = 0;
    long i = *at;
    for (; i < a->width && count < BLOCK; i++) {
        long position = i;
        if (a->selected) {
            position = a->selected[row * a->width + i];
            if (position < 0) continue;
        } else if (!a->allowed[row * a->width + i]) {
            continue;
        }
        const uint16_t *page = a->plane + table[position / PAGE_TOKENS] * a->page_stride;
        tokens[count++] = (const uint32_t *)(page + position % PAGE_TOKENS * a->dim);
    }
    *at = i;
    return count;
}

INLINE void attend_task(const struct attention *a, struct memory *m, int nz, long row, int first) {
    const int width = LANES * nz, count = a->heads - first < width ? a->heads - first : width;
    const __m512 scale = _mm512_set1_ps(a->scale * LOG2_E), lowest = _mm512_set1_ps(LOWEST);
    pack_queries(a->query + row * a->heads * a->dim, a->dim, first, count, nz, m->query);
    for (int i = 0; i < a->rank * width; i++) m->out[i] = 0.0f;
    __m512 most[MOST], total[MOST];
    for (int z = 0; z < nz; z++) most[z] = lowest, total[z] = _mm512_setzero_ps();
    long at = 0;
    for (int found; (found = collect(a, row, &at, m->tokens)) > 0;) {
        int padded = (found + TOKENS - 1) / TOKENS * TOKENS;
        for (int t = found; t < padded; t++) m->tokens[t] = m->tokens[found - 1];
        for (int t = 0; t < padded; t++) m->values[t] = (const uint16_t *)m->tokens[t];
        __m512 now[MOST];
        for (int z = 0; z < nz; z++) now[z] = most[z];
        for (int t = 0; t < padded; t += TOKENS) {
            __m512 sums[TOKENS][MOST];
            clear(nz, sums);
            products(nz, m->query, m->tokens + t, t + TOKENS < padded ? m->tokens + t + TOKENS : 0, a->dim / 2, sums);
            for (int j = 0; j < TOKENS; j++)
                for (int z = 0; z < nz; z++) {
                    // A token that only fills the block gets weight 0.
                    __m512 s = t + j < found ? _mm512_mul_ps(sums[j][z], scale) : _mm512_set1_ps(-__builtin_inff());
                    now[z] = _mm512_max_ps(now[z], s);
                    _mm512_store_ps(m->scores + (t + j) * width + z * LANES, s);
                }
        }
        weigh(m, nz, padded, a->rank, now, most, total, m->out);
    }
    _Alignas(64) uint16_t narrow[LANES * MOST];
    uint16_t *out = a->out + (row * a->heads + first) * a->rank;
    for (int z = 0; z < nz; z++) total[z] = _mm512_div_ps(_mm512_set1_ps(1.0f), total[z]);
    for (int r = 0; r < a->rank; r++) {
        for (int z = 0; z < nz; z++) {
            __m512 x = _mm512_mul_ps(_mm512_load_ps(m->out + r * width + z * LANES), total[z]);
            _mm256_store_si256((__m256i *)(narrow + z * LANES), (__m256i)_mm512_cvtneps_pbh(x));
        }
        for (int h = 0; h < count; h++) out[(long)h * a->rank + r] = narrow[h];
    }
}

static void attend_thread(void *argument, int thread, int threads) {
    (void)thread, (void)threads;
    const struct attention *a = argument;
    const int width = LANES * a->nz, groups = (a->heads + width - 1) / width;
    struct memory *m = open_memory(a->dim, a->rank, width);
    for (long task; (task = atomic_fetch_add(a->next, 1)) < a->rows * groups;) {
        long row = task / groups;
        int first = (int)(task % groups) * width;
        if (a->nz == 4) attend_task(a, m, 4, row, first);
        else if (a->nz == 2) attend_task(a, m, 2, row, first);
        else attend_task(a, m, 1, row, first);
    }
}

// Whether this library has the functions below. If not, they must not be called.
int dsa_latent_ready(void) { return 1; }

// out[n][h] = sum_c softmax_c(scale * query[n][h] . token[c]) token[c][:rank], over the tokens that row n selected or
// may see (see struct attention). `dim` is even, `rank` is a multiple of 16, scale > 0.
void dsa_latent_attend(const uint16_t *query, const uint16_t *plane, int64_t page_stride, const int64_t *tables,
                       int64_t pages, const int64_t *selected, const uint8_t *allowed, int64_t width, int64_t rows,
                       int64_t rows_a_request, int heads, int dim, int rank, float scale, uint16_t *out) {
    atomic_long next = 0;
    struct attention a = {query, plane, page_stride, tables, pages, selected, allowed, width, rows, rows_a_request,
                          heads, dim, rank, scale, out, 0, &next};
    // A task pairs a block's values once, so it should have many heads. But every thread should have a task.
    for (a.nz = MOST; a.nz > 1; a.nz /= 2) {
        long groups = (heads + LANES * a.nz - 1) / (LANES * a.nz);
        if (heads > LANES * a.nz / 2 && rows * groups >= dsa_threads()) break;
    }
    dsa_parallel(attend_thread, &a);
}

// ---- attention over keys and values that were expanded from a block of latents -----------------------------------

enum { WIDTH = LANES * MOST }; // rows of a group

struct expanded {
    const uint32_t *query;  // [heads][groups][(plain + rope) / 2][64 rows] pairs
    const uint16_t *tokens; // [count][dim]; the rotated key begins at `rank`
    const uint16_t *made;   // [count][heads][plain + value]
    const uint64_t *seen;   // [groups][count], a bit for each row that sees the token
    int heads, groups, count, dim, rank, plain, rope, value;
    float scale;
    float *most, *total; // [heads][groups][64]
    float *out;          // [heads][groups][value][64]
    atomic_long *next;
};

static void expanded_task(const struct expanded *e, struct memory *m, long task) {
    const int head = (int)(task / e->groups), group = (int)(task % e->groups), pairs = (e->plain + e->rope) / 2;
    const uint32_t *query = e->query + task * pairs * WIDTH;
    const uint64_t *seen = e->seen + (long)group * e->count;
    const __m512 scale = _mm512_set1_ps(e->scale * LOG2_E), never = _mm512_set1_ps(-__builtin_inff());
    const long token_made = (long)e->heads * (e->plain + e->value);
    const uint16_t *made = e->made + (long)head * (e->plain + e->value);
    __m512 most[MOST], total[MOST];
    for (int z = 0; z < MOST; z++) {
        most[z] = _mm512_loadu_ps(e->most + task * WIDTH + z * LANES);
        total[z] = _mm512_loadu_ps(e->total + task * WIDTH + z * LANES);
    }
    for (int from = 0; from < e->count; from += BLOCK) {
        int found = e->count - from < BLOCK ? e->count - from : BLOCK, padded = (found + TOKENS - 1) / TOKENS * TOKENS;
        uint64_t any = 0;
        for (int t = 0; t < found; t++) any |= seen[from + t];
        if (!any) continue;
        const uint32_t *turned[BLOCK + TOKENS];
        for (int t = 0; t < padded; t++) {
            int at = from + (t < found ? t : found - 1);
            m->tokens[t] = (const uint32_t *)(made + at * token_made);
            m->values[t] = made + at * token_made + e->plain;
            turned[t] = (const uint32_t *)(e->tokens + (long)at * e->dim + e->rank);
        }
        __m512 now[MOST];
        for (int z = 0; z < MOST; z++) now[z] = most[z];
        for (int t = 0; t < padded; t += TOKENS) {
            __m512 sums[TOKENS][MOST];
            clear(MOST, sums);
            products(MOST, query, m->tokens + t, t + TOKENS < padded ? m->tokens + t + TOKENS : 0, e->plain / 2, sums);
            products(MOST, query + e->plain / 2 * WIDTH, turned + t, 0, e->rope / 2, sums);
            for (int j = 0; j < TOKENS; j++)
                for (int z = 0; z < MOST; z++) {
                    uint64_t lanes = t + j < found ? seen[from + t + j] >> (LANES * z) : 0;
                    __m512 s = _mm512_mask_mul_ps(never, (__mmask16)lanes, sums[j][z], scale);
                    now[z] = _mm512_max_ps(now[z], s);
                    _mm512_store_ps(m->scores + (t + j) * WIDTH + z * LANES, s);
                }
        }
        weigh(m, MOST, padded, e->value, now, most, total, e->out + task * e->value * WIDTH);
    }
    for (int z = 0; z < MOST; z++) {
        _mm512_storeu_ps(e->most + task * WIDTH + z * LANES, most[z]);
        _mm512_storeu_ps(e->total + task * WIDTH + z * LANES, total[z]);
    }
}

static void expanded_thread(void *argument, int thread, int threads) {
    (void)thread, (void)threads;
    const struct expanded *e = argument;
    struct memory *m = open_memory(2, e->value, WIDTH);
    for (long task; (task = atomic_fetch_add(e->next, 1)) < (long)e->heads * e->groups;) expanded_task(e, m, task);
}

// Continue ordinary attention of rows in groups of 64 with `count` tokens (see struct expanded). Before the first call
// `most` must be -1e30, `total` and `out` 0. After the last call the result is out / total. `plain` and `rope` are
// even, `value` is a multiple of 16. `out` is aligned to 64 bytes.
void dsa_latent_expanded(const uint32_t *query, const uint16_t *tokens, const uint16_t *made, const uint64_t *seen,
                         int heads, int groups, int count, int dim, int rank, int plain, int rope, int value,
                         float scale, float *most, float *total, float *out) {
    atomic_long next = 0;
    struct expanded e = {query, tokens, made, seen, heads, groups, count, dim, rank, plain, rope, value, scale,
                         most, total, out, &next};
    dsa_parallel(expanded_thread, &e);
}

// ---- index scores --------------------------------------------------------------------------------------------

struct scoring {
    const uint16_t *query; // [rows][heads][dim]
    const float *weights;  // [rows][heads]
    const uint16_t *plane;
    long page_stride;
    const int64_t *tables;
    long pages;
    const int64_t *positions; // [rows]
    long rows, rows_a_request;
    int heads, dim;
    float *out; // [rows][64 pages]
    long span;  // positions in a task
    uint32_t *packed; // [rows][groups of heads][dim / 2][16 nz]
    atomic_long *next;
};

INLINE void score_span(const struct scoring *s, int nz, long row, int first, long from, long to, int add) {
    const int width = LANES * nz, count = s->heads - first < width ? s->heads - first : width;
    const int groups = (s->heads + LANES * MOST - 1) / (LANES * MOST);
    const uint32_t *query = s->packed + (row * groups + first / (LANES * MOST)) * (s->dim / 2) * LANES * MOST;
    const int64_t *table = s->tables + row / s->rows_a_request * s->pages;
    float *out = s->out + row * s->pages * PAGE_TOKENS;
    __m512 weights[MOST];
    for (int z = 0; z < nz; z++) {
        int left = count - z * LANES;
        __mmask16 lanes = left >= LANES ? 0xffff : left > 0 ? (__mmask16)((1 << left) - 1) : 0;
        weights[z] = _mm512_maskz_loadu_ps(lanes, s->weights + row * s->heads + first + z * LANES);
    }
    const uint32_t *tokens[2 * TOKENS];
    for (long c = from; c < to; c += TOKENS) {
        for (int j = 0; j < 2 * TOKENS; j++) {
            long position = c + j < to ? c + j : to - 1;
            const uint16_t *page = s->plane + table[position / PAGE_TOKENS] * s->page_stride;
            tokens[j] = (const uint32_t *)(page + position % PAGE_TOKENS * s->dim);
        }
        __m512 sums[TOKENS][MOST];
        clear(nz, sums);
        products(nz, query, tokens, tokens + TOKENS, s->dim / 2, sums);
        for (int j = 0; j < TOKENS && c + j < to; j++) {
            __m512 all = _mm512_setzero_ps();
            for (int z = 0; z < nz; z++)
                // In this order not-a-number stays.
                all = _mm512_fmadd_ps(weights[z], _mm512_max_ps(_mm512_setzero_ps(), sums[j][z]), all);
            out[c + j] = _mm512_reduce_add_ps(all) + (add ? out[c + j] : 0.0f);
        }
    }
}

static void score_thread(void *argument, int thread, int threads) {
    (void)thread, (void)threads;
    const struct scoring *s = argument;
    const long context = s->pages * PAGE_TOKENS, spans = (context + s->span - 1) / s->span;
    for (long task; (task = atomic_fetch_add(s->next, 1)) < s->rows * spans;) {
        // Neighbouring tasks are rows over the same keys, so the keys stay in the second-level cache.
        long request = task / (s->rows_a_request * spans), rest = task % (s->rows_a_request * spans);
        long row = request * s->rows_a_request + rest % s->rows_a_request, from = rest / s->rows_a_request * s->span;
        long end = from + s->span < context ? from + s->span : context;
        long visible = s->positions[row] + 1 < end ? s->positions[row] + 1 : end;
        if (visible > from)
            for (int first = 0; first < s->heads; first += LANES * MOST) {
                int left = s->heads - first;
                if (left > 2 * LANES) score_span(s, 4, row, first, from, visible, first > 0);
                else if (left > LANES) score_span(s, 2, row, first, from, visible, first > 0);
                else score_span(s, 1, row, first, from, visible, first > 0);
            }
        for (long c = visible > from ? visible : from; c < end; c++) s->out[row * context + c] = -__builtin_inff();
    }
}

// out[n][c] = sum_h weights[n][h] relu(query[n][h] . key[c]), and -infinity beyond the row's position. `dim` is even.
void dsa_latent_index_scores(const uint16_t *query, const float *weights, const uint16_t *plane, int64_t page_stride,
                             const int64_t *tables, int64_t pages, const int64_t *positions, int64_t rows,
                             int64_t rows_a_request, int heads, int dim, float *out) {
    atomic_long next = 0;
    const int groups = (heads + LANES * MOST - 1) / (LANES * MOST);
    const int64_t packed = (int64_t)sizeof(uint32_t) * rows * groups * (dim / 2) * LANES * MOST;
    struct scoring s = {query, weights, plane, page_stride, tables, pages, positions, rows, rows_a_request,
                        heads, dim, out, 16 * PAGE_TOKENS, dsa_scratch(packed), &next};
    for (long row = 0; row < rows; row++)
        for (int g = 0; g < groups; g++) {
            int first = g * LANES * MOST, left = heads - first, nz = left > 2 * LANES ? 4 : left > LANES ? 2 : 1;
            pack_queries(query + row * heads * dim, dim, first, left < LANES * nz ? left : LANES * nz, nz,
                         s.packed + (row * groups + g) * (dim / 2) * LANES * MOST);
        }
    dsa_parallel(score_thread, &s); // score_thread must not use scratch, because the caller's scratch is `packed`
}

#else

int dsa_latent_ready(void) { return 0; }

#endif
