// The gradient of the features: dy1 and du of all rows, added up over those of each point, in a fixed order
// and without atomics, and through W1. As neighbour by an inverse list of the neighbours, as centre from sums
// over groups, which those of du bring along, by an inverse list of the centres. Entries that come through a
// maximum are added up in shared memory, where a thread has a channel. Products are in TF32.
//
// H200, 32 clouds, K = 81, us of the tokenizer's three stages in all: rows 411 (243 for every byte once),
// entries 89, products 142.
#include <type_traits>

#include "local_aggregate/hopper_rows.cuh"
#include "local_aggregate/hopper_train.h"

namespace any2point {
namespace {

constexpr int kThreads = 256;
constexpr int kShares = 4;                  // threads that share a sum of rows,
constexpr int kItems = kThreads / kShares;  // and sums of a block
constexpr int kSparse = 8;                  // channels of a block of entries,
constexpr int kSlices = 4;                  // slices of the groups
constexpr int kSparsePoints = 1024;         // and points, at most
constexpr int kPoints = 32;                 // of a block of products
constexpr int kChannels = 96;               // of one
constexpr int kDepth = 64;                  // rows of W1 at a time
constexpr int kWeightRow = kChannels + 8;

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
  __device__ __forceinline__ void add(const Sum& other) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] += other.v[i];
  }
  __device__ __forceinline__ void store(float* to) const {
    reinterpret_cast<float4*>(to)[0] = {v[0], v[1], v[2], v[3]};
    reinterpret_cast<float4*>(to)[1] = {v[4], v[5], v[6], v[7]};
  }
};

// Some threads share eight channels of a group or of a point; blocks of a cloud come after each other, so
// that what both read of dy1 stays in the cache.
template <typename T>
__global__ void __launch_bounds__(kThreads) rows_kernel(const HopperPoints args, int64_t blocks) {
  const int64_t cloud = blockIdx.x / blocks;
  const int own = static_cast<int>(args.hidden / 8), part = threadIdx.x / kItems;
  const int half = args.dense ? static_cast<int>(args.width / 16) : 0, chunks = own + half;
  // First the groups, then the points.
  const int64_t turn = (blockIdx.x % blocks) * kItems + threadIdx.x % kItems, groups = args.centers * own;
  const bool by_center = turn < groups;
  const int chunk = static_cast<int>(by_center ? turn % own : (turn - groups) % chunks);
  const int64_t item = by_center ? turn / own : (turn - groups) / chunks;
  const uint4* from;  // of row 0
  int64_t stride;     // in 16 bytes
  if (chunk < own) {
    from = static_cast<const uint4*>(args.dy1) + chunk;
    stride = own;
  } else {
    from = static_cast<const uint4*>(args.dense) + (chunk - own);
    stride = half;
  }
  Sum<T> sum;
  float* to = nullptr;
  if (by_center) {
    const int64_t group = cloud * args.centers + item;
    const uint4* row = from + group * args.neighbors * stride;
#pragma unroll 8
    for (int64_t k = part; k < args.neighbors; k += kShares) sum.add(__ldg(row + k * stride));
    to = args.groups + (group * own + chunk) * 8;
  } else if (item < args.points) {
    const int64_t at = cloud * args.points + item;
    const uint32_t* start = args.near + cloud * (args.points + 1) + item;
    const uint32_t end = start[1];
#pragma unroll 4
    for (uint32_t i = start[0] + part; i < end; i += kShares) {
      sum.add(__ldg(from + int64_t{args.pairs[i] - args.first_pair} * stride));
    }
    to =
        chunk < own ? args.by_neighbor + (at * own + chunk) * 8 : args.direct + (at * half + chunk - own) * 8;
  }
  __shared__ Sum<T> shares[kShares][kItems];
  shares[part][threadIdx.x % kItems] = sum;
  __syncthreads();
  if (part > 0 || !to) return;
  for (int i = 1; i < kShares; i++) sum.add(shares[i][threadIdx.x]);
  sum.store(to);
}

// direct = the entries of neighbours, of the points [first, first + each) of a cloud. A thread has a channel
// and a slice of the groups.
__global__ void __launch_bounds__(kSparse* kSlices) entries_kernel(const HopperPoints args, int64_t each) {
  extern __shared__ float room[];  // [points, slices, channels]
  constexpr int kRow = kSparse * kSlices;
  const int64_t half = args.width / 2;
  const int64_t channel = int64_t{blockIdx.x} * kSparse + threadIdx.x % kSparse;
  const int64_t cloud = blockIdx.y, first = blockIdx.z * each, points = min(each, args.points - first);
  for (int64_t p = 0; p < points; p++) room[p * kRow + threadIdx.x] = 0;
  const float* grad = args.grad + cloud * args.centers * args.width + channel;
  const int32_t* argmax = args.argmax + cloud * args.centers * args.width + channel;
  const int64_t* neighbor = args.neighbor + cloud * args.centers * args.neighbors;
  const int64_t slice = threadIdx.x / kSparse, size = (args.centers + kSlices - 1) / kSlices;
  const int64_t end = min((slice + 1) * size, args.centers);
  constexpr int kAhead = 16;
  for (int64_t group = slice * size; group < end; group += kAhead) {
    float value[kAhead];
    int64_t point[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int64_t g = min(group + i, end - 1);
      value[i] = group + i < end ? grad[g * args.width] : 0.0f;
      point[i] = neighbor[g * args.neighbors + argmax[g * args.width]] - first;
    }
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      if (point[i] >= 0 && point[i] < points) room[point[i] * kRow + threadIdx.x] += value[i];
    }
  }
  __syncthreads();
  for (int64_t p = slice; p < points; p += kSlices) {
    const float* from = room + p * kRow + threadIdx.x % kSparse;
    float sum = 0;
    for (int i = 0; i < kSlices; i++) sum += from[i * kSparse];
    args.direct[(cloud * args.points + first + p) * half + channel] = sum;
  }
}

__device__ __forceinline__ uint32_t tf32(float value) {
  uint32_t d;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(d) : "f"(value));
  return d;
}

__device__ __forceinline__ float2 plus(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ __forceinline__ float4 plus(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}
__device__ __forceinline__ uint4 tf32(float4 v) { return {tf32(v.x), tf32(v.y), tf32(v.z), tf32(v.w)}; }

// The groups whose centre is a point: mostly none or one.
struct Owned {
  uint32_t begin, end, first;

  Owned() = default;
  __device__ Owned(const HopperPoints& args, int64_t point) {
    const uint32_t* start = args.middle + point + point / args.points;
    begin = start[0];
    end = start[1];
    first = begin < end ? args.owned[begin] : 0;
  }
  // The sum of from[group] over them.
  template <typename T>
  __device__ __forceinline__ T sum(const HopperPoints& args, const T* from, int64_t stride) const {
    T sum = begin < end ? from[first * stride] : T{};
    for (uint32_t i = begin + 1; i < end; i++) sum = plus(sum, from[int64_t{args.owned[i]} * stride]);
    return sum;
  }
};

// Rows [k, k + kDepth) of [W1 of neighbours; W1 of centres], the block's channels.
__device__ __forceinline__ void bring_weight(const HopperPoints& args, int k, float* to) {
  const int hidden = static_cast<int>(args.hidden);
  const float* from = args.weight + int64_t{blockIdx.y} * kChannels;
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  constexpr int kChunks = kChannels / 4;
  for (int i = threadIdx.x; i < kDepth * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks, part = k + row >= hidden;
    const float* own = from + (k + row - part * hidden) * args.width + part * (args.width / 2) + 4 * chunk;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(at + (row * kWeightRow + 4 * chunk) * 4),
                 "l"(own));
  }
  asm volatile("cp.async.commit_group;");
}

// features = factor (direct + [as neighbour, as centre] W1), of kPoints points and kChannels channels.
template <typename T>
__global__ void __launch_bounds__(kThreads) features_kernel(const HopperPoints args) {
  extern __shared__ __align__(
      16) float staged[];  // [2, kDepth, kWeightRow], then sums [kPoints, 2 H], padded
  const int hidden = static_cast<int>(args.hidden), row = 2 * hidden + 4;
  uint32_t* const sums = reinterpret_cast<uint32_t*>(staged + 2 * kDepth * kWeightRow);
  const int64_t half = args.width / 2, total = args.clouds * args.points;
  const int64_t first = int64_t{blockIdx.x} * kPoints;
  if (hidden > 0) bring_weight(args, 0, staged);
  __shared__ Owned owned_by[kPoints];
  if (threadIdx.x < kPoints) {
    owned_by[threadIdx.x] = Owned(args, min(first + static_cast<int64_t>(threadIdx.x), total - 1));
  }
  __syncthreads();
  const int chunks = hidden / 4;
#pragma unroll 4
  for (int i = threadIdx.x; i < kPoints * chunks; i += kThreads) {
    const int slot = i / chunks, chunk = i % chunks;
    const int64_t point = min(first + slot, total - 1);
    uint4* to = reinterpret_cast<uint4*>(sums + slot * row) + chunk;
    const float4* near = reinterpret_cast<const float4*>(args.by_neighbor) + point * chunks + chunk;
    to[0] = tf32(*near);
    to[chunks] = tf32(owned_by[slot].sum(args, reinterpret_cast<const float4*>(args.groups) + chunk, chunks));
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  constexpr int kAcross = kThreads / 32 * 16 / kPoints, kOwn = kChannels / kAcross, kTiles = kOwn / 8;
  const uint32_t* a = sums + (warp / kAcross * 16 + g) * row + t;
  const int64_t column = int64_t{blockIdx.y} * kChannels + warp % kAcross * kOwn;
  float d[kTiles][4] = {};
  for (int k = 0, turn = 0; k < 2 * hidden; k += kDepth, turn ^= 1) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    if (k + kDepth < 2 * hidden) bring_weight(args, k + kDepth, staged + (turn ^ 1) * kDepth * kWeightRow);
    const float* weight = staged + (turn * kDepth + t) * kWeightRow + warp % kAcross * kOwn + g;
#pragma unroll
    for (int s = 0; s < kDepth; s += 8, a += 8) {
      const uint32_t a0 = a[0], a1 = a[8 * row], a2 = a[4], a3 = a[8 * row + 4];
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
        const uint32_t b0 = tf32(weight[s * kWeightRow + 8 * n]);
        const uint32_t b1 = tf32(weight[(s + 4) * kWeightRow + 8 * n]);
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
            "%9}, {%0, %1, %2, %3};"
            : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
      }
    }
  }
  const float factor = args.factor ? *args.factor : 1.0f;
  const bool past = args.by_center || args.grad;
  const float* const from = args.by_center ? args.by_center : args.grad + half;
  const int64_t stride = args.by_center ? half : args.width;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int64_t point = first + warp / kAcross * 16 + g + 8 * i;
    if (point >= total) continue;
    const Owned owned = owned_by[point - first];
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      const int64_t channel = column + 8 * n + 2 * t;
      const float2 direct = *reinterpret_cast<const float2*>(args.direct + point * half + channel);
      float2 middle = {0, 0};
      if (past) middle = owned.sum(args, reinterpret_cast<const float2*>(from + channel), stride / 2);
      const float low = d[n][2 * i] + direct.x + middle.x, high = d[n][2 * i + 1] + direct.y + middle.y;
      const int64_t to = (point * half + channel) / 2;
      if constexpr (std::is_same_v<T, float>) {
        static_cast<float2*>(args.features)[to] = {low * factor, high * factor};
      } else {
        static_cast<uint32_t*>(args.features)[to] = Two<T>::of(low * factor, high * factor);
      }
    }
  }
}

unsigned blocks_of(int64_t threads) { return static_cast<unsigned>(divided(threads, kThreads)); }

template <typename T>
int features(const HopperPoints& args, cudaStream_t stream) {
  const int bytes = static_cast<int>(2 * kDepth * kWeightRow + kPoints * (2 * args.hidden + 4)) * 4;
  const cudaError_t error =
      cudaFuncSetAttribute(features_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const dim3 parts(static_cast<unsigned>(divided(args.clouds * args.points, kPoints)),
                   static_cast<unsigned>(args.width / 2 / kChannels));
  features_kernel<T><<<parts, kThreads, bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

int hopper_resolve(const int64_t* center, const int64_t* neighbor, int64_t groups, int64_t neighbors,
                   int64_t* to, void* stream) {
  if (groups == 0) return 0;
  resolve_kernel<<<blocks_of(groups * neighbors), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      center, neighbor, groups * neighbors, neighbors, to);
  return cudaGetLastError();
}

int hopper_point_sums(const HopperPoints& args, void* stream_) {
  if (args.clouds * args.points == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const int64_t columns = args.hidden + (args.dense ? args.width / 2 : 0);
  const int64_t blocks = divided(args.centers * (args.hidden / 8) + args.points * (columns / 8), kItems);
  const unsigned grid = static_cast<unsigned>(blocks * args.clouds);
  if (args.bfloat16) {
    rows_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(args, blocks);
  } else {
    rows_kernel<__half><<<grid, kThreads, 0, stream>>>(args, blocks);
  }
  return cudaGetLastError();
}

int hopper_points(const HopperPoints& args, void* stream_) {
  if (args.clouds * args.points == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const int error = hopper_point_sums(args, stream_);
  if (error) return error;
  if (!args.by_center && (!args.grad || args.centers == 0)) {
    cudaMemsetAsync(args.direct, 0, args.clouds * args.points * args.width * 2, stream);
  } else if (!args.by_center) {
    const int64_t each = std::min<int64_t>(kSparsePoints, args.points);
    const int bytes = static_cast<int>(each * kSparse * kSlices * 4);
    const cudaError_t error =
        cudaFuncSetAttribute(entries_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    const dim3 parts(static_cast<unsigned>(args.width / 2 / kSparse), static_cast<unsigned>(args.clouds),
                     static_cast<unsigned>(divided(args.points, each)));
    entries_kernel<<<parts, kSparse * kSlices, bytes, stream>>>(args, each);
  }
  if (args.single) return features<float>(args, stream);
  return args.bfloat16 ? features<__nv_bfloat16>(args, stream) : features<__half>(args, stream);
}

}  // namespace any2point
