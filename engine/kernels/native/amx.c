// Products with AMX; see amx.h. Two blocks of 16 rows are multiplied with two tiles of 16 outputs at once, so that each tile
// that is loaded is used twice. Inputs are cut into panels: a panel of weights is unpacked once for all rows.
#define _GNU_SOURCE // for syscall
#include "amx.h"

#include "integers.h"
#include "scratch.h"

// MANY: from so many rows on AMX is used (measured). PANEL: the most groups of a panel. UNIT: the most tiles of
// weights that are multiplied at once: with several panels the activations come from a far cache for each unit.
enum { MANY = 24, PANEL = 32, UNIT = 8 };

static int panels_of(int groups) { return (groups + PANEL - 1) / PANEL; }

int dsa_amx_unit(int inputs) { return panels_of(inputs / DSA_GROUP) > 2 ? UNIT : 2; }

#if defined(DSA_AVX512) && defined(__linux__)

#include <cpuid.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AMX __attribute__((target("amx-tile,amx-bf16")))

// What is known about AMX here, and whether it is on. Threads that ask at the same time find the same.
enum { UNKNOWN, ABSENT, OFF, ON };
static atomic_int state = UNKNOWN;

static int is_permitted(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 }; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA of Linux
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_BF16) || !(d & AMX_TILE)) return 0;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

int dsa_amx_here(void) {
    int now = atomic_load_explicit(&state, memory_order_relaxed);
    if (now == UNKNOWN) {
        now = is_permitted() ? ON : ABSENT;
        atomic_store_explicit(&state, now, memory_order_relaxed);
    }
    return now != ABSENT;
}

int dsa_use_amx(int wanted) {
    if (!dsa_amx_here()) return 0;
    atomic_store(&state, wanted ? ON : OFF);
    return wanted != 0;
}

int dsa_amx_rows(int count) {
    return count >= MANY && dsa_amx_here() && atomic_load_explicit(&state, memory_order_relaxed) == ON;
}

// The layout of the instruction's operand.
struct configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

AMX static void configure(void) {
    struct configuration tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        tiles.row_bytes[i] = 64;
        tiles.rows[i] = 16;
    }
    __asm__ volatile("" ::"r"(&tiles) : "memory"); // the compiler does not know that the next instruction reads it all
    _tile_loadconfig(&tiles);
}

// One or two blocks of rows, one or two tiles of weights, and a panel of inputs.
struct product {
    const uint8_t *upper, *lower; // of the first block
    size_t next_block;            // bytes from block to block
    const uint8_t *weights[2];    // a group has a tile; or two, of upper and lower halves
    int groups;
    const float *from[2][2]; // sums to add to, [block][tile], without gaps; NULL: zeros
    float *to[2][2];
    size_t strides[2]; // of `to`, for a block
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
AMX __attribute__((always_inline)) static inline void multiply(const struct product *p, int blocks, int tiles, int terms) {
    const size_t step = terms > 1 ? 2 * DSA_SPLIT : DSA_SPLIT;
    FROM(0, 0, 0);
    FROM(1, 0, 1);
    FROM(2, 1, 0);
    FROM(3, 1, 1);
    for (int g = 0; g < p->groups; g++) {
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

AMX static void multiply_any(const struct product *p, int blocks, int tiles, int terms) {
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

// What the panels of a unit are multiplied with, and their place in memory.
struct unit {
    const struct dsa_rows *x;
    float *out;
    size_t stride;
    int first, last, groups, terms; // the panel; groups of a row
    float *sums;                    // [pairs of tiles][blocks][2][16 rows][16 outputs]: of the panels so far
    float *edge;                    // [2][16][16]: of a block that has fewer rows than 16
};

static void multiply_pair(const struct unit *u, const uint8_t *weights[2], int tiles, int tile) {
    const int count = u->x->count, blocks = (count + DSA_BLOCK - 1) / DSA_BLOCK;
    const size_t block_bytes = (size_t)u->groups * DSA_SPLIT, panel = (size_t)u->first * DSA_SPLIT;
    for (int b = 0; b < blocks; b += 2) {
        struct product p = {
            .upper = (const uint8_t *)u->x->upper + b * block_bytes + panel,
            .lower = (const uint8_t *)u->x->lower + b * block_bytes + panel,
            .next_block = block_bytes,
            .weights = {weights[0], weights[1]},
            .groups = u->last - u->first,
        };
        const int together = blocks - b < 2 ? 1 : 2;
        int edge = -1; // the block with fewer rows
        for (int i = 0; i < together; i++) {
            float *sums = u->sums + ((size_t)(tile / 2) * blocks + b + i) * 2 * 256;
            p.strides[i] = 16;
            if (u->last == u->groups && (b + i + 1) * DSA_BLOCK > count) edge = i;
            else if (u->last == u->groups) p.strides[i] = u->stride;
            for (int j = 0; j < tiles; j++) {
                p.from[i][j] = u->first ? sums + 256 * j : 0;
                p.to[i][j] = u->last < u->groups ? sums + 256 * j : edge == i ? u->edge + 256 * j
                           : u->out + (size_t)(b + i) * DSA_BLOCK * u->stride + (tile + j) * DSA_LANES;
            }
        }
        multiply_any(&p, together, tiles, u->terms);
        if (edge < 0) continue;
        for (int j = 0; j < tiles; j++)
            for (int r = (b + edge) * DSA_BLOCK; r < count; r++)
                memcpy(u->out + r * u->stride + (tile + j) * DSA_LANES, u->edge + 256 * j + r % DSA_BLOCK * 16, 64);
    }
}

AMX void dsa_amx_product(int kind, const uint8_t *weights, size_t bytes, int tiles, const struct dsa_rows *x, float *out,
                         size_t stride) {
    const int groups = x->inputs / DSA_GROUP, panels = panels_of(groups), each = (groups + panels - 1) / panels;
    const size_t blocks = (size_t)(x->count + DSA_BLOCK - 1) / DSA_BLOCK;
    const size_t panel_bytes = (size_t)each * 2 * DSA_SPLIT, sums_bytes = panels > 1 ? UNIT * blocks * 1024 : 0;
    uint8_t *scratch = dsa_scratch((int64_t)(2 * panel_bytes + sums_bytes + 2 * 1024));
    float *sums = (float *)(void *)(scratch + 2 * panel_bytes);
    struct unit u = {x, out, stride, 0, 0, groups, kind == DSA_BF16 ? 1 : x->lower ? 3 : 2, sums, sums + sums_bytes / 4};
    configure();
    for (int begin = 0; begin < tiles; begin += UNIT, u.out += UNIT * DSA_LANES) {
        const int some = tiles - begin < UNIT ? tiles - begin : UNIT;
        for (u.first = 0; u.first < groups; u.first = u.last) {
            u.last = u.first + each < groups ? u.first + each : groups;
            for (int t = 0; t < some; t += 2) {
                const int pair = some - t < 2 ? 1 : 2;
                const uint8_t *halves[2] = {0};
                for (int i = 0; i < pair; i++) {
                    const uint8_t *tile = weights + (size_t)(begin + t + i) * bytes;
                    halves[i] = kind == DSA_BF16 ? tile + (size_t)u.first * DSA_SPLIT : scratch + i * panel_bytes;
                    if (kind != DSA_BF16) dsa_integer_split(kind, tile, groups, u.first, u.last, scratch + i * panel_bytes);
                }
                multiply_pair(&u, halves, pair, t);
            }
        }
    }
    _tile_release();
}

#else // other processors have no AMX

int dsa_amx_here(void) { return 0; }

int dsa_use_amx(int wanted) {
    (void)wanted;
    return 0;
}

int dsa_amx_rows(int count) {
    (void)count;
    return 0;
}

void dsa_amx_product(int kind, const uint8_t *weights, size_t bytes, int tiles, const struct dsa_rows *x, float *out,
                     size_t stride) {
    (void)kind, (void)weights, (void)bytes, (void)tiles, (void)x, (void)out, (void)stride;
}

#endif
