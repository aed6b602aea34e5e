// Rows of segments on CUDA, shared by forward and backward: pooling tokens into them, a walk over all of them
// with sums per channel, and a block per token that reads them.
#pragma once

#include <type_traits>

#include "guided_aggregate/device.cuh"
#include "guided_aggregate/passes.h"

namespace any2point {
namespace guided {

constexpr int kWarps = kThreads / kWarp;
constexpr int kGroup = 7;  // layers whose sums fit in shared memory: 8 warps x 7 x 128 channels x 8 bytes
constexpr int kTile = 4;   // segments that a warp projects at once

// Arrays one after the other in one piece of memory.
struct Room {
  char* memory;
  int64_t used = 0;
  explicit Room(void* memory) : memory(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(memory + used);
    used += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return array;
  }
};

// Whether rows are read four channels at a time; 16-bit features always are.
inline bool packs(const Guided& args) { return args.channels % 4 == 0; }

// function(element, integral constant of the channels read at once)
template <typename F>
int with_packs(const Guided& args, const F& function) {
  using std::integral_constant;
  if (args.dtype == Dtype::f16) return function(Half{}, integral_constant<int, 4>{});
  if (args.dtype == Dtype::bf16) return function(BFloat16{}, integral_constant<int, 4>{});
  return packs(args) ? function(float{}, integral_constant<int, 4>{})
                     : function(float{}, integral_constant<int, 1>{});
}

// The walk of a block over the segments of its cloud and its slice of channels, a warp per tile of
// segments, layer by layer. Between layers the warps keep what they sum up in shared memory.
template <int N>
struct Walk {
  const Guided& args;
  int64_t cloud, rows, c;
  int warp, lane;
  bool active;  // whether the lane has channels

  __device__ explicit Walk(const Guided& args) : args(args) {
    cloud = blockIdx.x;
    rows = args.clouds * args.tokens;
    warp = threadIdx.x / kWarp;
    lane = threadIdx.x % kWarp;
    c = (int64_t(blockIdx.y) * kWarp + lane) * N;
    active = c < args.channels;
  }
  static int64_t slices(const Guided& args) { return (args.channels + kWarp * N - 1) / (kWarp * N); }
  static dim3 grid(const Guided& args) {
    return dim3(static_cast<unsigned>(args.clouds), static_cast<unsigned>(slices(args)));
  }

  // tile(layer, first, end): segments [first, min(first + kTile, end)), as many as hold tokens at most;
  // flush(layer) after the tiles of a layer; merge(first layer, end) by all threads after a group of them.
  template <typename Tile, typename Flush, typename Merge>
  __device__ void run(const Tile& tile, const Flush& flush, const Merge& merge) const {
    int64_t next = warp;
    for (int64_t group = 0; group < args.layers; group += kGroup) {
      const int64_t last = group + kGroup < args.layers ? group + kGroup : args.layers;
      for (int64_t layer = group; layer < last; layer++) {
        // Voxels are dealt to the clouds in turn, since those of one cloud need not be together.
        const bool voxels = layer == args.views;
        const int64_t all = (rows + kTile - 1) / kTile;
        const int64_t held = args.count[layer * args.clouds + cloud];
        const int64_t tiles =
            voxels ? (all - cloud + args.clouds - 1) / args.clouds : (held + kTile - 1) / kTile;
        const int64_t base = cloud * args.tokens;
        for (; next < tiles; next += kWarps) {
          if (voxels) {
            tile(layer, (next * args.clouds + cloud) * kTile, rows);
          } else {
            tile(layer, base + next * kTile, base + held);
          }
        }
        next -= tiles;
        flush(layer);
      }
      __syncthreads();
      merge(group, last);
      __syncthreads();
    }
  }
};

// acc[j] += sum over k of from[j][k] * proj[k], for kTile rows of coefficients.
template <int N>
__device__ inline void project(Lane<N> (&acc)[kTile], const float* const (&from)[kTile],
                               const float* __restrict__ proj,  // [M + 1, C], at the lane's channels
                               int inner, int64_t channels) {
  for (int k = 0; k <= inner; k += 4) {
    float4 a[kTile];
    Lane<N> w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = load<N>(proj + min(k + i, inner) * channels);  // padding is zero
#pragma unroll
    for (int j = 0; j < kTile; j++) a[j] = *reinterpret_cast<const float4*>(from[j] + k);
#pragma unroll
    for (int j = 0; j < kTile; j++) {
      add(&acc[j], a[j].x, w[0]);
      add(&acc[j], a[j].y, w[1]);
      add(&acc[j], a[j].z, w[2]);
      add(&acc[j], a[j].w, w[3]);
    }
  }
}

constexpr int64_t kStaged = 112 << 10;  // bytes that may be staged: two blocks for each processor

template <int N>
int walk_shared(const Guided& args) {
  const int64_t group = args.layers < kGroup ? args.layers : kGroup;
  return static_cast<int>(kWarps * group * (kWarp * N * sizeof(float2) + sizeof(int32_t)));
}

}  // namespace guided
}  // namespace any2point
