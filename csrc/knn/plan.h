// Which kernels serve a neighbour search on CUDA: plain arithmetic, so that it can be tested for GPUs that
// are not there.
#pragma once

#include <stdint.h>

#include "knn/kernel.h"

namespace any2point {

// What the choice depends on of a search.
struct SearchSizes {
  int64_t clouds, dim, k;
  int64_t points, queries;  // of the largest cloud; packed: of all clouds, as the host does not know more
  bool packed;
  bool same;  // the points are the queries, row for row
  bool wide;  // float64

  int64_t all_points() const { return packed ? points : clouds * points; }
  int64_t all_queries() const { return packed ? queries : clouds * queries; }
};

template <typename T>
SearchSizes sizes_of(const Neighbours<T>& run) {
  const Rows &rows = run.rows, &queries = run.query_rows;
  const bool same = run.query == run.points && queries.total == rows.total && queries.padded == rows.padded &&
                    queries.lengths == rows.lengths && queries.offsets == rows.offsets;
  return {rows.clouds,
          run.dim,
          run.k,
          rows.packed() ? rows.total : rows.padded,
          rows.packed() ? queries.total : queries.padded,
          rows.packed(),
          same,
          sizeof(T) == 8};
}

// The sort of a tree where a block can take a cloud (tree_sort.cu): kSortThreads threads with so many rows
// each, words in shared memory, 16-bit counters of 256 digits for each warp and a few other variables.
constexpr int kSortThreads = 1024, kSortDigits = 256;
constexpr int kSortCounters = kSortThreads / 32 + 1;  // of a digit: odd, so that digits lie in other banks
constexpr int kSortEach[] = {4, 6, 8, 10, 12, 16};

inline int64_t sort_dynamic(int each) {
  return int64_t(4) * each * kSortThreads + int64_t(2) * kSortDigits * kSortCounters;
}
inline int64_t sort_shared(int each) { return sort_dynamic(each) + 4096; }

// Rows of a thread if each cloud, its queries included, is to be sorted by a block that can have `shared`
// bytes of shared memory; 0: they do not fit.
inline int sort_each(const SearchSizes& sizes, int64_t shared) {
  const int64_t rows = sizes.points + (sizes.same ? 0 : sizes.queries);
  for (const int each : kSortEach) {
    if (rows <= int64_t(each) * kSortThreads) return sort_shared(each) <= shared ? each : 0;
  }
  return 0;
}

struct SearchPlan {
  enum Kernel { general, scan, tree } kernel;  // of general.cu, cuda.cu, tree_search.cu
  int each;        // tree: rows of a thread if a block sorts each cloud; 0: one sort for all
  int64_t shared;  // bytes of shared memory of that block
};

constexpr int64_t kSmallCloud = 2048;  // points that a warp holds in registers

// A tree takes 30 to 80 us to build. Scans take that for more points than a warp can hold, however few the
// queries are; for fewer points only many queries of few neighbours pay for it.
inline bool wants_tree(const SearchSizes& sizes) {
  if (sizes.wide || sizes.dim > 3 || sizes.k == 0 || sizes.k > kTreeMost || sizes.clouds == 0) return false;
  const int64_t all = sizes.all_points(), queries = sizes.all_queries();
  if (queries == 0 || all >= 1 << 30 || queries >= 1 << 30) return false;
  const int64_t points = all / sizes.clouds;
  return points > kSmallCloud || (points > 1024 && sizes.k <= 20 && double(queries) * double(points) >= 1e8);
}

// `shared`: bytes of shared memory that a block can have.
inline SearchPlan plan_search(const SearchSizes& sizes, int64_t shared) {
  SearchPlan plan{SearchPlan::general, 0, 0};
  if (wants_tree(sizes)) {
    plan.kernel = SearchPlan::tree;
    plan.each = sort_each(sizes, shared);
    plan.shared = plan.each > 0 ? sort_shared(plan.each) : 0;
  } else if (!sizes.wide && sizes.dim <= 3 && sizes.k <= 192 && sizes.k > 0 && sizes.points < 1 << 30 &&
             sizes.clouds > 0) {
    plan.kernel = SearchPlan::scan;
  }
  return plan;
}

}  // namespace any2point
