// What the forward passes of training share: how rows are cut, y1 of units that are done, and their layers.
#pragma once

#include <algorithm>

#include "local_aggregate/hopper_rows.cuh"
#include "local_aggregate/hopper_train.h"

namespace any2point {

constexpr int kTeams = 3;  // of four warps, in a block
constexpr int kWarps = 4 * kTeams;

// How the tiles of all rows are cut: so many a warp.
struct Plan {
  int each;
  int64_t blocks, warps;

  Plan(int64_t groups, int64_t neighbors, int processors) {
    const int64_t tiles = divided(groups * neighbors, kRows);
    const int64_t most = std::max<int64_t>(1, (int64_t{kGroups - 1} * neighbors + 1) / kRows);
    each =
        static_cast<int>(std::max<int64_t>(1, std::min(most, divided(tiles, int64_t{kWarps} * processors))));
    blocks = divided(tiles, int64_t{kWarps} * each);
    warps = blocks * kWarps;
  }
};

// A done unit's W2 [C, H] for products with h.
template <int C, int H>
__device__ void load_done_weight(const void* weight, char* to) {
  const uint4* from = static_cast<const uint4*>(weight);
  for (int i = threadIdx.x; i < C * H / 8; i += blockDim.x) {
    const int n = i / (H / 8), b = i % (H / 8) / 4, t = i % 4;
    store_weight(from[Order<C>::channel(n) * (H / 8) + b * 4 + t], to + b * C * kBlockBytes, n, t);
  }
}

template <int H>
__device__ void load_scales(const HopperDone& unit, float* to) {
  for (int i = threadIdx.x; i < H; i += blockDim.x) {
    to[i] = unit.scale[i];
    to[H + i] = unit.shift[i];
  }
}

// Two rows of y1, as a thread reads them: of those that it writes if a next unit's y1 takes their place.
template <int H>
struct Before {
  uint4 v[2][H / 32];

  __device__ __forceinline__ Before(const void* before, const Walk& walk, int64_t first, int tile) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int place = min(tile * kRows + static_cast<int>(threadIdx.x % 32 / 4) + 8 * i, walk.rows - 1);
      const uint4* from = static_cast<const uint4*>(before) + (first + place) * (H / 8) + threadIdx.x % 4;
#pragma unroll
      for (int b = 0; b < H / 32; b++) v[i][b] = from[4 * b];
    }
  }
};

// h = ReLU(scale y1 + shift) as an operand.
template <int H, typename T>
__device__ __forceinline__ void hidden_operand(const Before<H>& before, const float* scale,
                                               uint32_t (&h)[H / 16][4]) {
#pragma unroll
  for (int b = 0; b < H / 32; b++) {
    const float* at = scale + 32 * b + threadIdx.x % 4 * 8;
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const float2 factor = *reinterpret_cast<const float2*>(at + 2 * q);
      const float2 shift = *reinterpret_cast<const float2*>(at + H + 2 * q);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint4& v = before.v[i][b];
        const uint32_t y = q == 0 ? v.x : q == 1 ? v.y : q == 2 ? v.z : v.w;
        h[2 * b + q / 2][q % 2 * 2 + i] = hidden_pair<T>(y, factor, shift);
      }
    }
  }
}

// x + h W2' + bias, 64 channels at a time, to `take`. While it has some the products of the next ones run.
template <int C, int H, typename T, typename Take>
__device__ __forceinline__ void apply_unit(const uint32_t (&h)[H / 16][4], const char* weight,
                                           const float* bias, Channels (&x)[C / 64], Take take) {
  constexpr int kPairs = C / 64;
  float d[2][32];
#pragma unroll
  for (int p = 0; p <= kPairs; p++) {
    if (p < kPairs) {
#pragma unroll
      for (int b = 0; b < 2; b++) set_residual<T>(x[p][b], bias + 64 * p + 32 * b, d[p % 2] + 16 * b);
      out_product<C, H, 64, T>(d[p % 2], h, weight, 64 * p);
    }
    if (p > 0) {
      if (p < kPairs) {
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      pin(d[(p + 1) % 2]);
      take(p - 1, d[(p + 1) % 2]);
    }
  }
}

template <typename Kernel, typename... Args>
int launch(Kernel kernel, int64_t blocks, size_t shared, cudaStream_t stream, const Args&... args) {
  const int bytes = static_cast<int>(shared);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), kWarps * 32, bytes, stream>>>(args...);
  return cudaGetLastError();
}

// What kernels keep beside weights.
template <int C>
constexpr size_t around(int floats) {
  return kTeams * Feed<C>::kBytes + 4 * (C / 6 + floats) + sizeof(Group) * kGroups * kWarps;
}

inline Part part_of(const HopperAggregate& rows, const Plan& plan, float4* scales, cudaStream_t stream) {
  scale_kernel<<<static_cast<unsigned>(divided(rows.groups, 4)), 128, 0, stream>>>(rows, scales);
  return {0, rows.groups * rows.neighbors, plan.each, scales, nullptr, nullptr};
}

}  // namespace any2point
