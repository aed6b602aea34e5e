// What blocks of one launch tell each other through L2, in PTX that every architecture from sm_75 on has.
#pragma once

#include "common/cluster.cuh"

namespace any2point {

// Adds 1; all that this thread saw before is visible to whoever loads the new value.
__device__ __forceinline__ void add_release(unsigned* at) {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(at) : "memory");
}
__device__ __forceinline__ unsigned load_acquire(const unsigned* at) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(unsigned long long* at, unsigned long long value) {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}
__device__ __forceinline__ unsigned long long load_acquire(const unsigned long long* at) {
  unsigned long long value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}

// No order with other accesses: for words that say all there is to say.
__device__ __forceinline__ unsigned long long load_relaxed(const unsigned long long* at) {
  return *static_cast<const volatile unsigned long long*>(at);
}

// 2^x, roughly: for steering only.
__device__ __forceinline__ float rough_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace any2point
