// The scores of the lightning indexer in 8 bits. attention.h describes the layout.
#include <math.h>

#include "attention.h"

float dsa_quantise(const bf16 *x, int d, int8_t *n) {
    // Absolute values have the same order as their bits. Not-a-number is the largest, so it shows in the scale.
    int32_t most = 0;
    for (int i = 0; i < d; i++) {
        int32_t size = x[i] & 0x7fff;
        most = size > most ? size : most;
    }
    float largest = wide((bf16)most);
    float scale = largest / 127.0f;
    // nearbyintf rounds ties to even. |x / scale| is at most 127.
    float inverse = scale > 0.0f && scale < INFINITY ? 1.0f : 0.0f;
    float divisor = inverse > 0.0f ? scale : 1.0f;
    for (int i = 0; i < d; i++) {
        float y = wide(x[i]) * inverse / divisor;
        n[i] = (int8_t)(int)nearbyintf(y == y ? y : 0.0f);
    }
    return scale;
}

void dsa_index_key_write(uint8_t *page, int offset, const bf16 *key, int d) {
    int8_t n[512];
    float scale = dsa_quantise(key, d, n);
    uint8_t *out = page + offset / 16 * 16 * d + offset % 16 * 4;
    for (int j = 0; j < d; j += 4, out += 64)
        for (int i = 0; i < 4; i++) out[i] = (uint8_t)(n[j + i] + 128);
    memcpy(page + PAGE * d + 4 * offset, &scale, 4);
}

void dsa_index_query(const bf16 *query, const float *head_weights, int H, int d, int8_t *n, float *weights,
                     int32_t *begins) {
    for (int h = 0; h < H; h++) {
        weights[h] = head_weights[h] * dsa_quantise(query + h * d, d, n + h * d);
        int32_t total = 0;
        for (int i = 0; i < d; i++) total += n[h * d + i];
        begins[h] = -128 * total;
    }
}

#ifdef DSA_AVX512

// Score `heads` heads of one query against a page; sums [4] are the page's scores before the keys' scales. The next
// page may be anywhere in memory. So if `next` is not NULL, each step prefetches `lines` cache lines from there. (They
// go to the second-level cache: the first takes few misses at a time, and is half as fast here.)
static inline __attribute__((always_inline)) void score_heads(int heads, const int8_t *query, const float *weights,
                                                              const int32_t *begins, const uint8_t *page,
                                                              const uint8_t *next, int lines, int d, __m512 *sums) {
    __m512i products[4][4];
    for (int h = 0; h < heads; h++)
        for (int g = 0; g < 4; g++) products[h][g] = _mm512_set1_epi32(begins[h]);
    for (int j = 0; j < d / 4; j++) {
        __m512i keys[4];
        for (int g = 0; g < 4; g++) keys[g] = _mm512_loadu_si512(page + (g * (d / 4) + j) * 64);
        if (next)
            for (int i = 0; i < lines; i++) _mm_prefetch((const char *)next + (lines * j + i) * 64, _MM_HINT_T1);
        for (int h = 0; h < heads; h++) {
            int32_t four;
            memcpy(&four, query + h * d + 4 * j, 4);
            __m512i q = _mm512_set1_epi32(four);
            for (int g = 0; g < 4; g++) products[h][g] = _mm512_dpbusd_epi32(products[h][g], keys[g], q);
        }
    }
    for (int h = 0; h < heads; h++) {
        __m512 weight = _mm512_set1_ps(weights[h]);
        for (int g = 0; g < 4; g++) {
            __m512i positive = _mm512_max_epi32(products[h][g], _mm512_setzero_si512());
            sums[g] = _mm512_fmadd_ps(weight, _mm512_cvtepi32_ps(positive), sums[g]);
        }
    }
}

static void score_page(const int8_t *query, const float *weights, const int32_t *begins, const uint8_t *page,
                       const uint8_t *next, int H, int d, float *out) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    const uint8_t *scales = page + PAGE * d;
    if (next)
        for (int g = 0; g < 4; g++) _mm_prefetch((const char *)next + PAGE * d + 64 * g, _MM_HINT_T1);
    // Spread the prefetch of the next page's d lines over the heads: in a burst they would delay one another, and this
    // page's loads.
    const int lines = H <= 4 ? 4 : H <= 12 ? 2 : 1, turns = 4 / lines;
    int h = 0;
    for (int turn = 0; h < H; turn++, h += 4) {
        const uint8_t *part = next && turn < turns ? next + turn * lines * (d / 4) * 64 : 0;
        const int8_t *q = query + h * d;
        switch (H - h) {
        case 1: score_heads(1, q, weights + h, begins + h, page, part, lines, d, sums); break;
        case 2: score_heads(2, q, weights + h, begins + h, page, part, lines, d, sums); break;
        case 3: score_heads(3, q, weights + h, begins + h, page, part, lines, d, sums); break;
        default: score_heads(4, q, weights + h, begins + h, page, part, lines, d, sums); break;
        }
    }
    for (int g = 0; g < 4; g++)
        _mm512_storeu_ps(out + 16 * g, _mm512_mul_ps(sums[g], _mm512_loadu_ps(scales + 64 * g)));
}

#elif defined(__AVX2__)

enum { TOGETHER = 8 }; // heads whose sums fit the registers

// Score `heads` heads of one query against 8 tokens: add to their scores before the keys' scales. The query is as pairs
// [heads][d / 4][2] of 16 bits: dims 0 and 2 of four, dims 1 and 3. Bytes of keys become such pairs by a mask and a shift.
static inline __attribute__((always_inline)) __m256 score_heads(int heads, const int32_t *pairs, const float *weights,
                                                                const int32_t *begins, const uint8_t *keys, int d, __m256 sum) {
    __m256i products[TOGETHER];
    for (int h = 0; h < heads; h++) products[h] = _mm256_set1_epi32(begins[h]);
    for (int j = 0; j < d / 4; j++) {
        const __m256i bytes = _mm256_loadu_si256((const void *)(keys + 64 * j));
        const __m256i even = _mm256_and_si256(bytes, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(bytes, 8);
        for (int h = 0; h < heads; h++) {
            const int32_t *q = pairs + (h * (d / 4) + j) * 2;
            const __m256i two = _mm256_add_epi32(_mm256_madd_epi16(even, _mm256_set1_epi32(q[0])),
                                                 _mm256_madd_epi16(odd, _mm256_set1_epi32(q[1])));
            products[h] = _mm256_add_epi32(products[h], two);
        }
    }
    for (int h = 0; h < heads; h++) {
        const __m256i positive = _mm256_max_epi32(products[h], _mm256_setzero_si256());
        sum = _mm256_fmadd_ps(_mm256_set1_ps(weights[h]), _mm256_cvtepi32_ps(positive), sum);
    }
    return sum;
}

// `pairs`: the whole query's. The next page is prefetched part by part: in a burst its lines would delay one another.
static void score_page(const int32_t *pairs, const float *weights, const int32_t *begins, const uint8_t *page,
                       const uint8_t *next, int H, int d, float *out) {
    const int part = PAGE * (d + 4) / 8; // of a page, in bytes
    for (int g = 0; g < 8; g++) {
        const uint8_t *keys = page + g / 2 * 16 * d + g % 2 * 32;
        __m256 sum = _mm256_setzero_ps();
        if (next)
            for (int line = g * part; line < (g + 1) * part; line += 64) __builtin_prefetch(next + line, 0, 2);
        for (int h = 0; h < H; h += TOGETHER) {
            const int32_t *q = pairs + h * d / 2;
            switch (H - h) {
            case 1: sum = score_heads(1, q, weights + h, begins + h, keys, d, sum); break;
            case 2: sum = score_heads(2, q, weights + h, begins + h, keys, d, sum); break;
            case 3: sum = score_heads(3, q, weights + h, begins + h, keys, d, sum); break;
            case 4: sum = score_heads(4, q, weights + h, begins + h, keys, d, sum); break;
            case 5: sum = score_heads(5, q, weights + h, begins + h, keys, d, sum); break;
            case 6: sum = score_heads(6, q, weights + h, begins + h, keys, d, sum); break;
            case 7: sum = score_heads(7, q, weights + h, begins + h, keys, d, sum); break;
            default: sum = score_heads(8, q, weights + h, begins + h, keys, d, sum); break;
            }
        }
        const float *scales = (const float *)(const void *)(page + PAGE * d + 32 * g);
        _mm256_storeu_ps(out + 8 * g, _mm256_mul_ps(sum, _mm256_loadu_ps(scales)));
    }
}

#else

static void score_page(const int8_t *query, const float *weights, const int32_t *begins, const uint8_t *page,
                       const uint8_t *next, int H, int d, float *out) {
    (void)next;
    float scales[PAGE];
    memcpy(scales, page + PAGE * d, sizeof scales);
    for (int g = 0; g < 4; g++) {
        float sums[16] = {0};
        for (int h = 0; h < H; h++) {
            int32_t products[16];
            for (int c = 0; c < 16; c++) products[c] = begins[h];
            for (int j = 0; j < d / 4; j++) {
                const uint8_t *keys = page + (g * (d / 4) + j) * 64;
                for (int i = 0; i < 4; i++) {
                    int32_t q = query[h * d + 4 * j + i];
                    for (int c = 0; c < 16; c++) products[c] += q * keys[4 * c + i];
                }
            }
            for (int c = 0; c < 16; c++) sums[c] += weights[h] * (float)(products[c] > 0 ? products[c] : 0);
        }
        for (int c = 0; c < 16; c++) out[16 * g + c] = sums[c] * scales[16 * g + c];
    }
}

#endif

void dsa_index_scores_row(const int8_t *query, const float *weights, const int32_t *begins, const uint8_t *plane,
                          int64_t page_stride, const int64_t *block_table, int first, int last, int H, int d,
                          float *scores) {
#if defined(__AVX2__) && !defined(DSA_AVX512)
    int32_t form[H * d / 2];
    for (int i = 0; i < H * d; i += 4) {
        const int16_t ordered[4] = {query[i], query[i + 2], query[i + 1], query[i + 3]};
        memcpy(form + i / 2, ordered, sizeof ordered);
    }
#else
    const int8_t *form = query;
#endif
    for (int page = first; page < last; page++) {
        const uint8_t *next = page + 2 < last ? plane + block_table[page + 2] * page_stride : 0;
        score_page(form, weights, begins, plane + block_table[page] * page_stride, next, H, d, scores + PAGE * page);
    }
}
