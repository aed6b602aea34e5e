// Builds inverse lists on CUDA: a stable sort of the entries by row.
//
// For clouds of few rows it is one pass of counting: in one cluster a cloud (cluster.cu), or in two kernels.
// Of these each block has 4,096 entries of a cloud and writes how many point at each row. Then, from these
// counts, each block knows where its entries of a row begin; its warps count theirs again in shared memory
// and put them there, 32 at a time in order. Otherwise CUB's radix sort does it, on the bits that (cloud,
// row) needs.
#include "common/grid.cuh"
#include "common/radix_sort.h"
#include "inverse_list/kernel.h"

namespace any2point {
namespace {

constexpr int kEach = 16;                     // entries of a thread
constexpr int64_t kChunk = kEach * kThreads;  // of a block
constexpr int kWarps = kThreads / kWarp;

struct Chunks {
  const int64_t* index;  // [B, R]
  int64_t clouds, entries, rows;
  int64_t chunks;    // of each cloud
  uint32_t* counts;  // [B, chunks, N]
  uint32_t* start;   // [B, N + 1]
  uint32_t* order;
};

// A block's part of a cloud, and the rows that its entries point at: entry e of this thread is number
// first + 32 e of the cloud.
struct Part {
  int64_t cloud, chunk, first;
  int row[kEach];  // -1: none

  __device__ explicit Part(const Chunks& args) {
    cloud = blockIdx.x / args.chunks;
    chunk = blockIdx.x - cloud * args.chunks;
    first = chunk * kChunk + threadIdx.x / kWarp * (kEach * kWarp) + threadIdx.x % kWarp;
#pragma unroll
    for (int e = 0; e < kEach; e++) {
      const int64_t i = first + e * kWarp;
      const int64_t value = i < args.entries ? args.index[cloud * args.entries + i] : -1;
      row[e] = value >= 0 && value < args.rows ? int(value) : -1;
    }
  }
};

// Lanes with the same value, which has so many bits. (__match_any_sync takes a step for each different
// value.)
__device__ __forceinline__ unsigned equal_lanes(int value, int bits) {
  unsigned same = kAll;
  for (int bit = 0; bit < bits; bit++) {
    const bool one = value >> bit & 1;
    const unsigned lanes = __ballot_sync(kAll, one);
    same &= one ? lanes : ~lanes;
  }
  return same;
}

__global__ __launch_bounds__(kThreads) void count_kernel(Chunks args) {
  __shared__ uint32_t counters[kCountedRows];
  const Part part(args);
  for (int64_t n = threadIdx.x; n < args.rows; n += kThreads) counters[n] = 0;
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    if (part.row[e] >= 0) atomicAdd(counters + part.row[e], 1u);
  }
  __syncthreads();
  uint32_t* counts = args.counts + int64_t(blockIdx.x) * args.rows;
  for (int64_t n = threadIdx.x; n < args.rows; n += kThreads) counts[n] = counters[n];
}

__global__ __launch_bounds__(kThreads) void place_kernel(Chunks args) {
  constexpr int kRowsEach = kCountedRows / kThreads;
  __shared__ uint32_t first_place[kCountedRows];                  // of the block's entries of a row
  __shared__ alignas(4) uint16_t counters[kWarps][kCountedRows];  // of a warp's
  const Part part(args);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, rows = int(args.rows);
  uint32_t* pairs = reinterpret_cast<uint32_t*>(counters[warp]);
  for (int i = lane; i < (rows + 1) / 2; i += kWarp) pairs[i] = 0;
  __syncwarp();
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    const int row = part.row[e];
    if (row >= 0) atomicAdd(pairs + row / 2, row % 2 ? 0x10000u : 1u);
  }

  uint32_t total[kRowsEach] = {}, before[kRowsEach] = {};  // of row j * kThreads + thread, over the chunks
  const uint32_t* counts = args.counts + part.cloud * args.chunks * rows;
#pragma unroll 2
  for (int c = 0; c < args.chunks; c++) {
#pragma unroll
    for (int j = 0; j < kRowsEach; j++) {
      const int n = j * kThreads + threadIdx.x;
      const uint32_t count = n < rows ? counts[int64_t(c) * rows + n] : 0;
      total[j] += count;
      before[j] += c < part.chunk ? count : 0;
    }
  }
  uint32_t base = uint32_t(part.cloud * args.entries);
  uint32_t* start = args.start + part.cloud * (rows + 1);
#pragma unroll
  for (int j = 0; j < kRowsEach; j++) {
    const int n = j * kThreads + threadIdx.x;
    if (j * kThreads >= rows) break;
    uint32_t sum;
    const uint32_t begin = base + exclusive_sum(total[j], &sum);
    base += sum;
    if (n >= rows) continue;
    if (part.chunk == 0) start[n] = begin;
    first_place[n] = begin + before[j];
    uint32_t of_warps = 0;
    for (int w = 0; w < kWarps; w++) {
      const uint32_t count = counters[w][n];
      counters[w][n] = uint16_t(of_warps);
      of_warps += count;
    }
  }
  if (part.chunk == 0 && threadIdx.x == 0) start[rows] = base;
  __syncthreads();

  const int bits = 32 - __clz(rows);
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    const int row = part.row[e];
    const unsigned same = equal_lanes(row < 0 ? rows : row, bits);
    const int earlier = __popc(same & ((1u << lane) - 1));
    const uint32_t place = row >= 0 ? counters[warp][row] : 0;
    __syncwarp();
    if (row >= 0) {
      if (earlier == 0) counters[warp][row] = uint16_t(place + __popc(same));
      const int64_t entry = part.cloud * args.entries + part.first + e * kWarp;
      args.order[first_place[row] + place + earlier] = uint32_t(entry);
    }
    __syncwarp();
  }
}

__global__ void key_kernel(Chunks args, uint64_t* keys, uint32_t* values) {
  const int64_t total = args.clouds * args.entries;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t row = args.index[i];
    const bool valid = row >= 0 && row < args.rows;
    const uint32_t cloud = args.clouds == 1 ? 0 : uint32_t(i) / uint32_t(args.entries);
    keys[i] = valid ? uint64_t(cloud) * args.rows + row : uint64_t(args.clouds) * args.rows;
    values[i] = uint32_t(i);
  }
}

// start[b][n] is the number of sorted keys below b * N + n.
__global__ void search_kernel(Chunks args, const uint64_t* keys) {
  const int64_t total = args.clouds * args.entries;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < args.clouds * (args.rows + 1);
       i += int64_t(gridDim.x) * kThreads) {
    const uint64_t key = i - i / (args.rows + 1);
    int64_t lo = 0, hi = total;
    while (lo < hi) {
      const int64_t middle = (lo + hi) / 2;
      if (keys[middle] < key) {
        lo = middle + 1;
      } else {
        hi = middle;
      }
    }
    args.start[i] = uint32_t(lo);
  }
}

int64_t round_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

ListPlan plan_of(const InverseListCuda& list) {
  int device = 0, major = 0, minor = 0, processors = 0, shared = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return plan_list(major * 10 + minor, processors, shared, list.clouds, list.entries, list.rows);
}

}  // namespace

int64_t inverse_list_workspace(const InverseListCuda& list) {
  const int64_t n = list.clouds * list.entries;
  if (n == 0 || list.rows == 0) return 0;
  const ListPlan plan = plan_of(list);
  if (plan.kernel == ListPlan::cluster) return 0;
  if (plan.kernel == ListPlan::counted)
    return list.clouds * ((list.entries + kChunk - 1) / kChunk) * list.rows * 4;
  return 2 * round_up(8 * n) + round_up(4 * n) + static_cast<int64_t>(radix_sort_scratch(n));
}

int inverse_list_cuda(const InverseListCuda& list, void* workspace, int64_t bytes, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const int64_t n = list.clouds * list.entries;
  if (list.clouds == 0) return 0;
  if (n == 0 || list.rows == 0) {
    return cudaMemsetAsync(list.start, 0, 4 * list.clouds * (list.rows + 1), stream);
  }
  const ListPlan plan = plan_of(list);
  if (plan.kernel == ListPlan::cluster) return inverse_list_cluster(list, plan, stream);
  char* memory = static_cast<char*>(workspace);
  Chunks args{list.index, list.clouds, list.entries, list.rows, 0, nullptr, list.start, list.order};
  if (plan.kernel == ListPlan::counted) {
    args.chunks = (list.entries + kChunk - 1) / kChunk;
    args.counts = reinterpret_cast<uint32_t*>(memory);
    const auto blocks = static_cast<unsigned>(list.clouds * args.chunks);
    count_kernel<<<blocks, kThreads, 0, stream>>>(args);
    place_kernel<<<blocks, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
  }
  SortBuffers buffers;
  buffers.keys[0] = reinterpret_cast<uint64_t*>(memory);
  buffers.keys[1] = reinterpret_cast<uint64_t*>(memory + round_up(8 * n));
  buffers.values[0] = list.order;
  buffers.values[1] = reinterpret_cast<uint32_t*>(memory + 2 * round_up(8 * n));
  const int64_t used = 2 * round_up(8 * n) + round_up(4 * n);
  int bits = 0;
  while (uint64_t(list.clouds) * list.rows >> bits) bits++;
  key_kernel<<<grid_for(n), kThreads, 0, stream>>>(args, buffers.keys[0], buffers.values[0]);
  if (const int error = radix_sort(&buffers, n, 0, bits, memory + used, bytes - used, stream)) return error;
  if (buffers.values[0] != list.order) {
    cudaMemcpyAsync(list.order, buffers.values[0], 4 * n, cudaMemcpyDeviceToDevice, stream);
  }
  search_kernel<<<grid_for(list.clouds * (list.rows + 1)), kThreads, 0, stream>>>(args, buffers.keys[0]);
  return cudaGetLastError();
}

}  // namespace any2point
