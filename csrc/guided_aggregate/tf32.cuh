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

// Numbers in TF32: rounded, or with kSplit what it has of them and what is left.
template <int N, bool kSplit>
struct Fragment {
  uint32_t high[N], low[N];

  __device__ __forceinline__ explicit Fragment(const float (&value)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      high[i] = __float_as_uint(value[i]);
      low[i] = 0;
      if constexpr (kSplit) {
        high[i] &= 0xffffe000u;
        low[i] = __float_as_uint(value[i] - __uint_as_float(high[i]));
      } else {
#if __CUDA_ARCH__ >= 800
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high[i]) : "f"(value[i]));
#endif
      }
    }
  }
};

// sum += a b; of what was split the same as in float32, but for products of low parts. Lane l has rows l / 4
// (+ 8) and columns l % 4 (+ 4) of a, rows l % 4 (+ 4) and column l / 4 of b.
template <bool kSplit>
__device__ __forceinline__ void multiply(float (&sum)[4], const Fragment<4, kSplit>& a,
                                         const Fragment<2, kSplit>& b) {
#if __CUDA_ARCH__ >= 800
  if constexpr (kSplit) {
    multiply_tf32(sum, a.high, b.low);
    multiply_tf32(sum, a.low, b.high);
  }
  multiply_tf32(sum, a.high, b.high);
#else
  const int lane = threadIdx.x % 32;
  const auto whole = [](uint32_t high, uint32_t low) { return __uint_as_float(high) + __uint_as_float(low); };
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const int i = k / 4 * 2;
    const float near = __shfl_sync(0xffffffff, whole(a.high[i], a.low[i]), lane / 4 * 4 + k % 4);
    const float far = __shfl_sync(0xffffffff, whole(a.high[i + 1], a.low[i + 1]), lane / 4 * 4 + k % 4);
    const float column = whole(b.high[k / 4], b.low[k / 4]);
    const float left = __shfl_sync(0xffffffff, column, lane % 4 * 8 + k % 4);
    const float right = __shfl_sync(0xffffffff, column, lane % 4 * 8 + 4 + k % 4);
    sum[0] = fmaf(near, left, sum[0]);
    sum[1] = fmaf(near, right, sum[1]);
    sum[2] = fmaf(far, left, sum[2]);
    sum[3] = fmaf(far, right, sum[3]);
  }
#endif
}

}  // namespace guided
}  // namespace any2point
