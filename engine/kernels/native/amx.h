// Products of many rows with Intel AMX, whose tiles multiply bfloat16 and sum in float32. matrix.c calls them.
//
// bfloat16 has 8 significant bits, too few for activations and for unpacked weights. So each number is the sum of two:
// `upper`, the number rounded or cut to bfloat16, and `lower`, the nearest to what is left. A product is upper * upper +
// lower * upper + upper * lower. Without lower * lower and what `lower` rounds, each product is within 2^-14, and sums of many
// are within 5e-6 (measured; 2e-5 with activations in 16 bits).
#ifndef DSA_AMX_H
#define DSA_AMX_H

#include "matrix.h"

#if defined(DSA_AVX512) && defined(__linux__)
#define DSA_AMX __attribute__((target("amx-tile,amx-bf16")))
#endif

// DSA_BLOCK: rows of a tile of activations. DSA_SPLIT: bytes of a tile of activations or weights, 32 inputs each.
enum { DSA_BLOCK = 16, DSA_SPLIT = 1024 };

// Turn AMX on or off for the products after this call; returns whether it is on. It is on wherever it may be used.
int dsa_use_amx(int wanted);

// Whether it is on.
int dsa_uses_amx(void);

// Whether so many rows are multiplied with AMX.
int dsa_amx_rows(int count);

// Set all tiles to 16 rows of 64 bytes. From then until the end this thread has their content to save and restore.
void dsa_amx_begin(void);
void dsa_amx_end(void);

// c[rows][columns] = a[rows][pairs] b[pairs][columns], added to c with `add`; between begin and end. a has pairs of bfloat16 in a
// row, `a_row` numbers apart; each lane of b has a pair. rows and pairs: multiples of 16, columns: of 32.
void dsa_amx_multiply(int rows, int columns, int pairs, int add, const bf16 *a, int a_row, const uint32_t *b, int b_row,
                      float *c, int c_row);

// How many tiles of a weight a thread should take at once, so that all threads have about the same.
int dsa_amx_unit(int tiles, int threads);

// Multiply `tiles` tiles of `bytes` bytes each, which begin at `weights`, with all rows; out[r * stride] is the first output of
// row r. The rows have `upper`, and `lower` if they are not exact.
void dsa_amx_product(int kind, const uint8_t *weights, size_t bytes, int tiles, const struct dsa_rows *x, float *out,
                     size_t stride);

#endif
