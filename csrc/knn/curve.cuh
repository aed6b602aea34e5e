// Extents of clouds and places on a Hilbert curve, for the two ways in which tree_build.cu and tree_sort.cu
// bring points into its order.
#pragma once

#include "knn/sort_lanes.cuh"
#include "knn/tree.cuh"

namespace any2point {
namespace {

constexpr int kSamples = 256;  // points from which the usual extent of a cloud is told

__device__ __forceinline__ float3 row_of(const float* rows, int64_t dim, int64_t i) {
  const float* p = rows + i * dim;
  return {p[0], dim > 1 ? p[1] : 0.0f, dim > 2 ? p[2] : 0.0f};
}
__device__ __forceinline__ bool finite_point(float3 p) { return finite(p.x) && finite(p.y) && finite(p.z); }

__device__ __forceinline__ uint32_t rising_bits(float a) {
  const uint32_t bits = __float_as_uint(a);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float from_rising_bits(uint32_t bits) {
  return __uint_as_float(bits ^ (bits >> 31 ? 0x80000000u : 0xffffffffu));
}

__device__ __forceinline__ uint32_t warp_min(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_min_sync(kAll, value);
#else
  for (int d = 16; d; d >>= 1) value = min(value, __shfl_xor_sync(kAll, value, d));
  return value;
#endif
}

// By a whole block of at least three warps: kSamples rows of a cloud, sorted along each axis by a warp.
// Between 1/32 and 31/32 of them the cloud has its usual extent; the box is larger by four times the longest
// side of that.
__device__ inline void find_usual_extent(const float* cloud, int64_t count, int64_t dim, Extent* extent) {
  constexpr int kEach = kSamples / 32;
  __shared__ float low[3], high[3];
  const int axis = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (axis < 3) {
    float value[kEach];
    int usable = 0;
#pragma unroll
    for (int r = 0; r < kEach; r++) {
      const float3 p = row_of(cloud, dim, (lane * kEach + r) * count / kSamples);
      const bool is_finite = finite_point(p);
      value[r] = is_finite ? (axis == 0 ? p.x : axis == 1 ? p.y : p.z) : infinite();
      usable += is_finite;
    }
    sort_lanes<32>(value, lane);
    usable = warp_sum(usable);
    const int first = usable / 32, last = usable - 1 - first;
#pragma unroll
    for (int r = 0; r < kEach; r++) {
      if (lane * kEach + r == first) low[axis] = value[r];
      if (lane * kEach + r == last) high[axis] = value[r];
    }
    if (usable == 0 && lane == 0) low[axis] = high[axis] = 0;
  }
  __syncthreads();
  const float side = fmaxf(fmaxf(high[0] - low[0], high[1] - low[1]), high[2] - low[2]);
  if (side > 0 && threadIdx.x < 3) {
    extent->usual_low[threadIdx.x] = low[threadIdx.x] - 4 * side;
    extent->usual_high[threadIdx.x] = high[threadIdx.x] + 4 * side;
  }
}

// Rows first, first + step, ... below `last` of a cloud into an extent in shared memory, by a whole warp.
__device__ __forceinline__ void extend(Extent* extent, const float* cloud, int64_t dim, int64_t first,
                                       int64_t last, int64_t step) {
  uint32_t least[6] = {~0u, ~0u, ~0u, ~0u, ~0u, ~0u};
  int usable = 0;
#pragma unroll 4
  for (int64_t i = first; i < last; i += step) {
    const float3 p = row_of(cloud, dim, i);
    if (!finite_point(p)) continue;
    const uint32_t bits[3] = {rising_bits(p.x), rising_bits(p.y), rising_bits(p.z)};
#pragma unroll
    for (int c = 0; c < 3; c++) {
      least[c] = min(least[c], bits[c]);
      least[3 + c] = min(least[3 + c], ~bits[c]);
    }
    usable++;
  }
  __syncwarp();
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < 6; c++) {
    const uint32_t of_warp = warp_min(least[c]);
    if (lane == 0) atomicMin(c < 3 ? &extent->low[c] : &extent->high[c - 3], of_warp);
  }
  usable = warp_sum(usable);
  if (lane == 0) atomicAdd(&extent->count, uint32_t(usable));
}

// An extent without points, by threads 0 .. of a block.
__device__ __forceinline__ void clear(Extent* extent) {
  constexpr int kWords = sizeof(Extent) / 4;
  if (threadIdx.x < kWords) reinterpret_cast<uint32_t*>(extent)[threadIdx.x] = ~0u;
}

// Where the curve of a cloud lies: its cells are cubes. Halves, as a difference may overflow.
struct Frame {
  float low[3], scale;

  Frame() = default;
  __device__ Frame(const Extent& extent, int bits) {
    float longest = 0;
#pragma unroll
    for (int c = 0; c < 3; c++) {
      low[c] = 0.5f * fmaxf(from_rising_bits(extent.low[c]), extent.usual_low[c]);
      const float high = 0.5f * fminf(from_rising_bits(~extent.high[c]), extent.usual_high[c]);
      longest = fmaxf(longest, high - low[c]);
    }
    scale = float(1u << bits) / longest;
  }
  // Any float will do: what is not in the box goes to its wall.
  __device__ __forceinline__ uint32_t cell(float x, int axis, int bits) const {
    return min(__float2uint_rz((0.5f * x - low[axis]) * scale), (1u << bits) - 1);
  }
};

__device__ __forceinline__ uint64_t spread(uint64_t a) {  // bit i to bit 3 i, for up to 21 bits
  uint64_t x = a;
  x = (x | x << 32) & 0x1f00000000ffffull;
  x = (x | x << 16) & 0x1f0000ff0000ffull;
  x = (x | x << 8) & 0x100f00f00f00f00full;
  x = (x | x << 4) & 0x10c30c30c30c30c3ull;
  return (x | x << 2) & 0x1249249249249249ull;
}
__device__ __forceinline__ uint32_t spread(uint32_t x) {  // for up to 10 bits
  x = (x | x << 16) & 0x030000ff;
  x = (x | x << 8) & 0x0300f00f;
  x = (x | x << 4) & 0x030c30c3;
  return (x | x << 2) & 0x09249249;
}

// J. Skilling, "Programming the Hilbert curve", 2004. Key: 32 bits for up to 10 a coordinate, 64 for 21.
template <typename Key>
__device__ __forceinline__ Key place_on_curve(const Frame& frame, float3 p, int bits) {
  uint32_t x = frame.cell(p.x, 0, bits), y = frame.cell(p.y, 1, bits), z = frame.cell(p.z, 2, bits);
  for (uint32_t bit = 1u << (bits - 1); bit > 1; bit >>= 1) {
    const uint32_t below = bit - 1;
    if (x & bit) x ^= below;
    uint32_t change = (x ^ y) & below;
    if (y & bit) {
      x ^= below;
    } else {
      x ^= change;
      y ^= change;
    }
    change = (x ^ z) & below;
    if (z & bit) {
      x ^= below;
    } else {
      x ^= change;
      z ^= change;
    }
  }
  y ^= x;
  z ^= y;
  uint32_t flips = z >> 1;  // bit i: the parity of the bits of z above it
  for (int d = 1; d < bits; d *= 2) flips ^= flips >> d;
  return spread(Key(x ^ flips)) << 2 | spread(Key(y ^ flips)) << 1 | spread(Key(z ^ flips));
}

}  // namespace
}  // namespace any2point
