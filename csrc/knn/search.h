// What cpu.cpp hands to the SIMD code: plain pointers and sizes, all storage owned by cpu.cpp.
#pragma once

#include <stdint.h>

#include "common/isa.h"
#include "knn/kernel.h"

namespace any2point {

// Floats or int32 that a vector may read or write past the end of any list.
constexpr int64_t kSlack = 64;

// Lists of one thread, each with room for the points of the largest cloud plus kSlack.
struct Scratch {
  float* distance;  // of every point, for a scan
  float* near;      // candidates: squared distance ...
  int32_t* place;   // ... and row, or position in the tree
  float* spare;     // for sorting
  int32_t* spare_place;
  float* copy;  // for ties in a tree
  int32_t* copy_place;
  int32_t* groups[2];  // box groups to look into
};

// Where the results of one cloud's queries go, and what is wanted.
struct Wanted {
  int64_t k;
  float limit;
  Choice choice;
  int64_t index_base;  // added to rows
  int64_t* index;      // [S, k]
  float* distance;     // [S, k]
  int64_t* count;      // [S] or null
};

// A cloud with one row per coordinate: [dim][stride], stride a multiple of kSlack. Rows that are no finite
// point have NaN as their first coordinate, so that no comparison holds for their distance.
struct Columns {
  const float* data;
  int64_t stride;
  int64_t dim;    // at least 3: missing coordinates are 0, which changes no bit of a distance
  int64_t valid;  // finite points
};

// Queries `query[first .. last)` of one cloud against all its points.
struct ScanTask {
  Columns points;
  const float* query;  // [S, query_dim]
  int64_t query_dim, first, last;
};

// A tree of boxes over points in k-d order: blocks of kFanout points, groups of kFanout boxes.
constexpr int64_t kFanout = 16;
constexpr int kMaxLevels = 8;

struct Tree {
  int64_t rows;     // of the cloud
  int64_t points;   // finite points
  float* axis[3];   // by position in k-d order; NaN up to the end of the last block
  int32_t* row;     // row in the cloud of each position
  int32_t* lowest;  // positions of the lowest rows, rising with the row
  int64_t lowest_count;
  int levels;  // of boxes: those of level 0 hold blocks, those of level l groups of level l - 1
  int64_t groups[kMaxLevels];  // of boxes; the last level has one
  float* box[kMaxLevels];      // [groups][6][kFanout]: low x, high x, low y, ...; NaN where there is no box
};

struct TreeTask {
  Tree tree;
  Columns points;        // the same, by row: for balls that hold very many; data is null if not needed
  const float* axis[3];  // queries in an order that keeps neighbours together
  const int32_t* row;    // and the row of each
  int64_t first, last;
};

// Points to bring into k-d order, or scratch of the same size for that: every list is kSlack longer than the
// points.
constexpr int kMostAxes = 16;

struct Axes {
  float* axis[kMostAxes];
  int32_t* row;
  int count;  // at least 3
};

// The same kind of tree for any type and up to kMostAxes coordinates.
template <typename T>
struct GeneralTree {
  int64_t points, dim;  // dim: at least 2
  T* block;             // [blocks][dim][kFanout]: points in k-d order; NaN where there is none
  int32_t* row;         // [blocks][kFanout]
  int levels;
  int64_t groups[kMaxLevels];
  T* box[kMaxLevels];  // [groups][dim][2][kFanout]: low and high; NaN where there is no box
};

// Lists of one thread, each with room for all points of the tree and kFanout more.
template <typename T>
struct GeneralScratch {
  T* near;       // candidates: squared distance ...
  int32_t* row;  // ... and row
  T* spare;      // for sorting
  int32_t* spare_row;
  int32_t* blocks[2];
};

A2P_DECLARE_ISA(void scan(const ScanTask& task, const Wanted& wanted, const Scratch& scratch))
// The lowest rows within the limit, before row `end` (or a little behind it); returns how many, at most k.
A2P_DECLARE_ISA(int64_t first_rows(const Columns& points, const float* query, const Wanted& wanted,
                                   const Scratch& scratch, int64_t end))
// Splits `count` points from `begin` on in two branches; returns how many are in front, 0 if they need not be
// split. Branches can be split at the same time.
A2P_DECLARE_ISA(int64_t split(const Axes& points, const Axes& scratch, int64_t begin, int64_t count))
// The same again and again, to the end.
A2P_DECLARE_ISA(void order(const Axes& points, const Axes& scratch, int64_t begin, int64_t count))
// Fills boxes of a tree whose points are in order: groups first .. last - 1 of one level, bottom up.
A2P_DECLARE_ISA(void enclose(const Tree& tree, int level, int64_t first, int64_t last))
A2P_DECLARE_ISA(void search(const TreeTask& task, const Wanted& wanted, const Scratch& scratch))

// Longest list of candidates that sort_few takes.
constexpr int64_t kFew = 160;

template <typename T>
struct GeneralKernels {
  // Fills the boxes of groups first .. last - 1 of one level, bottom up.
  void (*enclose)(const GeneralTree<T>& tree, int level, int64_t first, int64_t last);
  // Lists the blocks within t in blocks[0]; returns how many.
  int64_t (*list_blocks)(const GeneralTree<T>& tree, const T* query, T t, const GeneralScratch<T>& scratch);
  // Packs the points within t of the n listed blocks; returns how many.
  int64_t (*pack_blocks)(const GeneralTree<T>& tree, const T* query, T t, int64_t n,
                         const GeneralScratch<T>& scratch);
  // Sorts candidates by distance; of equal ones the first in the list comes first.
  void (*sort_few)(int64_t m, const GeneralScratch<T>& scratch);
  // Packs the k lowest of `count` rows [dim] that are within t; returns how many there are.
  int64_t (*first_within)(const T* points, int64_t count, int64_t dim, const T* query, T t, int64_t k,
                          const GeneralScratch<T>& scratch);
};

// The argument only tells the type.
A2P_DECLARE_ISA(const GeneralKernels<float>& general_kernels(float))
A2P_DECLARE_ISA(const GeneralKernels<double>& general_kernels(double))

// float64: packs the rows within t of a query, of points [dim][stride], with their distances; returns how
// many. The lists have room for `stride`.
A2P_DECLARE_ISA(int64_t within(const double* points, int64_t stride, int64_t dim, const double* query,
                               double t, double* distance, int64_t* row))

}  // namespace any2point
