// A stable radix sort of (64-bit key, 32-bit value) pairs on CUDA. One instantiation for the whole library:
// CUB's sort is by far the slowest thing to compile.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace any2point {

struct SortBuffers {
  uint64_t* keys[2];    // input in [0]; the result's place is swapped into [0]
  uint32_t* values[2];  // likewise
};

// Bytes of scratch memory for n pairs.
size_t radix_sort_scratch(int64_t n);
// By bits [begin, end) of the keys. Returns a cudaError_t.
int radix_sort(SortBuffers* buffers, int64_t n, int begin, int end, void* scratch, size_t scratch_bytes,
               void* stream);

}  // namespace any2point
