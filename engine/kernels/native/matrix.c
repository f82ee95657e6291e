// Products with packed weights; see matrix.h. The file has over 400 lines because the two forms of the inner product
// (AVX-512, and any processor) must keep the same layout.
#include "matrix.h"

#include "pool.h"
#include "superblock.h"

// NIBBLES and SCALES: the bytes of each part of a tile for a group of 32 inputs x 16 outputs. ROWS: the most rows that
// are multiplied with a tile at once, so that their sums and a group's weights fit the registers.
enum { NIBBLES = 256, SCALES = 32, ROWS = 8 };

// PANEL: how many groups of a tile are unpacked to bfloat16 at once, 64 KB. With more rows than Q4_ROWS or Q8_ROWS
// (measured) unpacking is faster, as the rows share it.
enum { PANEL = 64, Q4_ROWS = 32, Q8_ROWS = 8 };

// How many bytes ahead of their use weights are prefetched.
enum { AHEAD = 8192 };

static inline size_t number_bytes(int kind) {
    return kind == DSA_Q4 ? NIBBLES : kind == DSA_Q8 ? 2 * NIBBLES : 4 * NIBBLES;
}

// Bytes of all scales and offsets of a tile. The tile's numbers follow them.
static inline size_t head_bytes(int kind, int groups) {
    size_t group = kind == DSA_Q4 ? 2 * SCALES : kind == DSA_Q8 ? SCALES : 0;
    return (group * groups + 63) / 64 * 64;
}

static inline size_t tile_bytes(int kind, int groups) { return head_bytes(kind, groups) + number_bytes(kind) * groups; }

static float group_sum(const bf16 *x) {
#ifdef DSA_AVX512
    __m512i both = _mm512_loadu_si512(x);
    __m512 odd = (__m512)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));
    return _mm512_reduce_add_ps(_mm512_add_ps((__m512)_mm512_slli_epi32(both, 16), odd));
#else
    float part[4] = {0};
    for (int i = 0; i < DSA_GROUP; i++) part[i % 4] += wide(x[i]);
    return (part[0] + part[1]) + (part[2] + part[3]);
#endif
}

int dsa_needs_integers(const struct dsa_matrix *w) {
    for (; w; w = w->next)
        if (dsa_is_super(w->kind)) return 1;
    return 0;
}

void dsa_finish_row(struct dsa_rows *rows, int at) {
    const int groups = rows->inputs / DSA_GROUP;
    const bf16 *x = rows->values + (size_t)at * rows->inputs;
    for (int g = 0; g < groups; g++, x += DSA_GROUP) {
        rows->sums[(size_t)at * groups + g] = group_sum(x);
        if (!rows->integers) continue;
        float values[DSA_GROUP];
        for (int i = 0; i < DSA_GROUP; i++) values[i] = wide(x[i]);
        dsa_super_set_group(rows, at, g, values);
    }
}

void dsa_set_group(struct dsa_rows *rows, int at, int group, const float *x) {
    const int groups = rows->inputs / DSA_GROUP;
    bf16 *out = rows->values + (size_t)at * rows->inputs + group * DSA_GROUP;
#ifdef DSA_AVX512
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x)));
#else
    for (int i = 0; i < DSA_GROUP; i++) out[i] = narrow(x[i]);
#endif
    rows->sums[(size_t)at * groups + group] = group_sum(out);
    if (rows->integers) dsa_super_set_group(rows, at, group, x);
}

void dsa_set_row(struct dsa_rows *rows, int at, const float *x) {
    for (int g = 0; g < rows->inputs / DSA_GROUP; g++) dsa_set_group(rows, at, g, x + g * DSA_GROUP);
}

// A run of groups of one tile, and the rows to multiply it with.
struct run {
    const uint8_t *numbers, *scales, *offsets; // of the first group; `numbers` packed, or plain bfloat16
    const uint8_t *ahead;                      // what to prefetch; NULL for nothing
    int groups;
    const bf16 *values; // the first row's, from the first group's inputs on
    const float *sums;  // the first row's, from the first group on
    size_t inputs;      // length of a row
    float *out;         // of the first row
    size_t stride;      // from row to row of `out`
};

#ifdef DSA_AVX512

// One lookup turns a nibble into bfloat16. vpermw uses the low 5 bits of each 16-bit lane as the index, so the table is
// stored twice and no mask is needed. The other three nibbles of a 16-bit lane are shifted down first.
#define NIBBLE_TABLE(f) \
    f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#define NUMBER(n) (float)(n)                              // 0 to 15
#define UPPER(n) (float)(16 * ((n) < 8 ? (n) : (n) - 16)) // -128 to 112: the upper half of a signed byte

static inline __m512i table_of(const float *numbers) {
    __m512 values = _mm512_loadu_ps(numbers);
    __m256i narrowed = (__m256i)_mm512_cvtneps_pbh(values);
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrowed), narrowed, 1);
}

static inline __m512 halves(const uint8_t *at) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)at)); }

static inline __m512bh pair(const bf16 *x) { // two neighbouring inputs, in every lane
    int32_t both;
    memcpy(&both, x, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
}

// The j-th pairs of a word of nibbles, as bfloat16.
static inline __m512bh looked_up(__m512i word, int j, __m512i table) {
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4 * j), table);
}

// Multiply 256 bytes of nibbles with 32 inputs of each row. Each row has `chains` sums, because one sum would have to
// wait for its own last addition.
__attribute__((always_inline)) static inline void nibbles(
    const uint8_t *w, __m512i table, const bf16 *x, size_t inputs, int rows, int chains, __m512 *sums) {
    for (int i = 0; i < 4; i++) {
        __m512i word = _mm512_loadu_si512(w + 64 * i);
        for (int j = 0; j < 4; j++) {
            __m512bh value = looked_up(word, j, table);
            for (int r = 0; r < rows; r++) {
                __m512 *sum = &sums[r * chains + j % chains];
                *sum = _mm512_dpbf16_ps(*sum, value, pair(x + r * inputs + 8 * i + 2 * j));
            }
        }
    }
}

// Multiply the bfloat16 numbers of 32 inputs with each row.
__attribute__((always_inline)) static inline void numbers(
    const uint8_t *w, const bf16 *x, size_t inputs, int rows, int chains, __m512 *sums) {
    for (int i = 0; i < DSA_GROUP / 2; i++) {
        __m512bh value = (__m512bh)_mm512_loadu_si512(w + 64 * i);
        for (int r = 0; r < rows; r++) {
            __m512 *sum = &sums[r * chains + i % chains];
            *sum = _mm512_dpbf16_ps(*sum, value, pair(x + r * inputs + 2 * i));
        }
    }
}

static const float NUMBERS[16] = {NIBBLE_TABLE(NUMBER)}, UPPERS[16] = {NIBBLE_TABLE(UPPER)};

// Multiply a run with `rows` rows. `plain`: the numbers were unpacked to bfloat16. `add`: add to the content of `out`.
// `kind`, `plain`, `add` and `rows` are constants where this is inlined.
__attribute__((always_inline)) static inline void multiply(const struct run *run, int kind, int plain, int add, int rows) {
    const __m512i low = table_of(NUMBERS), high = table_of(UPPERS);
    const int chains = rows == 1 ? 4 : rows <= 3 ? 2 : 1;
    const size_t inputs = run->inputs, bytes = plain ? 4 * NIBBLES : number_bytes(kind);
    const bf16 *x = run->values;
    const uint8_t *w = run->numbers;
    __m512 total[ROWS];
    for (int r = 0; r < rows; r++) total[r] = add ? _mm512_loadu_ps(run->out + r * run->stride) : _mm512_setzero_ps();
    for (int g = 0; g < run->groups; g++, x += DSA_GROUP, w += bytes) {
        if (run->ahead) {
            const size_t group = bytes + (kind == DSA_Q4 ? 2 * SCALES : kind == DSA_Q8 ? SCALES : 0);
            for (size_t line = 0; line < group; line += 64) __builtin_prefetch(run->ahead + g * group + line, 0, 1);
        }
        __m512 part[ROWS];
        for (int i = 0; i < rows * chains; i++) part[i] = _mm512_setzero_ps();
        if (plain || kind == DSA_BF16) {
            numbers(w, x, inputs, rows, chains, part);
        } else {
            nibbles(w, kind == DSA_Q8 ? high : low, x, inputs, rows, chains, part);
            if (kind == DSA_Q8) nibbles(w + NIBBLES, low, x, inputs, rows, chains, part);
        }
        const __m512 scale = kind == DSA_BF16 ? total[0] : halves(run->scales + SCALES * g);
        const __m512 offset = kind == DSA_Q4 ? halves(run->offsets + SCALES * g) : total[0];
        for (int r = 0; r < rows; r++) {
            __m512 sum = part[r * chains];
            for (int c = 1; c < chains; c++) sum = _mm512_add_ps(sum, part[r * chains + c]);
            total[r] = kind == DSA_BF16 ? _mm512_add_ps(total[r], sum) : _mm512_fmadd_ps(sum, scale, total[r]);
            if (kind == DSA_Q4)
                total[r] = _mm512_fmadd_ps(offset, _mm512_set1_ps(run->sums[r * (inputs / DSA_GROUP) + g]), total[r]);
        }
    }
    for (int r = 0; r < rows; r++) _mm512_storeu_ps(run->out + r * run->stride, total[r]);
}

// Unpack the numbers of `groups` groups to bfloat16, without scale and offset. This is exact: they are integers below
// 256.
static void make_plain(int kind, const uint8_t *w, int groups, uint8_t *out) {
    const __m512i low = table_of(NUMBERS), high = table_of(UPPERS);
    for (int g = 0; g < groups; g++, w += number_bytes(kind))
        for (int i = 0; i < 4; i++) {
            __m512i word = _mm512_loadu_si512(w + 64 * i);
            __m512i lower = kind == DSA_Q8 ? _mm512_loadu_si512(w + NIBBLES + 64 * i) : word;
            for (int j = 0; j < 4; j++, out += 64) {
                __m512bh value = looked_up(word, j, kind == DSA_Q8 ? high : low);
                if (kind == DSA_Q8) {
                    // Add the upper and the lower half of a byte as float32. The sum is exact: their bits do not
                    // overlap.
                    __m512i a = (__m512i)value, b = (__m512i)looked_up(lower, j, low);
                    const __m512i upper16 = _mm512_set1_epi32((int)0xffff0000);
                    __m512 odd = _mm512_add_ps((__m512)_mm512_and_si512(a, upper16), (__m512)_mm512_and_si512(b, upper16));
                    __m512 even = _mm512_add_ps((__m512)_mm512_slli_epi32(a, 16), (__m512)_mm512_slli_epi32(b, 16));
                    a = _mm512_or_si512(_mm512_and_si512((__m512i)odd, upper16), _mm512_srli_epi32((__m512i)even, 16));
                    value = (__m512bh)a;
                }
                _mm512_storeu_si512(out, (__m512i)value);
            }
        }
}

#else // any processor, in vectors of 16 that the compiler splits for it

typedef float v16f __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));

static inline v16f halves(const uint8_t *at) {
    _Float16 stored[DSA_LANES];
    v16f out;
    memcpy(stored, at, sizeof stored);
    for (int i = 0; i < DSA_LANES; i++) out[i] = (float)stored[i];
    return out;
}

static inline v16u word_at(const uint8_t *at) {
    v16u word;
    memcpy(&word, at, sizeof word);
    return word;
}

// Nibble n of each 32-bit lane; with `upper`, as the signed upper half of a byte.
static inline v16f nibble_of(v16u word, int n, int upper) {
    v16i number = (v16i)(word << (28 - 4 * n));
    number = upper ? number >> 28 << 4 : (v16i)((v16u)number >> 28);
    return __builtin_convertvector(number, v16f);
}

// The j-th pairs of the word at `at`. The lower halves of a Q8 group are NIBBLES bytes further.
static inline void pair_of(int kind, const uint8_t *at, int j, v16f *even, v16f *odd) {
    v16u word = word_at(at);
    *even = nibble_of(word, j, kind == DSA_Q8);
    *odd = nibble_of(word, j + 4, kind == DSA_Q8);
    if (kind == DSA_Q8) {
        word = word_at(at + NIBBLES);
        *even += nibble_of(word, j, 0);
        *odd += nibble_of(word, j + 4, 0);
    }
}

// The same function as the AVX-512 form above.
__attribute__((always_inline)) static inline void multiply(const struct run *run, int kind, int plain, int add, int rows) {
    const size_t inputs = run->inputs, bytes = plain ? 4 * NIBBLES : number_bytes(kind);
    const bf16 *x = run->values;
    const uint8_t *w = run->numbers;
    v16f total[ROWS] = {0};
    if (add)
        for (int r = 0; r < rows; r++) memcpy(&total[r], run->out + r * run->stride, sizeof total[r]);
    for (int g = 0; g < run->groups; g++, x += DSA_GROUP, w += bytes) {
        v16f part[ROWS] = {0};
        for (int i = 0; i < DSA_GROUP / 2; i++) {
            v16f even, odd;
            if (plain || kind == DSA_BF16) {
                v16u word = word_at(w + 64 * i);
                even = (v16f)(word << 16);
                odd = (v16f)(word & 0xffff0000);
            } else {
                pair_of(kind, w + 64 * (i / 4), i % 4, &even, &odd);
            }
            for (int r = 0; r < rows; r++) part[r] += even * wide(x[r * inputs + 2 * i]) + odd * wide(x[r * inputs + 2 * i + 1]);
        }
        v16f scale = kind == DSA_BF16 ? total[0] : halves(run->scales + SCALES * g);
        v16f offset = kind == DSA_Q4 ? halves(run->offsets + SCALES * g) : total[0];
        for (int r = 0; r < rows; r++) {
            total[r] += kind == DSA_BF16 ? part[r] : part[r] * scale;
            if (kind == DSA_Q4) total[r] += offset * run->sums[r * (inputs / DSA_GROUP) + g];
        }
    }
    for (int r = 0; r < rows; r++) memcpy(run->out + r * run->stride, &total[r], sizeof total[r]);
}

static void make_plain(int kind, const uint8_t *w, int groups, uint8_t *out) {
    for (int g = 0; g < groups; g++, w += number_bytes(kind))
        for (int i = 0; i < DSA_GROUP / 2; i++, out += 64) {
            v16f even, odd;
            pair_of(kind, w + 64 * (i / 4), i % 4, &even, &odd);
            v16u both = (v16u)even >> 16 | ((v16u)odd & 0xffff0000);
            memcpy(out, &both, sizeof both);
        }
}

#endif

// Multiply a run with any number of rows.
__attribute__((always_inline)) static inline void multiply_rows(struct run run, int count, int kind, int plain, int add) {
    for (; count >= ROWS; count -= ROWS) {
        multiply(&run, kind, plain, add, ROWS);
        run.ahead = 0;
        run.values += ROWS * run.inputs;
        run.sums += ROWS * (run.inputs / DSA_GROUP);
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
__attribute__((noinline)) static void multiply_plain(struct run run, int count, int kind) {
    _Alignas(64) uint8_t plain[PANEL * 4 * NIBBLES];
    const int groups = run.groups;
    const uint8_t *packed = run.numbers;
    run.numbers = plain;
    run.ahead = 0;
    for (int first = 0; first < groups; first += PANEL) {
        run.groups = groups - first < PANEL ? groups - first : PANEL;
        make_plain(kind, packed + first * number_bytes(kind), run.groups, plain);
        if (kind == DSA_Q4 && first == 0) multiply_rows(run, count, DSA_Q4, 1, 0);
        else if (kind == DSA_Q4) multiply_rows(run, count, DSA_Q4, 1, 1);
        else if (first == 0) multiply_rows(run, count, DSA_Q8, 1, 0);
        else multiply_rows(run, count, DSA_Q8, 1, 1);
        run.scales += SCALES * PANEL;
        run.offsets += SCALES * PANEL;
        run.values += DSA_GROUP * PANEL;
        run.sums += PANEL;
    }
}

// Multiply tile t of one part with all rows. `out` is the place of the tile's first output in the first row.
static void product_tile(const struct dsa_matrix *w, const struct dsa_rows *x, float *out, size_t stride, int t) {
    const int groups = w->inputs / DSA_GROUP;
    if (dsa_is_super(w->kind)) {
        dsa_super_tile(w->kind, w->data + t * dsa_super_bytes(w->kind, w->inputs), x, out, stride);
        return;
    }
    const uint8_t *at = w->data + t * tile_bytes(w->kind, groups);
    struct run run = {
        .numbers = at + head_bytes(w->kind, groups),
        .scales = at,
        .offsets = at + SCALES * groups,
        .ahead = at + AHEAD, // the hardware's prefetcher stops at each page
        .groups = groups,
        .values = x->values,
        .sums = x->sums,
        .inputs = (size_t)x->inputs,
        .out = out,
        .stride = stride,
    };
    if (w->kind == DSA_BF16) multiply_rows(run, x->count, DSA_BF16, 0, 0);
    else if (x->count > (w->kind == DSA_Q4 ? Q4_ROWS : Q8_ROWS)) multiply_plain(run, x->count, w->kind);
    else if (w->kind == DSA_Q4) multiply_rows(run, x->count, DSA_Q4, 0, 0);
    else multiply_rows(run, x->count, DSA_Q8, 0, 0);
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

void dsa_product(const struct dsa_matrix *w, const struct dsa_rows *x, float *out, size_t stride, int first, int last) {
    for (int t = first; t < last; t++) {
        int within = t;
        const struct dsa_matrix *part = part_of(w, &within, DSA_LANES);
        product_tile(part, x, out + (size_t)t * DSA_LANES, stride, within);
    }
}

static float half(const uint8_t *at) {
    _Float16 stored;
    memcpy(&stored, at, sizeof stored);
    return (float)stored;
}

void dsa_weights(const struct dsa_matrix *w, int output, float *out) {
    w = part_of(w, &output, 1);
    const int groups = w->inputs / DSA_GROUP, lane = output % DSA_LANES;
    if (dsa_is_super(w->kind)) {
        const uint8_t *tile = w->data + output / DSA_LANES * dsa_super_bytes(w->kind, w->inputs);
        dsa_super_weights(w->kind, tile, lane, w->inputs, out);
        return;
    }
    const uint8_t *at = w->data + output / DSA_LANES * tile_bytes(w->kind, groups);
    const uint8_t *scales = at + 2 * lane, *offsets = scales + SCALES * groups;
    at += head_bytes(w->kind, groups);
    for (int g = 0; g < groups; g++, at += number_bytes(w->kind), scales += SCALES, offsets += SCALES) {
        for (int i = 0; i < DSA_GROUP; i++, out++) {
            if (w->kind == DSA_BF16) {
                bf16 stored;
                memcpy(&stored, at + 64 * (i / 2) + 4 * lane + 2 * (i % 2), sizeof stored);
                *out = wide(stored);
                continue;
            }
            // Even and odd inputs have separate 16-bit halves. Inside its half, the input is the nibble of its pair.
            const uint8_t *word = at + 64 * (i / 8) + 4 * lane + 2 * (i % 2) + i % 8 / 4;
            const int shift = 4 * (i / 2 % 2);
            int number = *word >> shift & 15;
            if (w->kind == DSA_Q4) {
                *out = half(scales) * (float)number + half(offsets);
            } else {
                int upper = number < 8 ? number : number - 16;
                *out = half(scales) * (float)(16 * upper + (word[NIBBLES] >> shift & 15));
            }
        }
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
    dsa_barrier();
    dsa_share(dsa_tiles(job->weight), 1, thread, threads, &first, &last);
    int step = CACHED / inputs / ROWS * ROWS;
    step = step < 8 * ROWS ? 8 * ROWS : step > MOST_ROWS ? MOST_ROWS : step;
    _Alignas(64) float out[MOST_ROWS * DSA_LANES];
    for (int row = 0; row < all->count; row += step) {
        const int count = all->count - row < step ? all->count - row : step;
        struct dsa_rows some = {
            .values = all->values + (size_t)row * inputs,
            .sums = all->sums + (size_t)row * groups,
            .count = count,
            .inputs = inputs,
        };
        if (all->integers) {
            some.integers = all->integers + (size_t)row * inputs;
            some.scales = all->scales + (size_t)row * groups;
            some.integer_sums = all->integer_sums + (size_t)row * groups;
            some.begins = all->begins + (size_t)row * 2 * groups;
        }
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
    return groups * (dsa_needs_integers(weight) ? 4 + DSA_GROUP + 4 + 4 + 8 : 4);
}

// x [count, inputs] bfloat16 -> [count, outputs]: to `wide` in float32, or if that is NULL to `narrow` in bfloat16.
void dsa_linear(const struct dsa_matrix *weight, bf16 *x, int count, uint8_t *scratch, bf16 *narrow, float *wide) {
    struct linear_job job = {weight, {.values = x, .count = count, .inputs = weight->inputs}, narrow, wide};
    const size_t groups = (size_t)count * (size_t)(weight->inputs / DSA_GROUP);
    job.rows.sums = (float *)(void *)scratch;
    if (dsa_needs_integers(weight)) {
        job.rows.scales = job.rows.sums + groups;
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
