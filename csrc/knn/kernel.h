// Neighbour search, without torch: k nearest neighbours, optionally within a radius (ball query). op.cpp,
// ball_query/op.cpp and numpy.cpp call this; cpu.cpp and cuda.cu implement it.
#pragma once

#include <stdint.h>

#include <functional>

#include "common/layout.h"

namespace any2point {

// What is wanted of the points that are near enough.
enum class Choice {
  nearest,  // the k nearest, ordered by (distance, index)
  set,      // the same ones, in ascending order of index
  first,    // the k of lowest index, ascending
};

// One run over a batch; device pointers for the CUDA launcher. T is float or double. Both sides have the same
// number of clouds.
template <typename T>
struct Neighbours {
  const T* query;  // [query_rows.total, dim]
  Rows query_rows;
  const T* points;  // [rows.total, dim]
  Rows rows;
  int64_t dim;  // D >= 1
  int64_t k;
  T limit;  // largest squared distance of a neighbour: +inf, or the last value below radius^2; negative: none
  Choice choice;
  int64_t* index;  // [query_rows.total, k] out: as users see it, -1 where there is no neighbour left
  T* distance;     // [query_rows.total, k] out: squared; +inf beside index -1
  int64_t* count;  // [query_rows.total] out, how many are not -1; or null
};

// Calls its argument with ranges that cover 0 .. n - 1, on as many threads as the caller likes.
using Range = std::function<void(int64_t first, int64_t last)>;
using ParallelFor = std::function<void(int64_t n, const Range&)>;

template <typename T>
void neighbours_cpu(const Neighbours<T>& run, const ParallelFor& parallel_for);

// On the current CUDA device, with `neighbours_workspace` bytes there (null if 0); returns a cudaError_t.
template <typename T>
int neighbours_cuda(const Neighbours<T>& run, void* workspace, void* stream);
template <typename T>
int64_t neighbours_workspace(const Neighbours<T>& run);
// The same by kernels for any k and D: neighbours_cuda calls it where it has no better one.
template <typename T>
int neighbours_general_cuda(const Neighbours<T>& run, void* stream);
// The same through a tree of boxes: at most three coordinates, k <= kTreeMost, fewer than 2^30 rows.
constexpr int64_t kTreeMost = 280;
int neighbours_tree_cuda(const Neighbours<float>& run, void* workspace, void* stream);
int64_t tree_workspace(const Neighbours<float>& run);

// `limit` of a ball: the largest number below radius * radius, as the search includes its limit.
template <typename T>
T ball_limit(double radius);

}  // namespace any2point
