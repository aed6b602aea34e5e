// Exact batched farthest point sampling on CUDA: float, D = 3, ties to the lowest index. See batched.cu.
#pragma once

#include <stdint.h>

#include "farthest_point_sample/given.h"
#include "farthest_point_sample/kernel.h"
#include "farthest_point_sample/plan.h"

namespace any2point {

// Bytes of workspace for a plan; it needs no initial contents.
int64_t batched_workspace(const FarthestPointSample<float>& run, const BatchedPlan& plan);
// Samples the clouds of more than `above` and at most plan.capacity points. Returns a cudaError_t.
int launch_batched(const FarthestPointSample<float>& run, int64_t above, const BatchedPlan& plan,
                   const GivenPicks& given, void* workspace, void* stream);

// The same for clouds that one block or one cluster holds.
int64_t cluster_workspace(const FarthestPointSample<float>& run, const BatchedPlan& plan);
int launch_cluster(const FarthestPointSample<float>& run, int64_t above, const BatchedPlan& plan,
                   const GivenPicks& given, void* workspace, void* stream);

}  // namespace any2point
