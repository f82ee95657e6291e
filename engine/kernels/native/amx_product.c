// Products with weights; see amx.h. Two blocks of 16 rows are multiplied with two tiles of 16 outputs at once, so that each
// tile that is loaded is used twice. Inputs are cut into panels: a panel of weights is unpacked once for all rows.
#include "amx.h"
#include "integers.h"
#include "scratch.h"

// PANEL: the most groups of a panel. UNIT: the most tiles of weights that are multiplied at once: with several panels the
// activations come from a far cache for each unit.
enum { PANEL = 24, UNIT = 8 };

int dsa_amx_unit(int tiles, int threads) {
    int best = 2, least = tiles + UNIT;
    for (int unit = UNIT; unit > 0; unit -= 2) {
        const int most = ((tiles + unit - 1) / unit + threads - 1) / threads * unit; // that one thread has
        if (most < least) {
            best = unit;
            least = most;
        }
    }
    return best;
}

#ifdef DSA_AMX

// Weights to unpack: groups first to last - 1 of one or two tiles, a group of one tile at a time.
struct unpacking {
    int kind, tiles, groups, first, last, done; // groups of a row; `done`: so many were unpacked, of all tiles
    const uint8_t *from[2];
    uint8_t *to[2];
};

static inline void unpack_next(struct unpacking *u) {
    const int tile = u->done % u->tiles, g = u->done / u->tiles;
    dsa_integer_split(u->kind, u->from[tile], u->groups, u->first + g, u->first + g + 1,
                      u->to[tile] + (size_t)g * 2 * DSA_SPLIT);
    u->done++;
}

static inline int to_unpack(const struct unpacking *u) { return (u->last - u->first) * u->tiles - u->done; }

// One or two blocks of rows, one or two tiles of weights, and a panel of inputs. Meanwhile weights are unpacked, which other
// parts of the processor do: `share` of `of` groups for each group that is multiplied.
struct product {
    const uint8_t *upper, *lower; // of the first block
    size_t next_block;            // bytes from block to block
    const uint8_t *weights[2];    // a group has a tile; or two, of upper and lower halves
    int groups;
    const float *from[2][2]; // sums to add to, [block][tile], without gaps; NULL: zeros
    float *to[2][2];
    size_t strides[2]; // of `to`, for a block
    struct unpacking *meanwhile;
    int share, of;
};

#define FROM(sum, r, c) \
    do { \
        if ((r) < blocks && (c) < tiles) { \
            if (p->from[r][c]) _tile_loadd(sum, p->from[r][c], 64); \
            else _tile_zero(sum); \
        } \
    } while (0)
#define TO(sum, r, c) \
    do { \
        if ((r) < blocks && (c) < tiles) _tile_stored(sum, p->to[r][c], p->strides[r] * sizeof(float)); \
    } while (0)
#define ROWS_AT(place) \
    do { \
        _tile_loadd(4, place, 64); \
        if (blocks > 1) _tile_loadd(5, (place) + p->next_block, 64); \
    } while (0)
#define WEIGHTS_AT(at) \
    do { \
        _tile_loadd(6, p->weights[0] + (at), 64); \
        if (tiles > 1) _tile_loadd(7, p->weights[1] + (at), 64); \
    } while (0)
#define MULTIPLY() \
    do { \
        _tile_dpbf16ps(0, 4, 6); \
        if (tiles > 1) _tile_dpbf16ps(1, 4, 7); \
        if (blocks > 1) _tile_dpbf16ps(2, 5, 6); \
        if (blocks > 1 && tiles > 1) _tile_dpbf16ps(3, 5, 7); \
    } while (0)

// `terms` of a product: 3; 2 without the lower halves of rows; 1 without those of weights, too. All three are constants where
// this is inlined.
DSA_AMX __attribute__((always_inline)) static inline void multiply(const struct product *p, int blocks, int tiles, int terms) {
    const size_t step = terms > 1 ? 2 * DSA_SPLIT : DSA_SPLIT;
    FROM(0, 0, 0);
    FROM(1, 0, 1);
    FROM(2, 1, 0);
    FROM(3, 1, 1);
    for (int g = 0, due = 0; g < p->groups; g++) {
        for (due += p->share; due >= p->of && to_unpack(p->meanwhile) > 0; due -= p->of) unpack_next(p->meanwhile);
        const uint8_t *upper = p->upper + (size_t)g * DSA_SPLIT;
        ROWS_AT(upper);
        if (terms > 1) {
            WEIGHTS_AT(g * step + DSA_SPLIT);
            MULTIPLY();
        }
        WEIGHTS_AT(g * step);
        MULTIPLY();
        if (terms > 2) {
            const uint8_t *lower = p->lower + (size_t)g * DSA_SPLIT;
            ROWS_AT(lower);
            MULTIPLY();
        }
    }
    TO(0, 0, 0);
    TO(1, 0, 1);
    TO(2, 1, 0);
    TO(3, 1, 1);
}

DSA_AMX static void multiply_any(const struct product *p, int blocks, int tiles, int terms) {
#define FORM(b, t, n) \
    case 100 * (b) + 10 * (t) + (n): multiply(p, b, t, n); break;
    switch (100 * blocks + 10 * tiles + terms) {
        FORM(1, 1, 1)
        FORM(1, 1, 2)
        FORM(1, 1, 3)
        FORM(1, 2, 1)
        FORM(1, 2, 2)
        FORM(1, 2, 3)
        FORM(2, 1, 1)
        FORM(2, 1, 2)
        FORM(2, 1, 3)
        FORM(2, 2, 1)
        FORM(2, 2, 2)
        FORM(2, 2, 3)
    }
#undef FORM
}

// The product of a unit of tiles with all rows, and its place in memory.
struct unit {
    const struct dsa_rows *x;
    float *out;
    size_t stride;
    int groups, terms; // groups of a row
    float *sums;       // [pairs of tiles][blocks][2][16 rows][16 outputs]: of the panels so far
    float *edge;       // [2][16][16]: of a block that has fewer rows than 16
};

// Multiply a panel of tiles `tile` and `tile` + 1 with all rows. `own`: the panel, of which the first group is unpacked at least.
// `next`: what is to be unpacked meanwhile.
static void multiply_panel(const struct unit *u, const uint8_t *const weights[2], struct unpacking *own, struct unpacking *next,
                           int tile) {
    const int count = u->x->count, blocks = (count + DSA_BLOCK - 1) / DSA_BLOCK, tiles = own->tiles;
    const size_t block_bytes = (size_t)u->groups * DSA_SPLIT, panel = (size_t)own->first * DSA_SPLIT;
    const int begun = to_unpack(own) > 0, steps = ((blocks + 1) / 2 - begun) * (own->last - own->first);
    for (int b = 0; b < blocks; b += 2) {
        const int mine = begun && b == 0, together = blocks - b < 2 ? 1 : 2;
        struct product p = {
            .upper = (const uint8_t *)u->x->upper + b * block_bytes + panel,
            .lower = (const uint8_t *)u->x->lower + b * block_bytes + panel,
            .next_block = block_bytes,
            .weights = {weights[0], weights[1]},
            .groups = own->last - own->first,
            .meanwhile = mine ? own : next,
            .share = mine ? tiles : to_unpack(next) + next->done,
            .of = mine ? 1 : steps,
        };
        int edge = -1; // the block with fewer rows
        for (int i = 0; i < together; i++) {
            float *sums = u->sums + ((size_t)(tile / 2) * blocks + b + i) * 2 * 256;
            p.strides[i] = 16;
            if (own->last == u->groups && (b + i + 1) * DSA_BLOCK > count) edge = i;
            else if (own->last == u->groups) p.strides[i] = u->stride;
            for (int j = 0; j < tiles; j++) {
                p.from[i][j] = own->first ? sums + 256 * j : 0;
                p.to[i][j] = own->last < u->groups ? sums + 256 * j : edge == i ? u->edge + 256 * j
                           : u->out + (size_t)(b + i) * DSA_BLOCK * u->stride + (tile + j) * DSA_LANES;
            }
        }
        multiply_any(&p, together, tiles, u->terms);
        if (edge < 0) continue;
        for (int j = 0; j < tiles; j++)
            for (int r = (b + edge) * DSA_BLOCK; r < count; r++)
                memcpy(u->out + r * u->stride + (tile + j) * DSA_LANES, u->edge + 256 * j + r % DSA_BLOCK * 16, 64);
    }
    while (to_unpack(next) > 0) unpack_next(next);
}

DSA_AMX void dsa_amx_product(int kind, const uint8_t *weights, size_t bytes, int tiles, const struct dsa_rows *x, float *out,
                         size_t stride) {
    const int groups = x->inputs / DSA_GROUP, panels = (groups + PANEL - 1) / PANEL, each = (groups + panels - 1) / panels;
    const size_t blocks = (size_t)(x->count + DSA_BLOCK - 1) / DSA_BLOCK;
    const size_t panel_bytes = (size_t)each * 2 * DSA_SPLIT, sums_bytes = panels > 1 ? UNIT * blocks * 1024 : 0;
    uint8_t *scratch = dsa_scratch((int64_t)(4 * panel_bytes + sums_bytes + 2 * 1024));
    float *sums = (float *)(void *)(scratch + 4 * panel_bytes);
    struct unit u = {x, out, stride, groups, kind == DSA_BF16 ? 1 : x->lower ? 3 : 2, sums, sums + sums_bytes / 4};
    dsa_amx_begin();
    for (int begin = 0; begin < tiles; begin += UNIT, u.out += UNIT * DSA_LANES) {
        const int some = tiles - begin < UNIT ? tiles - begin : UNIT, pairs = (some + 1) / 2;
        struct unpacking works[2]; // of this step and of the next
        for (int step = -1; step < panels * pairs; step++) {
            struct unpacking *own = &works[step & 1], *next = &works[(step + 1) & 1];
            const int panel = (step + 1) / pairs, t = (step + 1) % pairs * 2;
            *next = (struct unpacking){.kind = kind, .tiles = some - t < 2 ? 1 : 2, .groups = groups, .first = panel * each};
            next->last = panel == panels ? next->first : panel == panels - 1 ? groups : next->first + each;
            for (int i = 0; i < next->tiles; i++) {
                next->from[i] = weights + (size_t)(begin + t + i) * bytes;
                next->to[i] = scratch + (size_t)(2 * ((step + 1) & 1) + i) * panel_bytes;
            }
            if (kind == DSA_BF16) next->done = next->tiles * (next->last - next->first); // they are multiplied where they are
            if (step < 0) {
                for (int i = 0; i < next->tiles && to_unpack(next) > 0; i++) unpack_next(next);
                continue;
            }
            const uint8_t *halves[2];
            for (int i = 0; i < 2; i++)
                halves[i] = kind == DSA_BF16 ? own->from[i] + (size_t)own->first * DSA_SPLIT : own->to[i];
            multiply_panel(&u, halves, own, next, step % pairs * 2);
        }
    }
    dsa_amx_end();
}

#else // never called

void dsa_amx_product(int kind, const uint8_t *weights, size_t bytes, int tiles, const struct dsa_rows *x, float *out,
                     size_t stride) {
    (void)kind, (void)weights, (void)bytes, (void)tiles, (void)x, (void)out, (void)stride;
}

#endif
