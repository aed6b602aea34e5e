// Copies from global to shared memory that threads do not wait for.
#pragma once

#include <stdint.h>

#include "common/grid.cuh"

namespace any2point {
namespace guided {

// kBytes from `from`, or zeros.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
#if __CUDA_ARCH__ >= 800
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = inside ? kBytes : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(kBytes), "r"(bytes)
               : "memory");
#else
  using Bytes = Pack<uint32_t, kBytes / 4>;
  *static_cast<Bytes*>(to) = inside ? *static_cast<const Bytes*>(from) : Bytes{};
#endif
}

__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// For all copies of this thread but those committed last, kPending times; others see them after a barrier.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace guided
}  // namespace any2point
