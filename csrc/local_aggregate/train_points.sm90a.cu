// Gradients of rows, [M, channels] of 16 bits, added up over the rows of each point, in a fixed order and
// without atomics: as neighbour by an inverse list of the neighbours, as centre first over a group's rows and
// then by an inverse list of the centres. Entries that come through a maximum are added up in shared memory,
// where a thread has a channel.
#include "local_aggregate/hopper_rows.cuh"
#include "local_aggregate/hopper_train.h"

namespace any2point {
namespace {

constexpr int kThreads = 256;
constexpr int kSparse = 32;          // channels of a block
constexpr int kSparsePoints = 1024;  // and points, at most

__global__ void resolve_kernel(const int64_t* center, const int64_t* neighbor, int64_t rows,
                               int64_t neighbors, int64_t* to) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row < rows) to[row] = neighbor[row] < 0 ? center[row / neighbors] : neighbor[row];
}

// Eight channels of 16 bits, added up.
template <typename T>
struct Sum {
  float v[8] = {};
  __device__ __forceinline__ void add(const uint4& w) {
    const uint32_t pairs[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const float2 two = Two<T>::floats(pairs[q]);
      v[2 * q] += two.x;
      v[2 * q + 1] += two.y;
    }
  }
  __device__ __forceinline__ void store(float* to) const {
    reinterpret_cast<float4*>(to)[0] = {v[0], v[1], v[2], v[3]};
    reinterpret_cast<float4*>(to)[1] = {v[4], v[5], v[6], v[7]};
  }
};

// A thread has eight channels of a group or of a point; blocks of a cloud come after each other, so that what
// both read stays in the cache.
template <typename T>
__global__ void __launch_bounds__(kThreads) rows_kernel(const HopperPoints args, int64_t blocks) {
  const int64_t cloud = blockIdx.x / blocks;
  const int own = static_cast<int>(args.hidden / 8);
  const int half = args.dense ? static_cast<int>(args.width / 16) : 0, chunks = own + half;
  int64_t item = (blockIdx.x % blocks) * kThreads + threadIdx.x;
  const int chunk = static_cast<int>(item % chunks);
  item /= chunks;
  const bool by_center = item < args.centers;
  const uint4* from;  // of row 0
  int64_t stride;     // in 16 bytes
  if (chunk < own) {
    from = static_cast<const uint4*>(args.dy1) + chunk;
    stride = own;
  } else {
    from = static_cast<const uint4*>(args.dense) + (chunk - own) + (by_center ? half : 0);
    stride = 2 * half;
  }
  Sum<T> sum;
  if (by_center) {
    const int64_t group = cloud * args.centers + item;
    const uint4* row = from + group * args.neighbors * stride;
#pragma unroll 8
    for (int64_t k = 0; k < args.neighbors; k++) sum.add(__ldg(row + k * stride));
    sum.store(args.groups + (group * chunks + chunk) * 8);
  } else if (item - args.centers < args.points) {
    const int64_t point = item - args.centers, at = cloud * args.points + point;
    const uint32_t* start = args.near + cloud * (args.points + 1) + point;
    const uint32_t end = start[1];
#pragma unroll 4
    for (uint32_t i = start[0]; i < end; i++) sum.add(__ldg(from + int64_t{args.pairs[i]} * stride));
    sum.store(chunk < own ? args.by_neighbor + (at * own + chunk) * 8
                          : args.direct + (at * half + chunk - own) * 8);
  }
}

// Adds the sums of groups up over those of a centre.
__global__ void __launch_bounds__(kThreads) centers_kernel(const HopperPoints args, int columns) {
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x, at = item / columns;
  if (at >= args.clouds * args.points) return;
  const int column = static_cast<int>(item % columns), hidden = static_cast<int>(args.hidden);
  const uint32_t* start = args.middle + at + at / args.points;
  const uint32_t end = start[1];
  float sum = 0;
  for (uint32_t i = start[0]; i < end; i++) sum += args.groups[int64_t{args.owned[i]} * columns + column];
  if (column < hidden) {
    args.by_center[at * hidden + column] = sum;
  } else {
    args.direct[at * (columns - hidden) + column - hidden] += sum;
  }
}

// direct = the entries of the points [first, first + kSparsePoints) of a cloud. A thread has a channel of the
// features, which gets entries of two channels of x.
__global__ void __launch_bounds__(kSparse) entries_kernel(const HopperPoints args, int64_t each) {
  extern __shared__ float room[];  // [points, kSparse]
  const int64_t half = args.width / 2, channel = int64_t{blockIdx.x} * kSparse + threadIdx.x;
  const int64_t cloud = blockIdx.y, first = blockIdx.z * each, points = min(each, args.points - first);
  for (int64_t p = 0; p < points; p++) room[p * kSparse + threadIdx.x] = 0;
  const float* grad = args.grad + cloud * args.centers * args.width + channel;
  const int32_t* argmax = args.argmax + cloud * args.centers * args.width + channel;
  const int64_t* center = args.center + cloud * args.centers;
  const int64_t* neighbor = args.neighbor + cloud * args.centers * args.neighbors;
  constexpr int kAhead = 8;
  if (channel >= half) return;
  for (int64_t group = 0; group < args.centers; group += kAhead) {
    float value[kAhead][2];
    int64_t point[kAhead][2];
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int64_t g = min(group + i, args.centers - 1);
      const bool used = group + i < args.centers;
      value[i][0] = used ? grad[g * args.width] : 0;
      value[i][1] = used ? grad[g * args.width + half] : 0;
      point[i][0] = neighbor[g * args.neighbors + argmax[g * args.width]] - first;
      point[i][1] = center[g] - first;
    }
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        if (point[i][j] >= 0 && point[i][j] < points) {
          room[point[i][j] * kSparse + threadIdx.x] += value[i][j];
        }
      }
    }
  }
  float* to = args.direct + (cloud * args.points + first) * half + channel;
  for (int64_t p = 0; p < points; p++) to[p * half] = room[p * kSparse + threadIdx.x];
}

unsigned blocks_of(int64_t threads) { return static_cast<unsigned>(divided(threads, kThreads)); }

}  // namespace

int hopper_resolve(const int64_t* center, const int64_t* neighbor, int64_t groups, int64_t neighbors,
                   int64_t* to, void* stream) {
  if (groups == 0) return 0;
  resolve_kernel<<<blocks_of(groups * neighbors), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      center, neighbor, groups * neighbors, neighbors, to);
  return cudaGetLastError();
}

int hopper_points(const HopperPoints& args, void* stream_) {
  if (args.clouds * args.points == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const int64_t columns = args.hidden + (args.dense ? args.width / 2 : 0);
  const int64_t blocks = blocks_of((args.centers + args.points) * (columns / 8));
  const unsigned grid = static_cast<unsigned>(blocks * args.clouds);
  if (args.bfloat16) {
    rows_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(args, blocks);
  } else {
    rows_kernel<__half><<<grid, kThreads, 0, stream>>>(args, blocks);
  }
  centers_kernel<<<blocks_of(args.clouds * args.points * columns), kThreads, 0, stream>>>(
      args, static_cast<int>(columns));
  if (args.dense) return cudaGetLastError();
  const int64_t each = std::min<int64_t>(kSparsePoints, args.points);
  const int bytes = static_cast<int>(each * kSparse * 4);
  const cudaError_t error =
      cudaFuncSetAttribute(entries_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const dim3 parts(static_cast<unsigned>(divided(args.width / 2, kSparse)),
                   static_cast<unsigned>(args.clouds), static_cast<unsigned>(divided(args.points, each)));
  entries_kernel<<<parts, kSparse, bytes, stream>>>(args, each);
  return cudaGetLastError();
}

}  // namespace any2point
