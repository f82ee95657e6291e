// Selects the index_top_k best scores of a row without sorting. A bisection over the bits of floats, which have the same
// order as the floats, finds the k-th largest score; each of its steps counts a vector of scores in one instruction.
// For a long row, a sample of the scores first gives a threshold. It leaves little more than index_top_k scores to
// bisect.
#include <float.h>

#include "attention.h"

// Maps integers to floats in the same order: -FLT_MAX .. -0 = 0 .. FLT_MAX.
static inline float from_rank(int32_t rank) {
    int32_t bits = rank < 0 ? (int32_t)(0x80000000u | (uint32_t)-rank) : rank;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline int32_t to_rank(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits < 0 ? -(bits & 0x7fffffff) : bits;
}

enum { HALVES = 12 };

// How many numbers are >= t, in every step-th vector of 16 numbers of x[n]. n is a multiple of 16, or step is 1.
static int count_at_least(const float *x, int n, int step, float t) {
    int count = 0;
#ifdef DSA_AVX512
    __m512 edge = _mm512_set1_ps(t);
    int i = 0;
    for (; i + 16 <= n; i += 16 * step)
        count += __builtin_popcount(_mm512_cmp_ps_mask(_mm512_loadu_ps(x + i), edge, _CMP_GE_OQ));
    if (step == 1 && i < n) {
        __mmask16 rest = (__mmask16)((1u << (n - i)) - 1);
        count += __builtin_popcount(_mm512_mask_cmp_ps_mask(rest, _mm512_maskz_loadu_ps(rest, x + i), edge, _CMP_GE_OQ));
    }
#else
    v16i found = {0};
    int i = 0;
    for (; i + 16 <= n; i += 16 * step) found -= load_16(x + i) >= t; // true is -1
    for (int j = 0; j < 16; j++) count += found[j];
    for (; i < n; i++) count += x[i] >= t;
#endif
    return count;
}

// Find the largest t in [low, high] with count_at_least(t) >= wanted, or any such t with at most `enough`. `count` is
// count_at_least(low), which must be >= wanted. Returns count_at_least(t).
static int bisect(const float *x, int n, int step, int wanted, int enough, int32_t low, int32_t high, int count,
                  float *threshold) {
    for (int turn = 0; count > enough && low < high; turn++) {
        int32_t middle = (int32_t)(((int64_t)low + high + 1) >> 1);
        if (turn < HALVES) { // scores do not crowd by sign or exponent, so first halve the interval of values
            int32_t half = to_rank(0.5f * from_rank(low) + 0.5f * from_rank(high));
            if (low < half && half <= high) middle = half;
        }
        int found = count_at_least(x, n, step, from_rank(middle));
        if (found >= wanted) {
            low = middle;
            count = found;
        } else {
            high = middle - 1;
        }
    }
    *threshold = from_rank(low);
    return count;
}

#if defined(__AVX2__) && !defined(DSA_AVX512)
#define DSA_FRONT
// FRONT[mask]: the lanes of 8 that the mask has, in order, a byte each. (pext makes the same, but takes hundreds of cycles on
// Zen 2 and before.)
static uint64_t FRONT[256];

__attribute__((constructor)) static void fill_front(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int lane = 0, at = 0; lane < 8; lane++)
            if (mask >> lane & 1) FRONT[mask] |= (uint64_t)lane << 8 * at++;
}

// Which of 8 scores are >= t: a bit for each.
static inline int reaching(__m256 x, __m256 t) { return _mm256_movemask_ps(_mm256_cmp_ps(x, t, _CMP_GE_OQ)); }

// Where permutevar8x32 takes each lane from, so that those of the mask come first.
static inline __m256i to_front(int mask) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)&FRONT[mask])); }
#endif

// Copy the scores that are >= t, and their positions, in order. Returns how many. Writes up to 15 entries more.
static int thin(const float *scores, int n, float t, float *kept, int32_t *at) {
    int count = 0, i = 0;
#ifdef DSA_AVX512
    __m512 edge = _mm512_set1_ps(t);
    __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + 16 <= n; i += 16) {
        __m512 x = _mm512_loadu_ps(scores + i);
        __mmask16 mask = _mm512_cmp_ps_mask(x, edge, _CMP_GE_OQ);
        // Compress in a register and store it whole: compressing to memory takes a hundred cycles on Zen 4.
        _mm512_storeu_ps(kept + count, _mm512_maskz_compress_ps(mask, x));
        _mm512_storeu_si512(at + count, _mm512_maskz_compress_epi32(mask, index));
        index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
        count += __builtin_popcount(mask);
    }
#elif defined(DSA_FRONT)
    const __m256 edge = _mm256_set1_ps(t);
    __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (; i + 8 <= n; i += 8) {
        const __m256 x = _mm256_loadu_ps(scores + i);
        const int mask = reaching(x, edge);
        const __m256i order = to_front(mask);
        _mm256_storeu_ps(kept + count, _mm256_permutevar8x32_ps(x, order));
        _mm256_storeu_si256((void *)(at + count), _mm256_permutevar8x32_epi32(index, order));
        index = _mm256_add_epi32(index, _mm256_set1_epi32(8));
        count += __builtin_popcount((unsigned)mask);
    }
#endif
    for (; i < n; i++)
        if (scores[i] >= t) {
            kept[count] = scores[i];
            at[count++] = i;
        }
    return count;
}

// The smallest and the largest of x[n]. No number may be below `least`.
static void bounds(const float *x, int n, float least, float *low, float *high) {
    float lows[16], highs[16];
    for (int j = 0; j < 16; j++) {
        lows[j] = FLT_MAX;
        highs[j] = least;
    }
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) {
            lows[j] = x[i + j] < lows[j] ? x[i + j] : lows[j];
            highs[j] = x[i + j] > highs[j] ? x[i + j] : highs[j];
        }
    for (int j = 0; i + j < n; j++) {
        lows[j] = x[i + j] < lows[j] ? x[i + j] : lows[j];
        highs[j] = x[i + j] > highs[j] ? x[i + j] : highs[j];
    }
    *low = FLT_MAX;
    *high = least;
    for (int j = 0; j < 16; j++) {
        *low = lows[j] < *low ? lows[j] : *low;
        *high = highs[j] > *high ? highs[j] : *high;
    }
}

enum { SAMPLE_STEP = 8 }; // every SAMPLE_STEP-th vector of 16 is in the sample

int dsa_select_row(const float *scores, int n, int index_top_k, int32_t *selected, float *scratch) {
    float *kept = scratch;
    int32_t *at = (int32_t *)(scratch + n + 16);
    int count = 0;
    if (n >= 2048 && n >= 3 * index_top_k) {
        // Neighbouring scores are alike, so a sample of whole vectors has a larger error than one of single scores.
        // `wanted` has a margin for that.
        int whole = n & ~15;
        int sampled = (whole / 16 + SAMPLE_STEP - 1) / SAMPLE_STEP * 16;
        int wanted = (int)((int64_t)sampled * index_top_k / n) * 5 / 4 + 24;
        int finite = count_at_least(scores, whole, SAMPLE_STEP, -FLT_MAX);
        if (finite > wanted) {
            float t, low, high;
            bounds(scores, 16, -FLT_MAX, &low, &high); // of a few scores, so that the search begins near them
            int32_t from = to_rank(low), to = to_rank(high);
            if (!(count_at_least(scores, whole, SAMPLE_STEP, low) >= wanted)) from = to_rank(-FLT_MAX);
            if (count_at_least(scores, whole, SAMPLE_STEP, high) >= wanted) to = to_rank(FLT_MAX);
            bisect(scores, whole, SAMPLE_STEP, wanted, wanted + wanted / 8, from, to, finite, &t);
            count = thin(scores, n, t, kept, at);
        }
    }
    if (count < index_top_k) count = thin(scores, n, -FLT_MAX, kept, at); // a short row, or the threshold was too high
    if (count <= index_top_k) {
        memcpy(selected, at, sizeof(int32_t) * (size_t)count);
        return count;
    }
    float edge, low, high;
    bounds(kept, count, -FLT_MAX, &low, &high);
    int reached = bisect(kept, count, 1, index_top_k, index_top_k, to_rank(low), to_rank(high), count, &edge);
    // More than index_top_k scores reach the edge only if several equal it. The earliest of these are left out.
    int spare = reached - index_top_k, made = 0, i = 0;
#ifdef DSA_AVX512
    if (spare == 0)
        for (; i + 16 <= count && made + 16 <= index_top_k; i += 16) {
            __mmask16 mask = _mm512_cmp_ps_mask(_mm512_loadu_ps(kept + i), _mm512_set1_ps(edge), _CMP_GE_OQ);
            _mm512_storeu_si512(selected + made, _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(at + i)));
            made += __builtin_popcount(mask);
        }
#elif defined(DSA_FRONT)
    if (spare == 0)
        for (; i + 8 <= count && made + 8 <= index_top_k; i += 8) {
            const int mask = reaching(_mm256_loadu_ps(kept + i), _mm256_set1_ps(edge));
            const __m256i from = _mm256_loadu_si256((const void *)(at + i));
            _mm256_storeu_si256((void *)(selected + made), _mm256_permutevar8x32_epi32(from, to_front(mask)));
            made += __builtin_popcount((unsigned)mask);
        }
#endif
    for (; i < count && made < index_top_k; i++) {
        if (kept[i] == edge && spare > 0) spare--;
        else if (kept[i] >= edge) selected[made++] = at[i];
    }
    return made;
}

enum { EMPTY = 1, SHORT = 2, OUTSIDE = 4, REPEATED = 8 };

int32_t dsa_selection_flaws(const int32_t *selected, int found, int wanted, int first, int last) {
    if (found == 0) return EMPTY;
    int32_t outside = 0, unordered = 0;
    for (int i = 0; i < found; i++) outside |= (selected[i] < first) | (selected[i] >= last);
    for (int i = 1; i < found; i++) unordered |= selected[i] <= selected[i - 1];
    return (found < wanted ? SHORT : 0) | (outside ? OUTSIDE : 0) | (unordered ? REPEATED : 0);
}
