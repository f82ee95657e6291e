// Memory that a thread keeps between calls, for what lives only inside of one.
#ifndef DSA_SCRATCH_H
#define DSA_SCRATCH_H

#include <stdint.h>

// At least so many bytes, on a cache line; what an earlier call of this thread gave is lost.
void *dsa_scratch(int64_t bytes);

// Bytes rounded up to whole cache lines.
static inline int64_t dsa_whole(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

#endif
