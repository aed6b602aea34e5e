// What cpu.cpp and the SIMD files of farthest point sampling share: one cloud at a time.
#pragma once

#include <stdint.h>

#include "common/isa.h"

namespace any2point {

template <typename T>
struct FarthestPointCloud {
  const T* points;  // [count, dim]
  int64_t count, dim, samples;
  int64_t pick;    // the first, a finite point
  int64_t* index;  // [samples] out, samples >= 1: as many as there are finite points, the rest is left alone
  T* distance;     // [samples] out, likewise
  char* scratch;   // as many bytes as the function's *_scratch says, aligned like a double
};

// Sequential: one pass over all points a pick. Any D.
A2P_DECLARE_ISA(int64_t farthest_point_sequential_scratch(int64_t count, int64_t dim))
A2P_DECLARE_ISA(void farthest_point_sequential(const FarthestPointCloud<float>& cloud))
A2P_DECLARE_ISA(void farthest_point_sequential_double(const FarthestPointCloud<double>& cloud))
// Batched: many picks a round, pruned by blocks. D = 2 or 3 only; `pays` says whether and when to use it.
A2P_DECLARE_ISA(bool farthest_point_batched_pays(int64_t count, int64_t dim, int64_t samples))
A2P_DECLARE_ISA(int64_t farthest_point_batched_scratch(int64_t count, int64_t dim))
A2P_DECLARE_ISA(void farthest_point_batched(const FarthestPointCloud<float>& cloud))

}  // namespace any2point
