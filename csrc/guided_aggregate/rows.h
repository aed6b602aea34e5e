// What the CPU passes of guided aggregation share. Included by *.simd.cpp only.
#pragma once

#include <float.h>
#include <math.h>
#include <string.h>

#include "common/simd.h"
#include "guided_aggregate/cpu.h"

namespace any2point {
namespace A2P_ISA {

// One layer of one cloud: its segments are [first, last), those that hold tokens are visited.
struct Chunk {
  int64_t layer, first, last, shift;
  const int32_t *order, *segment, *start;

  Chunk(const GuidedRows& args, int64_t chunk) {
    const int64_t rows = args.rows();
    layer = chunk / args.clouds;
    first = chunk % args.clouds * args.tokens;
    last = first + args.tokens;
    shift = args.shift[chunk];
    order = args.order + layer * rows;
    segment = args.segment + layer * rows;
    start = args.start + layer * (rows + 1);
  }
  bool is_view(const GuidedRows& args) const { return layer < args.views; }
  bool pools_maximum(const GuidedRows& args) const { return args.maximum || !is_view(args); }
  // Of a segment: where its tokens are in `order`, and how many.
  const int32_t* tokens(int64_t seg) const { return order + start[seg]; }
  int64_t count(int64_t seg) const { return start[seg + 1] - start[seg]; }
  int64_t row(int64_t seg) const { return seg + shift; }
};

// The row of a token's segment in a layer; the last, which is zeros, if it has none.
A2P_INLINE int64_t row_of(const GuidedRows& args, int64_t layer, int64_t token) {
  return args.row[layer * args.rows() + token];
}
A2P_INLINE const float* activation_of(const GuidedRows& args, int64_t row) {
  return args.g + row * args.stride;
}
A2P_INLINE int32_t* argmax_of(const GuidedRows& args, int64_t row) {
  return args.argmax + (row - args.first_maximum) * args.stride;
}

A2P_INLINE float sum_lanes(Float a) {
  float lane[kLanes];
  store(lane, a);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; i++) lane[i] += lane[i + step];
  }
  return lane[0];
}

// e^x for x <= 88, within 2e-7; NaN stays. Written so that loops over it become vector instructions.
A2P_INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float turns = x * 1.44269504f + 12582912.0f - 12582912.0f;  // to the nearest whole number
  const float r = x - turns * 0.693359375f + turns * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r + 1.0f) * bits_float(((int32_t)turns + 127) << 23);
}

// The normal distribution's Phi(y), within 1e-7 (Abramowitz and Stegun 7.1.26), and e^(-y^2 / 2).
struct Normal {
  float below, bell;
};
A2P_INLINE Normal normal(float y) {
  const float x = fabsf(y) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * x);
  const float bell = exponential(-0.5f * y * y);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = 0.5f * p * t * bell;
  return {y < 0 ? tail : 1.0f - tail, bell};
}

// Calls body(Count<N>, c) for blocks of N vectors of channels from c on.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <typename Body>
A2P_INLINE void each_block(int64_t stride, Body body) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= stride; c += 4 * kLanes) body(Count<4>(), c);
  for (; c < stride; c += kLanes) body(Count<1>(), c);
}

}  // namespace A2P_ISA
}  // namespace any2point
