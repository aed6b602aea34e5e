// Rows of features by index. Torch-free.
#pragma once

#include <stdint.h>

namespace any2point {

// out[b, r] = features[b, index[b, r]], a zero row for -1.
struct Group {
  const void* features;  // [B, N] rows
  const int64_t* index;  // [B, R]
  void* out;             // [B, R] rows
  int64_t rows;          // N
  int64_t entries;       // R
  int64_t row_bytes;
};

// Entries [begin, end) of the B * R. Returns the position of the first value outside [-1, N), or -1.
int64_t group_cpu(const Group& args, int64_t begin, int64_t end);

// All entries of all clouds; rows of a value outside [-1, N) are filled with `nan`, 8 bytes. Returns a
// cudaError_t.
int group_cuda(const Group& args, int64_t clouds, uint64_t nan, void* stream);

}  // namespace any2point
