// Whether AMX may be used, its state, and products of small matrices; see amx.h.
#define _GNU_SOURCE // for syscall
#include "amx.h"

enum { MANY = 16 }; // from so many rows on AMX is used: with fewer, products without it are as fast (measured)

int dsa_amx_rows(int count) { return count >= MANY && dsa_uses_amx(); }

#ifdef DSA_AMX

#include <cpuid.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

// What is known about AMX here, and whether it is on. Threads that ask at the same time find the same.
enum { UNKNOWN, ABSENT, OFF, ON };
static atomic_int state = UNKNOWN;

static int is_permitted(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 }; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA of Linux
    enum { BF16 = 1 << 22, TILE = 1 << 24 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & BF16) || !(d & TILE)) return 0;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

static int state_now(void) {
    int now = atomic_load_explicit(&state, memory_order_relaxed);
    if (now != UNKNOWN) return now;
    const int found = is_permitted() ? ON : ABSENT;
    return atomic_compare_exchange_strong(&state, &now, found) ? found : now;
}

int dsa_use_amx(int wanted) {
    if (state_now() == ABSENT) return 0;
    atomic_store_explicit(&state, wanted ? ON : OFF, memory_order_relaxed);
    return wanted != 0;
}

int dsa_uses_amx(void) { return state_now() == ON; }

// The layout of the instruction's operand.
struct configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

DSA_AMX void dsa_amx_begin(void) {
    struct configuration tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        tiles.row_bytes[i] = 64;
        tiles.rows[i] = 16;
    }
    __asm__ volatile("" ::"r"(&tiles) : "memory"); // the compiler does not know that the next instruction reads it all
    _tile_loadconfig(&tiles);
}

DSA_AMX void dsa_amx_end(void) { _tile_release(); }

#define SUM(operation, sum, i, j) \
    do { \
        float *at = c + ((row) + 16 * (i)) * c_row + column + 16 * (j); \
        if (16 * (i) < some) operation(sum, at, (size_t)c_row * 4); \
    } while (0)

DSA_AMX void dsa_amx_multiply(int rows, int columns, int pairs, int add, const bf16 *a, int a_row, const uint32_t *b, int b_row,
                              float *c, int c_row) {
    for (int row = 0; row < rows; row += 32)
        for (int column = 0; column < columns; column += 32) {
            const int some = rows - row;
            if (add) {
                SUM(_tile_loadd, 0, 0, 0);
                SUM(_tile_loadd, 1, 0, 1);
                SUM(_tile_loadd, 2, 1, 0);
                SUM(_tile_loadd, 3, 1, 1);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int k = 0; k < pairs; k += 16) {
                _tile_loadd(4, a + row * a_row + 2 * k, (size_t)a_row * 2);
                _tile_loadd(6, b + k * b_row + column, (size_t)b_row * 4);
                _tile_loadd(7, b + k * b_row + column + 16, (size_t)b_row * 4);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                if (some <= 16) continue;
                _tile_loadd(5, a + (row + 16) * a_row + 2 * k, (size_t)a_row * 2);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            SUM(_tile_stored, 0, 0, 0);
            SUM(_tile_stored, 1, 0, 1);
            SUM(_tile_stored, 2, 1, 0);
            SUM(_tile_stored, 3, 1, 1);
        }
}

#else // other processors have no AMX, so the rest is never called

int dsa_use_amx(int wanted) {
    (void)wanted;
    return 0;
}

int dsa_uses_amx(void) { return 0; }

void dsa_amx_begin(void) {}

void dsa_amx_end(void) {}

void dsa_amx_multiply(int rows, int columns, int pairs, int add, const bf16 *a, int a_row, const uint32_t *b, int b_row,
                      float *c, int c_row) {
    (void)rows, (void)columns, (void)pairs, (void)add, (void)a, (void)a_row, (void)b, (void)b_row, (void)c, (void)c_row;
}

#endif
