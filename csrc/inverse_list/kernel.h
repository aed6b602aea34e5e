// The inverse of an index: for every row, in ascending order, the entries that point at it (a CSR list). With
// it the transpose of a gather is a gather too: each row adds up its own entries, in a fixed order and
// without atomics. Torch-free; shared by group, interpolate and segment_pool.
//
// Padded by clouds: index [B, R] with values in [0, N), everything else is left out. start is [B, N + 1]: the
// entries of row n of cloud b are order[start[b][n]] ... order[start[b][n + 1] - 1], numbered b * R + r. A
// prebuilt list of one cloud may hold fewer rows at its end than entries.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "inverse_list/plan.h"

namespace any2point {

// One cloud of the list. `base` is b * R. Returns the position of the first value outside [-1, N), or -1.
template <typename List>
int64_t inverse_list_cpu(const int64_t* index, int64_t entries, int64_t rows, int64_t base, List* start,
                         List* order);

// The same on CUDA, all clouds at once: asynchronous, without reading anything back; values out of range are
// left out. Functions on CUDA return a cudaError_t.
constexpr int64_t kCudaListLimit = 0xffffe000;  // entries; the rest of 2^32 is room for sums of places
struct InverseListCuda {
  const int64_t* index;  // [B, R]
  int64_t clouds, entries, rows;
  uint32_t* start;  // [B, N + 1]
  uint32_t* order;  // [B * R]
};
int64_t inverse_list_workspace(const InverseListCuda& list);
int inverse_list_cuda(const InverseListCuda& list, void* workspace, int64_t bytes, void* stream);
// For a plan with that kernel.
int inverse_list_cluster(const InverseListCuda& list, const ListPlan& plan, void* stream);

enum class Reduce { sum, mean, max };

// out[row] = reduce over the entries e of `row` of weight[e] * source[e / per_source], with fixed order.
struct GatherReduce {
  Dtype dtype;
  Reduce reduce;
  const void* source;  // [entries / per_source, channels]
  const void* weight;  // [entries] of the accumulator's type, or null: ones
  int64_t channels;
  int64_t per_source;  // neighbouring entries that share a row of the source
  int64_t sources;     // rows of the source; a prebuilt list that leads elsewhere is clamped to them
  int64_t rows;        // N
  bool wide;           // the list is int64, else uint32
  const void* start;   // [B, N + 1]
  const void* order;   // [entries]
  int64_t entries;
  void* out;        // [B, N, channels]
  int64_t* argmax;  // max: [B, N, channels], the lowest entry that attains it; -1 in empty rows
  int64_t* count;   // mean: [B, N], entries of each row; or null
};

// Items [begin, end) of the B * N * column_tiles(channels) items of work.
void gather_reduce_cpu(const GatherReduce& args, int64_t begin, int64_t end);
// Channels that are accumulated at once: 1 kB of float32, which stays in the first-level cache.
constexpr int64_t kColumnTile = 256;
static inline int64_t column_tiles(int64_t channels) { return (channels + kColumnTile - 1) / kColumnTile; }

// All `rows` = B * N rows; the list is uint32 and valid.
int64_t gather_reduce_workspace(const GatherReduce& args, int64_t rows);
int gather_reduce_cuda(const GatherReduce& args, int64_t rows, void* workspace, void* stream);
// A prebuilt list to uint32, clamped to 0..bound.
int narrow_list_cuda(const int64_t* from, int64_t n, int64_t bound, uint32_t* to, void* stream);

}  // namespace any2point
