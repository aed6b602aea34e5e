// One vector type for all CPU kernels. Included only by *.simd.cpp, which is compiled once per instruction
// set with -DA2P_ISA=scalar|avx2|avx512. Two rules keep those objects safe to link together: nothing from the
// C++ library (its inline functions would be emitted with this set's instructions and could be the copy that
// the linker keeps for everybody), and everything inside namespace any2point::A2P_ISA.
//
// Float: kLanes floats. Masks are plain bit sets, lane 0 in bit 0. Words: kLanes uint32, each a set of bits.
#pragma once

#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define A2P_INLINE static inline __attribute__((always_inline))

namespace any2point {
namespace A2P_ISA {

typedef uint32_t Mask;

#if defined(__AVX512F__)

constexpr int kLanes = 16;
typedef __m512 Float;

A2P_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
A2P_INLINE void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
A2P_INLINE Float splat(float a) { return _mm512_set1_ps(a); }
A2P_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
A2P_INLINE Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
A2P_INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
A2P_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
A2P_INLINE Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
A2P_INLINE Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
A2P_INLINE Mask less(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
A2P_INLINE Mask less_equal(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
A2P_INLINE Mask equal(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
A2P_INLINE float reduce_max(Float a) { return _mm512_reduce_max_ps(a); }
A2P_INLINE float reduce_min(Float a) { return _mm512_reduce_min_ps(a); }
// The largest lane, in every lane.
A2P_INLINE Float splat_max(Float a) {
  a = _mm512_max_ps(a, _mm512_shuffle_f32x4(a, a, 0x4e));
  a = _mm512_max_ps(a, _mm512_shuffle_f32x4(a, a, 0xb1));
  a = _mm512_max_ps(a, _mm512_permute_ps(a, 0x4e));
  return _mm512_max_ps(a, _mm512_permute_ps(a, 0xb1));
}
// Writes the lanes of `mask` to p, packed; may touch kLanes floats. Returns how many were kept.
A2P_INLINE int compress(float* p, Float a, Mask mask) {
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps((__mmask16)mask, a));
  return __builtin_popcount(mask);
}
// The same for the numbers first, first + 1, ...
A2P_INLINE int compress_index(int32_t* p, int32_t first, Mask mask) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(first));
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32((__mmask16)mask, index));
  return __builtin_popcount(mask);
}
typedef __m512i Words;
A2P_INLINE Words no_words() { return _mm512_setzero_si512(); }
// `words`, with `bits` added in the lanes where a < b.
A2P_INLINE Words add_where_less(Words words, uint32_t bits, Float a, Float b) {
  return _mm512_mask_or_epi32(words, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), words,
                              _mm512_set1_epi32((int)bits));
}
A2P_INLINE Mask nonzero(Words words) { return _mm512_test_epi32_mask(words, words); }
A2P_INLINE void store(uint32_t* p, Words words) { _mm512_storeu_si512(p, words); }

#elif defined(__AVX2__)

constexpr int kLanes = 8;
typedef __m256 Float;

A2P_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
A2P_INLINE void store(float* p, Float a) { _mm256_storeu_ps(p, a); }
A2P_INLINE Float splat(float a) { return _mm256_set1_ps(a); }
A2P_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
A2P_INLINE Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
A2P_INLINE Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
A2P_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
A2P_INLINE Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
A2P_INLINE Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
A2P_INLINE Mask less(Float a, Float b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
A2P_INLINE Mask less_equal(Float a, Float b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ)); }
A2P_INLINE Mask equal(Float a, Float b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
A2P_INLINE float reduce_max(Float a) {
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_shuffle_ps(b, b, 1)));
}
A2P_INLINE float reduce_min(Float a) {
  __m128 b = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_min_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_min_ss(b, _mm_shuffle_ps(b, b, 1)));
}
A2P_INLINE Float splat_max(Float a) {
  a = _mm256_max_ps(a, _mm256_permute2f128_ps(a, a, 1));
  a = _mm256_max_ps(a, _mm256_permute_ps(a, 0x4e));
  return _mm256_max_ps(a, _mm256_permute_ps(a, 0xb1));
}
// AVX2 has no compress: bits of the mask spread to bytes, pext packs the lane numbers, permutevar moves.
A2P_INLINE __m256i packing(Mask mask) {
  const uint64_t bytes = _pdep_u64(mask, 0x0101010101010101ull) * 0xff;
  const uint64_t lanes = _pext_u64(0x0706050403020100ull, bytes);
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)lanes));
}
A2P_INLINE int compress(float* p, Float a, Mask mask) {
  _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(a, packing(mask)));
  return __builtin_popcount(mask);
}
A2P_INLINE int compress_index(int32_t* p, int32_t first, Mask mask) {
  _mm256_storeu_si256((__m256i*)p, _mm256_add_epi32(packing(mask), _mm256_set1_epi32(first)));
  return __builtin_popcount(mask);
}
typedef __m256i Words;
A2P_INLINE Words no_words() { return _mm256_setzero_si256(); }
A2P_INLINE Words add_where_less(Words words, uint32_t bits, Float a, Float b) {
  const __m256i chosen = _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LT_OQ));
  return _mm256_or_si256(words, _mm256_and_si256(chosen, _mm256_set1_epi32((int)bits)));
}
A2P_INLINE Mask nonzero(Words words) {
  const __m256i zero = _mm256_cmpeq_epi32(words, _mm256_setzero_si256());
  return 0xffu & ~(Mask)_mm256_movemask_ps(_mm256_castsi256_ps(zero));
}
A2P_INLINE void store(uint32_t* p, Words words) { _mm256_storeu_si256((__m256i*)p, words); }

#else

constexpr int kLanes = 8;
struct Float {
  float lane[kLanes];
};

#define A2P_LANES for (int i = 0; i < kLanes; i++)
A2P_INLINE Float load(const float* p) {
  Float r;
  A2P_LANES r.lane[i] = p[i];
  return r;
}
A2P_INLINE void store(float* p, Float a) { A2P_LANES p[i] = a.lane[i]; }
A2P_INLINE Float splat(float a) {
  Float r;
  A2P_LANES r.lane[i] = a;
  return r;
}
#define A2P_LANEWISE(name, expression)      \
  A2P_INLINE Float name(Float a, Float b) { \
    Float r;                                \
    A2P_LANES r.lane[i] = (expression);     \
    return r;                               \
  }
A2P_LANEWISE(add, a.lane[i] + b.lane[i])
A2P_LANEWISE(sub, a.lane[i] - b.lane[i])
A2P_LANEWISE(mul, a.lane[i] * b.lane[i])
// As the instructions do: the second operand if either is NaN.
A2P_LANEWISE(min, a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i])
A2P_LANEWISE(max, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i])
#undef A2P_LANEWISE
A2P_INLINE Float fma(Float a, Float b, Float c) {
  Float r;
  A2P_LANES r.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]);
  return r;
}
#define A2P_COMPARE(name, op)                           \
  A2P_INLINE Mask name(Float a, Float b) {              \
    Mask m = 0;                                         \
    A2P_LANES m |= (Mask)(a.lane[i] op b.lane[i]) << i; \
    return m;                                           \
  }
A2P_COMPARE(less, <)
A2P_COMPARE(less_equal, <=)
A2P_COMPARE(equal, ==)
#undef A2P_COMPARE
A2P_INLINE float reduce_max(Float a) {
  float r = a.lane[0];
  A2P_LANES r = a.lane[i] > r ? a.lane[i] : r;
  return r;
}
A2P_INLINE float reduce_min(Float a) {
  float r = a.lane[0];
  A2P_LANES r = a.lane[i] < r ? a.lane[i] : r;
  return r;
}
A2P_INLINE int compress(float* p, Float a, Mask mask) {
  int n = 0;
  A2P_LANES if (mask >> i & 1) p[n++] = a.lane[i];
  return n;
}
A2P_INLINE int compress_index(int32_t* p, int32_t first, Mask mask) {
  int n = 0;
  A2P_LANES if (mask >> i & 1) p[n++] = first + i;
  return n;
}
A2P_INLINE Float splat_max(Float a) { return splat(reduce_max(a)); }
struct Words {
  uint32_t lane[kLanes];
};
A2P_INLINE Words no_words() { return Words{}; }
A2P_INLINE Words add_where_less(Words words, uint32_t bits, Float a, Float b) {
  A2P_LANES words.lane[i] |= a.lane[i] < b.lane[i] ? bits : 0;
  return words;
}
A2P_INLINE Mask nonzero(Words words) {
  Mask m = 0;
  A2P_LANES m |= (Mask)(words.lane[i] != 0) << i;
  return m;
}
A2P_INLINE void store(uint32_t* p, Words words) { A2P_LANES p[i] = words.lane[i]; }
#undef A2P_LANES

#endif

}  // namespace A2P_ISA
}  // namespace any2point
