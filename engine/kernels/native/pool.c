// A worker first spins for some microseconds, because the next call usually follows at once. Then it sleeps, because a
// server that waits for requests must not use its cores.
//
// Only the workers that come in time compute a call; it never waits for the others. On a busy machine a worker may not
// run for milliseconds, and in that time the caller alone would finish the step. (Measured on two busy cores: steps
// that waited for a worker took up to ten times as long as steps that did not.)
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

enum {
    MAX_THREADS = 256,
    SPINS = 4000,        // about 10 ns each
    JOIN_SPINS = 400,    // how long a call waits for workers that are awake
    WAKE_SPINS = 6000,   // how long it waits for workers that have to wake up
    CLOSED = 1 << 20,    // more than the number of workers
};

static int threads = 1;
static int started = 0; // workers that exist: threads 1 to `started`
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;

static void (*job)(void *, int, int);
static void *job_arg;
static atomic_uint job_number; // grows by one with each call
static atomic_int sleeping;    // workers in pthread_cond_wait
static atomic_int joined;      // workers that are in the current call; CLOSED or more once the call is closed
static atomic_int members;     // threads of the current call, with the caller; 0 until the number is known
static atomic_int finished;    // workers that have finished the current call
static atomic_int arrived;     // threads at the barrier
static atomic_uint barrier_number;

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Spin for a while. After that give the core to others between two looks, as the awaited thread may need it.
static inline void pause_number(unsigned turn) {
    if (turn < SPINS) relax();
    else sched_yield();
}

static unsigned await_job(unsigned seen) {
    for (int i = 0; i < SPINS; i++) {
        unsigned now = atomic_load_explicit(&job_number, memory_order_acquire);
        if (now != seen) return now;
        relax();
    }
    pthread_mutex_lock(&lock);
    atomic_fetch_add(&sleeping, 1);
    while (atomic_load(&job_number) == seen) pthread_cond_wait(&wake, &lock);
    atomic_fetch_sub(&sleeping, 1);
    unsigned now = atomic_load(&job_number);
    pthread_mutex_unlock(&lock);
    return now;
}

struct start {
    int thread;
    unsigned seen;
};
static struct start starts[MAX_THREADS];

static void *work(void *argument) {
    struct start *start = argument;
    unsigned seen = start->seen;
    for (;;) {
        seen = await_job(seen);
        // A worker beyond the current number of threads only counts the jobs. A late worker waits for the next job.
        // (It may be so late that it joins the next job before it has seen that job's number. When it sees the number,
        // that job is closed for it.)
        if (start->thread >= threads) continue;
        int thread = atomic_fetch_add(&joined, 1) + 1, count;
        if (thread > CLOSED) continue;
        for (unsigned i = 0; !(count = atomic_load_explicit(&members, memory_order_acquire)); i++) pause_number(i);
        job(job_arg, thread, count);
        atomic_fetch_add_explicit(&finished, 1, memory_order_release);
    }
    return 0;
}

void dsa_set_threads(int wanted) {
    threads = wanted < 1 ? 1 : wanted > MAX_THREADS ? MAX_THREADS : wanted;
    while (started < threads - 1) {
        pthread_t id;
        pthread_attr_t attributes;
        starts[started + 1] = (struct start){started + 1, atomic_load(&job_number)};
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        int failed = pthread_create(&id, &attributes, work, &starts[started + 1]);
        pthread_attr_destroy(&attributes);
        if (failed) { // the system gives no more threads: use those that exist
            threads = started + 1;
            return;
        }
        started++;
    }
}

int dsa_threads(void) { return threads; }

void dsa_parallel(void (*fn)(void *, int, int), void *arg) {
    if (threads == 1) {
        fn(arg, 0, 1);
        return;
    }
    job = fn;
    job_arg = arg;
    atomic_store(&members, 0);
    atomic_store(&finished, 0);
    atomic_store(&joined, 0);
    atomic_fetch_add(&job_number, 1);
    int turns = JOIN_SPINS;
    if (atomic_load(&sleeping)) {
        turns = WAKE_SPINS;
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&lock);
    }
    while (turns-- && atomic_load_explicit(&joined, memory_order_relaxed) < threads - 1) relax();
    const int workers = atomic_exchange(&joined, CLOSED);
    atomic_store_explicit(&members, workers + 1, memory_order_release);
    fn(arg, 0, workers + 1);
    for (unsigned i = 0; atomic_load_explicit(&finished, memory_order_acquire) < workers; i++) pause_number(i);
}

void dsa_barrier(void) {
    const int count = threads == 1 ? 1 : atomic_load_explicit(&members, memory_order_relaxed);
    if (count == 1) return;
    unsigned number = atomic_load(&barrier_number);
    if (atomic_fetch_add(&arrived, 1) == count - 1) {
        atomic_store(&arrived, 0);
        atomic_fetch_add(&barrier_number, 1);
        return;
    }
    for (unsigned i = 0; atomic_load_explicit(&barrier_number, memory_order_acquire) == number; i++) pause_number(i);
}

// Identifies the sources that the library was compiled from; see levels.py.
const char *dsa_fingerprint(void) { return DSA_FINGERPRINT; }
