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

// The parts of numbers that TF32 has, and what is left of them.
template <int N>
__device__ __forceinline__ void split(const float (&value)[N], uint32_t (&high)[N], uint32_t (&low)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    high[i] = __float_as_uint(value[i]) & 0xffffe000u;
    low[i] = __float_as_uint(value[i] - __uint_as_float(high[i]));
  }
}

// sum += a b of what was split, the same as in float32, but for products of low parts. Lane l has rows l / 4
// (+ 8) and columns l % 4 (+ 4) of a, rows l % 4 (+ 4) and column l / 4 of b.
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&high_a)[4],
                                         const uint32_t (&low_a)[4], const uint32_t (&high_b)[2],
                                         const uint32_t (&low_b)[2]) {
#if __CUDA_ARCH__ >= 800
  multiply_tf32(sum, high_a, low_b);
  multiply_tf32(sum, low_a, high_b);
  multiply_tf32(sum, high_a, high_b);
#else
  const int lane = threadIdx.x % 32;
  const auto whole = [](uint32_t high, uint32_t low) { return __uint_as_float(high) + __uint_as_float(low); };
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const int i = k / 4 * 2;
    const float near = __shfl_sync(0xffffffff, whole(high_a[i], low_a[i]), lane / 4 * 4 + k % 4);
    const float far = __shfl_sync(0xffffffff, whole(high_a[i + 1], low_a[i + 1]), lane / 4 * 4 + k % 4);
    const float b = whole(high_b[k / 4], low_b[k / 4]);
    const float left = __shfl_sync(0xffffffff, b, lane % 4 * 8 + k % 4);
    const float right = __shfl_sync(0xffffffff, b, lane % 4 * 8 + 4 + k % 4);
    sum[0] = fmaf(near, left, sum[0]);
    sum[1] = fmaf(near, right, sum[1]);
    sum[2] = fmaf(far, left, sum[2]);
    sum[3] = fmaf(far, right, sum[3]);
  }
#endif
}

}  // namespace guided
}  // namespace any2point
