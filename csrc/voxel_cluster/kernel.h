// Points of one voxel get one number: sorted by (cloud, z, y, x). Torch-free.
#pragma once

#include <stdint.h>

#include "common/layout.h"

namespace any2point {

constexpr int kVoxelDims = 3;

struct VoxelPoints {
  Rows rows;
  int dim;                  // 1, 2 or 3
  bool wide;                // points and origin are float64, else float32
  const void* points;       // [rows.total, dim]
  const void* origin;       // [B, dim], or null: the lowest coordinates of each cloud
  double size[kVoxelDims];  // rounded to the points' type before the division
};

// Finite rows of a cloud.
int64_t voxel_count_cpu(const VoxelPoints& points, int64_t cloud);

// Sorts the finite rows of a cloud by (voxel, row) into order[0 .. count); cluster[row] becomes the number of
// the voxel among those of the cloud. Returns how many voxels there are, or -1 - row for a row whose voxel
// has a coordinate outside of int32.
int64_t voxel_sort_cpu(const VoxelPoints& points, int64_t cloud, int64_t count, int64_t* order,
                       int64_t* cluster);

// The whole op on CUDA, for fewer than 2^32 rows; rows whose voxel has a coordinate outside of int32 get no
// cluster. Returns a cudaError_t.
struct VoxelOut {
  int64_t* cluster;  // [R]
  int64_t* start;    // [R + 1]
  int64_t* order;    // [R]
  int64_t* count;    // one
};
int64_t voxel_cluster_workspace(const VoxelPoints& points);
int voxel_cluster_cuda(const VoxelPoints& points, const VoxelOut& out, void* workspace, void* stream);

}  // namespace any2point
