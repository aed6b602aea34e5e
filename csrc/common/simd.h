// One vector type for all CPU kernels. Included only by *.simd.cpp, which is compiled once per instruction
// set with -DA2P_ISA=scalar|avx2|avx512, and *.bf16.cpp, with avx512bf16|amx. Two rules keep those objects
// safe to link together: nothing from the C++ library (its inline functions would be emitted with this set's
// instructions and could be the copy that the linker keeps for everybody), and everything inside namespace
// any2point::A2P_ISA.
//
// Float: kLanes floats. Int: kLanes int32. Words: kLanes uint32, each a set of bits. Masks are plain bit
// sets, lane 0 in bit 0.
#pragma once

#include <stdint.h>
#if defined(__AVX2__)
// GCC 12 warns of the registers that its own headers leave undefined on purpose.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define A2P_INLINE static inline __attribute__((always_inline))

namespace any2point {
namespace A2P_ISA {

typedef uint32_t Mask;

A2P_INLINE int32_t float_bits(float a) {
  int32_t bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  return bits;
}
A2P_INLINE float bits_float(int32_t bits) {
  float a;
  __builtin_memcpy(&a, &bits, sizeof a);
  return a;
}

#if defined(__AVX512F__)

constexpr int kLanes = 16;
typedef __m512 Float;

A2P_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
A2P_INLINE void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
A2P_INLINE Float splat(float a) { return _mm512_set1_ps(a); }
A2P_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
A2P_INLINE Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
A2P_INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
A2P_INLINE Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
A2P_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
A2P_INLINE Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
A2P_INLINE Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
A2P_INLINE Mask less(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
A2P_INLINE Mask less_equal(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
A2P_INLINE Mask equal(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
// `value` in the lanes where a is positive, else 0.
A2P_INLINE Float where_positive(Float a, Float value) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ), value);
}
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

typedef __m512i Int;

A2P_INLINE Int load(const int32_t* p) { return _mm512_loadu_si512(p); }
A2P_INLINE void store(int32_t* p, Int a) { _mm512_storeu_si512(p, a); }
A2P_INLINE Int splat_int(int32_t a) { return _mm512_set1_epi32(a); }
A2P_INLINE int compress(int32_t* p, Int a, Mask mask) {
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32((__mmask16)mask, a));
  return __builtin_popcount(mask);
}
A2P_INLINE int reduce_add(Int a) { return _mm512_reduce_add_epi32(a); }
// count + 1 in the lanes where a < b, or a <= b.
A2P_INLINE Int count_less(Int count, Float a, Float b) {
  return _mm512_mask_sub_epi32(count, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), count, splat_int(-1));
}
A2P_INLINE Int count_less_equal(Int count, Float a, Float b) {
  return _mm512_mask_sub_epi32(count, _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), count, splat_int(-1));
}
// count + 1 in the lanes where a < b, and in lanes above `lane` also where a == b.
A2P_INLINE Int count_before(Int count, Float a, Float b, int lane) {
  const Mask above = 0xfffeu << lane;
  const Mask before = less(a, b) | (equal(a, b) & above);
  return _mm512_mask_sub_epi32(count, (__mmask16)before, count, splat_int(-1));
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
typedef __m256 Float;

A2P_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
A2P_INLINE void store(float* p, Float a) { _mm256_storeu_ps(p, a); }
A2P_INLINE Float splat(float a) { return _mm256_set1_ps(a); }
A2P_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
A2P_INLINE Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
A2P_INLINE Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
A2P_INLINE Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
A2P_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
A2P_INLINE Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
A2P_INLINE Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
A2P_INLINE Mask less(Float a, Float b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
A2P_INLINE Mask less_equal(Float a, Float b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ)); }
A2P_INLINE Mask equal(Float a, Float b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
A2P_INLINE Float where_positive(Float a, Float value) {
  return _mm256_and_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ), value);
}
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

typedef __m256i Int;

A2P_INLINE Int load(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
A2P_INLINE void store(int32_t* p, Int a) { _mm256_storeu_si256((__m256i*)p, a); }
A2P_INLINE Int splat_int(int32_t a) { return _mm256_set1_epi32(a); }
A2P_INLINE int compress(int32_t* p, Int a, Mask mask) {
  store(p, _mm256_permutevar8x32_epi32(a, packing(mask)));
  return __builtin_popcount(mask);
}
A2P_INLINE int reduce_add(Int a) {
  __m128i b = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  b = _mm_add_epi32(b, _mm_shuffle_epi32(b, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(b, _mm_shuffle_epi32(b, 0xb1)));
}
// count + 1 in the lanes where a < b, or a <= b.
A2P_INLINE Int count_less(Int count, Float a, Float b) {
  return _mm256_sub_epi32(count, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LT_OQ)));
}
A2P_INLINE Int count_less_equal(Int count, Float a, Float b) {
  return _mm256_sub_epi32(count, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LE_OQ)));
}
// count + 1 in the lanes where a < b, and in lanes above `lane` also where a == b.
A2P_INLINE Int count_before(Int count, Float a, Float b, int lane) {
  const __m256i above = _mm256_cmpgt_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), splat_int(lane));
  const Float equals = _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ), _mm256_castsi256_ps(above));
  const Float before = _mm256_or_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ), equals);
  return _mm256_sub_epi32(count, _mm256_castps_si256(before));
}

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
A2P_LANEWISE(div, a.lane[i] / b.lane[i])
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
A2P_INLINE Float where_positive(Float a, Float value) {
  A2P_LANES value.lane[i] = a.lane[i] > 0 ? value.lane[i] : 0.0f;
  return value;
}
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

struct Int {
  int32_t lane[kLanes];
};

A2P_INLINE Int load(const int32_t* p) {
  Int r;
  A2P_LANES r.lane[i] = p[i];
  return r;
}
A2P_INLINE void store(int32_t* p, Int a) { A2P_LANES p[i] = a.lane[i]; }
A2P_INLINE Int splat_int(int32_t a) {
  Int r;
  A2P_LANES r.lane[i] = a;
  return r;
}
A2P_INLINE int compress(int32_t* p, Int a, Mask mask) {
  int n = 0;
  A2P_LANES if (mask >> i & 1) p[n++] = a.lane[i];
  return n;
}
A2P_INLINE int reduce_add(Int a) {
  int r = 0;
  A2P_LANES r += a.lane[i];
  return r;
}
// count + 1 in the lanes where a < b, or a <= b.
A2P_INLINE Int count_less(Int count, Float a, Float b) {
  A2P_LANES count.lane[i] += a.lane[i] < b.lane[i];
  return count;
}
A2P_INLINE Int count_less_equal(Int count, Float a, Float b) {
  A2P_LANES count.lane[i] += a.lane[i] <= b.lane[i];
  return count;
}
// count + 1 in the lanes where a < b, and in lanes above `lane` also where a == b.
A2P_INLINE Int count_before(Int count, Float a, Float b, int lane) {
  A2P_LANES count.lane[i] += a.lane[i] < b.lane[i] || (a.lane[i] == b.lane[i] && i > lane);
  return count;
}
#undef A2P_LANES

#endif

}  // namespace A2P_ISA
}  // namespace any2point
