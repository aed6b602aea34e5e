// Farthest point sampling, without torch. op.cpp and numpy.cpp call this; cpu.cpp and cuda.cu implement it.
#pragma once

#include <stdint.h>

#include "common/layout.h"

namespace any2point {

// One run over a batch; device pointers for the CUDA launcher. T is float or double.
template <typename T>
struct FarthestPointSample {
  const T* points;       // [total, dim]
  Rows rows;             // which of them belong to which cloud
  int64_t dim;           // D >= 1; 3 if pointnet2
  int64_t samples;       // M
  const int64_t* start;  // [B, starts] within the cloud, or null: 0
  bool pointnet2;        // tie order, skip radius and fallback of pointnet2_ops
  int64_t* index;        // [B, M] out: as users see it, -1 where a cloud has no point left
  T* distance;           // [B, M] out: squared, to the picks before; +inf for the first, 0 beside index -1
  int64_t starts = 1;    // given picks of a cloud, before the others; at least 1, and 1 if pointnet2
};

// Clouds first .. last - 1, on the calling thread.
template <typename T>
void farthest_point_sample_cpu(const FarthestPointSample<T>& run, int64_t first, int64_t last);

// On the current CUDA device. The workspace needs no initial contents; its size is 0 for most runs.
template <typename T>
int64_t farthest_point_sample_workspace(const FarthestPointSample<T>& run);
// Returns a cudaError_t.
template <typename T>
int farthest_point_sample_cuda(const FarthestPointSample<T>& run, void* workspace, void* stream);

}  // namespace any2point
