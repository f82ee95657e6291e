// Products of activations in 8 bits with weights in super-blocks: GGUF's Q4_K, Q5_K and Q6_K. matrix.c calls them.
//
// A super-block is 256 inputs of 16 outputs: 32 bytes of scales of scales and 32 of scales of offsets (float16, an output
// each; zeros where a kind has no offsets), 256 bytes of small scales, and eight groups of 32 inputs. Q4_K and Q5_K have
// for each group 16 scales and 16 offsets, unsigned; Q6_K has twice 16 signed scales, one for each half of the group.
// A group is four words of 64 bytes, then one word with the fifth bits (Q5_K) or two with the upper two bits (Q6_K).
// A word has a lane of four bytes for each output. The lower nibbles of word w are inputs 8 w to 8 w + 3 in the order of
// the bytes, the upper ones 8 w + 4 to 8 w + 7. Bit j of a byte of the fifth bits belongs to the group's inputs 4 j to
// 4 j + 3; bits 2 t and 2 t + 1 of word h of the upper bits belong to inputs 16 h + 4 t to 16 h + 4 t + 3.
#ifndef DSA_SUPERBLOCK_H
#define DSA_SUPERBLOCK_H

#include "matrix.h"

static inline int dsa_is_super(int kind) { return kind == DSA_Q4_K || kind == DSA_Q5_K || kind == DSA_Q6_K; }

// Bytes of 16 outputs with so many inputs, a multiple of 256.
size_t dsa_super_bytes(int kind, int inputs);

// Round 32 activations to 8 bits, as group `group` of row `at`.
void dsa_super_set_group(struct dsa_rows *rows, int at, int group, const float *x);

// Multiply a tile, whose weights begin at `weights`, with all rows; out[r * stride] is the tile's first output of row r.
void dsa_super_tile(int kind, const uint8_t *weights, const struct dsa_rows *x, float *out, size_t stride);

// Unpack one output (`lane`) of a tile, exactly, to out [inputs].
void dsa_super_weights(int kind, const uint8_t *weights, int lane, int inputs, float *out);

// Lay out a matrix of GGUF's blocks: `rows` [outputs], `row_bytes` each -> tiles. It is the same as pack_superblocks of
// packing.py, which is slower.
void dsa_super_pack(int kind, const uint8_t *rows, int64_t row_bytes, int outputs, int inputs, uint8_t *out);

#endif
