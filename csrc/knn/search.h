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
  const float* axis[3];  // queries in an order that keeps neighbours together
  const int32_t* row;    // and the row of each
  int64_t first, last;
};

// Scratch of `order`: four lists as long as the cloud, plus kSlack.
struct OrderScratch {
  float* axis[3];
  int32_t* row;
};

A2P_DECLARE_ISA(void scan(const ScanTask& task, const Wanted& wanted, const Scratch& scratch))
// Brings points into k-d order. Of coincident points that make up a whole branch only the first `keep` stay.
A2P_DECLARE_ISA(void order(float* const axis[3], int32_t* row, int64_t count, int64_t keep,
                           const OrderScratch& scratch))
// Fills the boxes of a tree whose points are in order.
A2P_DECLARE_ISA(void enclose(const Tree& tree))
A2P_DECLARE_ISA(void search(const TreeTask& task, const Wanted& wanted, const Scratch& scratch))
// float64: packs the rows within t of a query, of points [dim][stride], with their distances; returns how
// many. The lists have room for `stride`.
A2P_DECLARE_ISA(int64_t within(const double* points, int64_t stride, int64_t dim, const double* query,
                               double t, double* distance, int64_t* row))

}  // namespace any2point
