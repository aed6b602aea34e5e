// The gradient of pooling over segments; the pooling itself is inverse_list's gather_reduce. Torch-free.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "inverse_list/kernel.h"

namespace any2point {

// grad_features[r] = the part of grad[segment[r]] that row r gets: all (sum), 1 / count (mean), or where it
// is the maximum (max). Rows of no segment get 0.
struct SegmentPoolBackward {
  Dtype dtype;
  Reduce reduce;
  const void* grad;        // [S, C]
  const int64_t* segment;  // [R]
  const int64_t* saved;    // mean: count [S]; max: argmax [S, C]
  void* out;               // [R, C]
  int64_t segments, channels;
};

// Rows [begin, end) of the R.
void segment_pool_backward_cpu(const SegmentPoolBackward& args, int64_t begin, int64_t end);
// All `entries` = R rows. Returns a cudaError_t.
int segment_pool_backward_cuda(const SegmentPoolBackward& args, int64_t entries, void* stream);

}  // namespace any2point
