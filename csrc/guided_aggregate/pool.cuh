// What kernels that pool tokens into rows share: a walk over segments, their mean and spread, and voxels.
#pragma once

#include "guided_aggregate/passes.h"
#include "guided_aggregate/rows.cuh"

namespace any2point {
namespace guided {

constexpr int kBatch = 4;  // tokens fetched at once

// Mean and spread of the rows that a lane sees, about the first of them.
template <int N>
struct Spread {
  int size = 0;
  Lane<N> pivot, sum = zero<N>(), square = zero<N>();

  __device__ void put(const Lane<N>& row) {
    if (size++ == 0) pivot = row;
#pragma unroll
    for (int n = 0; n < N; n++) {
      const float away = row.at[n] - pivot.at[n];
      sum.at[n] += away;
      square.at[n] = fmaf(away, away, square.at[n]);
    }
  }
  __device__ void store_to(float2* to) const {
    const float share = 1.0f / float(size);
#pragma unroll
    for (int n = 0; n < N; n++) {
      const float mean = sum.at[n] * share;
      to[n] = make_float2(pivot.at[n] + mean, square.at[n] - sum.at[n] * mean);
    }
  }
};

// Calls finish(segment, sum, largest, tokens) for each of the segments [first, last) that hold tokens;
// value(token) gives what is pooled, by all lanes of a warp.
template <int N, bool kMaximum, typename Value, typename Finish>
__device__ void walk(const int32_t* start, const int32_t* order, int64_t first, int64_t last, int lane,
                     const Value& value, const Finish& finish) {
  for (; first < last; first += kWarp - 1) {
    const int count = static_cast<int>(min(last - first, int64_t(kWarp - 1)));
    const int32_t mine = start[first + min(lane, count)];
    const int32_t end = __shfl_sync(kAll, mine, count);
    int32_t begin = __shfl_sync(kAll, mine, 0), stop = begin;
    int segment = -1;
    const auto advance = [&] {
      begin = stop;
      do stop = __shfl_sync(kAll, mine, ++segment + 1);
      while (stop == begin);
    };
    if (begin == end) continue;
    advance();
    Lane<N> sum = zero<N>(), most;
    for (int32_t p = begin; p < end; p += kBatch) {
      Lane<N> batch[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; j++) batch[j] = value(order[min(p + j, end - 1)]);
#pragma unroll
      for (int j = 0; j < kBatch; j++) {
        if (p + j >= end) break;
        if (kMaximum) {
#pragma unroll
          for (int n = 0; n < N; n++) {
            if (p + j == begin || exceeds(batch[j].at[n], most.at[n])) most.at[n] = batch[j].at[n];
          }
        }
        add(&sum, 1.0f, batch[j]);
        if (p + j + 1 < stop) continue;
        finish(first + segment, sum, most, stop - begin);
        sum = zero<N>();
        if (p + j + 1 < end) advance();
      }
    }
  }
}

// Merges `count` means and spreads `apart` apart, of as many rows as `sizes` says.
__device__ inline float2 merge(const float2* parts, const int32_t* sizes, int count, int apart) {
  int rows = 0;
  float mean = 0.0f, spread = 0.0f;
  for (int i = 0; i < count; i++) {
    const int more = sizes[i];
    if (more == 0) continue;
    const float2 part = parts[i * apart];
    const float away = part.x - mean, share = float(more) / float(rows + more);
    spread += part.y + away * away * share * float(rows);
    mean = fmaf(away, share, mean);
    rows += more;
  }
  return make_float2(mean, spread);
}

// Rows of the voxels [cloud * S, (cloud + 1) * S), by a block of kThreads for a slice of kWarp * N channels.
// spreads [kWarps, kWarp * N], sizes [kWarps]: shared.
template <typename T, int N>
__device__ void pool_voxels(const Guided& args, const Rows& to, float2* spreads, int32_t* sizes,
                            bool statistics) {
  constexpr int kWidth = kWarp * N;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t rows = args.clouds * args.tokens, channels = args.channels, layer = args.views;
  const int64_t base = blockIdx.x * args.tokens, own = int64_t(blockIdx.y) * kWidth + lane * N;
  const bool active = own < channels;
  const int64_t c = active ? own : 0;
  const T* const x = static_cast<const T*>(args.features) + c;
  float* const z = to.z + layer * rows * channels + c;
  const int64_t each = (args.tokens + kWarps - 1) / kWarps;
  const int64_t first = base + min(args.tokens, warp * each);
  Spread<N> spread;
  walk<N, true>(
      args.start + layer * (rows + 1), args.order + layer * rows, first,
      min(base + args.tokens, first + each), lane,
      [&](int32_t token) { return load<N>(x + token * channels); },
      [&](int64_t segment, Lane<N> row, const Lane<N>& most, int tokens) {
        const float share = reciprocal(float(tokens));
#pragma unroll
        for (int n = 0; n < N; n++) row.at[n] = fmaf(row.at[n], share, most.at[n]);
        if (active) store(z + segment * channels, row);
        spread.put(row);
      });
  if (!statistics) return;
  if (spread.size > 0) spread.store_to(spreads + warp * kWidth + lane * N);
  if (lane == 0) sizes[warp] = spread.size;
  __syncthreads();
  for (int i = threadIdx.x; i < kWidth; i += kThreads) {
    const int64_t channel = int64_t(blockIdx.y) * kWidth + i;
    if (channel >= channels) continue;
    to.parts[(blockIdx.x * args.layers + layer) * channels + channel] =
        merge(spreads + i, sizes, kWarps, kWidth);
  }
}

}  // namespace guided
}  // namespace any2point
