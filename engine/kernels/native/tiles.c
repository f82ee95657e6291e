// A tile is cut into blocks of rows. Threads take blocks as they become free, because later rows have longer contexts.
#include "tiles.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "dense.h"
#include "pool.h"
#include "scratch.h"

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- sharing ---------------------------------------------------------------------------------------------------

struct shared {
    void (*fn)(void *job, int64_t item);
    void *job;
    int64_t items;
    atomic_llong next;
};

static void take(void *arg, int thread, int threads) {
    (void)thread, (void)threads;
    struct shared *all = arg;
    for (;;) {
        int64_t item = atomic_fetch_add_explicit(&all->next, 1, memory_order_relaxed);
        if (item >= all->items) return;
        all->fn(all->job, item);
    }
}

// Call fn(job, item) for each item, on any thread that is free.
static void each(int64_t items, void (*fn)(void *, int64_t), void *job) {
    if (items == 1) {
        fn(job, 0);
        return;
    }
    struct shared all = {fn, job, items, 0};
    dsa_parallel(take, &all);
}

// ---- index keys and scores -------------------------------------------------------------------------------------

void dsa_index_keys_write(uint8_t *plane, int64_t page_stride, const int64_t *pages, const int64_t *offsets,
                          const bf16 *keys, int rows, int d) {
    for (int t = 0; t < rows; t++)
        dsa_index_key_write(plane + pages[t] * page_stride, (int)offsets[t], keys + (int64_t)t * d, d);
}

enum { BLOCK = 8 }; // rows that are scored together: all but the first read a page of keys from the nearest cache

struct scoring {
    const struct dsa_tile *tile;
    const bf16 *query;
    const float *head_weights;
    const uint8_t *plane;
    int64_t stride;
    int H, d;
};

static inline int64_t blocks(const struct dsa_tile *tile) { return (tile->rows + BLOCK - 1) / BLOCK; }

static int64_t query_scratch(const struct scoring *s) { return BLOCK * dsa_whole(s->H * (s->d + 8)); }

// Score rows `first` to `last` - 1 of request r, to scores[row - first][64 * pages].
static void score_block(const struct scoring *s, int64_t r, int64_t first, int64_t last, float *scores, char *scratch) {
    const int H = s->H, d = s->d;
    const int64_t context = PAGE * s->tile->pages;
    const int64_t *table = s->tile->block_table + r * s->tile->pages, *positions = s->tile->positions + r * s->tile->rows;
    int64_t each_row = dsa_whole(H * (d + 8)), furthest = 0;
    for (int64_t row = first; row < last; row++) {
        int64_t at = r * s->tile->rows + row;
        char *mine = scratch + (row - first) * each_row;
        dsa_index_query(s->query + at * H * d, s->head_weights + at * H, H, d, (int8_t *)(mine + 8 * H), (float *)mine,
                        (int32_t *)(mine + 4 * H));
        if (positions[row] > furthest) furthest = positions[row];
    }
    for (int page = 0; page <= furthest / PAGE; page++)
        for (int64_t row = first; row < last; row++) {
            if (positions[row] < (int64_t)page * PAGE) continue;
            char *mine = scratch + (row - first) * each_row;
            dsa_index_scores_row((int8_t *)(mine + 8 * H), (float *)mine, (int32_t *)(mine + 4 * H), s->plane, s->stride,
                                 table, page, page + 1, H, d, scores + (row - first) * context);
        }
}

struct scores_job {
    struct scoring scoring;
    float *scores;
};

static void scores_item(void *arg, int64_t item) {
    struct scores_job *job = arg;
    const struct dsa_tile *tile = job->scoring.tile;
    int64_t r = item / blocks(tile), first = item % blocks(tile) * BLOCK, last = smaller(first + BLOCK, tile->rows);
    int64_t context = PAGE * tile->pages;
    float *out = job->scores + (r * tile->rows + first) * context;
    score_block(&job->scoring, r, first, last, out, dsa_scratch(query_scratch(&job->scoring)));
    for (int64_t row = first; row < last; row++)
        for (int64_t c = tile->positions[r * tile->rows + row] + 1; c < context; c++)
            out[(row - first) * context + c] = -INFINITY;
}

void dsa_index_scores(const struct dsa_tile *tile, const bf16 *query, const float *head_weights, const uint8_t *plane,
                      int64_t page_stride, int H, int d, float *scores) {
    struct scores_job job = {{tile, query, head_weights, plane, page_stride, H, d}, scores};
    each(tile->requests * blocks(tile), scores_item, &job);
}

// ---- selection -------------------------------------------------------------------------------------------------

struct select_job {
    const float *scores;
    const int64_t *index_top_k;
    int64_t context, width;
    int64_t *selected;
};

static void select_item(void *arg, int64_t row) {
    struct select_job *job = arg;
    int64_t n = job->context, wanted = smaller(job->index_top_k[row], n);
    char *scratch = dsa_scratch(8 * (n + 16) + 4 * job->width);
    int32_t *found = (int32_t *)(scratch + 8 * (n + 16));
    int count = dsa_select_row(job->scores + row * n, (int)n, (int)wanted, found, (float *)scratch);
    int64_t *out = job->selected + row * job->width;
    for (int64_t i = 0; i < job->width; i++) out[i] = i < count ? found[i] : -1;
}

void dsa_select(const float *scores, const int64_t *index_top_k, int64_t rows, int64_t context, int64_t width,
                int64_t *selected) {
    struct select_job job = {scores, index_top_k, context, width, selected};
    each(rows, select_item, &job);
}

// ---- attention -------------------------------------------------------------------------------------------------

struct attention {
    const struct dsa_tile *tile;
    const bf16 *query, *plane;
    int64_t stride;
    int Hkv, G, D;
    float scale;
    bf16 *out;
};

static void attend_one(const struct attention *a, int64_t r, int64_t row, const int32_t *selected, int count,
                       void *scratch) {
    int64_t at = (r * a->tile->rows + row) * a->Hkv * a->G * a->D;
    dsa_attend_row(a->query + at, a->plane, a->stride, a->tile->block_table + r * a->tile->pages, selected, 0, count,
                   0, a->Hkv, a->Hkv, a->G, a->D, a->scale, a->out + at, scratch);
}

struct selected_job {
    struct attention attention;
    const int64_t *selected;
    int64_t width;
};

static void selected_item(void *arg, int64_t item) {
    struct selected_job *job = arg;
    char *scratch = dsa_scratch(dsa_whole(4 * job->width) + dsa_attend_scratch((int)job->width));
    int32_t *chosen = (int32_t *)scratch;
    int count = 0;
    for (int64_t i = 0; i < job->width; i++) {
        int64_t position = job->selected[item * job->width + i];
        if (position >= 0) chosen[count++] = (int32_t)position;
    }
    int64_t rows = job->attention.tile->rows;
    attend_one(&job->attention, item / rows, item % rows, chosen, count, scratch + dsa_whole(4 * job->width));
}

void dsa_attend_selected(const struct dsa_tile *tile, const bf16 *query, const bf16 *plane, int64_t page_stride,
                         const int64_t *selected, int64_t width, int Hkv, int G, int D, float scale, bf16 *out) {
    struct selected_job job = {{tile, query, plane, page_stride, Hkv, G, D, scale, out}, selected, width};
    each(tile->requests * tile->rows, selected_item, &job);
}

struct sparse_job {
    struct scoring scoring;
    struct attention attention;
    const int64_t *index_top_k;
    int32_t *flaws; // [R][Q], or 0
};

static void sparse_item(void *arg, int64_t item) {
    struct sparse_job *job = arg;
    const struct dsa_tile *tile = job->scoring.tile;
    int64_t r = item / blocks(tile), first = item % blocks(tile) * BLOCK, last = smaller(first + BLOCK, tile->rows);
    const int64_t *positions = tile->positions + r * tile->rows, *index_top_k = job->index_top_k + r * tile->rows;
    int64_t context = PAGE * tile->pages, most = 1;
    for (int64_t row = first; row < last; row++)
        if (smaller(index_top_k[row], positions[row] + 1) > most) most = smaller(index_top_k[row], positions[row] + 1);
    int64_t scores_at = dsa_whole(query_scratch(&job->scoring)), chosen_at = scores_at + 4 * BLOCK * context;
    int64_t thin_at = chosen_at + dsa_whole(4 * most);
    int64_t more = 8 * (context + 16) > dsa_attend_scratch((int)most) ? 8 * (context + 16) : dsa_attend_scratch((int)most);
    char *scratch = dsa_scratch(thin_at + more);
    float *scores = (float *)(scratch + scores_at);
    int32_t *chosen = (int32_t *)(scratch + chosen_at);
    score_block(&job->scoring, r, first, last, scores, scratch);
    for (int64_t row = first; row < last; row++) {
        int n = (int)positions[row] + 1, wanted = (int)smaller(index_top_k[row], n);
        int count = dsa_select_row(scores + (row - first) * context, n, wanted, chosen, (float *)(scratch + thin_at));
        if (job->flaws) job->flaws[r * tile->rows + row] |= dsa_selection_flaws(chosen, count, wanted, 0, n);
        // `count` is 0 if every score is not-a-number. The row is lost then, but attention needs at least one token.
        if (count == 0) chosen[count++] = (int32_t)positions[row];
        attend_one(&job->attention, r, row, chosen, count, scratch + thin_at);
    }
}

void dsa_attend_sparse(const struct dsa_tile *tile, const bf16 *query, const bf16 *index_query,
                       const float *head_weights, const bf16 *kv_plane, int64_t kv_stride, const uint8_t *key_plane,
                       int64_t key_stride, const int64_t *index_top_k, int H, int d, int Hkv, int G, int D, float scale,
                       bf16 *out, int32_t *flaws) {
    struct sparse_job job = {{tile, index_query, head_weights, key_plane, key_stride, H, d},
                             {tile, query, kv_plane, kv_stride, Hkv, G, D, scale, out},
                             index_top_k,
                             flaws};
    each(tile->requests * blocks(tile), sparse_item, &job);
}

struct dense_job {
    struct attention attention;
    const uint8_t *allowed;
    int64_t rows_at_once;
};

// Dense attention for any sizes: each row separately, over a list of the positions that it may see.
static void dense_rows(struct dense_job *job, int64_t r, int64_t first, int64_t last) {
    const struct dsa_tile *tile = job->attention.tile;
    int64_t context = PAGE * tile->pages;
    char *scratch = dsa_scratch(dsa_whole(4 * context) + dsa_attend_scratch((int)context));
    int32_t *chosen = (int32_t *)scratch;
    for (int64_t row = first; row < last; row++) {
        int64_t at = r * tile->rows + row;
        int count = 0;
        if (job->allowed) {
            for (int64_t c = 0; c < context; c++)
                if (job->allowed[at * context + c]) chosen[count++] = (int32_t)c;
        } else {
            count = (int)tile->positions[at] + 1;
        }
        attend_one(&job->attention, r, row, job->allowed ? chosen : 0, count, scratch + dsa_whole(4 * context));
    }
}

static void dense_item(void *arg, int64_t item) {
    struct dense_job *job = arg;
    const struct attention *a = &job->attention;
    const struct dsa_tile *tile = a->tile;
    int64_t parts = (tile->rows + job->rows_at_once - 1) / job->rows_at_once;
    int64_t head = item % a->Hkv, r = item / a->Hkv / parts, first = item / a->Hkv % parts * job->rows_at_once;
    int64_t last = smaller(first + job->rows_at_once, tile->rows), context = PAGE * tile->pages;
    if (!dsa_dense_known(a->D) || last - first == 1) {
        if (head == 0) dense_rows(job, r, first, last);
        return;
    }
    int64_t at = r * tile->rows + first, row_size = (int64_t)a->Hkv * a->G * a->D, offset = at * row_size + head * a->G * a->D;
    const struct dsa_block block = {
        .query = a->query + offset, .out = a->out + offset, .row_size = row_size, .plane = a->plane, .page_stride = a->stride,
        .block_table = tile->block_table + r * tile->pages, .rows = (int)(last - first), .head = (int)head, .Hkv = a->Hkv,
        .G = a->G, .D = a->D, .scale = a->scale};
    dsa_dense_block(&block, tile->positions + at, job->allowed ? job->allowed + at * context : 0, context, 0);
}

void dsa_attend_dense(const struct dsa_tile *tile, const bf16 *query, const bf16 *plane, int64_t page_stride,
                      const uint8_t *allowed, int Hkv, int G, int D, float scale, bf16 *out) {
    struct dense_job job = {{tile, query, plane, page_stride, Hkv, G, D, scale, out}, allowed, dsa_dense_rows(G)};
    int64_t parts = (tile->rows + job.rows_at_once - 1) / job.rows_at_once;
    each(tile->requests * parts * Hkv, dense_item, &job);
}
