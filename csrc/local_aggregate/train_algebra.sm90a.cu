// Parts of sums are added up by blocks of columns. Small matrices are made row by row, a few rows a block,
// and their sums cut among its threads. A launch takes 5 to 30 us at the tokenizer's sizes.
#include "local_aggregate/train_algebra.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace any2point {
namespace {

constexpr int kColumns = 32;   // of a block that adds parts up
constexpr int kThreads = 768;  // of a block that makes rows of a result: a multiple of H
constexpr int kHighest = 192;  // H
constexpr int kWidest = 768;   // C
constexpr int kSlices = 16;    // of the parts, which a block's warps have
constexpr int kEach = 4;       // rows of a result that a block makes

unsigned divided(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

// The sum of a value over the block's slices, for each of its columns and in order; all threads call it.
__device__ double over_slices(double value, double (*room)[kColumns]) {
  const int column = threadIdx.x % kColumns, slice = threadIdx.x / kColumns;
  __syncthreads();
  room[slice][column] = value;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < kSlices; i++) sum += room[i][column];
  return sum;
}

__global__ void __launch_bounds__(kColumns* kSlices) in_statistics_kernel(const InStatistics args) {
  __shared__ double room[kSlices][kColumns];
  const int64_t slice = threadIdx.x / kColumns;
  const int64_t column = int64_t{blockIdx.x} * kColumns + threadIdx.x % kColumns;
  double sum = 0, total = 0, spread = 0;
#pragma unroll 8
  for (int64_t p = slice; p < args.parts; p += kSlices) {
    const double count = args.count[p];
    sum += count * args.mean[p * args.hidden + column];
    total += count;
  }
  total = over_slices(total, room);
  const double mean = over_slices(sum, room) / total;
#pragma unroll 8
  for (int64_t p = slice; p < args.parts; p += kSlices) {
    const double delta = args.mean[p * args.hidden + column] - mean;
    spread += args.spread[p * args.hidden + column] + args.count[p] * delta * delta;
  }
  const double deviation = 1 / sqrt(over_slices(spread, room) / total + args.eps);
  if (slice > 0) return;
  const double scale = args.weight[column] * deviation;
  args.to_mean[column] = mean;
  args.to_deviation[column] = deviation;
  const double values[4] = {scale, args.bias[column] - mean * scale, mean, deviation};
  for (int i = 0; i < 4; i++) args.single[i * args.hidden + column] = static_cast<float>(values[i]);
}

// to [columns] = the sum of from [parts, columns].
__global__ void __launch_bounds__(kColumns* kSlices)
    parts_kernel(const float* from, int64_t parts, int64_t columns, double* to, double divisor,
                 double* mean) {
  __shared__ double room[kSlices][kColumns];
  const int64_t column = int64_t{blockIdx.x} * kColumns + threadIdx.x % kColumns;
  double sum = 0;
#pragma unroll 8
  for (int64_t p = threadIdx.x / kColumns; p < parts; p += kSlices) sum += from[p * columns + column];
  sum = over_slices(sum, room);
  if (threadIdx.x >= kColumns) return;
  to[column] = sum;
  if (mean) mean[column] = sum / divisor;
}

__device__ double over_warp(double value) {
  for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(0xffffffff, value, d);
  return value;
}

// Products of kEach rows, of which each of the threads with the same column has a part of the sum.
struct Products {
  double room[kEach * kThreads];

  __device__ void set(const double (&part)[kEach]) {
    for (int i = 0; i < kEach; i++) room[i * kThreads + threadIdx.x] = part[i];
    __syncthreads();
  }
  __device__ double get(int row, int column, int hidden) const {
    double sum = 0;
    for (int at = column; at < kThreads; at += hidden) sum += room[row * kThreads + at];
    return sum;
  }
};

// kEach rows of weights [*, H] in float64.
struct Weights {
  double row[kEach][kHighest];

  __device__ void set(const float* from, int hidden) {
    for (int i = threadIdx.x; i < kEach * hidden; i += kThreads) row[i / hidden][i % hidden] = from[i];
    __syncthreads();
  }
};

__device__ float rounded(float value, bool bfloat16, void* to, int64_t at) {
  if (bfloat16) {
    const __nv_bfloat16 v = __float2bfloat16_rn(value);
    static_cast<__nv_bfloat16*>(to)[at] = v;
    return __bfloat162float(v);
  }
  const __half v = __float2half_rn(value);
  static_cast<__half*>(to)[at] = v;
  return __half2float(v);
}

// Blocks of kEach channels, a warp each, then of kEach rows of hidden_outer.
__global__ void __launch_bounds__(kThreads)
    out_statistics_kernel(const OutStatistics args, int channel_blocks) {
  __shared__ Products products;
  __shared__ Weights weights;
  __shared__ double means[kHighest];
  const int hidden = static_cast<int>(args.hidden), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t block = blockIdx.x;
  if (block >= channel_blocks) {
    const int64_t first = (block - channel_blocks) * kEach * hidden;
    for (int64_t at = first + threadIdx.x; at < first + kEach * hidden; at += kThreads) {
      args.hidden_outer[at] = args.to_gram[at] - args.hidden_mean[at / hidden] * args.hidden_sum[at % hidden];
    }
    return;
  }
  const double each = 1 / static_cast<double>(args.rows);
  const int column = threadIdx.x % hidden;
  if (threadIdx.x < hidden) means[threadIdx.x] = args.hidden_mean[threadIdx.x];
  weights.set(args.out_weight + block * kEach * hidden, hidden);
  const double mean = means[column];
  double part[kEach] = {};
#pragma unroll 8
  for (int i = threadIdx.x / hidden; i < hidden; i += kThreads / hidden) {
    const double cov = __fma_rn(args.to_gram[i * hidden + column], each, -means[i] * mean);
#pragma unroll
    for (int c = 0; c < kEach; c++) part[c] = __fma_rn(weights.row[c][i], cov, part[c]);
  }
  products.set(part);
  if (warp >= kEach) return;
  const int64_t channel = block * kEach + warp, row = channel * hidden;
  double variance = 0, own = 0, taken = 0;
  for (int j = lane; j < hidden; j += 32) {
    const double weight = weights.row[warp][j];
    variance += weight * products.get(warp, j, hidden);
    own += weight * means[j];
  }
  variance = over_warp(variance);
  own = over_warp(own);
  const double deviation = 1 / sqrt((variance < 0 ? 0 : variance) + args.eps);
  const double scale = args.weight[channel] * deviation;
  for (int j = lane; j < hidden; j += 32) {
    const float folded = static_cast<float>(weights.row[warp][j] * scale);
    taken += rounded(folded, args.bfloat16, args.folded, row + j) * means[j];
  }
  taken = over_warp(taken);
  if (lane > 0) return;
  own += args.out_bias[channel];
  args.single[channel] = static_cast<float>(own);
  args.single[args.width + channel] = static_cast<float>(deviation);
  args.to_mean[channel] = own;
  args.to_deviation[channel] = deviation;
  args.shift[channel] = static_cast<float>(args.bias[channel] - taken);
}

// Blocks of kEach rows of out_grad and of carried, then of q, then one for the constant.
__global__ void __launch_bounds__(kThreads)
    pull_kernel(const Pull args, int channel_blocks, int hidden_blocks) {
  __shared__ Products products;
  __shared__ Weights weights;
  __shared__ double bends[kWidest];
  const int hidden = static_cast<int>(args.hidden), width = static_cast<int>(args.width);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = threadIdx.x % hidden;
  const int64_t block = blockIdx.x;
  const double count = static_cast<double>(args.rows);
  const auto factor = [&](int64_t c) { return args.out_scale[c] * args.deviation[c]; };
  const auto bend = [&](int64_t c) { return factor(c) * args.deviation[c] * args.normed[c] / count; };
  double part[kEach] = {};
  if (block < channel_blocks) {
    weights.set(args.out_weight + block * kEach * hidden, hidden);
#pragma unroll 8
    for (int i = threadIdx.x / hidden; i < hidden; i += kThreads / hidden) {
      const double outer = args.hidden_outer[i * hidden + column];
#pragma unroll
      for (int c = 0; c < kEach; c++) part[c] = __fma_rn(weights.row[c][i], outer, part[c]);
    }
    products.set(part);
    if (warp >= kEach) return;
    const int64_t channel = block * kEach + warp;
    const double scale = factor(channel), bent = bend(channel), middle = args.total[channel] / count;
    for (int j = lane; j < hidden; j += 32) {
      const int64_t at = channel * hidden + j;
      const double own = args.outer[at] - middle * args.hidden_sum[j];
      args.out_grad[at] = static_cast<float>(scale * own - bent * products.get(warp, j, hidden));
      args.carried[args.transposed ? j * width + channel : at] =
          static_cast<float>(scale * args.out_weight[at]);
    }
    return;
  }
  if (block < channel_blocks + hidden_blocks) {
    const int64_t first = (block - channel_blocks) * kEach;
    for (int c = threadIdx.x; c < width; c += kThreads) bends[c] = bend(c);
    __syncthreads();
#pragma unroll 8
    for (int c = threadIdx.x / hidden; c < width; c += kThreads / hidden) {
      const double pulled = bends[c] * args.out_weight[c * hidden + column];
      const float4 own = *reinterpret_cast<const float4*>(args.out_weight + c * hidden + first);
      part[0] = __fma_rn(own.x, pulled, part[0]);
      part[1] = __fma_rn(own.y, pulled, part[1]);
      part[2] = __fma_rn(own.z, pulled, part[2]);
      part[3] = __fma_rn(own.w, pulled, part[3]);
    }
    products.set(part);
    if (warp >= kEach) return;
    for (int j = lane; j < hidden; j += 32) {
      args.q[(first + warp) * hidden + j] = static_cast<float>(-products.get(warp, j, hidden));
    }
    return;
  }
  // constant = mean' Q - (factor total / count)' W2
  constexpr int kLanes = 8;  // of a channel
  for (int c = threadIdx.x / kLanes; c < width; c += kThreads / kLanes) {
    double middle = 0;
#pragma unroll 4
    for (int j = threadIdx.x % kLanes; j < hidden; j += kLanes) {
      middle += args.out_weight[c * hidden + j] * args.hidden_mean[j];
    }
    for (int d = kLanes / 2; d > 0; d /= 2) middle += __shfl_xor_sync(0xffffffff, middle, d);
    if (threadIdx.x % kLanes == 0) bends[c] = bend(c) * middle - factor(c) * args.total[c] / count;
  }
  __syncthreads();
#pragma unroll 8
  for (int c = threadIdx.x / hidden; c < width; c += kThreads / hidden) {
    part[0] = __fma_rn(bends[c], args.out_weight[c * hidden + column], part[0]);
  }
  products.set(part);
  if (threadIdx.x < static_cast<unsigned>(hidden)) {
    args.constant[column] = static_cast<float>(products.get(0, column, hidden));
  }
}

__global__ void __launch_bounds__(kThreads) largest_kernel(const Entries args) {
  __shared__ float room[kThreads / 32];
  float largest = 0;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < args.count;
       i += kEntryParts * kThreads) {
    if (args.out[i] > 0) largest = fmaxf(largest, fabsf(args.grad[i]));
  }
  for (int d = 16; d > 0; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, d));
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = largest;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (float each : room) largest = fmaxf(largest, each);
  args.largest[blockIdx.x] = largest;
}

// One block: the largest gradient times the largest norm of a column of p W2, if that is above 1.
__global__ void __launch_bounds__(kThreads) size_kernel(const Entries args) {
  __shared__ float room[kThreads];
  const int hidden = static_cast<int>(args.hidden), width = static_cast<int>(args.width);
  const int column = threadIdx.x % hidden;
  float sum = 0;
#pragma unroll 8
  for (int c = threadIdx.x / hidden; c < width; c += kThreads / hidden) {
    const float scale = args.out_scale[c] * static_cast<float>(args.deviation[c]);
    const float carried = args.out_weight[c * hidden + column] * scale;
    sum += carried * carried;
  }
  room[threadIdx.x] = sum;
  __syncthreads();
  float norm = 1, largest = threadIdx.x < kEntryParts ? args.largest[threadIdx.x] : 0.0f;
  if (threadIdx.x < hidden) {
    for (int at = threadIdx.x + hidden; at < kThreads; at += hidden) sum += room[at];
    norm = fmaxf(norm, sqrtf(sum));
  }
  for (int d = 16; d > 0; d /= 2) {
    norm = fmaxf(norm, __shfl_xor_sync(0xffffffff, norm, d));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, d));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    room[threadIdx.x / 32 * 2] = norm;
    room[threadIdx.x / 32 * 2 + 1] = largest;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 0; i < kThreads / 32; i++) {
    norm = fmaxf(norm, room[2 * i]);
    largest = fmaxf(largest, room[2 * i + 1]);
  }
  const float exponent = 6 - ceilf(log2f(largest * norm));
  const float size = isfinite(exponent) ? exp2f(fminf(fmaxf(exponent, -100), 100)) : 1;
  args.sizes[0] = size;
  args.sizes[1] = 1 / size;
}

__global__ void __launch_bounds__(kThreads) entries_kernel(const Entries args) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= args.count) return;
  const float size = args.out_weight ? args.sizes[0] : 1;
  args.entries[i] = args.out[i] > 0 ? args.grad[i] * size : 0.0f;
}

}  // namespace

int entries(const Entries& args, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (args.out_weight) {
    largest_kernel<<<kEntryParts, kThreads, 0, stream>>>(args);
    size_kernel<<<1, kThreads, 0, stream>>>(args);
  }
  if (args.count > 0) entries_kernel<<<divided(args.count, kThreads), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

int in_statistics(const InStatistics& args, void* stream) {
  in_statistics_kernel<<<divided(args.hidden, kColumns), kColumns * kSlices, 0,
                         static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

int out_statistics(const OutStatistics& args, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const int64_t square = args.hidden * args.hidden;
  const double count = static_cast<double>(args.rows);
  parts_kernel<<<divided(square, kColumns), kColumns * kSlices, 0, stream>>>(args.gram, args.parts, square,
                                                                             args.to_gram, count, nullptr);
  parts_kernel<<<divided(args.hidden, kColumns), kColumns * kSlices, 0, stream>>>(
      args.sum, args.sum_parts, args.hidden, args.hidden_sum, count, args.hidden_mean);
  const unsigned channels = divided(args.width, kEach), rows = divided(args.hidden, kEach);
  out_statistics_kernel<<<channels + rows, kThreads, 0, stream>>>(args, static_cast<int>(channels));
  return cudaGetLastError();
}

int pull(const Pull& args, void* stream) {
  const unsigned channels = divided(args.width, kEach), rows = divided(args.hidden, kEach);
  pull_kernel<<<channels + rows + 1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      args, static_cast<int>(channels), static_cast<int>(rows));
  return cudaGetLastError();
}

}  // namespace any2point
