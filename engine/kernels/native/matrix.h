// Products of a few rows of activations with a weight that is not unpacked: packed in 4 to 8 bits, or bfloat16.
//
// A weight is stored in tiles of 16 outputs, one output in each lane of a vector, so that sums over the inputs need no
// shuffles. Inputs form groups of 32, as in GGUF. `packing.py` makes this layout.
#ifndef DSA_MATRIX_H
#define DSA_MATRIX_H

#include <stddef.h>
#include <stdint.h>

#include "numbers.h"

enum { DSA_LANES = 16, DSA_GROUP = 32 };

// value = scale * number + offset. DSA_Q4 is GGUF's Q4_1, and Q4_0 with offset -8 * scale. DSA_Q8 is GGUF's Q8_0, which
// has no offset. The others are GGUF's formats of these names. integers.h says how all but DSA_BF16 lie.
enum dsa_kind { DSA_BF16 = 0, DSA_Q4 = 1, DSA_Q8 = 2, DSA_Q4_K = 3, DSA_Q5_K = 4, DSA_Q6_K = 5 };

// A weight, or one of several parts of a weight that have different kinds.
struct dsa_matrix {
    const uint8_t *data;           // 64-byte aligned, outputs padded to a multiple of 16 with zeros
    int32_t kind, outputs, inputs; // of this part; inputs: a multiple of 32, with super-blocks of 256
    int32_t alike;                 // whether a row is summed in the same order beside any number of other rows
    const struct dsa_matrix *next; // the outputs after these; NULL: none. All parts but the last are whole tiles
};

// Rows of activations, rounded to bfloat16, and for integer weights to 16 bits, too.
struct dsa_rows {
    bf16 *values; // [count, inputs]; dsa_set_group does not set them if there is `upper`
    int32_t count, inputs;
    // [count, inputs / 32, 2, 32]: value = scale * (256 * upper + lower); without AVX-512 [count, inputs] of 16 bits, in the
    // order of integers.c. NULL if no weight needs them, as all that follows
    int8_t *integers;
    float *scales;       // [count, inputs / 32]
    float *integer_sums; // [count, inputs / 32]: scale * the group's sum of integers
    int32_t *begins;     // [count, inputs / 16]: -32 * the sum of integers of half a group
    // [count / 16, inputs / 32, 16, 32], with count rounded up to whole blocks of 16: the rows as tiles for amx.h. NULL unless
    // they are multiplied with AMX; integers are not made then
    bf16 *upper;
    bf16 *lower; // likewise: what rounding to `upper` left. NULL if it left nothing, or if all weights are bfloat16
};

// The tiles of all parts, and their outputs.
static inline int dsa_tiles(const struct dsa_matrix *w) {
    int tiles = 0;
    for (; w; w = w->next) tiles += (w->outputs + DSA_LANES - 1) / DSA_LANES;
    return tiles;
}

static inline int dsa_outputs(const struct dsa_matrix *w) {
    int outputs = 0;
    for (; w; w = w->next) outputs += w->outputs;
    return outputs;
}

// Whether a part needs the activations as integers.
int dsa_needs_integers(const struct dsa_matrix *w);

// Set row `at` to the activations x [inputs].
void dsa_set_row(struct dsa_rows *rows, int at, const float *x);

// Set one group of row `at` to x[32].
void dsa_set_group(struct dsa_rows *rows, int at, int group, const float *x);

// Compute what else row `at` has from its values.
void dsa_finish_row(struct dsa_rows *rows, int at);

// A thread has a multiple of so many tiles.
int dsa_product_unit(const struct dsa_matrix *w, const struct dsa_rows *rows);

// out[r * stride + o - 16 * first] = sum_i x[r, i] * w[o, i] for the outputs of tiles first to last - 1, with float32 sums. It
// writes whole tiles, so `out` must have room for the outputs rounded up to 16.
void dsa_product(const struct dsa_matrix *w, const struct dsa_rows *x, float *out, size_t stride, int first, int last);

// Unpack the weights of one output, exactly, to out [inputs].
void dsa_weights(const struct dsa_matrix *w, int output, float *out);

#endif
