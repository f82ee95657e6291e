// Products of activations in 16 bits with weights in 4 to 8 bits: GGUF's Q4_0, Q4_1, Q8_0, Q4_K, Q5_K and Q6_K. matrix.c
// calls them. `packing.py` makes the layouts of tiles.
//
// Each group of 32 inputs is some words of 64 bytes. A word has a lane of four bytes for each output. With 8 bits the
// bytes of word w are inputs 4 w to 4 w + 3, with 128 added. Else there are four words first: the lower nibbles of word w
// are inputs 8 w to 8 w + 3 in the order of the bytes, the upper ones 8 w + 4 to 8 w + 7. Q5_K has one word more with the
// fifth bits: bit j of a byte belongs to the group's inputs 4 j to 4 j + 3. Q6_K has two more with the upper two bits:
// bits 2 t and 2 t + 1 of word h belong to inputs 16 h + 4 t to 16 h + 4 t + 3.
//
// A tile of Q4 or Q8 begins with the scales of all groups (16 float16 for each group), with Q4 also all offsets, and zeros
// up to a multiple of 64 bytes. Q4_K, Q5_K and Q6_K have super-blocks of 256 inputs, one after the other: 32 bytes of
// scales of scales and 32 of scales of offsets (float16, an output each; zeros where a kind has no offsets), 256 bytes of
// small scales, and eight groups. Q4_K and Q5_K have for each group 16 small scales and 16 small offsets, unsigned; Q6_K
// has twice 16 signed scales, one for each half of the group.
#ifndef DSA_INTEGERS_H
#define DSA_INTEGERS_H

#include "matrix.h"

static inline int dsa_is_integer(int kind) { return kind != DSA_BF16; }

// Bytes of a tile with so many inputs, a multiple of 32, in super-blocks of 256.
size_t dsa_tile_bytes(int kind, int inputs);

// Round 32 activations to 16 bits, as group `group` of row `at`.
void dsa_integer_set_group(struct dsa_rows *rows, int at, int group, const float *x);

// Multiply a tile, whose weights begin at `weights`, with all rows; out[r * stride] is the tile's first output of row r.
void dsa_integer_tile(int kind, const uint8_t *weights, const struct dsa_rows *x, float *out, size_t stride);

// Unpack groups first to last - 1 of a tile that has `groups` groups, for amx.h: two tiles of bfloat16 for each group, first of
// upper halves and then of lower ones, with a pair of inputs for each output in 16 rows of 64 bytes. With AVX-512 only.
void dsa_integer_split(int kind, const uint8_t *weights, int groups, int first, int last, uint8_t *out);

// Unpack one output (`lane`) of a tile, exactly, to out [inputs].
void dsa_integer_weights(int kind, const uint8_t *weights, int lane, int inputs, float *out);

// Lay out a matrix of GGUF's super-blocks: `rows` [outputs], `row_bytes` each -> tiles. It is the same as pack_superblocks of
// packing.py, which is slower.
void dsa_super_pack(int kind, const uint8_t *rows, int64_t row_bytes, int outputs, int inputs, uint8_t *out);

#endif
