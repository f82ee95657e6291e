// Attention of one row over tokens that lie anywhere in the cache.
#include <math.h>

#include "attention.h"

enum { FETCHED = 32 }; // how many tokens ahead to prefetch

// So many tokens are read at once, a multiple of 32: their keys and values stay in the second-level cache until the values
// are summed. Processors without AVX-512 have smaller ones.
#ifdef DSA_AVX512
enum { AT_ONCE = 1024 };
#else
enum { AT_ONCE = 256 };
#endif

enum { MOST_DIMS = 256 }; // of a head, for the forms below that are not plain

enum { TOGETHER = 6 }; // the most queries of a head that read a token together: their sums must fit the registers

static inline int padded(int count) { return (count + 31) & ~31; }

int64_t dsa_attend_scratch(int count) {
    // Room for the tokens' addresses, the float32 and bfloat16 weights of several queries, and the sums of weights.
    int64_t n = padded(count);
    return 8 * n + TOGETHER * (4 + 2) * n + 64;
}

// Attention of one KV head in plain C, for any sizes and any processor.
static void attend_head(const bf16 *query, const bf16 *const *tokens, int64_t at, int count, int G, int D, float scale, bf16 *out,
                        float *weights) {
    for (int g = 0; g < G; g++) {
        const bf16 *q = query + g * D;
        float most = -INFINITY, total = 0.0f;
        for (int s = 0; s < count; s++) {
            float dot = 0.0f;
            for (int i = 0; i < D; i++) dot += wide(q[i]) * wide(tokens[s][at + i]);
            weights[s] = dot * scale;
            most = weights[s] > most ? weights[s] : most;
        }
        for (int s = 0; s < count; s++) total += weights[s] = exp_negative(weights[s] - most);
        enum { PART = 64 };
        for (int i = 0; i < D; i += PART) {
            float sums[PART] = {0};
            int width = D - i < PART ? D - i : PART;
            for (int s = 0; s < count; s++)
                for (int j = 0; j < width; j++) sums[j] += weights[s] * wide(tokens[s][at + D + i + j]);
            for (int j = 0; j < width; j++) out[g * D + i + j] = narrow(sums[j] / total);
        }
    }
}

#ifdef DSA_AVX512

static inline __m512bh load_pairs(const bf16 *x) { return (__m512bh)_mm512_loadu_si512(x); }

// scale * q . k of G queries and n tokens, D = 32 * parts. It prefetches `fetch` bytes from `at` on of later tokens, of which
// there are `known` with these.
static inline __attribute__((always_inline)) void dots(int G, int parts, const bf16 *query, const bf16 *const *tokens,
                                                       int64_t at, int64_t fetch, int n, int known, float scale,
                                                       float *weights) {
    const int D = 32 * parts;
    __m512bh q[TOGETHER][4];
    for (int g = 0; g < G; g++)
        for (int p = 0; p < parts; p++) q[g][p] = load_pairs(query + g * D + 32 * p);
    for (int s = 0; s < n; s += 16) {
        __m512 quarter[TOGETHER][4]; // [g]: four tokens' sums in each
        for (int i = 0; i < 4; i++) {
            __m512 sums[TOGETHER][4];
            for (int j = 0; j < 4; j++) {
                const bf16 *key = tokens[s + 4 * i + j] + at;
                if (s + FETCHED + 16 <= known) { // a later token, with its values: it may be anywhere in the paged cache
                    const char *next = (const char *)(tokens[s + FETCHED + 4 * i + j] + at);
                    for (int64_t line = 0; line < fetch; line += 64) _mm_prefetch(next + line, _MM_HINT_T1);
                }
                __m512bh k[4];
                for (int p = 0; p < parts; p++) k[p] = load_pairs(key + 32 * p);
                for (int g = 0; g < G; g++) {
                    __m512 sum = _mm512_setzero_ps();
                    for (int p = 0; p < parts; p++) sum = _mm512_dpbf16_ps(sum, k[p], q[g][p]);
                    sums[g][j] = sum;
                }
            }
            for (int g = 0; g < G; g++) {
                const __m512 *four = sums[g];
                __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(four[0], four[1]), _mm512_unpackhi_ps(four[0], four[1]));
                __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(four[2], four[3]), _mm512_unpackhi_ps(four[2], four[3]));
                __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
                quarter[g][i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                                              _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
            }
        }
        for (int g = 0; g < G; g++) {
            const __m512 *t = quarter[g];
            __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(t[0], t[1], 0x88), _mm512_shuffle_f32x4(t[0], t[1], 0xdd));
            __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(t[2], t[3], 0x88), _mm512_shuffle_f32x4(t[2], t[3], 0xdd));
            __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
            _mm512_storeu_ps(weights + g * n + s, _mm512_mul_ps(all, _mm512_set1_ps(scale)));
        }
    }
}

// The weights of one query: e^(x - max) as bfloat16, 0 beyond `count`. `largest` is the max of earlier tokens, and becomes
// that of all. Returns the sum of the rounded weights, so that the weights that are used sum to 1 exactly.
static float soften(float *x, int count, int n, bf16 *out, float *largest) {
    __m512 most = _mm512_set1_ps(*largest), total = _mm512_setzero_ps();
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int s = 0; s < count; s += 16) {
        __mmask16 in = _mm512_cmplt_epi32_mask(lanes, _mm512_set1_epi32(count - s));
        most = _mm512_mask_max_ps(most, in, most, _mm512_loadu_ps(x + s));
    }
    *largest = _mm512_reduce_max_ps(most);
    most = _mm512_set1_ps(*largest);
    for (int s = 0; s < n; s += 32) {
        __m512 e[2];
        for (int i = 0; i < 2; i++) {
            __mmask16 in = _mm512_cmplt_epi32_mask(lanes, _mm512_set1_epi32(count - s - 16 * i));
            e[i] = _mm512_maskz_mov_ps(in, exp_negative16(_mm512_sub_ps(_mm512_loadu_ps(x + s + 16 * i), most)));
        }
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(e[1], e[0]);
        _mm512_storeu_si512(out + s, both);
        total = _mm512_add_ps(total, (__m512)_mm512_slli_epi32(both, 16));
        total = _mm512_add_ps(total, (__m512)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
    }
    return _mm512_reduce_add_ps(total);
}

// out[g] = out[g] * shrink[g] + sum_s weights[g][s] value[s], D = 32 * parts, in the order of dims that `finish` reads.
// `shrink` is NULL for the first tokens, before which `out` has nothing.
static inline __attribute__((always_inline)) void combine(int G, int parts, const bf16 *const *tokens, int64_t at, int n,
                                                          const bf16 *weights, const float *shrink, float *out) {
    const int D = 32 * parts;
    for (int part = 0; part < parts; part += 2) {
        const int wide_parts = parts - part < 2 ? 1 : 2;
        __m512 sums[TOGETHER][4];
        for (int g = 0; g < G; g++)
            for (int i = 0; i < 2 * wide_parts; i++)
                sums[g][i] = shrink ? _mm512_mul_ps(_mm512_loadu_ps(out + g * D + 32 * part + 16 * i), _mm512_set1_ps(shrink[g]))
                                    : _mm512_setzero_ps();
        for (int s = 0; s < n; s += 2) {
            __m512bh pairs[4];
            for (int p = 0; p < wide_parts; p++) {
                // Put two tokens' values side by side. The instructions interleave within 128 bits: lane l of the low
                // half has dims 8 l to 8 l + 3, lane l of the high half has dims 8 l + 4 to 8 l + 7.
                __m512i a = _mm512_loadu_si512(tokens[s] + at + D + 32 * (part + p));
                __m512i b = _mm512_loadu_si512(tokens[s + 1] + at + D + 32 * (part + p));
                pairs[2 * p] = (__m512bh)_mm512_unpacklo_epi16(a, b);
                pairs[2 * p + 1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
            }
            for (int g = 0; g < G; g++) {
                int32_t two;
                memcpy(&two, weights + g * n + s, 4);
                __m512bh w = (__m512bh)_mm512_set1_epi32(two);
                for (int i = 0; i < 2 * wide_parts; i++) sums[g][i] = _mm512_dpbf16_ps(sums[g][i], pairs[i], w);
            }
        }
        for (int g = 0; g < G; g++)
            for (int i = 0; i < 2 * wide_parts; i++) _mm512_storeu_ps(out + g * D + 32 * part + 16 * i, sums[g][i]);
    }
}

// out[g] = sums[g] / total[g], with the dims in order.
static void finish(int G, int D, const float *sums, const float *totals, bf16 *out) {
    // The order of dims in [16 words of the low half | 16 words of the high half], see `combine`.
    static const uint16_t ORDER[32] = {0, 1, 2,  3,  16, 17, 18, 19, 4,  5,  6,  7,  20, 21, 22, 23,
                                       8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31};
    for (int g = 0; g < G; g++) {
        const __m512 over = _mm512_set1_ps(1.0f / totals[g]);
        for (int i = g * D; i < (g + 1) * D; i += 32) {
            __m512 low = _mm512_mul_ps(_mm512_loadu_ps(sums + i), over), high = _mm512_mul_ps(_mm512_loadu_ps(sums + i + 16), over);
            __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER), both));
        }
    }
}

// Up to TOGETHER queries of one head over n tokens, n a multiple of 32.
static inline __attribute__((always_inline)) void attend_queries(int G, int parts, const bf16 *query,
                                                                 const bf16 *const *tokens, int64_t at,
                                                                 int64_t fetch, int count, int n,
                                                                 float scale, bf16 *out, float *weights, bf16 *soft,
                                                                 float *totals) {
    float sums[TOGETHER * 128], most[TOGETHER], shrink[TOGETHER];
    for (int g = 0; g < G; g++) {
        most[g] = -INFINITY;
        totals[g] = 0.0f;
    }
    for (int first = 0; first < n; first += AT_ONCE) {
        const int some = n - first < AT_ONCE ? n - first : AT_ONCE, real = count - first < some ? count - first : some;
        dots(G, parts, query, tokens + first, at, fetch, some, n - first, scale, weights);
        for (int g = 0; g < G; g++) {
            const float before = most[g];
            const float total = soften(weights + g * some, real, some, soft + g * some, &most[g]);
            // Not of -inf minus -inf, which is not-a-number. Not-a-number among the scores stays in the sums.
            shrink[g] = first == 0 || !(before < most[g]) ? 1.0f : exp_negative(before - most[g]);
            totals[g] = totals[g] * shrink[g] + total;
        }
        combine(G, parts, tokens + first, at, some, soft, first ? shrink : 0, sums);
    }
    finish(G, 32 * parts, sums, totals, out);
}

#define CASE(G, PARTS) \
    case 8 * G + PARTS: \
        attend_queries(G, PARTS, query, tokens, at, fetch, count, n, scale, out, weights, soft, totals); \
        break;

static void attend_known(int G, int parts, const bf16 *query, const bf16 *const *tokens, int64_t at, int64_t fetch, int count,
                         int n, float scale, bf16 *out, float *weights, bf16 *soft, float *totals) {
    switch (8 * G + parts) {
        CASE(1, 1) CASE(2, 1) CASE(3, 1) CASE(4, 1) CASE(5, 1) CASE(6, 1)
        CASE(1, 2) CASE(2, 2) CASE(3, 2) CASE(4, 2) CASE(5, 2) CASE(6, 2)
        CASE(1, 3) CASE(2, 3) CASE(3, 3) CASE(4, 3) CASE(5, 3) CASE(6, 3)
        CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 4) CASE(5, 4) CASE(6, 4)
    default: break;
    }
}

#else // any processor, in vectors of 8 that the compiler splits for it

// scale * q . k of G queries and `count` tokens. `query` [G][D] is float32: of each 16 dims the even ones come first. It
// prefetches `fetch` bytes of later tokens, of which there are `known` with these.
static inline __attribute__((always_inline)) void dots(int G, int D, const float *query, const bf16 *const *tokens, int64_t at,
                                                       int64_t fetch, int count, int known, float scale, float *weights) {
    for (int s = 0; s < count; s++) {
        const bf16 *key = tokens[s] + at;
        if (s + FETCHED < known) {
            const char *next = (const char *)(tokens[s + FETCHED] + at);
            for (int64_t line = 0; line < fetch; line += 64) __builtin_prefetch(next + line, 0, 2);
        }
        v8f sums[TOGETHER] = {0};
        for (int i = 0; i < D; i += 16) {
            const v8u pairs = load_8(key + i);
            const v8f even = evens(pairs), odd = odds(pairs);
            for (int g = 0; g < G; g++)
                sums[g] += even * (v8f)load_8(query + g * D + i) + odd * (v8f)load_8(query + g * D + i + 8);
        }
        for (int g = 0; g < G; g++) weights[g * AT_ONCE + s] = scale * sum_8(sums[g]);
    }
}

// Turn one query's scores into e^(x - max). `largest` is the max of earlier tokens, and becomes that of all. Returns the sum
// of the new ones.
static float soften(float *x, int count, float *largest) {
    float most = *largest, total = 0.0f;
    v16f larger = (v16f){0} + most, sums = {0};
    int s = 0;
    for (; s + 16 <= count; s += 16) {
        const v16f y = load_16(x + s);
        larger = chosen_16(y > larger, y, larger);
    }
    most = most_16(larger);
    for (; s < count; s++) most = x[s] > most ? x[s] : most;
    for (s = 0; s + 16 <= count; s += 16) {
        const v16f y = exp_negative_16(load_16(x + s) - most);
        memcpy(x + s, &y, sizeof y);
        sums += y;
    }
    for (; s < count; s++) total += x[s] = exp_negative(x[s] - most);
    *largest = most;
    return total + sum_16(sums);
}

// out[g] = out[g] * shrink[g] + sum_s weights[g][s] value[s], of each 16 dims the even ones first. Sixteen dims of all queries
// at a time, so that their sums fit the registers. `shrink` is NULL for the first tokens, before which `out` has nothing.
static inline __attribute__((always_inline)) void combine(int G, int D, const bf16 *const *tokens, int64_t at, int count,
                                                          const float *weights, const float *shrink, float *out) {
    for (int i = 0; i < D; i += 16) {
        v8f even[TOGETHER] = {0}, odd[TOGETHER] = {0};
        for (int g = 0; shrink && g < G; g++) {
            even[g] = shrink[g] * (v8f)load_8(out + g * D + i);
            odd[g] = shrink[g] * (v8f)load_8(out + g * D + i + 8);
        }
        for (int s = 0; s < count; s++) {
            const v8u pairs = load_8(tokens[s] + at + D + i);
            for (int g = 0; g < G; g++) {
                const float weight = weights[g * AT_ONCE + s];
                even[g] += weight * evens(pairs);
                odd[g] += weight * odds(pairs);
            }
        }
        for (int g = 0; g < G; g++) {
            memcpy(out + g * D + i, &even[g], sizeof even[g]);
            memcpy(out + g * D + i + 8, &odd[g], sizeof odd[g]);
        }
    }
}

static inline __attribute__((always_inline)) void attend_queries(int G, int D, const bf16 *query, const bf16 *const *tokens,
                                                                 int64_t at, int64_t fetch, int count, float scale, bf16 *out) {
    float weights[TOGETHER * AT_ONCE], q[TOGETHER * MOST_DIMS], sums[TOGETHER * MOST_DIMS];
    float totals[TOGETHER], most[TOGETHER], shrink[TOGETHER];
    for (int i = 0; i < G * D; i++) q[i / 16 * 16 + i % 2 * 8 + i % 16 / 2] = wide(query[i]);
    for (int g = 0; g < G; g++) {
        most[g] = -INFINITY;
        totals[g] = 0.0f;
    }
    for (int first = 0; first < count; first += AT_ONCE) {
        const int some = count - first < AT_ONCE ? count - first : AT_ONCE;
        dots(G, D, q, tokens + first, at, fetch, some, count - first, scale, weights);
        for (int g = 0; g < G; g++) {
            const float before = most[g], total = soften(weights + g * AT_ONCE, some, &most[g]);
            // Not of -inf minus -inf, which is not-a-number. Not-a-number among the scores stays in the sums.
            shrink[g] = first == 0 || !(before < most[g]) ? 1.0f : exp_negative(before - most[g]);
            totals[g] = totals[g] * shrink[g] + total;
        }
        combine(G, D, tokens + first, at, some, weights, first ? shrink : 0, sums);
    }
    for (int g = 0; g < G; g++)
        for (int i = 0; i < D; i++) out[g * D + i] = narrow(sums[g * D + i / 16 * 16 + i % 2 * 8 + i % 16 / 2] / totals[g]);
}

static void attend_known(int G, int D, const bf16 *query, const bf16 *const *tokens, int64_t at, int64_t fetch, int count,
                         float scale, bf16 *out) {
    switch (G) {
    case 1: attend_queries(1, D, query, tokens, at, fetch, count, scale, out); break;
    case 2: attend_queries(2, D, query, tokens, at, fetch, count, scale, out); break;
    case 3: attend_queries(3, D, query, tokens, at, fetch, count, scale, out); break;
    case 4: attend_queries(4, D, query, tokens, at, fetch, count, scale, out); break;
    case 5: attend_queries(5, D, query, tokens, at, fetch, count, scale, out); break;
    case 6: attend_queries(6, D, query, tokens, at, fetch, count, scale, out); break;
    }
}

#endif

void dsa_attend_row(const bf16 *query, const bf16 *plane, int64_t page_stride, const int64_t *block_table,
                    const int32_t *selected, int begin, int count, int first, int last, int Hkv, int G, int D, float scale,
                    bf16 *out, void *scratch) {
    const int n = padded(count);
    const bf16 **tokens = scratch;
    float *weights = (float *)(tokens + n);
    const int64_t size = (int64_t)Hkv * 2 * D;
    // The address of each token's heads. Beyond the end the last token is repeated, with weight 0.
    if (selected) {
        for (int s = 0; s < count; s++) {
            uint32_t position = (uint32_t)selected[s];
            const char *page = (const char *)plane + block_table[position / PAGE] * page_stride;
            tokens[s] = (const bf16 *)page + (int64_t)(position % PAGE) * size;
        }
    } else {
        for (int s = 0; s < count; s++) {
            const int position = begin + s;
            const char *page = (const char *)plane + block_table[position / PAGE] * page_stride;
            tokens[s] = (const bf16 *)page + (int64_t)(position % PAGE) * size;
        }
    }
    for (int s = count; s < n; s++) tokens[s] = tokens[count - 1];
    for (int s = 0; s < count && s < FETCHED; s++) { // `dots` prefetches the later tokens
        const char *token = (const char *)(tokens[s] + (int64_t)first * 2 * D);
        for (int64_t line = 0; line < (last - first) * 4 * (int64_t)D; line += 64) __builtin_prefetch(token + line, 0, 2);
    }
    for (int head = first; head < last; head++) {
        const bf16 *q = query + (int64_t)head * G * D;
        bf16 *o = out + (int64_t)head * G * D;
        const int64_t at = (int64_t)head * 2 * D;
        // The first head prefetches all heads of a token from memory; the other heads find them in the cache.
        const int64_t fetch = (head == first ? last - first : 1) * 4 * (int64_t)D;
        const int turns = (G + TOGETHER - 1) / TOGETHER, together = (G + turns - 1) / turns; // 8 as 4 and 4
#ifdef DSA_AVX512
        if (D % 32 == 0 && D <= 128) {
            bf16 *soft = (bf16 *)(weights + (int64_t)n * TOGETHER);
            float *totals = (float *)(soft + (int64_t)n * TOGETHER);
            for (int g = 0; g < G; g += together)
                attend_known(G - g < together ? G - g : together, D / 32, q + g * D, tokens, at, fetch, count, n, scale, o + g * D,
                             weights, soft, totals);
            continue;
        }
#else
        if (D % 16 == 0 && D <= MOST_DIMS) {
            for (int g = 0; g < G; g += together)
                attend_known(G - g < together ? G - g : together, D, q + g * D, tokens, at, fetch, count, scale, o + g * D);
            continue;
        }
#endif
        attend_head(q, tokens, at, count, G, D, scale, o, weights);
    }
}
