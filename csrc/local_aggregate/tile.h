// Pieces of the CPU kernels of local aggregation: products of a few rows with packed weights, and the rows x
// themselves. Included by *.simd.cpp only.
#pragma once

#include <math.h>
#include <string.h>

#include "local_aggregate/offsets.h"

namespace any2point {
namespace A2P_ISA {

// A register block is kRows rows by up to kVectors vectors: 24 (12) accumulators of the 32 (16) registers.
constexpr int kRows = 6;
#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif
constexpr int64_t kPanel = kVectors * kLanes;

A2P_INLINE int64_t padded(int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }

// Polynomials of least largest error on [-pi, pi], found by Lawson's iteration: 1e-9 and 1e-8.
constexpr float kSine[] = {1.0f,
                           -0.166666641831398f,
                           0.00833331048488617f,
                           -0.00019840153981931508f,
                           2.752944055828266e-06f,
                           -2.467684723228558e-08f,
                           1.345107636385734e-10f};
constexpr float kCosine[] = {1.0f,
                             -0.49999988079071045f,
                             0.04166648909449577f,
                             -0.0013887807726860046f,
                             2.4769957235548645e-05f,
                             -2.707968462800636e-07f,
                             1.724727471952292e-09f};
// Beyond this many radians the reduction below would lose digits.
constexpr float kFar = 1e5f;

struct SineCosine {
  Float sine, cosine;
};

// Within 6e-7 of the exact values.
A2P_INLINE SineCosine sine_cosine(Float angle) {
  if (less(splat(kFar), angle) | less(angle, splat(-kFar))) {
    float lane[kLanes], sine[kLanes], cosine[kLanes];
    store(lane, angle);
    for (int i = 0; i < kLanes; i++) {
      sine[i] = sinf(lane[i]);
      cosine[i] = cosf(lane[i]);
    }
    return {load(sine), load(cosine)};
  }
  // Adding and taking away 1.5 * 2^23 rounds to a whole number of turns; 2 pi is subtracted in two parts.
  const Float round = splat(12582912.0f);
  const Float turns = sub(add(mul(angle, splat(0.15915494309189535f)), round), round);
  const Float minus = sub(splat(0.0f), turns);
  Float r = fma(minus, splat(6.2831854820251465f), angle);
  r = fma(minus, splat(-1.7484556000744883e-07f), r);
  const Float square = mul(r, r);
  Float s = splat(kSine[6]), c = splat(kCosine[6]);
#pragma GCC unroll 8
  for (int i = 5; i >= 0; i--) {
    s = fma(s, square, splat(kSine[i]));
    c = fma(c, square, splat(kCosine[i]));
  }
  return {mul(s, r), c};
}

// acc = x [kRows, depth] w [depth, V lanes].
template <int V>
A2P_INLINE void multiply(const float* x, int64_t stride, const float* w, int64_t depth, Float acc[kRows][V]) {
  for (int64_t d = 0; d < depth; d++, w += V * kLanes) {
    Float column[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) column[v] = load(w + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const Float value = splat(x[r * stride + d]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[r][v] = fma(value, column[v], acc[r][v]);
    }
  }
}

// What becomes of a product x w + bias: stored, added to y, or the residual unit's ReLU of either.
enum class Into { store, add, relu, add_relu };

template <int V, Into kInto>
static void panel(const float* x, int64_t x_stride, const float* w, const float* bias, int64_t depth,
                  float* y, int64_t y_stride, int64_t rows) {
  const Float zero = splat(0.0f);
  for (int64_t row = 0; row < rows; row += kRows) {
    Float acc[kRows][V];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[r][v] = load(bias + v * kLanes);
    }
    multiply<V>(x + row * x_stride, x_stride, w, depth, acc);
    for (int r = 0; r < kRows; r++) {
      float* to = y + (row + r) * y_stride;
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        Float value = acc[r][v];
        if (kInto == Into::add || kInto == Into::add_relu) value = add(value, load(to + v * kLanes));
        if (kInto == Into::relu || kInto == Into::add_relu) value = max(zero, value);  // NaN stays
        store(to + v * kLanes, value);
      }
    }
  }
}

// x [rows, in] into y [rows, padded(out)]. `rows` is a multiple of kRows.
template <Into kInto>
static void layer(const float* x, int64_t x_stride, const PackedLinear& weights, int64_t in, int64_t out,
                  float* y, int64_t y_stride, int64_t rows) {
  const int64_t columns = padded(out);
  const float* w = weights.weight;
  for (int64_t first = 0; first < columns; first += kPanel) {
    const int64_t vectors = (columns - first < kPanel ? columns - first : kPanel) / kLanes;
    const float* bias = weights.bias + first;
    float* to = y + first;
    switch (vectors) {
#if defined(__AVX512F__)
      case 4:
        panel<4, kInto>(x, x_stride, w, bias, in, to, y_stride, rows);
        break;
      case 3:
        panel<3, kInto>(x, x_stride, w, bias, in, to, y_stride, rows);
        break;
#endif
      case 2:
        panel<2, kInto>(x, x_stride, w, bias, in, to, y_stride, rows);
        break;
      default:
        panel<1, kInto>(x, x_stride, w, bias, in, to, y_stride, rows);
    }
    w += in * vectors * kLanes;
  }
}

A2P_INLINE void add_lanes(float* to, Float value, int64_t lanes) {
  if (lanes >= kLanes) {
    store(to, add(load(to), value));
    return;
  }
  float lane[kLanes];
  store(lane, value);
  for (int64_t j = 0; j < lanes; j++) to[j] += lane[j];
}

// x [K, stride] += sine and cosine of the offsets, C / 6 of each per axis.
static void add_encoding(const Neighborhoods& args, const float* offset, float* x, int64_t stride) {
  const int64_t count = args.width / 6;
  for (int64_t k = 0; k < args.neighbors; k++) {
    for (int axis = 0; axis < 3; axis++) {
      const Float scaled = splat(args.beta * offset[3 * k + axis]);
      float* to = x + k * stride + axis * 2 * count;
      for (int64_t i = 0; i < count; i += kLanes) {
        const SineCosine value = sine_cosine(div(scaled, load(args.wavelength + i)));
        add_lanes(to + i, value.sine, count - i);
        add_lanes(to + count + i, value.cosine, count - i);
      }
    }
  }
}

// x [K, stride] of one group: features of the neighbours beside those of the centre, and the encoding of the
// offsets. offset: room for 3 K.
static void build_rows(const Neighborhoods& args, int64_t group, float* offset, float* x, int64_t stride) {
  const int64_t half = args.width / 2;
  const Members members = members_of(args, group);
  for (int64_t k = 0; k < args.neighbors; k++) {
    const int64_t row = member(members, k);
    float* to = x + k * stride;
    if (row < 0) {
      memset(to, 0, sizeof(float) * half);
    } else {
      memcpy(to, args.features + half * row, sizeof(float) * half);
    }
    if (members.middle < 0) {
      memset(to + half, 0, sizeof(float) * half);
    } else {
      memcpy(to + half, args.features + half * members.middle, sizeof(float) * half);
    }
  }
  normalized_offsets(args, group, offset);
  add_encoding(args, offset, x, stride);
}

// out [C] = the largest of the rows x [K, stride], NaN if one of them is.
static void largest_rows(const float* x, int64_t stride, int64_t rows, int64_t width, float* out) {
  for (int64_t c = 0; c < width; c += kLanes) {
    Float largest = load(x + c), wrong = splat(0.0f);
    for (int64_t k = 0; k < rows; k++) {
      const Float value = load(x + k * stride + c);
      largest = max(value, largest);
      wrong = fma(value, splat(0.0f), wrong);  // NaN for NaN, and for infinity
    }
    float lane[kLanes];
    store(lane, largest);
    if (equal(wrong, wrong) != (Mask)((1ull << kLanes) - 1)) {
      for (int j = 0; j < kLanes; j++) {
        for (int64_t k = 0; k < rows; k++) {
          const float value = x[k * stride + c + j];
          if (value != value) lane[j] = value;
        }
      }
    }
    for (int64_t j = 0; j < kLanes && c + j < width; j++) out[c + j] = lane[j];
  }
}

}  // namespace A2P_ISA
}  // namespace any2point
