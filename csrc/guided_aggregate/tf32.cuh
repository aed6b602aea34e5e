// Products of tiles of float32 matrices on tensor cores, by a warp.
#pragma once

#include <stdint.h>

namespace any2point {
namespace guided {

// sum += a b, of 16 x 8 and 8 x 8 in TF32.
__device__ __forceinline__ void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The part of a number that TF32 has, and what is left of it.
struct Split {
  uint32_t high, low;
  __device__ __forceinline__ explicit Split(float value) {
    high = __float_as_uint(value) & 0xffffe000u;
    low = __float_as_uint(value - __uint_as_float(high));
  }
};

// The same of float32, but for products of low parts. Lane l has rows l / 4 (+ 8) and columns l % 4 (+ 4) of
// a, rows l % 4 (+ 4) and column l / 4 of b.
__device__ __forceinline__ void multiply(float (&sum)[4], const float (&a)[4], const float (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  uint32_t high_a[4], low_a[4], high_b[2], low_b[2];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const Split split(a[i]);
    high_a[i] = split.high;
    low_a[i] = split.low;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const Split split(b[i]);
    high_b[i] = split.high;
    low_b[i] = split.low;
  }
  multiply_tf32(sum, high_a, low_b);
  multiply_tf32(sum, low_a, high_b);
  multiply_tf32(sum, high_a, high_b);
#else
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const float near = __shfl_sync(0xffffffff, a[k / 4 * 2], lane / 4 * 4 + k % 4);
    const float far = __shfl_sync(0xffffffff, a[k / 4 * 2 + 1], lane / 4 * 4 + k % 4);
    const float left = __shfl_sync(0xffffffff, b[k / 4], lane % 4 * 8 + k % 4);
    const float right = __shfl_sync(0xffffffff, b[k / 4], lane % 4 * 8 + 4 + k % 4);
    sum[0] = fmaf(near, left, sum[0]);
    sum[1] = fmaf(near, right, sum[1]);
    sum[2] = fmaf(far, left, sum[2]);
    sum[3] = fmaf(far, right, sum[3]);
  }
#endif
}

}  // namespace guided
}  // namespace any2point
