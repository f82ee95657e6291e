// Lays out GGUF's super-blocks as tiles; see integers.h. The layouts of GGUF's blocks are those of ggml-common.h.
#include "pool.h"
#include "integers.h"

enum { SUPER = 256, GROUPS = 8 };

// One block's numbers, small scales (Q6_K: 16; else 8) and small offsets (8), and where its float16 scales are.
struct block {
    uint8_t numbers[SUPER], scales[16], offsets[8];
    const uint8_t *scale, *offset; // offset: NULL for Q6_K
};

static void read_q6(const uint8_t *from, struct block *to) {
    const uint8_t *low = from, *high = from + 128;
    for (int half = 0; half < 2; half++, low += 64, high += 32)
        for (int i = 0; i < 32; i++) {
            uint8_t *n = to->numbers + 128 * half + i;
            n[0] = (low[i] & 15) | (high[i] & 3) << 4;
            n[32] = (low[i + 32] & 15) | (high[i] >> 2 & 3) << 4;
            n[64] = low[i] >> 4 | (high[i] >> 4 & 3) << 4;
            n[96] = low[i + 32] >> 4 | (high[i] >> 6) << 4;
        }
    memcpy(to->scales, from + 192, 16);
    to->scale = from + 208;
    to->offset = 0;
}

// Q4_K, or with `fifth` Q5_K.
static void read_q45(const uint8_t *from, int fifth, struct block *to) {
    const uint8_t *six = from + 4, *bits = from + 16, *low = bits + (fifth ? 32 : 0);
    for (int i = 0; i < 4; i++) { // four scales of 6 bits, then four offsets; the rest in what is left of the bits
        to->scales[i] = six[i] & 63;
        to->offsets[i] = six[i + 4] & 63;
        to->scales[i + 4] = (six[i + 8] & 15) | six[i] >> 6 << 4;
        to->offsets[i + 4] = six[i + 8] >> 4 | six[i + 4] >> 6 << 4;
    }
    for (int pair = 0; pair < 4; pair++, low += 32)
        for (int i = 0; i < 32; i++) {
            to->numbers[64 * pair + i] = low[i] & 15;
            to->numbers[64 * pair + 32 + i] = low[i] >> 4;
        }
    for (int g = 0; fifth && g < GROUPS; g++)
        for (int i = 0; i < 32; i++) to->numbers[32 * g + i] |= (bits[i] >> g & 1) << 4;
    to->scale = from;
    to->offset = from + 2;
}

// Write one output's block into its lane of a tile's block.
static void place(int kind, const struct block *block, int lane, uint8_t *out) {
    memcpy(out + 2 * lane, block->scale, 2);
    if (block->offset) memcpy(out + 32 + 2 * lane, block->offset, 2);
    out += 64;
    for (int g = 0; g < GROUPS; g++, out += 32) {
        out[lane] = kind == DSA_Q6_K ? block->scales[2 * g] : block->scales[g];
        out[16 + lane] = kind == DSA_Q6_K ? block->scales[2 * g + 1] : block->offsets[g];
    }
    for (int g = 0; g < GROUPS; g++) {
        const uint8_t *n = block->numbers + DSA_GROUP * g;
        for (int w = 0; w < 4; w++, n += 8, out += 64)
            for (int b = 0; b < 4; b++) out[4 * lane + b] = (n[b] & 15) | n[4 + b] << 4;
        n -= DSA_GROUP;
        const int words = kind == DSA_Q4_K ? 0 : kind == DSA_Q5_K ? 1 : 2, width = kind == DSA_Q5_K ? 1 : 2;
        for (int w = 0; w < words; w++, out += 64)
            for (int b = 0; b < 4; b++) {
                uint8_t bits = 0;
                for (int t = 0; t < 8 / width; t++) bits |= (uint8_t)(n[32 / words * w + 4 * t + b] >> 4 << width * t);
                out[4 * lane + b] = bits;
            }
    }
}

struct packing {
    int kind, outputs, inputs;
    const uint8_t *rows;
    int64_t row_bytes;
    uint8_t *out;
};

static void pack_part(void *arg, int thread, int threads) {
    const struct packing *p = arg;
    const int blocks = p->inputs / SUPER, tiles = (p->outputs + DSA_LANES - 1) / DSA_LANES;
    const size_t tile_bytes = dsa_tile_bytes(p->kind, p->inputs);
    int first, last;
    dsa_share(tiles, 1, thread, threads, &first, &last);
    for (int t = first; t < last; t++) {
        uint8_t *tile = p->out + (size_t)t * tile_bytes;
        memset(tile, 0, tile_bytes);
        for (int lane = 0; lane < DSA_LANES && t * DSA_LANES + lane < p->outputs; lane++) {
            const uint8_t *row = p->rows + (int64_t)(t * DSA_LANES + lane) * p->row_bytes;
            for (int b = 0; b < blocks; b++) {
                const uint8_t *from = row + b * (p->row_bytes / blocks);
                struct block block;
                if (p->kind == DSA_Q6_K) read_q6(from, &block);
                else read_q45(from, p->kind == DSA_Q5_K, &block);
                place(p->kind, &block, lane, tile + (size_t)b * (tile_bytes / (size_t)blocks));
            }
        }
    }
}

void dsa_super_pack(int kind, const uint8_t *rows, int64_t row_bytes, int outputs, int inputs, uint8_t *out) {
    struct packing packing = {kind, outputs, inputs, rows, row_bytes, out};
    dsa_parallel(pack_part, &packing);
}
