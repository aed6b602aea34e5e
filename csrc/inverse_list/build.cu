// Builds inverse lists on CUDA: a stable sort of the entries by row.
//
// For clouds of few rows it is one pass of counting: a warp counts its 1,024 entries in shared memory, a
// block per cloud turns the counts of all warps into first places, and the warps put their entries there, 32
// at a time in order. Otherwise CUB's radix sort does it, on the bits that (cloud, row) needs.
#include "common/grid.cuh"
#include "common/radix_sort.h"
#include "inverse_list/kernel.h"

namespace any2point {
namespace {

constexpr int64_t kChunk = 1024;        // entries of one warp
constexpr int64_t kCountedRows = 2048;  // 8 kB of counters per warp
constexpr int64_t kCountedChunks = 128;
constexpr int kSharedBytes = 48 << 10;

struct Chunks {
  const int64_t* index;  // [B, R]
  int64_t clouds, entries, rows;
  int64_t chunks;    // of each cloud
  uint32_t* counts;  // [B, chunks, N]
  uint32_t* start;   // [B, N + 1]
  uint32_t* order;
};

// What a warp works on: its chunk's entries and its counters.
struct Warp {
  int64_t cloud, begin, end;  // entries of the cloud
  uint32_t* counters;         // in shared memory
  uint32_t* counts;           // in global memory
  int lane;

  __device__ Warp(const Chunks& args, uint32_t* shared) {
    const int warp = threadIdx.x / kWarp;
    const int64_t chunk = int64_t(blockIdx.x) * (blockDim.x / kWarp) + warp;
    cloud = chunk / args.chunks;
    begin = chunk % args.chunks * kChunk;
    end = begin + kChunk < args.entries ? begin + kChunk : args.entries;
    counters = shared + warp * args.rows;
    counts = args.counts + chunk * args.rows;
    lane = threadIdx.x % kWarp;
  }
  // Entry i of the cloud, -1 if it is none or points at no row.
  __device__ int64_t row(const Chunks& args, int64_t i) const {
    if (i >= end) return -1;
    const int64_t row = args.index[cloud * args.entries + i];
    return row >= 0 && row < args.rows ? row : -1;
  }
};

__global__ void count_kernel(Chunks args) {
  extern __shared__ uint32_t shared[];
  const Warp warp(args, shared);
  if (warp.cloud >= args.clouds) return;
  for (int64_t n = warp.lane; n < args.rows; n += kWarp) warp.counters[n] = 0;
  __syncwarp();
  for (int64_t i = warp.begin + warp.lane; i < warp.end; i += kWarp) {
    const int64_t row = warp.row(args, i);
    if (row >= 0) atomicAdd(warp.counters + row, 1u);
  }
  __syncwarp();
  for (int64_t n = warp.lane; n < args.rows; n += kWarp) warp.counts[n] = warp.counters[n];
}

// One block per cloud: counts become the number of entries in earlier chunks, start the rows' beginnings.
__global__ void start_kernel(Chunks args) {
  const int64_t cloud = blockIdx.x;
  uint32_t* counts = args.counts + cloud * args.chunks * args.rows;
  uint32_t* start = args.start + cloud * (args.rows + 1);
  uint32_t base = uint32_t(cloud * args.entries);
  for (int64_t first = 0; first < args.rows; first += kThreads) {
    const int64_t n = first + threadIdx.x;
    uint32_t sum = 0;
    if (n < args.rows) {
#pragma unroll 8
      for (int64_t c = 0; c < args.chunks; c++) {
        const uint32_t count = counts[c * args.rows + n];
        counts[c * args.rows + n] = sum;
        sum += count;
      }
    }
    uint32_t total;
    const uint32_t before = exclusive_sum(sum, &total);
    if (n < args.rows) start[n] = base + before;
    base += total;
  }
  if (threadIdx.x == 0) start[args.rows] = base;
}

__global__ void place_kernel(Chunks args) {
  extern __shared__ uint32_t shared[];
  const Warp warp(args, shared);
  if (warp.cloud >= args.clouds) return;
  const uint32_t* start = args.start + warp.cloud * (args.rows + 1);
  for (int64_t n = warp.lane; n < args.rows; n += kWarp) warp.counters[n] = warp.counts[n] + start[n];
  __syncwarp();
  for (int64_t first = warp.begin; first < warp.end; first += kWarp) {
    const int64_t i = first + warp.lane, row = warp.row(args, i);
    const unsigned same = __match_any_sync(kAll, static_cast<int>(row));
    const int earlier = __popc(same & ((1u << warp.lane) - 1));
    uint32_t place = 0;
    if (row >= 0) place = warp.counters[row];
    __syncwarp();
    if (row >= 0) {
      if (earlier == 0) warp.counters[row] = place + __popc(same);
      args.order[place + earlier] = static_cast<uint32_t>(warp.cloud * args.entries + i);
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

bool counted(const InverseListCuda& list) {
  // With fewer entries than a quarter of the rows the counters would be the larger part.
  return list.rows <= kCountedRows && list.rows <= 4 * list.entries &&
         list.entries <= kCountedChunks * kChunk;
}

}  // namespace

int64_t inverse_list_workspace(const InverseListCuda& list) {
  const int64_t n = list.clouds * list.entries;
  if (n == 0 || list.rows == 0) return 0;
  if (counted(list)) return list.clouds * ((list.entries + kChunk - 1) / kChunk) * list.rows * 4;
  return 2 * round_up(8 * n) + round_up(4 * n) + static_cast<int64_t>(radix_sort_scratch(n));
}

int inverse_list_cuda(const InverseListCuda& list, void* workspace, int64_t bytes, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const int64_t n = list.clouds * list.entries;
  if (list.clouds == 0) return 0;
  if (n == 0 || list.rows == 0) {
    return cudaMemsetAsync(list.start, 0, 4 * list.clouds * (list.rows + 1), stream);
  }
  char* memory = static_cast<char*>(workspace);
  Chunks args{list.index, list.clouds, list.entries, list.rows, 0, nullptr, list.start, list.order};
  if (counted(list)) {
    args.chunks = (list.entries + kChunk - 1) / kChunk;
    args.counts = reinterpret_cast<uint32_t*>(memory);
    const int64_t fitting = kSharedBytes / (4 * list.rows), warps = fitting < 8 ? fitting : 8;
    const int shared = static_cast<int>(4 * warps * list.rows);
    const int threads = static_cast<int>(warps * kWarp);
    const int blocks = static_cast<int>((list.clouds * args.chunks + warps - 1) / warps);
    count_kernel<<<blocks, threads, shared, stream>>>(args);
    start_kernel<<<static_cast<int>(list.clouds), kThreads, 0, stream>>>(args);
    place_kernel<<<blocks, threads, shared, stream>>>(args);
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
