// The operations of `engine.kernels.interface.attention` over whole tiles: R requests of Q rows each, where R or Q is
// 1. That module defines the letters, the formulas and the layout of tensors. All tensors are contiguous except the
// planes, see attention.h. The threads of the pool share the rows.
#ifndef DSA_TILES_H
#define DSA_TILES_H

#include "attention.h"

// The shape of a tile and of the paged cache that it reads.
struct dsa_tile {
    int64_t requests, rows, pages;  // R, Q, P
    const int64_t *block_table;     // [R][P]
    const int64_t *positions;       // [R][Q]
};

// Store keys [rows][d] in a plane; key t goes to (pages[t], offsets[t]).
void dsa_index_keys_write(uint8_t *plane, int64_t page_stride, const int64_t *pages, const int64_t *offsets,
                          const bf16 *keys, int rows, int d);

// Compute the scores [R][Q][C]; a score is -inf if c > the row's position.
void dsa_index_scores(const struct dsa_tile *tile, const bf16 *query, const float *head_weights, const uint8_t *plane,
                      int64_t page_stride, int H, int d, float *scores);

// Select positions: scores [rows][C] -> selected [rows][K]; unused places are -1.
void dsa_select(const float *scores, const int64_t *index_top_k, int64_t rows, int64_t context, int64_t width,
                int64_t *selected);

// Attention over the positions in selected [R][Q][K]; -1 is no position.
void dsa_attend_selected(const struct dsa_tile *tile, const bf16 *query, const bf16 *plane, int64_t page_stride,
                         const int64_t *selected, int64_t width, int Hkv, int G, int D, float scale, bf16 *out);

// Attention over every position up to the row's own; if `allowed` [R][Q][C] is not NULL, over the positions it permits.
void dsa_attend_dense(const struct dsa_tile *tile, const bf16 *query, const bf16 *plane, int64_t page_stride,
                      const uint8_t *allowed, int Hkv, int G, int D, float scale, bf16 *out);

// Score, select and attend row by row, so that the scores and selections of a whole tile never need memory.
void dsa_attend_sparse(const struct dsa_tile *tile, const bf16 *query, const bf16 *index_query,
                       const float *head_weights, const bf16 *kv_plane, int64_t kv_stride, const uint8_t *key_plane,
                       int64_t key_stride, const int64_t *index_top_k, int H, int d, int Hkv, int G, int D, float scale,
                       bf16 *out, int32_t *flaws);

#endif
