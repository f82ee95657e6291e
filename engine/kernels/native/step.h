// One step of a llama-family decoder for any number of rows, all layers in one call. It computes the same as
// `engine/models/gqa/model.py` does with torch, without many small operations. `engine/models/gqa/native.py` fills
// these structures.
#ifndef DSA_STEP_H
#define DSA_STEP_H

#include "matrix.h"

struct dsa_layer {
    struct dsa_matrix qkv, o, gate_up, down;
    struct dsa_matrix index_query, index_key, index_weights; // without data if the model has no indexer
    // The sparse adapter: [adapter_rank, inputs] and [outputs, adapter_rank]; without data if there is none.
    struct dsa_matrix qkv_down, qkv_up, o_down, o_up;
    const float *input_norm, *post_norm;                     // [hidden]
    // Biases of the outputs, and norms of each head's query and key before it is rotated; NULL: none.
    const float *qkv_bias, *o_bias, *gate_up_bias, *down_bias;
    const float *q_norm, *k_norm;                            // [head_dim]
    const float *key_norm_weight, *key_norm_bias;            // [index_dim]
    uint8_t *kv_plane, *index_plane;                         // planes of the paged cache, see attention.h
    int64_t window;                                          // so many positions are seen by a row; 0: all up to its own
};

struct dsa_model {
    const struct dsa_layer *layers;
    const struct dsa_matrix *embed;
    const float *norm;
    const float *cos, *sin;             // [positions, head_dim / 2]
    const float *index_cos, *index_sin; // [positions, index_rope / 2]
    int64_t page_stride, index_stride;  // bytes from page to page of a layer's planes
    int32_t num_layers, hidden, intermediate, heads, kv_heads, head_dim;
    int32_t index_heads, index_dim, index_rope; // index_heads 0: no indexer
    int32_t adapter_rank;                       // 0: no adapter; else a multiple of 32
    int32_t integers;                           // whether a matrix has integers, so that rows need them
    int32_t integer_keys;                       // whether index keys are 8-bit integers; else they are bfloat16
    int32_t alike;                              // whether a row's bits are the same beside any other rows
    float eps, key_norm_eps;
};

// Row r is token_ids[r] at positions[r] of request[r], whose pages are line request[r] of the block table. It attends to the
// index_top_k[r] best of its context, or to all of it where that is 0: which rows are dense is said by
// engine/plan/sparsity.py, not here.
struct dsa_step {
    const int64_t *token_ids, *positions;
    const int32_t *request;
    const int64_t *index_top_k;
    const int64_t *block_table; // [requests, pages]
    bf16 *out;                  // [rows, hidden] after the last norm
    int32_t *flaws;             // [rows] of selections in any layer, see dsa_selection_flaws; 0: nobody looks
    int64_t pages;
    int32_t rows;
    int32_t longest; // the longest context of a row, in positions
};

// Bytes of scratch that a step of `rows` rows with contexts up to `longest` needs.
int64_t dsa_step_scratch(const struct dsa_model *model, int rows, int longest);

// Compute a step. `scratch` is aligned to 64 bytes.
void dsa_step(const struct dsa_model *model, const struct dsa_step *step, void *scratch);

#endif
