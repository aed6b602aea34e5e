// Element types of torch-free kernels: float16, bfloat16, float32, float64, and the type that each of them is
// accumulated in (float64 for itself, float32 for the others).
#pragma once

#include <stdint.h>
#include <string.h>

// Never emitted as a function of its own: a copy from a *.simd.cpp could be the one that the linker keeps.
#ifdef __CUDACC__
#define A2P_ALWAYS_INLINE static __host__ __device__ __forceinline__
#else
#define A2P_ALWAYS_INLINE static inline __attribute__((always_inline))
#endif

namespace any2point {

enum class Dtype { f16, bf16, f32, f64 };

// Storage only. Written out in integers because not every compiler that builds this has a 16-bit float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

namespace detail {
A2P_ALWAYS_INLINE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
A2P_ALWAYS_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
}  // namespace detail

A2P_ALWAYS_INLINE float widen(float value) { return value; }
A2P_ALWAYS_INLINE double widen(double value) { return value; }
A2P_ALWAYS_INLINE float widen(BFloat16 value) { return detail::float_of_bits(uint32_t(value.bits) << 16); }
A2P_ALWAYS_INLINE float widen(Half value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  // The exponent is rebased by a multiplication, which also normalises subnormals; infinity and NaN come out
  // at 2^16 or above and are moved to the top exponent.
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  const float scaled = detail::float_of_bits(magnitude) * 0x1p112f;
  uint32_t bits = detail::bits_of_float(scaled);
  bits |= scaled >= 65536.0f ? 0x7f800000u : 0u;
  return detail::float_of_bits(bits | uint32_t(value.bits & 0x8000) << 16);
#endif
}

// Rounded to nearest even.
A2P_ALWAYS_INLINE void narrow(float value, float* out) { *out = value; }
A2P_ALWAYS_INLINE void narrow(double value, double* out) { *out = value; }
A2P_ALWAYS_INLINE void narrow(float value, BFloat16* out) {
  const uint32_t bits = detail::bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out->bits = uint16_t(value != value ? 0x7fc0 : rounded);
}
A2P_ALWAYS_INLINE void narrow(float value, Half* out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(value));
#else
  const uint32_t bits = detail::bits_of_float(value), sign = bits >> 16 & 0x8000,
                 magnitude = bits & 0x7fffffff;
  uint32_t result;
  if (magnitude >= 0x47800000) {  // 65536 and above, infinity, NaN
    result = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 rounds at the right bit
    result = detail::bits_of_float(detail::float_of_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    result = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = uint16_t(sign | result);
#endif
}

// Calls function(T{}) with the element type of `dtype`.
template <typename F>
static inline void dispatch(Dtype dtype, const F& function) {
  switch (dtype) {
    case Dtype::f16:
      return function(Half{});
    case Dtype::bf16:
      return function(BFloat16{});
    case Dtype::f32:
      return function(float{});
    case Dtype::f64:
      return function(double{});
  }
}

}  // namespace any2point
