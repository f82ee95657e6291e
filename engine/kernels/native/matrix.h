// Products of a few rows of activations with a weight that is not unpacked: packed in 4 or 8 bits, or bfloat16.
//
// A weight is stored in tiles of 16 outputs, one output in each lane of a vector, so that sums over the inputs need no
// shuffles. Inputs form groups of 32, as in GGUF. Each group has a scale (and an offset) for each output. `packing.py`
// makes this layout.
#ifndef DSA_MATRIX_H
#define DSA_MATRIX_H

#include <stddef.h>
#include <stdint.h>

#include "numbers.h"

enum { DSA_LANES = 16, DSA_GROUP = 32 };

// value = scale * number + offset. DSA_Q4 is GGUF's Q4_1, and Q4_0 with offset -8 * scale. DSA_Q8 is GGUF's Q8_0, which
// has no offset.
enum dsa_kind { DSA_BF16 = 0, DSA_Q4 = 1, DSA_Q8 = 2 };

struct dsa_matrix {
    const uint8_t *data; // 64-byte aligned, outputs padded to a multiple of 16 with zeros
    int32_t kind, outputs, inputs; // inputs: a multiple of 32
};

// Rows of activations, rounded to bfloat16.
struct dsa_rows {
    bf16 *values; // [count, inputs]
    float *sums;  // [count, inputs / 32]: the sum of each group of rounded values; an offset is multiplied with it
    int32_t count, inputs;
};

static inline int dsa_tiles(const struct dsa_matrix *w) { return (w->outputs + DSA_LANES - 1) / DSA_LANES; }

// Set row `at` to the activations x [inputs].
void dsa_set_row(struct dsa_rows *rows, int at, const float *x);

// Set one group of row `at` to x[32].
void dsa_set_group(struct dsa_rows *rows, int at, int group, const float *x);

// Compute the sums of row `at` from its values.
void dsa_sum_row(struct dsa_rows *rows, int at);

// out[r * stride + o] = sum_i x[r, i] * w[o, i] for the outputs of tiles first to last - 1, with float32 sums. It
// writes whole tiles, so `out` must have room for the outputs rounded up to 16.
void dsa_product(const struct dsa_matrix *w, const struct dsa_rows *x, float *out, size_t stride, int first, int last);

// Unpack the weights of one output, exactly, to out [inputs].
void dsa_weights(const struct dsa_matrix *w, int output, float *out);

#endif
