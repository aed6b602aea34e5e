// Weighted sums of K rows, and the gradient of the weights; that of the features is inverse_list's
// gather_reduce. Torch-free.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace any2point {

struct Interpolate {
  Dtype dtype;
  const void* features;  // [B, N, C]
  const int64_t* index;  // [B, S, K]
  const void* weight;    // [B, S, K] of the accumulator's type
  const void* grad;      // [B, S, C]; for the gradient of the weights
  void* out;             // [B, S, C], or [B, S, K] of the accumulator's type
  int64_t rows, queries, neighbours, channels;
};

// out[b, s] = sum over k of weight[b, s, k] * features[b, index[b, s, k]], rows of -1 left out, for items
// [begin, end) of the B * S. Returns the position of the first index outside [-1, N), or -1.
int64_t interpolate_cpu(const Interpolate& args, int64_t begin, int64_t end);

// out[b, s, k] = grad[b, s] . features[b, index[b, s, k]], 0 for -1.
int64_t interpolate_weight_grad_cpu(const Interpolate& args, int64_t begin, int64_t end);

// The same for all queries, NaN where an index is outside of [-1, N). They return a cudaError_t.
int interpolate_cuda(const Interpolate& args, int64_t clouds, void* stream);
int interpolate_weight_grad_cuda(const Interpolate& args, int64_t clouds, void* stream);

}  // namespace any2point
