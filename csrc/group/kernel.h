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

}  // namespace any2point
