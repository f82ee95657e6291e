// What the parts of a step share (step.c, step_attend.c).
#ifndef DSA_STEP_WORK_H
#define DSA_STEP_WORK_H

#include "attention.h"
#include "dense.h"
#include "step.h"

// What a step computes with, in the scratch memory.
struct work {
    const struct dsa_model *model;
    const struct dsa_step *step;
    float *x;                  // [rows, hidden] the residual stream
    struct dsa_rows normed;    // [rows, hidden]
    struct dsa_rows attended;  // [rows, heads * head_dim]
    struct dsa_rows activated; // [rows, intermediate]
    float *wide;               // [rows, widest]: what a product gave
    float *index_wide;         // [rows, index_width]: of the indexer's
    float *inner;              // [rows, adapter_rank]: of the adapter's first products
    struct dsa_rows narrowed;  // [rows, adapter_rank]: likewise, for its second
    float *correction;         // [rows, widest]: what those gave; of rows with a selection only
    bf16 *query;               // [rows, heads * head_dim]
    bf16 *index_query;         // [rows, index_heads * index_dim]
    int8_t *index_integers;    // likewise
    float *index_weights;      // [rows, index_heads]
    int32_t *index_begins;     // likewise: see dsa_index_query
    uint8_t *own;              // a thread's, `own_bytes` each: scores, selected positions, their kernels' scratch
    size_t own_bytes;
    int widest, index_width, sparse;
};

// Whether a row has a selection in a layer. Which rows do is said by engine/plan/sparsity.py; its rule holds for the
// window, too: a window of at most index_top_k positions is read whole.
static inline int is_sparse(const struct dsa_step *step, const struct dsa_layer *layer, int row) {
    const int64_t index_top_k = step->index_top_k[row];
    return index_top_k > 0 && (layer->window == 0 || index_top_k < layer->window);
}

// The first position that a row sees.
static inline int first_seen(const struct dsa_step *step, const struct dsa_layer *layer, int row) {
    const int64_t context = step->positions[row] + 1;
    return layer->window && layer->window < context ? (int)(context - layer->window) : 0;
}

// The pages of a row's request.
static inline const int64_t *table_of(const struct dsa_step *step, int row) {
    return step->block_table + step->request[row] * step->pages;
}

// Of a row's index scores, whole pages.
static inline size_t scores_bytes(int longest) {
    return sizeof(float) * (size_t)((longest + PAGE - 1) / PAGE * PAGE);
}

// What a block of sparse rows of a prompt needs of `own`, at its end: see `struct united` in step_attend.c.
static inline size_t united_bytes(const struct dsa_model *m, int longest) {
    const size_t pages = (size_t)(longest + PAGE - 1) / PAGE, rows = (size_t)dsa_dense_rows(m->heads / m->kv_heads);
    return ((2 * rows + 1) * pages * sizeof(uint64_t) + pages * PAGE * sizeof(int32_t) + 63) / 64 * 64;
}

// Attention of all rows, from their queries to `attended`, by all threads.
void dsa_step_attend(struct work *w, const struct dsa_layer *layer, int thread, int threads);

#endif
