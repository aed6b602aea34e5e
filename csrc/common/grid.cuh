// Walking over large index spaces in CUDA kernels: 64-bit, without a division per element.
#pragma once

#include <stdint.h>

#include "common/layout.h"

namespace any2point {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffff;  // all lanes of a warp

// Blocks of kThreads for `items`, at most 128 for each processor: many times what fits at once, so that the
// last ones to run are few, and few enough that a thread's first division is spread over several items.
inline int grid_for(int64_t items) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t needed = (items + kThreads - 1) / kThreads, most = int64_t(processors) * 128;
  return static_cast<int>(needed < most ? needed : most);
}

// The coordinates of element i of an array [outer, middle, inner], and how they change over a stride.
struct Place {
  int64_t outer, middle, inner;
};

struct Strider {
  int64_t total, middle, inner;
  int64_t stride;
  Place step;

  // For kernels launched with `blocks` blocks of kThreads.
  Strider(int64_t outer_, int64_t middle_, int64_t inner_, int blocks)
      : total(outer_ * middle_ * inner_), middle(middle_), inner(inner_), stride(int64_t(blocks) * kThreads) {
    step = {stride / inner / middle, stride / inner % middle, stride % inner};
  }

#ifdef __CUDACC__
  __device__ int64_t first() const { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }
  __device__ Place place(int64_t i) const {
    if (((i | middle | inner) >> 32) == 0) {  // as a rule; a 64-bit division takes about 100 instructions
      const uint32_t row = uint32_t(i) / uint32_t(inner);
      return {row / uint32_t(middle), row % uint32_t(middle), uint32_t(i) % uint32_t(inner)};
    }
    return {i / inner / middle, i / inner % middle, i % inner};
  }
  // The place of i + stride.
  __device__ void advance(Place* p) const {
    p->inner += step.inner;
    int64_t carry = p->inner >= inner;
    p->inner -= carry ? inner : 0;
    p->middle += step.middle + carry;
    carry = p->middle >= middle;
    p->middle -= carry ? middle : 0;
    p->outer += step.outer + carry;
  }
#endif
};

// V elements that are loaded and stored at once.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

#ifdef __CUDACC__
// Sum of `value` over the threads before this one; `total` over all of the block's kThreads.
__device__ inline uint32_t exclusive_sum(uint32_t value, uint32_t* total) {
  __shared__ uint32_t sums[kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint32_t sum = value;
  for (int d = 1; d < kWarp; d *= 2) {
    const uint32_t other = __shfl_up_sync(kAll, sum, d);
    if (lane >= d) sum += other;
  }
  __syncthreads();  // of an earlier call, `sums` may still be read
  if (lane == kWarp - 1) sums[warp] = sum;
  __syncthreads();
  uint32_t before = 0;
  *total = 0;
  for (int w = 0; w < kThreads / kWarp; w++) {
    if (w == warp) before = *total;
    *total += sums[w];
  }
  return before + sum - value;
}

#endif

}  // namespace any2point
