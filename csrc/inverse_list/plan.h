// Which kernels build inverse lists on CUDA: plain arithmetic, so that it can be tested for GPUs that are not
// there.
#pragma once

#include <stdint.h>

namespace any2point {

// By sorting the entries, for any number of rows; by counting, a block for each 4,096 entries of a cloud; by
// counting in one cluster of blocks a cloud (from sm_90 on).
struct ListPlan {
  enum Kernel { sorted, counted, cluster } kernel;
  int parts;       // cluster: blocks a cloud
  int each;        // cluster: entries of a thread
  int rows;        // cluster: counters of a warp, 1,024 or 2,048
  int64_t shared;  // cluster: bytes of shared memory of a block
};

constexpr int64_t kCountedRows = 2048, kCountedEntries = 1 << 17;
constexpr int kClusterWarps = 16, kClusterThreads = kClusterWarps * 32;
constexpr int kClusterEach = 16;      // entries of a thread at most
constexpr int kClusterListParts = 8;  // blocks of a cluster at most

// `capability`: 10 * major + minor; `shared`: bytes that a block can have.
inline ListPlan plan_list(int capability, int64_t processors, int64_t shared, int64_t clouds, int64_t entries,
                          int64_t rows) {
  ListPlan plan{ListPlan::sorted, 0, 0, 0, 0};
  // With fewer entries than a quarter of the rows the counters would be the larger part.
  if (rows > kCountedRows || rows > 4 * entries || entries > kCountedEntries) return plan;
  plan.kernel = ListPlan::counted;
  if (capability < 90) return plan;
  ListPlan cluster{ListPlan::cluster, 0, 0, rows <= 1024 ? 1024 : 2048, 0};
  // 2 bytes for each warp and 6 more for each row; sums.
  cluster.shared = int64_t(cluster.rows) * (2 * kClusterWarps + 6) + 8 * kClusterWarps;
  if (cluster.shared > shared) return plan;
  // A cluster lies within one of the groups of 16 to 18 processors that a GPU is made of. Measured on an
  // H200, in 0.1 us: blocks with a processor each, and two of them on one.
  const int64_t groups = processors < 18 ? 1 : processors / 18;
  int64_t least = 0;
  for (int parts = 1; parts <= kClusterListParts; parts++) {
    const int64_t threads = int64_t(parts) * kClusterThreads, each = (entries + threads - 1) / threads;
    const int64_t at_once = groups * (32 / parts), waves = (clouds + at_once - 1) / at_once;
    const int64_t cost = clouds <= groups * (16 / parts) ? 49 + 4 * each : waves * (78 + 5 * each);
    if (each > kClusterEach || (least > 0 && cost >= least)) continue;
    least = cost;
    cluster.parts = parts;
    cluster.each = static_cast<int>(each);
  }
  return cluster.parts > 0 ? cluster : plan;
}

}  // namespace any2point
