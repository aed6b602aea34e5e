#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(A2P_WITH_BF16) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace any2point {
namespace {

#if defined(A2P_WITH_BF16)
// Whether the CPU has tiles of bfloat16 and Linux lets this process, all of its threads, use them.
bool allows_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  const unsigned needed = 1u << 24 | 1u << 22;  // AMX-TILE, AMX-BF16
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & needed) != needed) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa find_best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#if defined(A2P_WITH_BF16)
    // Without tiles Intel's products of bfloat16 are slower than those of float32.
    if (__builtin_cpu_supports("avx512bf16") && allows_amx()) return Isa::amx;
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd")) return Isa::avx512bf16;
#endif
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    return Isa::avx2;
  }
#endif
  return Isa::scalar;
}

Isa best_of_cpu() {
  static const Isa best = find_best();
  return best;
}

bool parse(const char* name, Isa* level) {
  for (Isa candidate : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amx}) {
    if (std::strcmp(name, isa_name(candidate)) == 0) {
      *level = candidate;
      return candidate <= best_of_cpu();
    }
  }
  return false;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> level{[] {
    // A level that is unknown or not there is ignored: the variable only ever lowers it.
    Isa wanted;
    const char* name = std::getenv("ANY2POINT_SIMD");
    return name && parse(name, &wanted) ? wanted : best_of_cpu();
  }()};
  return level;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

const char* isa_name(Isa level) {
  constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512bf16", "amx"};
  return kNames[static_cast<int>(level)];
}

bool set_isa(const char* name) {
  Isa level;
  if (!parse(name, &level)) return false;
  current().store(level);
  return true;
}

}  // namespace any2point
