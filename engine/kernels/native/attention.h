// The pieces of attention of one row: index scores, selection, attention over the selected tokens. The operations over
// whole tiles (tiles.c) and the decoding step (step.c) use them.
//
// A plane is one layer's part of the paged cache. Page p begins at `plane + p * page_stride` bytes. A request's
// position c lies in page `block_table[c / 64]` at offset c % 64.
#ifndef DSA_ATTENTION_H
#define DSA_ATTENTION_H

#include <stdint.h>

#include "numbers.h"

enum { PAGE = 64 };

// ---- index keys and queries in 8 bits ------------------------------------------------------------------------
//
// A vector x is stored as the nearest integers n of x / s, with one scale s = max|x| / 127. A page of keys is
// [4 groups of 16 tokens][d / 4][16 tokens][4 dims] bytes of n + 128, then 64 float32 scales. In this layout the
// operands of a vpdpbusd are contiguous. d is a multiple of 4, at most 512.

// Quantise one vector: x[d] -> n[d]. Returns s.
float dsa_quantise(const bf16 *x, int d, int8_t *n);

// Store one key at `offset` of a page.
void dsa_index_key_write(uint8_t *page, int offset, const bf16 *key, int d);

// Prepare one row's query [H][d] and head weights [H] for dsa_index_scores_row. `n` [H][d] gets the quantised query.
// `weights` [H] gets the head weights times the query's scales. `begins` [H] gets the start values of the sums of
// products, -128 times the sum of n, because keys are stored as n + 128.
void dsa_index_query(const bf16 *query, const float *head_weights, int H, int d, int8_t *n, float *weights,
                     int32_t *begins);

// scores[c] = sum_h weights[h] relu(query[h] . key[c]) for the positions of pages `first` to `last` - 1, 64 in a page;
// scores[0] belongs to position 0. `query`, `weights` and `begins` are what dsa_index_query made.
void dsa_index_scores_row(const int8_t *query, const float *weights, const int32_t *begins, const uint8_t *plane,
                          int64_t page_stride, const int64_t *block_table, int first, int last, int H, int d,
                          float *scores);

// ---- selection -----------------------------------------------------------------------------------------------

// Write the positions of the `index_top_k` largest of scores[n] to selected[index_top_k], ascending. Returns how many
// there are: fewer than index_top_k only if fewer scores are above -inf. Not-a-number is never selected. Of equal scores
// at the edge the later position wins. `scratch` has room for 2 * (n + 16) floats.
int dsa_select_row(const float *scores, int n, int index_top_k, int32_t *selected, float *scratch);

// What is wrong with selected[found], which should be `wanted` ascending positions from `first` to `last` - 1: 0, or the
// bits of engine/kernels/interface/selection.py.
int32_t dsa_selection_flaws(const int32_t *selected, int found, int wanted, int first, int last);

// ---- attention of one row ------------------------------------------------------------------------------------

// Bytes of scratch that dsa_attend_row needs for `count` tokens.
int64_t dsa_attend_scratch(int count);

// softmax(scale * q . k) v over the tokens at selected[count], or at `count` positions from `begin` on if `selected` is
// NULL.
// count >= 1. Only KV heads `first` to `last` - 1 of Hkv. query, out [Hkv][G][D]; a page of the plane [64][Hkv][2][D].
void dsa_attend_row(const bf16 *query, const bf16 *plane, int64_t page_stride, const int64_t *block_table,
                    const int32_t *selected, int begin, int count, int first, int last, int Hkv, int G, int D, float scale,
                    bf16 *out, void *scratch);

#endif
