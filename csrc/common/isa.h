// Which instruction set the CPU kernels use. Each *.simd.cpp is compiled once per set into its own namespace
// (any2point::scalar, ::avx2, ::avx512); callers choose at run time with A2P_DISPATCH_ISA. Each *.bf16.cpp is
// for the two sets that multiply bfloat16 (any2point::avx512bf16, ::amx; both contain avx512), and
// A2P_DISPATCH_BF16 chooses, at these levels only.
#pragma once

namespace any2point {

// In this order, each contains those before it. A compiler that lacks the last two builds without them.
enum class Isa { scalar, avx2, avx512, avx512bf16, amx };

// The level in use: the CPU's best, unless ANY2POINT_SIMD or set_isa says less.
Isa isa();
const char* isa_name(Isa level);
// False if the name is unknown or this CPU (or build) lacks the level.
bool set_isa(const char* name);

#if !defined(A2P_WITH_BF16)
// isa() is never high enough.
template <typename... T>
[[noreturn]] void no_bf16(const T&...) {
  __builtin_trap();
}
#endif

}  // namespace any2point

#if defined(__x86_64__)
#define A2P_DISPATCH_ISA(function, ...)     \
  switch (::any2point::isa()) {             \
    case ::any2point::Isa::amx:             \
    case ::any2point::Isa::avx512bf16:      \
    case ::any2point::Isa::avx512:          \
      return avx512::function(__VA_ARGS__); \
    case ::any2point::Isa::avx2:            \
      return avx2::function(__VA_ARGS__);   \
    default:                                \
      return scalar::function(__VA_ARGS__); \
  }
// Declares one function of a *.simd.cpp in the namespace of every instruction set.
#define A2P_DECLARE_ISA(...) \
  namespace scalar {         \
  __VA_ARGS__;               \
  }                          \
  namespace avx2 {           \
  __VA_ARGS__;               \
  }                          \
  namespace avx512 {         \
  __VA_ARGS__;               \
  }
#else
#define A2P_DISPATCH_ISA(function, ...) return scalar::function(__VA_ARGS__);
#define A2P_DECLARE_ISA(...) \
  namespace scalar {         \
  __VA_ARGS__;               \
  }
#endif

#if defined(A2P_WITH_BF16)
#define A2P_DISPATCH_BF16(function, ...)                                          \
  return ::any2point::isa() == ::any2point::Isa::amx ? amx::function(__VA_ARGS__) \
                                                     : avx512bf16::function(__VA_ARGS__);
#define A2P_DECLARE_BF16(...) \
  namespace avx512bf16 {      \
  __VA_ARGS__;                \
  }                           \
  namespace amx {             \
  __VA_ARGS__;                \
  }
#else
#define A2P_DISPATCH_BF16(function, ...) ::any2point::no_bf16(__VA_ARGS__);
#define A2P_DECLARE_BF16(...)
#endif
