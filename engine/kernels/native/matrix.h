// Products of a few rows of activations with a weight that stays as it is stored: packed in 4 or 8 bits, or bfloat16.
//
// A weight lies in tiles of 16 outputs, one a lane of a vector, so that sums over the inputs need no shuffles. Inputs
// come in groups of 32, as in GGUF, each with a scale (and an offset) an output. See `packing.py`, which lays them out.
#ifndef DSA_MATRIX_H
#define DSA_MATRIX_H

#include <stddef.h>
#include <stdint.h>

#include "numbers.h"

enum { DSA_LANES = 16, DSA_GROUP = 32 };

// value = scale * number + offset; GGUF's Q4_1, and Q4_0 with offset -8 * scale. DSA_Q8 is Q8_0, and has no offset.
enum dsa_kind { DSA_BF16 = 0, DSA_Q4 = 1, DSA_Q8 = 2 };

struct dsa_matrix {
    const uint8_t *data; // 64-byte aligned, outputs padded to a multiple of 16 with zeros
    int32_t kind, outputs, inputs; // inputs: a multiple of 32
};

// Rows of activations, rounded to bfloat16.
struct dsa_rows {
    bf16 *values; // [count, inputs]
    float *sums;  // [count, inputs / 32], of each group of the rounded values: what an offset is multiplied with
    int32_t count, inputs;
};

static inline int dsa_tiles(const struct dsa_matrix *w) { return (w->outputs + DSA_LANES - 1) / DSA_LANES; }

// One row of activations: float32 [inputs] to row `at` of `rows`.
void dsa_set_row(struct dsa_rows *rows, int at, const float *x);

// One group of it: x[32].
void dsa_set_group(struct dsa_rows *rows, int at, int group, const float *x);

// The sums of row `at`, whose values are there.
void dsa_sum_row(struct dsa_rows *rows, int at);

// out[r * stride + o] = sum_i x[r, i] * w[o, i] for the outputs of tiles first to last - 1; float32 sums. Writes whole
// tiles: `out` has room for the outputs rounded up to 16.
void dsa_product(const struct dsa_matrix *w, const struct dsa_rows *x, float *out, size_t stride, int first, int last);

// One output's weights, exact in float32: [inputs].
void dsa_weights(const struct dsa_matrix *w, int output, float *out);

#endif
