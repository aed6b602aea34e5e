// Inverse lists of clouds of few rows, in one kernel: a cluster of blocks a cloud (from sm_90 on).
//
// Each block has a run of the cloud's entries, each of its warps a part of that run. (1) A warp takes its
// entries 32 at a time, in order, and counts them by row in shared memory: what it finds there is how many of
// its entries come before in the row. Lanes with the same row would find this in any order; they are ordered
// anew. (2) For each row, sums over the warps, then over the blocks of the cluster, which read each other's,
// and over the rows: where the block's entries of a row begin. (3) The entries are brought into order in
// shared memory, and (4) written, those of a row side by side.
//
// H200, us: 14.9 for 32 x 41,472 entries at 1,024 rows, where the two kernels of build.cu take 34; 8.2 for 32
// x 12,288 entries, 8.7 for 1 x 41,472. Floor: 3.8 for the bytes. Clusters of 6 blocks, as 32 of 8 do not run
// at once (19.7). What limits: latency, with 6 warps to a scheduler. Of the 14.1 cycles that a warp spends on
// an instruction it waits 2.2 for shared memory, 2.1 for memory, 2.1 for the instruction before, 1.9 at
// barriers; issue slots 42 % of their peak, shared memory with L1 41 %, L2 35 %, DRAM 13 %. Tried: clusters
// of 8 whose lanes find equal rows by bits set in a second word of shared memory (23). Next: one more block
// to a processor, with fewer registers.
#include "common/cluster.cuh"
#include "common/grid.cuh"
#include "inverse_list/kernel.h"

namespace any2point {
namespace {

struct Lists {
  const int64_t* index;  // [B, R]
  int64_t entries, rows;
  int parts, each;
  uint32_t* start;  // [B, N + 1]
  uint32_t* order;  // [B * R]
};

// Sum over the threads before this one of two values at once; `total` over all threads.
__device__ __forceinline__ uint2 sums_before(uint2 value, uint2* sums, uint2* total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint2 sum = value;
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const uint32_t x = __shfl_up_sync(kAll, sum.x, d), y = __shfl_up_sync(kAll, sum.y, d);
    if (lane >= d) sum.x += x, sum.y += y;
  }
  if (lane == kWarp - 1) sums[warp] = sum;
  __syncthreads();
  uint2 before{0, 0};
  *total = {0, 0};
#pragma unroll
  for (int w = 0; w < kClusterWarps; w++) {
    if (w == warp) before = *total;
    total->x += sums[w].x;
    total->y += sums[w].y;
  }
  return {before.x + sum.x - value.x, before.y + sum.y - value.y};
}

// kRows: at most so many rows. Grid: `parts` blocks a cloud, one cluster.
template <int kRows>
__global__ void __launch_bounds__(kClusterThreads, 2) cluster_list_kernel(Lists args) {
  constexpr int kEach = kClusterEach, kPairs = kRows / 2 / kClusterThreads;
  constexpr int kOffsetBits = 13;  // of an entry in the block
  static_assert(1 << kOffsetBits == kEach * kClusterThreads, "entries of a block");
  static_assert(kRows * kClusterWarps * 2 >= kEach * kClusterThreads * 4, "they take the counters' place");
  extern __shared__ uint4 dynamic[];
  uint16_t* counters = reinterpret_cast<uint16_t*>(dynamic);                         // [kClusterWarps, kRows]
  uint32_t* totals = reinterpret_cast<uint32_t*>(counters + kClusterWarps * kRows);  // [kRows / 2] in pairs
  uint32_t* shift = totals + kRows / 2;  // [kRows] from the place in the block to that in `order`
  uint2* sums = reinterpret_cast<uint2*>(shift + kRows);  // [kClusterWarps]

  const int rows = static_cast<int>(args.rows), parts = args.parts, each = args.each;
  const int64_t cloud = blockIdx.x / parts;
  const int part = static_cast<int>(blockIdx.x) % parts;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int in_block = warp * each * kWarp + lane;  // entry e of this thread is number in_block + 32 e
  const int64_t first = int64_t(part) * each * kClusterThreads + in_block;
  const int64_t* index = args.index + cloud * args.entries;
  int row[kEach];  // -1: none
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    const int64_t i = first + e * kWarp, value = e < each && i < args.entries ? index[i] : -1;
    row[e] = value >= 0 && value < args.rows ? static_cast<int>(value) : -1;
  }
  for (int i = threadIdx.x; i < kClusterWarps * kRows * 2 / 16; i += kClusterThreads) {
    dynamic[i] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();

  uint16_t* counter = counters + warp * kRows;
  uint16_t earlier[kEach];  // entries of the warp in the same row
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    if (e >= each) break;
    const bool real = row[e] >= 0;
    const int half = row[e] % 2 * 16;
    uint32_t before = 0, after = 1;
    if (real) {
      uint32_t* pair = reinterpret_cast<uint32_t*>(counter) + row[e] / 2;
      before = atomicAdd(pair, 1u << half) >> half & 0xffff;
    }
    __syncwarp();
    if (real) after = counter[row[e]];
    unsigned unordered = __ballot_sync(kAll, after - before != 1);
    while (unordered) {
      const int other = __shfl_sync(kAll, row[e], __ffs(unordered) - 1);
      const unsigned same = __ballot_sync(kAll, row[e] == other);
      if (row[e] == other) before = after - __popc(same >> lane);
      unordered &= ~same;
    }
    earlier[e] = static_cast<uint16_t>(before);
    __syncwarp();
  }
  __syncthreads();

  // Over the warps: a thread has kPairs pairs of rows, two 16-bit counters in a word.
  uint32_t own[kPairs];
#pragma unroll
  for (int j = 0; j < kPairs; j++) {
    const int pair = threadIdx.x * kPairs + j;
    own[j] = 0;
#pragma unroll
    for (int w = 0; w < kClusterWarps; w++) {
      own[j] += reinterpret_cast<const uint32_t*>(counters + w * kRows)[pair];
    }
    totals[pair] = own[j];
  }
  cluster_sync();

  // Over the blocks, and over the rows.
  uint2 total[kPairs], before[kPairs];
  uint2 sum{0, 0};  // of `total` and of `own`
#pragma unroll
  for (int j = 0; j < kPairs; j++) {
    const int pair = threadIdx.x * kPairs + j;
    total[j] = before[j] = {0, 0};
    uint32_t of_part[kClusterListParts];
#pragma unroll
    for (int p = 0; p < kClusterListParts; p++) {
      of_part[p] = p < parts ? load_peer(peer_address(&totals[pair], p)) : 0;
    }
#pragma unroll
    for (int p = 0; p < kClusterListParts; p++) {
      const uint2 count{of_part[p] & 0xffffu, of_part[p] >> 16};
      total[j].x += count.x;
      total[j].y += count.y;
      before[j].x += p < part ? count.x : 0;
      before[j].y += p < part ? count.y : 0;
    }
    sum.x += total[j].x + total[j].y;
    sum.y += (own[j] & 0xffffu) + (own[j] >> 16);
  }
  cluster_arrive();
  uint2 of_all;
  uint2 at = sums_before(sum, sums, &of_all);
  at.x += static_cast<uint32_t>(cloud * args.entries);
  uint32_t* start = args.start + cloud * (args.rows + 1);
#pragma unroll
  for (int j = 0; j < kPairs; j++) {
    const int pair = threadIdx.x * kPairs + j, row = 2 * pair;
    const uint32_t second = at.x + total[j].x, second_local = at.y + (own[j] & 0xffffu);
    if (part == 0 && row < rows) start[row] = at.x;
    if (part == 0 && row + 1 < rows) start[row + 1] = second;
    shift[row] = at.x + before[j].x - at.y;
    shift[row + 1] = second + before[j].y - second_local;
    uint32_t place = second_local << 16 | at.y;  // of the warps' first entries, in the block
#pragma unroll
    for (int w = 0; w < kClusterWarps; w++) {
      uint32_t* here = reinterpret_cast<uint32_t*>(counters + w * kRows) + pair;
      const uint32_t of_warp = *here;
      *here = place;
      place += of_warp;
    }
    at = {second + total[j].y, second_local + (own[j] >> 16)};
  }
  if (part == 0 && threadIdx.x == 0) start[rows] = static_cast<uint32_t>(cloud * args.entries) + of_all.x;
  __syncthreads();

#pragma unroll
  for (int e = 0; e < kEach; e++) {
    if (e >= each) break;
    if (row[e] >= 0) earlier[e] = static_cast<uint16_t>(earlier[e] + counter[row[e]]);
  }
  __syncthreads();
  uint32_t* in_order = reinterpret_cast<uint32_t*>(dynamic);
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    if (e >= each) break;
    if (row[e] >= 0) in_order[earlier[e]] = row[e] << kOffsetBits | (in_block + e * kWarp);
  }
  __syncthreads();
  const uint32_t base = static_cast<uint32_t>(cloud * args.entries + part * each * kClusterThreads);
  for (uint32_t place = threadIdx.x; place < of_all.y; place += kClusterThreads) {
    const uint32_t entry = in_order[place];
    args.order[shift[entry >> kOffsetBits] + place] = base + (entry & ((1 << kOffsetBits) - 1));
  }
  cluster_wait();  // no block leaves while another reads its totals
}

template <int kRows>
int launch(const Lists& args, const ListPlan& plan, int64_t clouds, cudaStream_t stream) {
  const auto kernel = cluster_list_kernel<kRows>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(plan.shared));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = plan.parts;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clouds * plan.parts));
  config.blockDim = dim3(kClusterThreads);
  config.dynamicSmemBytes = plan.shared;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace

int inverse_list_cluster(const InverseListCuda& list, const ListPlan& plan, void* stream_) {
  const Lists args{list.index, list.entries, list.rows, plan.parts, plan.each, list.start, list.order};
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  return plan.rows == 1024 ? launch<1024>(args, plan, list.clouds, stream)
                           : launch<2048>(args, plan, list.clouds, stream);
}

}  // namespace any2point
