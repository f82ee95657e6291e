// What the kernels share: conversions between bfloat16 and float32, and the exponential.
#ifndef DSA_NUMBERS_H
#define DSA_NUMBERS_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512BW__)
#define DSA_AVX512 1
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef uint16_t bf16; // the upper half of a float32

// Vectors that the compiler splits for any processor.
typedef float v8f __attribute__((vector_size(32)));
typedef uint32_t v8u __attribute__((vector_size(32)));
typedef float v16f __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));

static inline v8u load_8(const void *at) {
    v8u all;
    memcpy(&all, at, sizeof all);
    return all;
}

static inline v16f load_16(const float *at) {
    v16f all;
    memcpy(&all, at, sizeof all);
    return all;
}

// Of 16 neighbouring bfloat16, those at even and at odd places.
static inline v8f evens(v8u pairs) { return (v8f)(pairs << 16); }
static inline v8f odds(v8u pairs) { return (v8f)(pairs & 0xffff0000); }

static inline float sum_8(v8f x) {
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

static inline float sum_16(v16f x) {
    v8f two[2];
    memcpy(two, &x, sizeof two);
    return sum_8(two[0] + two[1]);
}

// Where `mask` is set x, else y.
static inline v16f chosen_16(v16i mask, v16f x, v16f y) { return (v16f)((mask & (v16i)x) | (~mask & (v16i)y)); }

static inline float most_16(v16f x) {
    float most = x[0];
    for (int i = 1; i < 16; i++) most = x[i] > most ? x[i] : most;
    return most;
}

static inline float wide(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

// Round to the nearest bfloat16, ties to even. Not-a-number stays not-a-number.
static inline bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// e^x for x <= 0, with a relative error of at most 2^-21; 0 below about -87. 2^f is the polynomial of Cephes' exp2f
// (S. Moshier).
static inline float exp_negative(float x) {
    float t = x * 1.44269504f;
    t = t < -126.0f ? -126.0f : t;
    float n = (float)(int)(t - 0.5f); // rounds towards zero, which is to the nearest for t <= 0
    float f = t - n;
    float p = 1.535336188e-4f;
    p = p * f + 1.339887440e-3f;
    p = p * f + 9.618437357e-3f;
    p = p * f + 5.550332548e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472028e-1f;
    p = p * f + 1.0f;
    uint32_t bits = (uint32_t)((int)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : p * power;
}

// exp_negative of 16 numbers.
static inline v16f exp_negative_16(v16f x) {
    v16f t = x * 1.44269504f, lowest = (v16f){0} - 126.0f;
    t = chosen_16(t < lowest, lowest, t);
    v16i whole = __builtin_convertvector(t - 0.5f, v16i);
    v16f f = t - __builtin_convertvector(whole, v16f);
    v16f p = f * 1.535336188e-4f + 1.339887440e-3f;
    p = p * f + 9.618437357e-3f;
    p = p * f + 5.550332548e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472028e-1f;
    p = p * f + 1.0f;
    v16f power = (v16f)((whole + 127) << 23);
    return chosen_16(x < (v16f){0} - 87.0f, (v16f){0}, p * power);
}

#ifdef DSA_AVX512
static inline __m512 exp_negative16(__m512 x) {
    __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    const __mmask16 there = _mm512_cmp_ps_mask(t, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ); // so that not-a-number stays
    __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(t, n);
    __m512 p = _mm512_set1_ps(1.535336188e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.339887440e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618437357e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550332548e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402264791e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931472028e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(there, p, n);
}
#endif

#endif
