// The operations of `engine.kernels.interface.attention` over whole tiles: R requests of Q rows each, one of the two being 1.
// Letters, formulas and the layout of tensors are there; all tensors are contiguous but for the planes, see
// attention.h. Rows are shared among the threads of the pool.
#ifndef DSA_TILES_H
#define DSA_TILES_H

#include "attention.h"

// The shape of a tile and of the paged cache that it reads.
struct dsa_tile {
    int64_t requests, rows, pages;  // R, Q, P
    const int64_t *block_table;     // [R][P]
    const int64_t *positions;       // [R][Q]
};

// Keys [rows][d] into a plane at (pages[t], offsets[t]).
void dsa_index_keys_write(uint8_t *plane, int64_t page_stride, const int64_t *pages, const int64_t *offsets,
                          const bf16 *keys, int rows, int d);

// [R][Q][C] float32, -inf where c > position.
void dsa_index_scores(const struct dsa_tile *tile, const bf16 *query, const float *head_weights, const uint8_t *plane,
                      int64_t page_stride, int H, int d, float *scores);

// scores [rows][C] -> selected [rows][K], -1 for none.
void dsa_select(const float *scores, const int64_t *top_k, int64_t rows, int64_t context, int64_t width,
                int64_t *selected);

// Attention over selected [R][Q][K] positions, -1 for none.
void dsa_attend_selected(const struct dsa_tile *tile, const bf16 *query, const bf16 *plane, int64_t page_stride,
                         const int64_t *selected, int64_t width, int Hkv, int G, int D, float scale, bf16 *out);

// Attention over every position up to a row's own or, where `allowed` [R][Q][C] is not NULL, over those it permits.
void dsa_attend_dense(const struct dsa_tile *tile, const bf16 *query, const bf16 *plane, int64_t page_stride,
                      const uint8_t *allowed, int Hkv, int G, int D, float scale, bf16 *out);

// Score, select and attend, row by row, so that neither scores nor selections of a tile ever exist.
void dsa_attend_sparse(const struct dsa_tile *tile, const bf16 *query, const bf16 *index_query,
                       const float *head_weights, const bf16 *kv_plane, int64_t kv_stride, const uint8_t *key_plane,
                       int64_t key_stride, const int64_t *top_k, int H, int d, int Hkv, int G, int D, float scale,
                       bf16 *out);

#endif
