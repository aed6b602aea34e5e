// Given picks on CUDA: those of a start set [B, S] that need no kernel of one step a pick.
#pragma once

#include <stdint.h>

#include "farthest_point_sample/kernel.h"

namespace any2point {

// The picks that the kernels find done: index and distance are written.
struct GivenPicks {
  const int* count = nullptr;    // [B] how many, 0 if the cloud has no finite point; -1: see launch_given
  const void* points = nullptr;  // [B, starts] float4: x, y, z, bits of the index within the cloud
};

int64_t given_workspace(const FarthestPointSample<float>& run);
// Marks with count -1 the clouds whose set is not a run of distinct finite points, perhaps with some that are
// none after it: what such a set comes to depends on the picks. `workspace` needs no initial contents.
// Returns a cudaError_t.
int launch_given(const FarthestPointSample<float>& run, void* workspace, GivenPicks* given, void* stream);

}  // namespace any2point
