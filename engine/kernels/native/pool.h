// A small pool of threads for kernels that take microseconds.
#ifndef DSA_POOL_H
#define DSA_POOL_H

// How many threads a parallel call has at most, the caller's own included; at least 1. Not while a call runs.
void dsa_set_threads(int threads);
int dsa_threads(void);

// fn(arg, thread, threads) on as many threads as are there at once, the caller being thread 0; returns when all have.
// `threads` may be any number up to dsa_threads().
// Calls do not nest, and only one thread of the process makes them at a time.
void dsa_parallel(void (*fn)(void *arg, int thread, int threads), void *arg);

// Inside such an fn: wait until every thread is here.
void dsa_barrier(void);

// This thread's part of n rows, in whole multiples of `unit` rows: [*first, *last).
static inline void dsa_share(int n, int unit, int thread, int threads, int *first, int *last) {
    int units = (n + unit - 1) / unit;
    int from = (int)((long)units * thread / threads) * unit, to = (int)((long)units * (thread + 1) / threads) * unit;
    *first = from < n ? from : n;
    *last = to < n ? to : n;
}

#endif
