// A tree of boxes over the points of a batch of clouds, on CUDA: what tree_build.cu builds and tree_search.cu
// walks through.
//
// The finite points of each cloud lie in the order of a Hilbert curve. Every kLeaf of them in a row are a
// leaf with a box, every kFanout leaves a node with a box, every kFanout nodes a node of the next level. Node
// i of level l of cloud c is box[l][first_node(l, c) + i]; its children are nodes kFanout * i and following.
#pragma once

#include "knn/warp.cuh"

namespace any2point {

constexpr int kLeaf = 8, kFanout = 32, kMaxLevels = 6;

struct Box {
  float4 low, high;  // low.w: the lowest row of a point inside, as bits
};

// Of the finite points of a cloud: bits that rise with the coordinate, all of them of the kind "least so
// far".
struct Extent {
  uint32_t low[3], high[3];  // high: inverted
  uint32_t count;            // of finite points, less one
  // Where all but a few points lie, by a sample; NaN if that is one place. The curve is drawn here, so that
  // points far off do not coarsen it.
  float usual_low[3], usual_high[3];
  uint32_t unused[3];

  __device__ int64_t points() const { return uint32_t(count + 1); }
};

struct PointTree {
  Rows rows;
  const Extent* extent;  // [clouds]
  float4* point;         // [(leaves + 1) * kLeaf]: coordinates and row, NaN behind the last one of a cloud
  Box* box[kMaxLevels];
  int top;         // the level with at most kFanout nodes in every cloud
  uint32_t blank;  // the last leaf, which belongs to no cloud and holds no points

  static A2P_HOST_DEVICE int64_t size(int level) { return int64_t(kLeaf) << (5 * level); }
  // Nodes of all clouds, with room for those that are not full.
  static A2P_HOST_DEVICE int64_t nodes(const Rows& rows, int level) {
    return rows.total / size(level) + rows.clouds;
  }
  __device__ int64_t first_node(int level, int64_t cloud) const {
    return rows.begin(cloud) / size(level) + cloud;
  }
};

struct TreeSearch {
  Neighbours<float> run;
  PointTree tree;
  const float4* query;      // [query_rows.total] by cloud and place on its curve: coordinates (NaN in a row
                            // that is no query) and row; null: the queries are the points
  const uint32_t* nearest;  // [query_rows.total] place of each among the points of its cloud
};

// Enqueues the building of all that `search` points to, in `workspace`. Returns a cudaError_t.
int build_tree(TreeSearch* search, void* workspace, cudaStream_t stream);

}  // namespace any2point
