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

// The wanted start if it is a finite point of the cloud, else the lowest finite point, else -1. Whole block.
template <typename T>
__device__ int64_t first_pick(const T* points, int64_t count, int64_t dim, int64_t wanted) {
  if (wanted >= 0 && wanted < count && finite(points + wanted * dim, dim)) return wanted;
  __shared__ unsigned long long lowest;
  if (threadIdx.x == 0) lowest = ~0ull;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    if (finite(points + i * dim, dim)) {
      atomicMin(&lowest, static_cast<unsigned long long>(i));
      break;
    }
  }
  __syncthreads();
  const int64_t found = static_cast<int64_t>(lowest);  // -1 if untouched
  __syncthreads();
  return found;
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
