// Mean and deviation of a layer's rows in one channel, of the batch or running.
#pragma once

#include "guided_aggregate/device.cuh"

namespace any2point {
namespace guided {

constexpr int kParts = 8;  // threads of a column

// From parts [B, L, C] (mean, spread), in float64 and a fixed order, by kParts threads, `part` of which this
// is; total(value): their sum, for all of them. voxels [B]: rows of the last layer's parts, or null: `count`.
// Other blocks of the same kernel may have written them.
template <typename Total>
__device__ inline void batch_column(const GuidedForward& args, const float2* parts, const int32_t* voxels,
                                    int64_t count, int64_t column, int part, bool writes,
                                    const Total& total) {
  const int64_t columns = args.layers * args.channels, layer = column / args.channels;
  const int32_t* const sizes = voxels && layer == args.views ? voxels : args.count + layer * args.clouds;
  // The first of them at once, since each is far away.
  constexpr int kAtOnce = 4;
  int32_t size_at[kAtOnce] = {};
  float2 part_at[kAtOnce] = {};
#pragma unroll
  for (int i = 0; i < kAtOnce; i++) {
    const int64_t p = part + i * kParts;
    if (p >= count) continue;
    size_at[i] = __ldcg(sizes + p);
    part_at[i] = __ldcg(parts + p * columns + column);
  }
  const auto each = [&](const auto& use) {  // of parts that have rows
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      if (size_at[i] > 0) use(double(size_at[i]), part_at[i]);
    }
    for (int64_t p = part + kAtOnce * kParts; p < count; p += kParts) {
      const int32_t size = __ldcg(sizes + p);
      if (size > 0) use(double(size), __ldcg(parts + p * columns + column));
    }
  };
  double rows = 0.0, sum = 0.0, spread = 0.0;
  each([&](double size, const float2& own) {
    rows += size;
    sum += size * own.x;
  });
  rows = total(rows);
  const bool empties = args.total > 0 && layer < args.views;
  const double all = empties ? double(args.total) : rows > 0 ? rows : 1.0;
  const double mean = total(sum) / all;
  each([&](double size, const float2& own) {
    const double shift = own.x - mean;
    spread += own.y + size * shift * shift;
  });
  spread = total(spread);
  if (empties && all > rows) spread += (all - rows) * mean * mean;
  if (!writes) return;
  const double variance = spread / all;
  args.mean[column] = float(mean);
  args.deviation[column] = float(1.0 / sqrt(variance + double(args.eps)));
  args.unbiased[column] = float(variance * (all / (all > 2.0 ? all - 1.0 : 1.0)));
}

// Mean and 1 / deviation in evaluation.
__device__ inline float2 running_column(const GuidedForward& args, int64_t column, bool writes) {
  const int64_t split = args.views * args.channels;
  const float mean = column < split ? args.view_mean[column] : args.space_mean[column - split];
  const float variance = column < split ? args.view_variance[column] : args.space_variance[column - split];
  const float inverse = float(1.0 / sqrt(double(variance) + double(args.eps)));
  if (writes) {
    args.mean[column] = mean;
    args.deviation[column] = inverse;
    args.unbiased[column] = variance;
  }
  return make_float2(mean, inverse);
}

}  // namespace guided
}  // namespace any2point
