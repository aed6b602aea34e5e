// Offsets of the neighbours of one group, for the CPU kernels of every precision. Included by *.simd.cpp and
// *.bf16.cpp only.
#pragma once

#include <float.h>
#include <math.h>

#include "common/simd.h"
#include "local_aggregate/kernel.h"

namespace any2point {
namespace A2P_ISA {

// Rows of points and features that a group is made of, counted over all clouds; below 0: a point at the
// origin without features.
struct Members {
  const int64_t* neighbor;
  int64_t base, middle;
};

A2P_INLINE Members members_of(const Neighborhoods& args, int64_t group) {
  const int64_t base = group / args.centers * args.rows, middle = args.center[group];
  return {args.neighbor + group * args.neighbors, base, middle < 0 ? -1 : base + middle};
}
A2P_INLINE int64_t member(const Members& members, int64_t k) {
  return members.neighbor[k] < 0 ? members.middle : members.base + members.neighbor[k];
}

// The largest |offset| of each axis; NaN if there is one.
A2P_INLINE void largest_offsets(const float* offset, int64_t count, float largest[3]) {
  largest[0] = largest[1] = largest[2] = 0;
  for (int64_t k = 0; k < count; k++) {
    for (int axis = 0; axis < 3; axis++) {
      const float size = fabsf(offset[3 * k + axis]);
      if (size > largest[axis] || size != size) largest[axis] = size;
    }
  }
}

// offset [K, 3]: of the neighbours from their centre, divided by the group's size.
A2P_INLINE void normalized_offsets(const Neighborhoods& args, int64_t group, float* offset) {
  const float origin[3] = {0, 0, 0};
  const int64_t count = args.neighbors;
  const Members members = members_of(args, group);
  const float* here = members.middle < 0 ? origin : args.points + 3 * members.middle;
  for (int64_t k = 0; k < count; k++) {
    const int64_t row = member(members, k);
    const float* there = row < 0 ? origin : args.points + 3 * row;
    for (int axis = 0; axis < 3; axis++) offset[3 * k + axis] = there[axis] - here[axis];
  }
  float divisor[3];
  if (args.divisor) {
    divisor[0] = divisor[1] = divisor[2] = args.divisor[group / args.centers];
  } else {
    largest_offsets(offset, count, divisor);
    for (int axis = 0; axis < 3; axis++) {
      if (args.guard && divisor[axis] <= FLT_MIN) divisor[axis] = 1;  // written so that NaN stays
    }
  }
  float repeated[3 * kLanes];
  for (int i = 0; i < 3 * kLanes; i++) repeated[i] = divisor[i % 3];
  int64_t i = 0;
  for (int64_t lane = 0; i + kLanes <= 3 * count; i += kLanes, lane = (lane + kLanes) % (3 * kLanes)) {
    store(offset + i, div(load(offset + i), load(repeated + lane)));
  }
  for (; i < 3 * count; i++) offset[i] /= divisor[i % 3];
}

}  // namespace A2P_ISA
}  // namespace any2point
