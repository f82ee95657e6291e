#include "scratch.h"

#include <stdio.h>
#include <stdlib.h>

static _Thread_local void *memory;
static _Thread_local int64_t size;

void *dsa_scratch(int64_t bytes) {
    if (bytes > size) {
        free(memory);
        size = dsa_whole(bytes + bytes / 2);
        memory = aligned_alloc(64, (size_t)size);
        if (!memory) { // out of memory: end the process, as torch does, but with a message first
            fprintf(stderr, "native kernels: no memory for %lld bytes of scratch\n", (long long)size);
            abort();
        }
    }
    return memory;
}
