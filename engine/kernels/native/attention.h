// Attention of one row, in pieces: index scores, selection, attention over the selected. The operations over whole
// tiles (tiles.c) and the step of decoding are made of them.
//
// A plane is one layer's part of the paged cache: page p begins at `plane + p * page_stride` bytes, and a request's
// position c lies in page `block_table[c / 64]` at offset c % 64.
#ifndef DSA_ATTENTION_H
#define DSA_ATTENTION_H

#include <stdint.h>

#include "numbers.h"

enum { PAGE = 64 };

// ---- index keys and queries in 8 bits ------------------------------------------------------------------------
//
// x is kept as the nearest integers n of x / s with s = max|x| / 127, one scale a vector. A page of keys is
// [4 groups of 16 tokens][d / 4][16 tokens][4 dims] bytes of n + 128, and 64 float32 scales after them: what
// vpdpbusd multiplies lies together. d is a multiple of 4, at most 512.

// One vector x[d] -> n[d]; returns s.
float dsa_quantise(const bf16 *x, int d, int8_t *n);

// Store one key at `offset` of a page.
void dsa_index_key_write(uint8_t *page, int offset, const bf16 *key, int d);

// One row's query [H][d] and head weights [H], made ready: n [H][d]; its scales go into `weights` [H]; and since keys
// are stored as n + 128, `begins` [H] is what the sums of products start from, -128 times the sum of n.
void dsa_index_query(const bf16 *query, const float *head_weights, int H, int d, int8_t *n, float *weights,
                     int32_t *begins);

// scores[c] = sum_h weights[h] relu(query[h] . key[c]) for the positions of pages `first` to `last` - 1: 64 a page,
// scores[0] being position 0. The row as dsa_index_query made it.
void dsa_index_scores_row(const int8_t *query, const float *weights, const int32_t *begins, const uint8_t *plane,
                          int64_t page_stride, const int64_t *block_table, int first, int last, int H, int d,
                          float *scores);

// ---- selection -----------------------------------------------------------------------------------------------

// The positions of the `top_k` largest of scores[n], ascending, into selected[top_k]; returns how many (fewer only
// where fewer are above -inf; not-a-number is never selected). Of equal scores at the edge the later position wins.
// `scratch` holds 2 * (n + 16) floats.
int dsa_select_row(const float *scores, int n, int top_k, int32_t *selected, float *scratch);

// ---- attention of one row ------------------------------------------------------------------------------------

// Bytes of scratch for dsa_attend_row over `count` tokens.
int64_t dsa_attend_scratch(int count);

// softmax(scale * q . k) v over the tokens at selected[count], or at positions 0 to count - 1 where that is NULL;
// count >= 1. KV heads `first` to `last` - 1 of Hkv. query, out [Hkv][G][D]; kv plane [64][Hkv][2][D] a page.
void dsa_attend_row(const bf16 *query, const bf16 *plane, int64_t page_stride, const int64_t *block_table,
                    const int32_t *selected, int count, int first, int last, int Hkv, int G, int D, float scale,
                    bf16 *out, void *scratch);

#endif
