// The sort of clouds that fit into a block each: what tree_sort.cu does for tree_build.cu.
#pragma once

#include "knn/plan.h"
#include "knn/tree.cuh"

namespace any2point {

struct BlockSort {
  Rows rows, query_rows;
  const float *points, *query;  // query null: the points are the queries
  int64_t dim;
  Extent* extent;     // [clouds] out
  uint32_t* order;    // [rows.total] out: rows in the order of the curve, by cloud
  float4* in_order;   // [query_rows.total] out, as TreeSearch::query ...
  uint32_t* nearest;  // ... and TreeSearch::nearest; unused if the points are the queries
};

// `each`, of kSortEach: a cloud with its queries has at most that times kSortThreads rows. Returns a
// cudaError_t.
int block_sort(const BlockSort& sort, int each, cudaStream_t stream);

}  // namespace any2point
