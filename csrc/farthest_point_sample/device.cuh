// What the CUDA kernels of farthest point sampling share: warp reductions and the ends of a cloud's output.
#pragma once

#include <stdint.h>

#include "farthest_point_sample/kernel.h"

namespace any2point {

constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ unsigned warp_max(unsigned value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kAll, value);
#else
  for (int d = 16; d; d >>= 1) value = max(value, __shfl_xor_sync(kAll, value, d));
  return value;
#endif
}

__device__ __forceinline__ unsigned warp_min(unsigned value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_min_sync(kAll, value);
#else
  for (int d = 16; d; d >>= 1) value = min(value, __shfl_xor_sync(kAll, value, d));
  return value;
#endif
}

__device__ __forceinline__ unsigned warp_sum(unsigned value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kAll, value);
#else
  for (int d = 16; d; d >>= 1) value += __shfl_xor_sync(kAll, value, d);
  return value;
#endif
}

template <typename T>
__device__ __forceinline__ bool finite(const T* point, int64_t dim) {
  for (int64_t d = 0; d < dim; d++) {
    if (!(point[d] - point[d] == 0)) return false;
  }
  return true;
}

// Whole block: picks from `from` on are none.
template <typename T>
__device__ __forceinline__ void fill_rest(const FarthestPointSample<T>& run, int64_t cloud, int64_t from) {
  for (int64_t j = from + threadIdx.x; j < run.samples; j += blockDim.x) {
    run.index[cloud * run.samples + j] = -1;
    run.distance[cloud * run.samples + j] = T(0);
  }
}

}  // namespace any2point
