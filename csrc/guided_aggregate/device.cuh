// What the passes on CUDA share: activation, packs of channels, sums over lanes, walks over segments.
#pragma once

#include <type_traits>

#include "common/grid.cuh"
#include "guided_aggregate/kernel.h"

namespace any2point {
namespace guided {

constexpr float kTiny = 1.17549435e-38f;  // smallest normal float32
constexpr float kNorm = 1e-8f;            // least norm in a cosine

// Calls function(T{}) with the element type of `dtype`; float64 is for the composition in torch.
template <typename F>
inline void with_type(Dtype dtype, const F& function) {
  if (dtype == Dtype::f16) return function(Half{});
  if (dtype == Dtype::bf16) return function(BFloat16{});
  function(float{});
}

__device__ inline float reciprocal(float value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#else
  return 1.0f / value;
#endif
}

__device__ inline float power_of_two(float value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#else
  return exp2f(value);
#endif
}

struct Gelu {
  float value, slope;
};

// Abramowitz and Stegun 7.1.26, of which both the value and the slope are made: erf to 1.5e-7.
__device__ inline Gelu gelu(float y) {
  const float t = reciprocal(fmaf(0.3275911f * 0.70710678f, fabsf(y), 1.0f));
  const float a = y * 0.84932180f;  // root of log2(e) / 2
  const float e = power_of_two(-a * a);
  float p = fmaf(t, 0.5f * 1.061405429f, 0.5f * -1.453152027f);
  p = fmaf(t, p, 0.5f * 1.421413741f);
  p = fmaf(t, p, 0.5f * -0.284496736f);
  p = fmaf(t, p, 0.5f * 0.254829592f);
  const float tail = p * (t * e);  // the normal distribution's share beyond |y|
  const float share = y < 0.0f ? tail : 1.0f - tail;
  return {fmaf(-fabsf(y), tail, fmaxf(y, 0.0f)), fmaf(y * 0.39894228f, e, share)};
}

// GELU, for 16 bits through one approximate tanh: to 3e-5 and what 11 bits of it leave.
template <typename T>
__device__ inline float activate(float y) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 2) {
    const float square = fminf(y * y, 50.0f);  // beyond, tanh is 1
    const float factor = fmaf(square, fmaf(square, -3.51516e-4f, 3.70056e-2f), 0.797507f);
    float tail;
    asm("tanh.approx.f32 %0, %1;" : "=f"(tail) : "f"(y * factor));
    const float half = 0.5f * y;
    return fmaf(half, tail, half);
  }
#endif
  return gelu(y).value;
}

// N channels of a row.
template <int N>
struct Lane {
  float at[N];
};

template <int N, typename T>
__device__ inline Lane<N> load(const T* row) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(row);
  Lane<N> lane;
#pragma unroll
  for (int n = 0; n < N; n++) lane.at[n] = widen(pack.at[n]);
  return lane;
}

// Rounded to nearest even, as narrow() does for one.
__device__ inline uint32_t narrow_two(float low, float high, BFloat16) {
  uint32_t both = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
  BFloat16 pair[2];
  narrow(low, pair);
  narrow(high, pair + 1);
  both = pair[0].bits | uint32_t(pair[1].bits) << 16;
#endif
  return both;
}
__device__ inline uint32_t narrow_two(float low, float high, Half) {
  Half pair[2];
  narrow(low, pair);
  narrow(high, pair + 1);
  return pair[0].bits | uint32_t(pair[1].bits) << 16;
}
// The same by an instruction, where there is one.
template <typename T>
__device__ inline uint32_t pack_two(float low, float high) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, Half>) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
  }
#endif
  return narrow_two(low, high, T{});
}

template <int N, typename T>
__device__ inline void store(T* row, const Lane<N>& lane) {
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    Pack<uint32_t, N / 2> pack;
#pragma unroll
    for (int n = 0; n < N; n += 2) pack.at[n / 2] = narrow_two(lane.at[n], lane.at[n + 1], T{});
    *reinterpret_cast<Pack<uint32_t, N / 2>*>(row) = pack;
  } else {
    Pack<T, N> pack;
#pragma unroll
    for (int n = 0; n < N; n++) narrow(lane.at[n], pack.at + n);
    *reinterpret_cast<Pack<T, N>*>(row) = pack;
  }
}

template <int N>
__device__ inline Lane<N> zero() {
  Lane<N> lane;
#pragma unroll
  for (int n = 0; n < N; n++) lane.at[n] = 0.0f;
  return lane;
}

template <int N>
__device__ inline void add(Lane<N>* to, float factor, const Lane<N>& from) {
#pragma unroll
  for (int n = 0; n < N; n++) to->at[n] = fmaf(factor, from.at[n], to->at[n]);
}

// Eight channels, rounded to T.
template <typename T>
__device__ inline uint4 narrow_eight(const float* from) {
  const float4 a = *reinterpret_cast<const float4*>(from), b = *reinterpret_cast<const float4*>(from + 4);
  return make_uint4(narrow_two(a.x, a.y, T{}), narrow_two(a.z, a.w, T{}), narrow_two(b.x, b.y, T{}),
                    narrow_two(b.z, b.w, T{}));
}

// Writes x + blend at `at` of out, given x unless there is another base.
template <typename T, int N>
__device__ inline void store_out(const GuidedForward& args, int64_t at, const Lane<N>& x, float factor,
                                 const Lane<N>& blend) {
  Lane<N> sum = args.base ? load<N>(args.base + at) : x;
  add(&sum, factor, blend);
  if (args.base) {
    store(static_cast<float*>(args.out) + at, sum);
  } else {
    store(static_cast<T*>(args.out) + at, sum);
  }
}

// NaN is the largest value.
__device__ inline bool exceeds(float value, float most) {
  return value > most || (value != value && most == most);
}

// The larger; NaN if one is (sm_80 and later).
__device__ inline float largest(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
#else
  return exceeds(b, a) ? b : a;
#endif
}

__device__ inline float sum_of_warp(float value) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(kAll, value, d);
  return value;
}

// Sums of kCount values over the warp, kCount a power of two up to 32: lane i returns that of value
// i * kCount / 32. A template recursion, since arrays stay in registers only if every index is a constant.
template <int kCount, int kStep = kWarp / 2>
__device__ inline float sums_of_warp(const float (&value)[kCount], int lane) {
  constexpr int kHalf = kCount / 2;
  if constexpr (kStep == 0) {
    return value[0];
  } else if constexpr (kCount == 1) {
    const float sum[1] = {value[0] + __shfl_xor_sync(kAll, value[0], kStep)};
    return sums_of_warp<1, kStep / 2>(sum, lane);
  } else {
    const bool upper = lane & kStep;
    float half[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; i++) {
      const float sent = upper ? value[i] : value[i + kHalf], kept = upper ? value[i + kHalf] : value[i];
      half[i] = kept + __shfl_xor_sync(kAll, sent, kStep);
    }
    return sums_of_warp<kHalf, kStep / 2>(half, lane);
  }
}

// Normalisation of a layer's rows at some channels. The mean is subtracted first: folded into the bias it
// would cancel against rows that are all near it, whose deviation is large.
template <int N>
struct Norm {
  Lane<N> center, scale, bias;

  __device__ Norm(const Guided& args, const float* mean, const float* deviation, int64_t layer, int64_t c) {
    const bool voxels = layer == args.views;
    const float* weights = voxels ? args.space_weight : args.view_weight + layer * args.channels;
    const float* biases = voxels ? args.space_bias : args.view_bias + layer * args.channels;
    const Lane<N> weight = load<N>(weights + c), inverse = load<N>(deviation + layer * args.channels + c);
    center = load<N>(mean + layer * args.channels + c);
    bias = load<N>(biases + c);
#pragma unroll
    for (int n = 0; n < N; n++) scale.at[n] = weight.at[n] * inverse.at[n];
  }
  __device__ float operator()(int n, float z) const {
    return fmaf(z - center.at[n], scale.at[n], bias.at[n]);
  }
};

// The tokens of one segment, fetched 32 at a time by the lanes of a warp.
struct Tokens {
  const int32_t* order;
  int32_t begin, end;
  int lane;

  // function(position in the segment's part of 32, token); every lane gets every token.
  template <typename Fetch, typename Use>
  __device__ void each(const Fetch& fetch, const Use& use) const {
    for (int32_t first = begin; first < end; first += kWarp) {
      const int count = min(kWarp, end - first);
      const int32_t mine = lane < count ? order[first + lane] : 0;
      fetch(mine, lane < count);
#pragma unroll 4
      for (int i = 0; i < count; i++) use(i, __shfl_sync(kAll, mine, i));
    }
  }
};

constexpr int64_t kOptIn = 227 << 10;  // the most that any device has

// Bytes of shared memory that a block may use on this device, at most `most`.
inline int64_t shared_limit(int64_t most) {
  int device = 0, bytes = 48 << 10;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes < most ? bytes : most;
}

// Kernels may use more than 48 kB of shared memory once they are told so.
template <typename Kernel>
int allow_shared(Kernel kernel, int bytes) {
  if (bytes <= 48 << 10) return 0;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace guided
}  // namespace any2point
