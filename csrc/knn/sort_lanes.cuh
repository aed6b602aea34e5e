// A sort in registers, by lanes of a warp.
#pragma once

#include "knn/warp.cuh"

namespace any2point {
namespace {

// Sorts kEach * kLanes keys of each kLanes lanes, in a bitonic network: lane l ends with those of rank l *
// kEach + r.
template <int kLanes, int kEach, typename T>
__device__ __forceinline__ void sort_lanes(T (&key)[kEach], int lane) {
#pragma unroll
  for (int size = 2; size <= kEach * kLanes; size *= 2) {
#pragma unroll
    for (int stride = size / 2; stride > 0; stride /= 2) {
      // The first step of a size compares with the mirrored place, the others with the one `stride` on.
      const bool mirrored = stride == size / 2;
      if (stride < kEach) {
#pragma unroll
        for (int r = 0; r < kEach; r++) {
          const int other = mirrored ? r ^ (size - 1) : r ^ stride;
          if (other < r) continue;
          const T a = key[r], b = key[other];
          key[r] = min(a, b);
          key[other] = max(a, b);
        }
      } else {
        const int mask = mirrored ? size / kEach - 1 : stride / kEach;
        const bool lower = (lane & (stride / kEach)) == 0;
        T given[kEach];
#pragma unroll
        for (int r = 0; r < kEach; r++) {
          given[r] = __shfl_xor_sync(kAll, key[mirrored ? kEach - 1 - r : r], mask);
        }
#pragma unroll
        for (int r = 0; r < kEach; r++) key[r] = lower ? min(given[r], key[r]) : max(given[r], key[r]);
      }
    }
  }
}

}  // namespace
}  // namespace any2point
