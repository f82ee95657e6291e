// Attention of many rows of one request over its whole context, for one KV head, as tiles of matrix products.
#ifndef DSA_DENSE_H
#define DSA_DENSE_H

#include "attention.h"

// Whether dsa_dense_block works for heads of D dims on this processor.
int dsa_dense_known(int D);

// How many rows a block has, for G queries in a KV head.
int dsa_dense_rows(int G);

// query, out: [rows][G][D], with `row_size` numbers from row to row; positions [rows]; allowed [rows][context], or NULL
// for causal attention, over the last `window` positions only unless that is 0.
void dsa_dense_block(const bf16 *query, int64_t row_size, const bf16 *plane, int64_t page_stride,
                     const int64_t *block_table, const int64_t *positions, const uint8_t *allowed, int64_t context,
                     int64_t window, int rows, int head, int Hkv, int G, int D, float scale, bf16 *out);

// The same over chosen tokens: chosen [count], positions; visible [rows][words], a bit for each that a row sees, and zeros after
// the last. Each row sees one at least.
void dsa_chosen_block(const bf16 *query, int64_t row_size, const bf16 *plane, int64_t page_stride, const int64_t *block_table,
                      const int32_t *chosen, int count, const uint64_t *visible, int64_t words, int rows, int head, int Hkv, int G,
                      int D, float scale, bf16 *out);

#endif
