// Workers wait by spinning for some microseconds, since the next call of a decode step usually follows at once, and
// sleep after that, since a server that waits for requests must not burn its cores.
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

enum { MAX_THREADS = 256, SPINS = 4000 };

static int threads = 1;
static int started = 0; // workers that exist: threads 1 to `started`
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;

static void (*job)(void *, int, int);
static void *job_arg;
static atomic_uint job_number;  // grows by one a call
static atomic_int sleeping;     // workers in pthread_cond_wait
static atomic_int unfinished;   // workers still in the current job
static atomic_int arrived;      // threads at the barrier
static atomic_uint barrier_number;

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Spin a while; after that give the core away between looks: whoever is awaited may need it.
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
        // A worker beyond the current number of threads only keeps count of the jobs.
        if (start->thread < threads) {
            job(job_arg, start->thread, threads);
            atomic_fetch_sub_explicit(&unfinished, 1, memory_order_release);
        }
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
        if (failed) { // as many as the system gives
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
    atomic_store(&unfinished, threads - 1);
    atomic_fetch_add(&job_number, 1);
    if (atomic_load(&sleeping)) {
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&lock);
    }
    fn(arg, 0, threads);
    for (unsigned i = 0; atomic_load_explicit(&unfinished, memory_order_acquire); i++) pause_number(i);
}

void dsa_barrier(void) {
    if (threads == 1) return;
    unsigned number = atomic_load(&barrier_number);
    if (atomic_fetch_add(&arrived, 1) == threads - 1) {
        atomic_store(&arrived, 0);
        atomic_fetch_add(&barrier_number, 1);
        return;
    }
    for (unsigned i = 0; atomic_load_explicit(&barrier_number, memory_order_acquire) == number; i++) pause_number(i);
}

// What the library was compiled from; see levels.py.
const char *dsa_fingerprint(void) { return DSA_FINGERPRINT; }
