// The first kernel of an evaluation: what the others need of rows, found once, and the weights as they stand
// in shared memory.
#pragma once

#include "local_aggregate/hopper_eval.cuh"

namespace any2point {

constexpr int kLocateThreads = 32 * kTogether;

// Blocks that write the image of weights, before those that look for rows.
template <int C, int H, int kUnits>
constexpr int kImageBlocks = kUnits * 2 * C * H / 8 / kLocateThreads;

// Eight channels of a weight, by one thread.
template <int C, int H, int kUnits>
__device__ __forceinline__ void write_image(const HopperAggregate& args, char* image, int thread) {
  constexpr int kParts = C * H / 8;  // of a weight
  static_assert(kParts % kLocateThreads == 0, "a block has parts of one weight");
  const int weight = thread / kParts, i = thread % kParts;
  const HopperUnit& unit = args.units[weight / 2];
  char* const to = image + static_cast<int64_t>(weight) * (2 * C * H);
  if (weight % 2 == 0) {
    const int row = i / (C / 8), block = i % (C / 8) / 4, t = i % 4;
    const uint4* from = static_cast<const uint4*>(unit.in_weight) + row * (C / 8);
    store_weight(from[Order<C>::block(block) * 4 + t], to + block * H * kBlockBytes, row, t);
  } else {
    const int n = i / (H / 8), k = i % (H / 8);
    const uint4* from = static_cast<const uint4*>(unit.out_weight) + Order<C>::channel(n) * (H / 8);
    *reinterpret_cast<uint4*>(to + k / 4 * C * kBlockBytes + swizzle(n * kBlockBytes + k % 4 * 16)) = from[k];
  }
}

// A warp per group of a bundle, so many bundles a block. kShared: they are all of one cloud, whose points
// come to shared memory.
template <int C, int H, int kUnits, bool kShared>
__global__ void __launch_bounds__(kLocateThreads)
    locate_kernel(const HopperAggregate args, const Located located, int bundles) {
  let_next_begin();
  if (blockIdx.x < kImageBlocks<C, H, kUnits>) {
    write_image<C, H, kUnits>(args, located.image, blockIdx.x * kLocateThreads + threadIdx.x);
    return;
  }
  extern __shared__ float4 cached[];  // [N]
  const int64_t first_bundle = static_cast<int64_t>(blockIdx.x - kImageBlocks<C, H, kUnits>) * bundles;
  if constexpr (kShared) {
    const float* from = args.points + first_bundle * kTogether / args.centers * args.rows * 3;
#pragma unroll 4
    for (int i = threadIdx.x; i < static_cast<int>(args.rows) * 3; i += kLocateThreads) {
      reinterpret_cast<float*>(cached)[i / 3 * 4 + i % 3] = from[i];
    }
    __syncthreads();
  }
  constexpr int kAhead = 4, kStep = 32 * kAhead;
  const int lane = threadIdx.x % 32, place = threadIdx.x / 32, tiles = length_of(args);
  for (int b = 0; b < bundles; b++) {
    const int64_t bundle = first_bundle + b, group = min(bundle * kTogether + place, args.groups - 1);
    const int64_t cloud = group / args.centers, first = cloud * args.rows;
    const auto point = [&](int64_t row) {
      if constexpr (kShared) {
        if (row >= 0) return cached[static_cast<int>(row - first)];
      }
      return float4{coordinate(args, row, 0), coordinate(args, row, 1), coordinate(args, row, 2), 0};
    };
    const int64_t middle = row_of(args, args.center[group], first);
    const float4 center = point(middle);
    int64_t row[kAhead];
    float away[kAhead][3];
    const auto find = [&](int begin) {
#pragma unroll
      for (int i = 0; i < kAhead; i++) {  // beyond the end the last one again
        const int k = min(begin + 32 * i + lane, args.neighbors - 1);
        const int64_t index = args.neighbor[group * args.neighbors + k];
        row[i] = index < 0 ? middle : row_of(args, index, first);
      }
#pragma unroll
      for (int i = 0; i < kAhead; i++) {
        const float4 at = point(row[i]);
        away[i][0] = at.x - center.x;
        away[i][1] = at.y - center.y;
        away[i][2] = at.z - center.z;
      }
    };
    float scale[3] = {0, 0, 0};
    find(0);
    if (args.divisor) {
      for (float& each : scale) each = 1 / args.divisor[cloud];
    } else {
      for (int begin = 0; begin < args.neighbors; begin += kStep) {
        if (begin > 0) find(begin);
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
#pragma unroll
          for (int axis = 0; axis < 3; axis++) scale[axis] = fmaxf(scale[axis], fabsf(away[i][axis]));
        }
      }
      for (float& each : scale) {
        for (int d = 16; d > 0; d /= 2) each = fmaxf(each, __shfl_xor_sync(kLanes, each, d));
        if (args.guard && !(each > FLT_MIN)) each = 1;
        each = 1 / each;
      }
    }
    if (lane == 0) located.middles[bundle * kTogether + place] = static_cast<int>(middle);
    for (int begin = 0; begin < args.neighbors; begin += kStep) {
      if (args.neighbors > kStep) find(begin);
#pragma unroll
      for (int i = 0; i < kAhead; i++) {
        const int k = begin + 32 * i + lane;
        if (k >= 2 * tiles) break;
        located.rows[(bundle * tiles + k / 2) * kRows + 2 * place + k % 2] = {
            away[i][0] * scale[0] * args.beta, away[i][1] * scale[1] * args.beta,
            away[i][2] * scale[2] * args.beta, __int_as_float(static_cast<int>(row[i]))};
      }
    }
  }
}

}  // namespace any2point
