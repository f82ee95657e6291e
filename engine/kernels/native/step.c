// A step but for its attention (step_attend.c): products, norms, rotations, entries of the cache.
#include "step_work.h"

#include <math.h>

#include "amx.h"
#include "pool.h"

enum { AT_ONCE = 256 }; // how many rows go through a layer together

static size_t cut(uint8_t **at, size_t bytes) {
    size_t used = (bytes + 63) / 64 * 64;
    if (*at) *at += used;
    return used;
}

static int padded(int n) { return (n + DSA_LANES - 1) / DSA_LANES * DSA_LANES; }

static size_t select_bytes(int longest) { return sizeof(float) * 2 * ((scores_bytes(longest) / sizeof(float)) + 16); }

// Lay out the scratch from `at` on, and return its size. If `at` is NULL, only return the size.
static size_t lay_out(struct work *w, const struct dsa_model *m, int rows, int longest, uint8_t *at) {
    size_t total = 0;
    const int attended = m->heads * m->head_dim;
    w->widest = padded(attended + 2 * m->kv_heads * m->head_dim);
    if (w->widest < 2 * m->intermediate) w->widest = 2 * m->intermediate;
    if (w->widest < padded(m->hidden)) w->widest = padded(m->hidden);
    w->index_width = padded(m->index_heads * m->index_dim) + padded(m->index_dim) + padded(m->index_heads);
#define TAKE(place, type, count) \
    do { \
        (place) = (type *)(void *)at; \
        total += cut(&at, sizeof(type) * (size_t)(count)); \
    } while (0)
#define TAKE_ROWS(place, width) \
    do { \
        (place).count = rows; \
        (place).inputs = (width); \
        TAKE((place).values, bf16, (size_t)rows * (width)); \
        if (m->integers) { \
            TAKE((place).integers, int8_t, (size_t)rows * 2 * (width)); \
            TAKE((place).scales, float, (size_t)rows * ((width) / DSA_GROUP)); \
            TAKE((place).integer_sums, float, (size_t)rows * ((width) / DSA_GROUP)); \
            TAKE((place).begins, int32_t, (size_t)rows * 2 * ((width) / DSA_GROUP)); \
        } else { \
            (place).integers = 0; \
        } \
        (place).upper = (place).lower = 0; \
        if (blocks) TAKE((place).upper, bf16, (size_t)blocks * DSA_BLOCK * (width)); \
        if (blocks && m->integers) TAKE((place).lower, bf16, (size_t)blocks * DSA_BLOCK * (width)); \
    } while (0)
    TAKE(w->x, float, rows * m->hidden);
    rows = rows < AT_ONCE ? rows : AT_ONCE;
    const int blocks = !m->alike && dsa_amx_rows(rows) ? (rows + DSA_BLOCK - 1) / DSA_BLOCK : 0;
    TAKE_ROWS(w->normed, m->hidden);
    TAKE_ROWS(w->attended, attended);
    w->attended.lower = 0; // attention rounds its sums
    TAKE_ROWS(w->activated, m->intermediate);
    TAKE(w->wide, float, (size_t)rows * w->widest);
    TAKE(w->index_wide, float, (size_t)rows * w->index_width);
    if (m->adapter_rank) {
        TAKE(w->inner, float, (size_t)rows * m->adapter_rank);
        TAKE_ROWS(w->narrowed, m->adapter_rank);
        TAKE(w->correction, float, (size_t)rows * w->widest);
    }
    TAKE(w->query, bf16, (size_t)rows * attended);
    TAKE(w->index_query, bf16, (size_t)rows * m->index_heads * m->index_dim);
    TAKE(w->index_integers, int8_t, (size_t)rows * m->index_heads * m->index_dim);
    TAKE(w->index_weights, float, (size_t)rows * m->index_heads);
    TAKE(w->index_begins, int32_t, (size_t)rows * m->index_heads);
    w->own_bytes = scores_bytes(longest) + select_bytes(longest) + sizeof(int32_t) * (size_t)longest +
                   (size_t)dsa_attend_scratch(longest) + 4 * 64;
    if (w->own_bytes < sizeof(float) * (size_t)m->hidden) w->own_bytes = sizeof(float) * (size_t)m->hidden;
    w->own_bytes = (w->own_bytes + 63) / 64 * 64 + united_bytes(m, longest);
    TAKE(w->own, uint8_t, w->own_bytes * (size_t)dsa_threads());
#undef TAKE_ROWS
#undef TAKE
    return total;
}

int64_t dsa_step_scratch(const struct dsa_model *model, int rows, int longest) {
    struct work unused;
    return (int64_t)lay_out(&unused, model, rows, longest, 0);
}

static void rms_norm(const float *x, const float *weight, float eps, int n, float *out) {
    float sums[16] = {0}, sum = 0;
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += x[i + j] * x[i + j];
    for (; i < n; i++) sum += x[i] * x[i];
    for (int j = 0; j < 16; j++) sum += sums[j];
    float scale = 1.0f / sqrtf(sum / (float)n + eps);
    for (i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

static void layer_norm(const float *x, const float *weight, const float *bias, float eps, int n, float *out) {
    float mean = 0, variance = 0;
    for (int i = 0; i < n; i++) mean += x[i];
    mean /= (float)n;
    for (int i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean);
    float scale = 1.0f / sqrtf(variance / (float)n + eps);
    for (int i = 0; i < n; i++) out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

// Apply the rotary embedding to the first 2 * half numbers of x[n], as pairs (i, half + i). Round all n to bfloat16.
static void rotate(const float *x, const float *cos, const float *sin, int half, int n, bf16 *out) {
    for (int i = 0; i < half; i++) {
        out[i] = narrow(x[i] * cos[i] - x[half + i] * sin[i]);
        out[half + i] = narrow(x[half + i] * cos[i] + x[i] * sin[i]);
    }
    for (int i = 2 * half; i < n; i++) out[i] = narrow(x[i]);
}

// Normalise this thread's rows of x for the next products.
static void norm_rows(struct work *w, const float *weight, int thread, int threads) {
    const int n = w->model->hidden;
    int first, last;
    float *normed = (float *)(void *)(w->own + w->own_bytes * (size_t)thread); // [hidden]: see dsa_step
    dsa_share(w->step->rows, 1, thread, threads, &first, &last);
    for (int r = first; r < last; r++) {
        rms_norm(w->x + (size_t)r * n, weight, w->model->eps, n, normed);
        dsa_set_row(&w->normed, r, normed);
    }
}

// Compute outputs of weight * rows, to out[r * stride]; each thread its part.
static void product(const struct dsa_matrix *weight, const struct dsa_rows *rows, float *out, int stride,
                    int thread, int threads) {
    const int unit = dsa_product_unit(weight, rows);
    int first, last;
    dsa_share(dsa_tiles(weight), unit, thread, threads, &first, &last);
    if (first < last)
        dsa_product(weight, rows, out + first * DSA_LANES, (size_t)stride, first, last);
}

// The adapter's second product, from `inner`, the result of its first, to `correction`.
static void correct(struct work *w, const struct dsa_matrix *up, int thread, int threads) {
    const int rank = w->model->adapter_rank;
    int first, last;
    dsa_barrier();
    dsa_share(w->step->rows, 1, thread, threads, &first, &last);
    for (int r = first; r < last; r++) dsa_set_row(&w->narrowed, r, w->inner + (size_t)r * rank);
    dsa_barrier();
    product(up, &w->narrowed, w->correction, w->widest, thread, threads);
}

// Add weight * rows + bias to x. With `corrected`, also add the correction of each row that has a selection in that layer.
static void product_to_x(struct work *w, const struct dsa_matrix *weight, const float *bias, const struct dsa_rows *rows,
                         const struct dsa_layer *corrected, int thread, int threads) {
    const int n = w->model->hidden, unit = dsa_product_unit(weight, rows);
    int first, last;
    dsa_share(dsa_tiles(weight), unit, thread, threads, &first, &last);
    if (first >= last) return;
    dsa_product(weight, rows, w->wide + first * DSA_LANES, (size_t)w->widest, first, last);
    last = last * DSA_LANES < n ? last * DSA_LANES : n;
    for (int r = 0; r < w->step->rows; r++) {
        const size_t at = (size_t)r * w->widest;
        for (int i = first * DSA_LANES; i < last; i++) w->x[(size_t)r * n + i] += w->wide[at + i];
        if (bias)
            for (int i = first * DSA_LANES; i < last; i++) w->x[(size_t)r * n + i] += bias[i];
        if (corrected && is_sparse(w->step, corrected, r))
            for (int i = first * DSA_LANES; i < last; i++) w->x[(size_t)r * n + i] += w->correction[at + i];
    }
}

// Make the rotated queries of a row, and write the row's entries of the cache.
static void place_row(struct work *w, const struct dsa_layer *layer, int r) {
    const struct dsa_model *m = w->model;
    const int D = m->head_dim, half = D / 2, q = m->heads * D, k = m->kv_heads * D;
    const int64_t position = w->step->positions[r];
    float *from = w->wide + (size_t)r * w->widest;
    const float *cos = m->cos + position * half, *sin = m->sin + position * half;
    if (layer->qkv_bias)
        for (int i = 0; i < q + 2 * k; i++) from[i] += layer->qkv_bias[i];
    if (m->adapter_rank && is_sparse(w->step, layer, r))
        for (int i = 0; i < q + 2 * k; i++) from[i] += w->correction[(size_t)r * w->widest + i];
    if (layer->q_norm)
        for (int h = 0; h < m->heads; h++) rms_norm(from + h * D, layer->q_norm, m->eps, D, from + h * D);
    if (layer->k_norm)
        for (int h = 0; h < m->kv_heads; h++) rms_norm(from + q + h * D, layer->k_norm, m->eps, D, from + q + h * D);
    for (int h = 0; h < m->heads; h++) rotate(from + h * D, cos, sin, half, D, w->query + (size_t)r * q + h * D);
    const int64_t page = table_of(w->step, r)[position / PAGE], offset = position % PAGE;
    bf16 *kv = (bf16 *)(void *)(layer->kv_plane + page * m->page_stride) + offset * 2 * k;
    for (int h = 0; h < m->kv_heads; h++, kv += 2 * D) {
        rotate(from + q + h * D, cos, sin, half, D, kv);
        for (int i = 0; i < D; i++) kv[D + i] = narrow(from[q + k + h * D + i]);
    }
    if (!m->index_heads) return;
    // The indexer: [queries | key | head weights].
    const int d = m->index_dim, H = m->index_heads, turned = m->index_rope / 2;
    const float *index = w->index_wide + (size_t)r * w->index_width;
    cos = m->index_cos + position * turned;
    sin = m->index_sin + position * turned;
    float normed[512];
    bf16 key[512];
    layer_norm(index + padded(H * d), layer->key_norm_weight, layer->key_norm_bias, m->key_norm_eps, d, normed);
    rotate(normed, cos, sin, turned, d, key);
    uint8_t *keys = layer->index_plane + page * m->index_stride;
    if (m->integer_keys) dsa_index_key_write(keys, (int)offset, key, d);
    else memcpy(keys + offset * d * (int)sizeof(bf16), key, sizeof(bf16) * (size_t)d);
    if (!is_sparse(w->step, layer, r)) return;
    bf16 *query = w->index_query + (size_t)r * H * d;
    float *weights = w->index_weights + (size_t)r * H;
    const float scale = 1.0f / sqrtf((float)H * (float)d);
    for (int h = 0; h < H; h++) {
        rotate(index + h * d, cos, sin, turned, d, query + h * d);
        weights[h] = index[padded(H * d) + padded(d) + h] * scale;
    }
    if (m->integer_keys)
        dsa_index_query(query, weights, H, d, w->index_integers + (size_t)r * H * d, weights,
                        w->index_begins + (size_t)r * H);
}

// x[i] = silu(x[i]) * up[i] of a group.
static inline void silu(float *x, const float *up) {
    const v16f zero = {0};
    for (int i = 0; i < DSA_GROUP; i += 16) {
        const v16f gate = load_16(x + i), size = chosen_16(gate > zero, -gate, gate); // minus its absolute value
        const v16f e = exp_negative_16(size), over = 1.0f / (1.0f + e);
        const v16f made = gate * chosen_16(gate >= zero, over, e * over) * load_16(up + i);
        memcpy(x + i, &made, sizeof made);
    }
}

// silu(gate) * up of groups of outputs. A thread computes both products of its groups itself.
static void gated(struct work *w, const struct dsa_layer *layer, int thread, int threads) {
    const int n = w->model->intermediate, pairs = n / DSA_GROUP, tiles = DSA_GROUP / DSA_LANES;
    const int unit = (dsa_product_unit(&layer->gate_up, &w->normed) + 2 * tiles - 1) / (2 * tiles);
    const size_t stride = (size_t)w->widest;
    int first, last;
    dsa_share(pairs, unit, thread, threads, &first, &last);
    if (first >= last) return;
    float *gates = w->wide + first * DSA_GROUP;
    dsa_product(&layer->gate_up, &w->normed, gates, stride, first * tiles, last * tiles);
    dsa_product(&layer->gate_up, &w->normed, gates + n, stride, (first + pairs) * tiles, (last + pairs) * tiles);
    for (int r = 0; r < w->step->rows; r++)
        for (int g = first; g < last; g++) {
            float *gate = w->wide + r * stride + (size_t)g * DSA_GROUP;
            float *up = gate + n;
            if (layer->gate_up_bias)
                for (int i = 0; i < DSA_GROUP; i++) {
                    gate[i] += layer->gate_up_bias[g * DSA_GROUP + i];
                    up[i] += layer->gate_up_bias[n + g * DSA_GROUP + i];
                }
            silu(gate, up);
            dsa_set_group(&w->activated, r, g, gate);
        }
}

static void run_layer(struct work *w, const struct dsa_layer *layer, int thread, int threads) {
    const struct dsa_model *m = w->model;
    const int corrected = m->adapter_rank && w->sparse;
    int first, last;
    norm_rows(w, layer->input_norm, thread, threads);
    dsa_barrier();
    product(&layer->qkv, &w->normed, w->wide, w->widest, thread, threads);
    if (m->index_heads) {
        float *key = w->index_wide + padded(m->index_heads * m->index_dim);
        product(&layer->index_key, &w->normed, key, w->index_width, thread, threads);
        if (w->sparse) {
            product(&layer->index_query, &w->normed, w->index_wide, w->index_width, thread, threads);
            product(&layer->index_weights, &w->normed, key + padded(m->index_dim), w->index_width, thread, threads);
        }
    }
    if (corrected) {
        product(&layer->qkv_down, &w->normed, w->inner, m->adapter_rank, thread, threads);
        correct(w, &layer->qkv_up, thread, threads);
    }
    dsa_barrier();
    dsa_share(w->step->rows, 1, thread, threads, &first, &last);
    for (int r = first; r < last; r++) place_row(w, layer, r);
    dsa_barrier();
    dsa_step_attend(w, layer, thread, threads);
    dsa_barrier();
    if (corrected) {
        product(&layer->o_down, &w->attended, w->inner, m->adapter_rank, thread, threads);
        correct(w, &layer->o_up, thread, threads);
    }
    product_to_x(w, &layer->o, layer->o_bias, &w->attended, corrected ? layer : 0, thread, threads);
    dsa_barrier();
    norm_rows(w, layer->post_norm, thread, threads);
    dsa_barrier();
    gated(w, layer, thread, threads);
    dsa_barrier();
    product_to_x(w, &layer->down, layer->down_bias, &w->activated, 0, thread, threads);
    dsa_barrier();
}

// Restrict a step to the rows from `from` on, at most AT_ONCE. `layer`: the one that they go through, or NULL.
static void part_of(struct work *w, struct dsa_step *step, const struct dsa_layer *layer, int from) {
    step->token_ids += from;
    step->positions += from;
    step->request += from;
    step->index_top_k += from;
    step->out += (size_t)from * w->model->hidden;
    if (step->flaws) step->flaws += from;
    step->rows = step->rows - from < AT_ONCE ? step->rows - from : AT_ONCE;
    w->x += (size_t)from * w->model->hidden;
    w->step = step;
    struct dsa_rows *each[] = {&w->normed, &w->attended, &w->activated, &w->narrowed};
    for (size_t i = 0; i < sizeof each / sizeof *each; i++) {
        each[i]->count = step->rows;
        if (!dsa_amx_rows(step->rows)) each[i]->upper = 0;
    }
    w->sparse = 0;
    for (int r = 0; layer && r < step->rows; r++) w->sparse |= is_sparse(step, layer, r);
}

static void run(void *arg, int thread, int threads) {
    struct work *w = arg;
    const struct dsa_model *m = w->model;
    int first, last;
    dsa_share(w->step->rows, 1, thread, threads, &first, &last);
    for (int r = first; r < last; r++)
        dsa_weights(m->embed, (int)w->step->token_ids[r], w->x + (size_t)r * m->hidden);
    dsa_barrier();
    // Rows go through a layer in blocks, whose activations stay in the second-level cache. A block's keys are written
    // before the next block reads them.
    for (int i = 0; i < m->num_layers; i++)
        for (int from = 0; from < w->step->rows; from += AT_ONCE) {
            struct dsa_step step = *w->step;
            struct work part = *w;
            part_of(&part, &step, &m->layers[i], from);
            run_layer(&part, &m->layers[i], thread, threads);
        }
    for (int from = 0; from < w->step->rows; from += AT_ONCE) {
        struct dsa_step step = *w->step;
        struct work part = *w;
        part_of(&part, &step, 0, from);
        part.normed.upper = 0; // no product follows
        part.normed.integers = 0;
        norm_rows(&part, m->norm, thread, threads);
        dsa_barrier();
        if (thread == 0)
            memcpy(step.out, part.normed.values, sizeof(bf16) * (size_t)step.rows * (size_t)m->hidden);
        dsa_barrier();
    }
}

void dsa_step(const struct dsa_model *model, const struct dsa_step *step, void *scratch) {
    struct work w = {.model = model, .step = step};
    lay_out(&w, model, step->rows, step->longest, scratch);
    dsa_parallel(run, &w);
}
