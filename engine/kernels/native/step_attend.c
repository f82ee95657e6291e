// Attention of a step's rows: index scores, selection and sums, a row or a block of one prompt at a time.
#include <math.h>

#include "amx.h"
#include "dense.h"
#include "pool.h"
#include "scratch.h"
#include "step_work.h"

// Index scores from keys in bfloat16: plain, since integers are what is fast.
static void plain_scores(const bf16 *query, const float *weights, const uint8_t *plane, int64_t stride,
                         const int64_t *table, int first, int last, int H, int d, float *scores) {
    for (int page = first; page < last; page++) {
        const bf16 *keys = (const bf16 *)(const void *)(plane + table[page] * stride);
        for (int c = 0; c < PAGE; c++, keys += d) {
            float score = 0;
            for (int h = 0; h < H; h++) {
                float dot = 0;
                for (int i = 0; i < d; i++) dot += wide(query[h * d + i]) * wide(keys[i]);
                score += dot > 0 ? weights[h] * dot : 0;
            }
            scores[page * PAGE + c] = score;
        }
    }
}

// Select the best of a row's scores, the first of which is the one of position `begin`. Returns how many there are.
static int select_row(const struct dsa_step *step, int r, const float *scores, int begin, int context, int32_t *selected,
                      float *scratch) {
    int wanted = (int)step->index_top_k[r], visible = context - begin;
    int found = dsa_select_row(scores + begin, visible, wanted, selected, scratch);
    for (int i = 0; begin && i < found; i++) selected[i] += begin;
    if (step->flaws)
        step->flaws[r] |= dsa_selection_flaws(selected, found, wanted < visible ? wanted : visible, begin, context);
    if (found == 0) selected[found++] = context - 1; // all scores are not-a-number: so may the row be
    return found;
}

// The best of a row's scores, and attention over them.
static void select_and_attend(struct work *w, const struct dsa_layer *layer, int r, const float *scores, uint8_t *own) {
    const struct dsa_model *m = w->model;
    const struct dsa_step *step = w->step;
    const int D = m->head_dim, context = (int)step->positions[r] + 1, begin = first_seen(step, layer, r);
    int32_t *selected = (int32_t *)(void *)(own + scores_bytes(step->longest));
    uint8_t *rest = own + scores_bytes(step->longest) + (sizeof(int32_t) * (size_t)step->longest + 63) / 64 * 64;
    int found = select_row(step, r, scores, begin, context, selected, (float *)(void *)rest);
    dsa_attend_row(w->query + (size_t)r * m->heads * D, (const bf16 *)(const void *)layer->kv_plane, m->page_stride,
                   table_of(step, r), selected, 0, found, 0, m->kv_heads, m->kv_heads, m->heads / m->kv_heads, D,
                   1.0f / sqrtf((float)D), w->attended.values + (size_t)r * m->heads * D, rest);
}

// A row's attention, by itself (member 0 of 1) or by several threads together on the memory of one.
static void attend(struct work *w, const struct dsa_layer *layer, int r, uint8_t *shared, uint8_t *mine, int member,
                   int members) {
    const struct dsa_model *m = w->model;
    const struct dsa_step *step = w->step;
    const int D = m->head_dim, G = m->heads / m->kv_heads, context = (int)step->positions[r] + 1;
    const int begin = first_seen(step, layer, r), page = begin / PAGE;
    const int pages = (context + PAGE - 1) / PAGE, H = m->index_heads, d = m->index_dim;
    const int64_t *table = table_of(step, r);
    float *scores = (float *)(void *)shared;
    int32_t *selected = (int32_t *)(void *)(shared + scores_bytes(step->longest));
    uint8_t *rest = mine + scores_bytes(step->longest) + (sizeof(int32_t) * (size_t)step->longest + 63) / 64 * 64;
    int count = context - begin, sparse = is_sparse(step, layer, r), first, last;
    if (sparse) {
        dsa_share(pages - page, 1, member, members, &first, &last);
        first += page;
        last += page;
        const float *weights = w->index_weights + (size_t)r * H;
        if (m->integer_keys)
            dsa_index_scores_row(w->index_integers + (size_t)r * H * d, weights, w->index_begins + (size_t)r * H,
                                 layer->index_plane, m->index_stride, table, first, last, H, d, scores);
        else
            plain_scores(w->index_query + (size_t)r * H * d, weights, layer->index_plane, m->index_stride, table, first,
                         last, H, d, scores);
        if (members > 1) dsa_barrier();
        count = (int)step->index_top_k[r];
        if (member == 0) {
            int found = select_row(step, r, scores, begin, context, selected, (float *)(void *)rest);
            // Fewer only with not-a-number among the scores. The last again changes no sum that matters then.
            for (; found < count; found++) selected[found] = selected[found - 1];
        }
        if (members > 1) dsa_barrier();
    }
    dsa_share(m->kv_heads, 1, member, members, &first, &last);
    if (first < last)
        dsa_attend_row(w->query + (size_t)r * m->heads * D, (const bf16 *)(const void *)layer->kv_plane, m->page_stride,
                       table, sparse ? selected : 0, begin, count, first, last, m->kv_heads, G, D, 1.0f / sqrtf((float)D),
                       w->attended.values + (size_t)r * m->heads * D, rest);
}

// Consecutive rows from `first` on that are a part of one prompt, and alike dense or sparse: one after the last.
static int run_end(const struct dsa_step *step, const struct dsa_layer *layer, int first) {
    int r = first + 1, sparse = is_sparse(step, layer, first);
    while (r < step->rows && step->request[r] == step->request[first] && step->positions[r] == step->positions[r - 1] + 1 &&
           is_sparse(step, layer, r) == sparse)
        r++;
    return r;
}

// Rows `first` to last - 1, of one prompt, as one KV head attends with them.
static struct dsa_block block_of(const struct work *w, const struct dsa_layer *layer, int first, int last, int head) {
    const struct dsa_model *m = w->model;
    const int G = m->heads / m->kv_heads, D = m->head_dim;
    const size_t size = (size_t)m->heads * D, at = (size_t)first * size + (size_t)head * G * D;
    return (struct dsa_block){.query = w->query + at,
                              .out = w->attended.values + at,
                              .row_size = (int64_t)size,
                              .plane = (const bf16 *)(const void *)layer->kv_plane,
                              .page_stride = m->page_stride,
                              .block_table = table_of(w->step, first),
                              .rows = last - first,
                              .head = head,
                              .Hkv = m->kv_heads,
                              .G = G,
                              .D = D,
                              .scale = 1.0f / sqrtf((float)D)};
}

// Dense rows of one prompt as a tile.
static void attend_dense(struct work *w, const struct dsa_layer *layer, int first, int last, int head) {
    const struct dsa_block block = block_of(w, layer, first, last, head);
    dsa_dense_block(&block, w->step->positions + first, 0, 0, layer->window);
}

// KEY_PAGES: pages of index keys that are scored at once; SPARSE_ROWS: rows of a block whose tokens are gathered row by row;
// UNITED_ROWS: at most so many rows unite what they select, unless that is more than SPREAD times what one selects (measured).
enum { KEY_PAGES = 4, SPARSE_ROWS = 8, UNITED_ROWS = 16, SPREAD = 4 };

// How many rows unite what they select; 0: each gathers its own. A tile sums in another order than a row alone.
static int united_rows(const struct dsa_model *m) {
    const int G = m->heads / m->kv_heads, most = dsa_dense_rows(G), rows = most < UNITED_ROWS ? most : UNITED_ROWS;
    return !m->alike && m->integer_keys && dsa_dense_known(m->head_dim) && dsa_amx_rows(rows * G) ? rows : 0;
}

// The bits of `bits` at the places where `mask` has one, without gaps.
static inline uint64_t compressed(uint64_t bits, uint64_t mask) {
#ifdef __BMI2__
    return _pext_u64(bits, mask);
#else
    uint64_t out = 0;
    for (int at = 0; mask; mask &= mask - 1, at++) out |= (bits >> __builtin_ctzll(mask) & 1) << at;
    return out;
#endif
}

// The selections of a block of rows, a bit for each position, and their union.
struct united {
    uint64_t *bits;    // [rows][pages]
    uint64_t *all;     // [pages]
    uint64_t *visible; // [rows][pages]: what a row sees of `chosen`
    int32_t *chosen;   // the positions of the union
    int rows, pages, count;
};

static struct united unite(const struct work *w, int rows, int pages, uint8_t *own) {
    struct united u = {.rows = rows, .pages = pages};
    u.bits = (uint64_t *)(void *)(own + w->own_bytes - united_bytes(w->model, w->step->longest));
    u.all = u.bits + rows * pages;
    u.visible = u.all + pages;
    u.chosen = (int32_t *)(void *)(u.visible + rows * pages);
    memset(u.bits, 0, sizeof(uint64_t) * (size_t)(2 * rows + 1) * (size_t)pages);
    return u;
}

static void choose(struct united *u) {
    for (int page = 0; page < u->pages; page++) {
        uint64_t all = 0;
        for (int r = 0; r < u->rows; r++) all |= u->bits[r * u->pages + page];
        u->all[page] = all;
        for (; all; all &= all - 1) u->chosen[u->count++] = page * PAGE + __builtin_ctzll(all);
    }
    for (int r = 0; r < u->rows; r++) {
        uint64_t *out = u->visible + r * u->pages;
        for (int page = 0, at = 0; page < u->pages; page++) {
            const uint64_t own = compressed(u->bits[r * u->pages + page], u->all[page]);
            const int from = at % 64, count = __builtin_popcountll(u->all[page]);
            out[at / 64] |= own << from;
            if (from + count > 64) out[at / 64 + 1] |= own >> (64 - from);
            at += count;
        }
    }
}

// Index scores of rows of one prompt, [rows][64 pages]: KEY_PAGES pages of index keys are read from the nearest cache for all but
// the first row.
static void score_rows(const struct work *w, const struct dsa_layer *layer, int first, int last, int pages, float *scores) {
    const struct dsa_model *m = w->model;
    const struct dsa_step *step = w->step;
    const int H = m->index_heads, d = m->index_dim;
    for (int page = first_seen(step, layer, first) / PAGE; page < pages; page += KEY_PAGES)
        for (int r = first; r < last; r++) {
            const int own_pages = (int)(step->positions[r] / PAGE) + 1;
            const int end = page + KEY_PAGES < own_pages ? page + KEY_PAGES : own_pages;
            dsa_index_scores_row(w->index_integers + (size_t)r * H * d, w->index_weights + (size_t)r * H,
                                 w->index_begins + (size_t)r * H, layer->index_plane, m->index_stride, table_of(step, r),
                                 page, end, H, d, scores + (r - first) * pages * PAGE);
        }
}

// Attention of rows over their selections, as one tile if these are alike enough, else row by row.
static void attend_united(struct work *w, const struct dsa_layer *layer, int first, int last, int pages, const float *scores,
                          uint8_t *own) {
    const struct dsa_model *m = w->model;
    const struct dsa_step *step = w->step;
    const int rows = last - first;
    int32_t *selected = (int32_t *)(void *)(own + scores_bytes(step->longest));
    uint8_t *rest = own + scores_bytes(step->longest) + (sizeof(int32_t) * (size_t)step->longest + 63) / 64 * 64;
    struct united u = unite(w, rows, pages, own);
    int64_t total = 0;
    for (int r = 0; r < rows; r++) {
        uint64_t *bits = u.bits + r * pages;
        const int found = select_row(step, first + r, scores + r * pages * PAGE, first_seen(step, layer, first + r),
                                     (int)step->positions[first + r] + 1, selected, (float *)(void *)rest);
        for (int i = 0; i < found; i++) bits[selected[i] / PAGE] |= 1ull << (selected[i] % PAGE);
        total += found;
    }
    choose(&u);
    if (u.count * (int64_t)rows <= SPREAD * total) {
        for (int head = 0; head < m->kv_heads; head++) {
            const struct dsa_block block = block_of(w, layer, first, last, head);
            dsa_chosen_block(&block, u.chosen, u.count, u.visible, pages);
        }
        return;
    }
    const struct dsa_block all = block_of(w, layer, first, last, 0);
    for (int r = 0; r < rows; r++) {
        int found = 0;
        for (int page = 0; page < pages; page++)
            for (uint64_t bits = u.bits[r * pages + page]; bits; bits &= bits - 1)
                selected[found++] = page * PAGE + __builtin_ctzll(bits);
        dsa_attend_row(all.query + r * all.row_size, all.plane, all.page_stride, all.block_table, selected, 0, found, 0,
                       all.Hkv, all.Hkv, all.G, all.D, all.scale, all.out + r * all.row_size, rest);
    }
}

// Sparse rows of one prompt. Neighbours select much the same tokens, so a block of rows reads the union of their selections as a
// tile, in which each row sees its own.
static void attend_sparse(struct work *w, const struct dsa_layer *layer, int first, int last, uint8_t *own) {
    const int pages = (int)(w->step->positions[last - 1] / PAGE) + 1, rows = last - first;
    float *scores = dsa_scratch((int64_t)sizeof(float) * PAGE * pages * rows);
    score_rows(w, layer, first, last, pages, scores);
    if (united_rows(w->model) && dsa_amx_rows(rows * (w->model->heads / w->model->kv_heads)))
        attend_united(w, layer, first, last, pages, scores, own);
    else
        for (int r = first; r < last; r++) select_and_attend(w, layer, r, scores + (r - first) * pages * PAGE, own);
}

// Rows by blocks of one prompt, which threads take in turn. A tile sums in another order than a row alone, so where rows are
// to be alike, dense ones are attended one by one, as decodes are; all else sums each row in one order.
static void attend_blocks(struct work *w, const struct dsa_layer *layer, int thread, int threads) {
    const struct dsa_step *step = w->step;
    const struct dsa_model *m = w->model;
    const int dense_rows = dsa_dense_rows(m->heads / m->kv_heads);
    const int united = united_rows(m);
    int turn = 0;
    uint8_t *own = w->own + w->own_bytes * (size_t)thread;
    for (int first = 0; first < step->rows;) {
        int end = run_end(step, layer, first), sparse = is_sparse(step, layer, first);
        for (int from = first; from < end;) {
            const int share = (end - first + threads - 1) / threads;
            int to = from + (!sparse ? dense_rows : united ? united : share < SPARSE_ROWS ? share : SPARSE_ROWS);
            to = to < end ? to : end;
            if (!sparse && !m->alike && dsa_dense_known(m->head_dim) && to - from > 1) {
                for (int head = 0; head < m->kv_heads; head++)
                    if (turn++ % threads == thread) attend_dense(w, layer, from, to, head);
            } else if (turn++ % threads == thread) {
                if (sparse && m->integer_keys) attend_sparse(w, layer, from, to, own);
                else
                    for (int r = from; r < to; r++) attend(w, layer, r, own, own, 0, 1);
            }
            from = to;
        }
        first = end;
    }
}

void dsa_step_attend(struct work *w, const struct dsa_layer *layer, int thread, int threads) {
    const int rows = w->step->rows;
    if (rows > threads) {
        int first, last;
        attend_blocks(w, layer, thread, threads);
        dsa_barrier();
        dsa_share(rows, 1, thread, threads, &first, &last);
        for (int r = first; r < last; r++) dsa_finish_row(&w->attended, r);
        return;
    }
    uint8_t *own = w->own + w->own_bytes * (size_t)thread;
    for (int r = 0; r < rows; r++) {
        attend(w, layer, r, w->own, own, thread, threads);
        dsa_barrier();
        if (thread == 0) dsa_finish_row(&w->attended, r);
    }
}
