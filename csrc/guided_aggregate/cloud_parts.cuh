// Rows of a cloud's voxels, and what a cloud adds to the statistics of the batch: by a block that has a slice
// of its channels in shared memory (see cloud.cu).
#pragma once

#include "guided_aggregate/cloud.cuh"
#include "guided_aggregate/pool.cuh"

namespace any2point {
namespace guided {

// Rows of the tokens' voxels, max + mean: eight lanes have a token, each eight channels of every 64 of the
// slice.
template <typename T, int kWidth, int kPitch, int kBlock>
struct SpaceRows {
  static constexpr int kLanes = 8, kSteps = kWidth / (8 * kLanes), kOnce = kBlock / kLanes;
  static constexpr int kEach = kTokens / kOnce;  // tokens of a thread
  const GuidedForward& args;
  int64_t cloud, column;
  int2 bounds[kEach];  // where the voxel's tokens are in `order`; none: no voxel
  Lane<8> at[kEach][kSteps];

  __device__ SpaceRows(const GuidedForward& args, int64_t cloud, int64_t column)
      : args(args), cloud(cloud), column(column) {
    const int64_t rows = args.clouds * args.tokens;
    const int32_t* const start = args.start + args.views * (rows + 1);
    int32_t segment[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const bool inside = args.layers > args.views && token(i) < args.tokens;
      segment[i] = inside ? args.segment[args.views * rows + cloud * args.tokens + token(i)] : -1;
    }
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      bounds[i] = segment[i] >= 0 ? make_int2(start[segment[i]], start[segment[i] + 1]) : make_int2(0, 0);
    }
  }
  __device__ static int token(int i) { return static_cast<int>(threadIdx.x) / kLanes + i * kOnce; }
  __device__ static int channel(int k) { return 8 * (kLanes * k + static_cast<int>(threadIdx.x) % kLanes); }
  __device__ bool held(int i) const { return bounds[i].x < bounds[i].y; }
  __device__ const int32_t* order() const { return args.order + args.views * args.clouds * args.tokens; }

  // x: the slice's tokens; those of other clouds come from memory.
  __device__ void pool(const T* x) {
    const int64_t base = cloud * args.tokens;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      Lane<8> most[kSteps];
#pragma unroll
      for (int k = 0; k < kSteps; k++) at[i][k] = most[k] = zero<8>();
      const bool alone = bounds[i].y - bounds[i].x == 1;
      for (int place = bounds[i].x; place < bounds[i].y; place++) {
        const int64_t token = alone ? base + this->token(i) : order()[place], own = token - base;
#pragma unroll
        for (int k = 0; k < kSteps; k++) {
          Lane<8> row = zero<8>();
          if (own >= 0 && own < args.tokens) {
            row = load<8>(x + own * kPitch + channel(k));
          } else if (column + channel(k) < args.channels) {
            row = load<8>(static_cast<const T*>(args.features) + token * args.channels + column + channel(k));
          }
#pragma unroll
          for (int n = 0; n < 8; n++) {
            at[i][k].at[n] += row.at[n];
            most[k].at[n] = place == bounds[i].x ? row.at[n] : largest(most[k].at[n], row.at[n]);
          }
        }
      }
      const float share = held(i) ? reciprocal(static_cast<float>(bounds[i].y - bounds[i].x)) : 0.0f;
#pragma unroll
      for (int k = 0; k < kSteps; k++) {
#pragma unroll
        for (int n = 0; n < 8; n++) at[i][k].at[n] = fmaf(at[i][k].at[n], share, most[k].at[n]);
      }
    }
  }
  // Parts of the voxels whose first token is of the cloud, about twice the cloud's first token: max + mean.
  // spreads [warps, kWidth]: shared. By all threads.
  __device__ void parts(const CloudWork& work, const T* x, float2* spreads) const {
    constexpr int kWarpsHere = kBlock / kWarp;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    bool counts[kEach];
    int own = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      counts[i] = held(i) && order()[bounds[i].x] == cloud * args.tokens + token(i);
      own += __popc(__ballot_sync(kAll, counts[i] && lane % kLanes == 0));
    }
#pragma unroll
    for (int k = 0; k < kSteps; k++) {
      const Lane<8> near = load<8>(x + channel(k));
      float2 two[8] = {};
#pragma unroll
      for (int i = 0; i < kEach; i++) {
#pragma unroll
        for (int n = 0; n < 8; n++) {
          const float away = counts[i] ? fmaf(-2.0f, near.at[n], at[i][k].at[n]) : 0.0f;
          two[n].x += away;
          two[n].y = fmaf(away, away, two[n].y);
        }
      }
#pragma unroll
      for (int n = 0; n < 8; n++) {
#pragma unroll
        for (int d = kLanes; d < kWarp; d *= 2) {
          two[n].x += __shfl_xor_sync(kAll, two[n].x, d);
          two[n].y += __shfl_xor_sync(kAll, two[n].y, d);
        }
        if (lane < kLanes) spreads[warp * kWidth + channel(k) + n] = two[n];
      }
    }
    __shared__ int sizes[kWarpsHere];
    if (lane == 0) sizes[warp] = own;
    __syncthreads();
    int all = 0;
    for (int w = 0; w < kWarpsHere; w++) all += sizes[w];
    if (threadIdx.x == 0 && column == 0) work.voxels[cloud] = all;
    for (int c = threadIdx.x; c < kWidth; c += kBlock) {
      store_part(args, work, cloud, args.views, column + c, 2.0f * widen(x[c]), spreads + c, kWidth,
                 kWarpsHere, all);
    }
    __syncthreads();
  }
};

// Parts of the rows of all views. scratch: shared, [kRowGroups, V, kWidth] and as many sizes as those are of,
// [V, kRowGroups]. By all threads.
template <typename T, int kWidth, int kPitch>
__device__ inline void view_parts(const GuidedForward& args, const CloudWork& work, const Cloud& tokens,
                                  int64_t cloud, int64_t column, const T* x, float2* scratch) {
  const int views = static_cast<int>(args.views), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, from = warp % (kWidth / kRange) * kRange, group = warp / (kWidth / kRange);
  int32_t* const sizes = reinterpret_cast<int32_t*>(scratch + kRowGroups * views * kWidth);
  for (int i = threadIdx.x; i < kRowGroups * views; i += blockDim.x) sizes[i] = 0;
  __syncthreads();
  CellRows<T> rows(args, tokens, args.inner_means, cloud, x, kPitch, from);
  // About the group's first row of the view, not a token: the branch moves all rows away from their tokens.
  float pivot[kTall][2] = {}, sum[kTall][2] = {}, square[kTall][2] = {};
  int size = 0;
  rows.each(
      0, views, group, [&](int view) { rows.fetch(work.fragments, view, column + from); },
      [&](int view, int first, int, const Inner& inner) {
        const Tile tile = rows(view, first, inner);
        const float2 share = rows.shares(tile);
        if (size == 0) {
#pragma unroll
          for (int m = 0; m < kTall; m++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
              pivot[m][i] = __shfl_sync(kAll, tile.at[m][2 * i] * share.x, lane / 4 * 4);
            }
          }
        }
        size += min(kCells, tokens.held[view] - first);
#pragma unroll
        for (int m = 0; m < kTall; m++) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float own = i % 2 == 0 ? share.x : share.y;
            const float away = own > 0.0f ? fmaf(tile.at[m][i], own, -pivot[m][i / 2]) : 0.0f;
            sum[m][i / 2] += away;
            square[m][i / 2] = fmaf(away, away, square[m][i / 2]);
          }
        }
      },
      [&](int view) {
        const float share = reciprocal(static_cast<float>(size));
#pragma unroll
        for (int m = 0; m < kTall; m++) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int d = 1; d < 4; d *= 2) {
              sum[m][i] += __shfl_xor_sync(kAll, sum[m][i], d);
              square[m][i] += __shfl_xor_sync(kAll, square[m][i], d);
            }
            if (lane % 4 == 0) {
              const float mean = sum[m][i] * share;
              scratch[(group * views + view) * kWidth + from + 16 * m + 8 * i + g] =
                  make_float2(pivot[m][i] + mean, square[m][i] - sum[m][i] * mean);
            }
            sum[m][i] = square[m][i] = 0.0f;
          }
        }
        if (from == 0 && lane == 0) sizes[view * kRowGroups + group] = size;
        size = 0;
      });
  __syncthreads();
  for (int i = threadIdx.x; i < views * kWidth; i += blockDim.x) {
    const int view = i / kWidth;
    const int64_t channel = column + i % kWidth;
    if (channel >= args.channels) continue;
    work.parts[(cloud * args.layers + view) * args.channels + channel] =
        merge(scratch + i, sizes + view * kRowGroups, kRowGroups, views * kWidth);
  }
  __syncthreads();
}

}  // namespace guided
}  // namespace any2point
