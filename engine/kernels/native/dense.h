// Attention of many rows of one request over its whole context, one KV head: a tile of products on the matrix units.
#ifndef DSA_DENSE_H
#define DSA_DENSE_H

#include "attention.h"

// Whether dsa_dense_block is made for heads of D dims on this processor.
int dsa_dense_known(int D);

// Rows of a block, for G queries a KV head.
int dsa_dense_rows(int G);

// query, out: [rows][G][D] at `row_size` numbers a row; positions [rows]; allowed [rows][context] or NULL: causal.
void dsa_dense_block(const bf16 *query, int64_t row_size, const bf16 *plane, int64_t page_stride,
                     const int64_t *block_table, const int64_t *positions, const uint8_t *allowed, int64_t context,
                     int rows, int head, int Hkv, int G, int D, float scale, bf16 *out);

#endif
