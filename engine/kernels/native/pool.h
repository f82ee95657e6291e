// A small pool of threads for kernels that take microseconds.
#ifndef DSA_POOL_H
#define DSA_POOL_H

// Set how many threads a parallel call has at most, with the caller's; at least 1. Do not call it while a call runs.
void dsa_set_threads(int threads);
int dsa_threads(void);

// Run fn(arg, thread, threads) on the threads that are available at once; the caller is thread 0. Returns when all have
// returned. `threads` is any number from 1 to dsa_threads().
// Calls must not nest, and only one thread of the process may make a call at a time.
void dsa_parallel(void (*fn)(void *arg, int thread, int threads), void *arg);

// Inside `fn`: wait until every thread of the call is at the barrier.
void dsa_barrier(void);

// This thread's part [*first, *last) of n rows, in whole multiples of `unit` rows.
static inline void dsa_share(int n, int unit, int thread, int threads, int *first, int *last) {
    int units = (n + unit - 1) / unit;
    int from = (int)((long)units * thread / threads) * unit, to = (int)((long)units * (thread + 1) / threads) * unit;
    *first = from < n ? from : n;
    *last = to < n ? to : n;
}

#endif
