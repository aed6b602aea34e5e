// Lists of the tokens of every cell and voxel, once per batch. inverse_list sorts; here cells are numbered
// without gaps, so that the passes over them walk memory in order.
#include "common/grid.cuh"
#include "guided_aggregate/kernel.h"
#include "inverse_list/kernel.h"

namespace any2point {
namespace {

// One block per cloud and view.
__global__ void __launch_bounds__(kThreads)
    cells_kernel(GuidedLists args, const uint32_t* __restrict__ cell_start,  // [B * V, cells + 1]
                 const uint32_t* __restrict__ cell_order) {                  // [B * V * S]
  const int64_t cloud = blockIdx.x / args.views, view = blockIdx.x % args.views;
  const int64_t rows = args.clouds * args.tokens, base = cloud * args.tokens;
  const uint32_t before = uint32_t(blockIdx.x) * uint32_t(args.tokens);
  cell_start += blockIdx.x * (args.cells + 1);
  int32_t* order = args.order + view * rows;
  int32_t* segment = args.segment + view * rows;
  int32_t* start = args.start + view * (rows + 1);
  uint32_t numbered = 0;
  for (int64_t first = 0; first < args.cells; first += kThreads) {
    const int64_t cell = first + threadIdx.x;
    uint32_t begin = 0, end = 0, total;
    if (cell < args.cells) {
      begin = cell_start[cell];
      end = cell_start[cell + 1];
    }
    const int64_t number = base + numbered + exclusive_sum(end > begin, &total);
    if (end > begin) start[number] = int32_t(base + (begin - before));
    for (uint32_t i = begin; i < end; i++) {
      const int32_t token = int32_t(base + (cell_order[i] - before));
      order[base + (i - before)] = token;
      segment[token] = int32_t(number);
    }
    numbered += total;
  }
  for (int64_t i = numbered + threadIdx.x; i < args.tokens; i += kThreads) {
    start[base + i] = int32_t(base + args.tokens);
  }
  if (threadIdx.x == 0) {
    args.count[view * args.clouds + cloud] = int32_t(numbered);
    if (cloud == args.clouds - 1) start[rows] = int32_t(rows);
  }
}

// One block per range of S voxels.
__global__ void __launch_bounds__(kThreads) voxels_kernel(GuidedLists args) {
  const int64_t rows = args.clouds * args.tokens, base = blockIdx.x * args.tokens;
  const int32_t* start = args.start + args.views * (rows + 1);
  uint32_t held = 0, total;
  for (int64_t first = 0; first < args.tokens; first += kThreads) {
    const int64_t i = base + first + threadIdx.x;
    bool occupied = false;
    if (first + threadIdx.x < args.tokens) {
      const int64_t cluster = args.cluster[i];
      args.segment[args.views * rows + i] = cluster >= 0 && cluster < rows ? int32_t(cluster) : -1;
      occupied = start[i + 1] > start[i];
    }
    exclusive_sum(occupied, &total);
    held += total;
  }
  if (threadIdx.x == 0) args.count[args.views * args.clouds + blockIdx.x] = int32_t(held);
}

int64_t round_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

InverseListCuda cells_of(const GuidedLists& args, void* workspace) {
  const int64_t lists = args.clouds * args.views;
  uint32_t* start = static_cast<uint32_t*>(workspace);
  uint32_t* order = start + round_up(4 * lists * (args.cells + 1)) / 4;
  return {args.cell, lists, args.tokens, args.cells, start, order};
}

InverseListCuda voxels_of(const GuidedLists& args) {
  const int64_t rows = args.clouds * args.tokens;
  return {args.cluster,
          1,
          rows,
          rows,
          reinterpret_cast<uint32_t*>(args.start) + args.views * (rows + 1),
          reinterpret_cast<uint32_t*>(args.order) + args.views * rows};
}

int64_t own_bytes(const GuidedLists& args) {
  const int64_t lists = args.clouds * args.views;
  return round_up(4 * lists * (args.cells + 1)) + round_up(4 * lists * args.tokens);
}

}  // namespace

int64_t guided_lists_workspace(const GuidedLists& args) {
  int64_t inside = inverse_list_workspace(cells_of(args, nullptr));
  if (args.cluster) {
    const int64_t voxels = inverse_list_workspace(voxels_of(args));
    inside = voxels > inside ? voxels : inside;
  }
  return own_bytes(args) + inside;
}

int guided_lists_cuda(const GuidedLists& args, void* workspace, int64_t bytes, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const int64_t rows = args.clouds * args.tokens, own = own_bytes(args);
  if (rows == 0) {
    cudaMemsetAsync(args.count, 0, 4 * args.layers * args.clouds, stream);
    return cudaMemsetAsync(args.start, 0, 4 * args.layers, stream);
  }
  void* inside = static_cast<char*>(workspace) + own;
  if (args.views > 0) {
    const InverseListCuda cells = cells_of(args, workspace);
    if (const int error = inverse_list_cuda(cells, inside, bytes - own, stream)) return error;
    cells_kernel<<<static_cast<int>(args.clouds * args.views), kThreads, 0, stream>>>(args, cells.start,
                                                                                      cells.order);
  }
  if (args.cluster) {
    if (const int error = inverse_list_cuda(voxels_of(args), inside, bytes - own, stream)) return error;
    voxels_kernel<<<static_cast<int>(args.clouds), kThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace any2point
