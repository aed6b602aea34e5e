#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace any2point {
namespace {

Isa best_of_cpu() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    return Isa::avx2;
  }
#endif
  return Isa::scalar;
}

bool parse(const char* name, Isa* level) {
  for (Isa candidate : {Isa::scalar, Isa::avx2, Isa::avx512}) {
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
  return level == Isa::avx512 ? "avx512" : level == Isa::avx2 ? "avx2" : "scalar";
}

bool set_isa(const char* name) {
  Isa level;
  if (!parse(name, &level)) return false;
  current().store(level);
  return true;
}

}  // namespace any2point
