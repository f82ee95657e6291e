// Attention of many rows of one request over its whole context, for one KV head, as tiles of matrix products.
#ifndef DSA_DENSE_H
#define DSA_DENSE_H

#include "attention.h"

// Whether dsa_dense_block works for heads of D dims on this processor.
int dsa_dense_known(int D);

// How many rows a block has, for G queries in a KV head.
int dsa_dense_rows(int G);

// Rows of one request, as one KV head attends with them.
struct dsa_block {
    const bf16 *query; // [rows][G][D], with `row_size` numbers from row to row; `out` likewise
    bf16 *out;
    int64_t row_size;
    const bf16 *plane; // [pages][64][Hkv][2][D], with `page_stride` bytes from page to page
    int64_t page_stride;
    const int64_t *block_table; // the request's pages
    int rows, head, Hkv, G, D;
    float scale; // of scores, before the softmax
};

// Attend over all tokens up to each row's own position, or over those that `allowed` permits.
//
// positions [rows]; allowed [rows][context], or NULL; window: so many positions are seen at most, 0 is all.
void dsa_dense_block(const struct dsa_block *block, const int64_t *positions, const uint8_t *allowed, int64_t context,
                     int64_t window);

// The same over chosen tokens: chosen [count], positions; visible [rows][words], a bit for each that a row sees, and zeros after
// the last. Each row sees one at least.
void dsa_chosen_block(const struct dsa_block *block, const int32_t *chosen, int count, const uint64_t *visible, int64_t words);

#endif
