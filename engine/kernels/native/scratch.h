// Memory for the duration of one call. Each thread keeps its own between calls, so that a call need not allocate.
#ifndef DSA_SCRATCH_H
#define DSA_SCRATCH_H

#include <stdint.h>

// At least `bytes` bytes, aligned to a cache line. It invalidates the memory of this thread's earlier calls.
void *dsa_scratch(int64_t bytes);

// Bytes rounded up to whole cache lines.
static inline int64_t dsa_whole(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

#endif
