// Tokens pooled into the rows of their segments, with partial means and spreads of the rows for batch
// normalisation.
#include "guided_aggregate/passes.h"
#include "guided_aggregate/rows.cuh"

namespace any2point {
namespace guided {
namespace {

template <typename T, int N, bool kStage>
__global__ void __launch_bounds__(kThreads, kStage ? 3 : 2)
    pool_kernel(Guided args, Rows to, bool statistics) {
  extern __shared__ float4
      room[];  // staged rows; [warps][layers of a group][channels]: mean and spread; sizes
  float* shared = reinterpret_cast<float*>(room);
  const Walk<N> walk(args);
  const int lane = walk.lane, group = static_cast<int>(args.layers < kGroup ? args.layers : kGroup);
  const int pad = static_cast<int>(coefficients(args.inner)), inner = static_cast<int>(args.inner);
  const int64_t rows = walk.rows, channels = args.channels, c = walk.active ? walk.c : 0;
  const T* x = static_cast<const T*>(args.features) + c;
  const int32_t *orders = nullptr, *starts = nullptr;
  const float* staged = nullptr;
  if (kStage) {
    Stage<N> stage(args, shared);
    orders = stage.order;
    starts = stage.start;
    staged = stage.rows(args, static_cast<const T*>(args.features)) + lane * N;
    shared = stage.memory;
    __syncthreads();
  }
  const int count = static_cast<int>(args.tokens);
  const int64_t base = walk.cloud * args.tokens;
  float2* sums = reinterpret_cast<float2*>(shared);
  int32_t* sizes = reinterpret_cast<int32_t*>(sums + kWarps * group * kWarp * N);
  int size = 0;
  Lane<N> pivot = zero<N>(), sum = zero<N>(), square = zero<N>();

  const auto row_of = [&](int64_t token, bool inside) {
    return inside ? load<N>(staged + token * kWarp * N) : load<N>(x + token * channels);
  };
  const auto tile = [&](int64_t layer, int64_t first, int64_t end) {
    const bool voxels = layer == args.views, inside = kStage && !voxels;
    const int32_t* start = inside ? starts + layer * (count + 1) : args.start + layer * (rows + 1);
    const int32_t* order = inside ? orders + layer * count : args.order + layer * rows;
    const int64_t at = first + lane < end ? first + lane : end;
    const int32_t mine = lane <= kTile ? start[at - (inside ? base : 0)] : 0;
    const int32_t begin = __shfl_sync(kAll, mine, 0), stop = __shfl_sync(kAll, mine, kTile);
    if (begin == stop) return;
    const int32_t early = begin + lane < stop ? order[begin + lane] : 0;
    const auto token = [&](int32_t place) {
      return place - begin < kWarp ? __shfl_sync(kAll, early, place - begin) : order[place];
    };
    Lane<N> acc[kTile];
    int32_t from[kTile + 1];
#pragma unroll
    for (int j = 0; j <= kTile; j++) from[j] = __shfl_sync(kAll, mine, j);
    if (kStage || voxels || !args.maximum) {
      Lane<N> most[kTile];
#pragma unroll
      for (int j = 0; j < kTile; j++) {
        acc[j] = zero<N>();
        const int32_t tokens = from[j + 1] - from[j];
#pragma unroll 4
        for (int32_t i = 0; i < tokens; i++) {
          const Lane<N> value = row_of(token(from[j] + i), inside);
          add(&acc[j], 1.0f, value);
          if (voxels) {
#pragma unroll
            for (int n = 0; n < N; n++) {
              if (i == 0 || exceeds(value.at[n], most[j].at[n])) most[j].at[n] = value.at[n];
            }
          }
        }
        const float count = tokens > 0 ? float(tokens) : 1.0f;
#pragma unroll
        for (int n = 0; n < N; n++) {
          acc[j].at[n] /= count;
          if (voxels && tokens > 0) acc[j].at[n] += most[j].at[n];
        }
      }
      if (!voxels) {
        const float* coefficient[kTile];
#pragma unroll
        for (int j = 0; j < kTile; j++) {
          const int64_t row = first + j < end ? first + j : first;
          coefficient[j] = to.inner + (layer * rows + row) * pad;
        }
        project(acc, coefficient, args.proj + layer * (inner + 1) * channels + c, inner, channels);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kTile; j++) {
        Lane<N> most = zero<N>();
        acc[j] = zero<N>();
        for (int32_t i = from[j]; i < from[j + 1]; i += kTile) {
          Lane<N> value[kTile];
          const float* coefficient[kTile];
#pragma unroll
          for (int t = 0; t < kTile; t++) {
            const int64_t row = token(i + t < from[j + 1] ? i + t : i);
            value[t] = row_of(row, inside);
            coefficient[t] = to.heads + (layer * rows + (inside ? base : 0) + row) * pad;
          }
          project(value, coefficient, args.proj + layer * (inner + 1) * channels + c, inner, channels);
#pragma unroll
          for (int t = 0; t < kTile; t++) {
            if (i + t >= from[j + 1]) continue;
            add(&acc[j], 1.0f, value[t]);
#pragma unroll
            for (int n = 0; n < N; n++) {
              if (i + t == from[j] || exceeds(value[t].at[n], most.at[n])) most.at[n] = value[t].at[n];
            }
          }
        }
        const float count = from[j + 1] > from[j] ? float(from[j + 1] - from[j]) : 1.0f;
#pragma unroll
        for (int n = 0; n < N; n++) acc[j].at[n] = acc[j].at[n] / count + most.at[n];
      }
    }
#pragma unroll
    for (int j = 0; j < kTile; j++) {
      if (from[j + 1] == from[j]) continue;
      if (walk.active) store(to.z + (layer * rows + first + j) * channels + c, acc[j]);
      if (statistics) {
        if (size++ == 0) pivot = acc[j];
#pragma unroll
        for (int n = 0; n < N; n++) {
          const float away = acc[j].at[n] - pivot.at[n];
          sum.at[n] += away;
          square.at[n] = fmaf(away, away, square.at[n]);
        }
      }
    }
  };
  const auto flush = [&](int64_t layer) {
    if (!statistics) return;
    const int place = (walk.warp * group + static_cast<int>(layer % kGroup)) * kWarp + lane;
    const float count = size > 0 ? float(size) : 1.0f;
#pragma unroll
    for (int n = 0; n < N; n++) {
      const float mean = sum.at[n] / count;
      sums[place * N + n] = make_float2(pivot.at[n] + mean, square.at[n] - sum.at[n] * mean);
    }
    if (lane == 0) sizes[walk.warp * group + layer % kGroup] = size;
    size = 0;
    pivot = sum = square = zero<N>();
  };
  const auto merge = [&](int64_t layer, int64_t last) {
    if (!statistics) return;
    const int width = kWarp * N;
    for (int i = threadIdx.x; i < (last - layer) * width; i += kThreads) {
      const int l = i / width, column = i % width;
      int rows_before = 0;
      float mean = 0.0f, spread = 0.0f;
      for (int w = 0; w < kWarps; w++) {
        const int more = sizes[w * group + l];
        if (more == 0) continue;
        const float2 part = sums[(w * group + l) * width + column];
        const float away = part.x - mean, share = float(more) / float(rows_before + more);
        spread += part.y + away * away * share * float(rows_before);
        mean = fmaf(away, share, mean);
        rows_before += more;
      }
      const int64_t channel = int64_t(blockIdx.y) * width + column;
      if (channel < channels) {
        to.parts[(walk.cloud * args.layers + layer + l) * channels + channel] = make_float2(mean, spread);
      }
      if (blockIdx.y == 0 && column == 0) to.sizes[walk.cloud * args.layers + layer + l] = rows_before;
    }
  };
  walk.run(tile, flush, merge);
}

}  // namespace

int pool_rows(const Guided& args, const Rows& rows, bool statistics, cudaStream_t stream) {
  return with_packs(args, [&](auto type, auto width) {
    using T = decltype(type);
    constexpr int N = decltype(width)::value;
    if constexpr (N == 4) {  // half as many channels at once, so that a slice of a cloud fits
      const int64_t shared = Stage<2>::bytes(args, 1) + (statistics ? walk_shared<2>(args) : 0);
      if (!args.maximum && shared <= shared_limit(kStaged)) {
        const int bytes = static_cast<int>(shared);
        if (const int error = allow_shared(pool_kernel<T, 2, true>, bytes)) return error;
        pool_kernel<T, 2, true><<<Walk<2>::grid(args), kThreads, bytes, stream>>>(args, rows, statistics);
        return static_cast<int>(cudaGetLastError());
      }
    }
    const int shared = statistics ? walk_shared<N>(args) : 0;
    if (const int error = allow_shared(pool_kernel<T, N, false>, shared)) return error;
    pool_kernel<T, N, false><<<Walk<N>::grid(args), kThreads, shared, stream>>>(args, rows, statistics);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace guided
}  // namespace any2point
