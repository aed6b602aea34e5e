// Guided aggregation forward on CUDA: attention in cells, rows of all segments with partial sums for the
// statistics, statistics, activation of the rows, blend. Before it LayerNorm and the product with the weights
// of queries, keys and values, for 16-bit features in one kernel (product.cu).
//
// H200, B = 32, S = 128, C = 768, V = 6, M = 12, 39 cells, 12 blocks in a CUDA graph, forward: bfloat16
// features 1.15 ms in training, 1.06 in evaluation (B = 1: 0.57); float32 features with tf32 products 1.53
// and 1.44. The floor, tokens read and written once, is 0.04 ms (float32: 0.07). Of a block's 96 us in
// bfloat16 training the pool takes 32, activation 21, product 15, blend 11, attention 8, statistics 3,
// running statistics 3. The pool (13 M instructions, 0.51 a cycle and scheduler) and the activation (10 M,
// 0.49) are limited by instructions that wait for one another, not by memory. Kernels that start while the
// one before ends made it slower (1.36 to 1.40 ms then).
#include "guided_aggregate/passes.h"
#include "guided_aggregate/rows.cuh"

namespace any2point {
namespace guided {
namespace {

// One layer's mean and deviation from the parts, in float64 and a fixed order: 32 columns of 8 threads.
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(GuidedForward args, const float2* __restrict__ parts,  // [B, L, C]: mean, spread
                      int64_t count) {                                       // B
  __shared__ double shared[8][kWarp];
  const int64_t columns = args.layers * args.channels;
  const int64_t column = int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const int64_t own = column < columns ? column : columns - 1, layer = own / args.channels;
  const int group = threadIdx.x / kWarp;
  const auto total = [&](double value) {
    __syncthreads();
    shared[group][threadIdx.x % kWarp] = value;
    __syncthreads();
    double sum = 0.0;
    for (int g = 0; g < 8; g++) sum += shared[g][threadIdx.x % kWarp];
    return sum;
  };
  double rows = 0.0, sum = 0.0, spread = 0.0;
  for (int64_t p = group; p < count; p += 8) {
    const double size = args.count[layer * args.clouds + p];
    rows += size;
    if (size > 0) sum += size * parts[p * columns + own].x;
  }
  rows = total(rows);
  const bool empties = args.total > 0 && layer < args.views;
  const double all = empties ? double(args.total) : rows > 0 ? rows : 1.0;
  const double mean = total(sum) / all;
  for (int64_t p = group; p < count; p += 8) {
    const double size = args.count[layer * args.clouds + p];
    if (size == 0) continue;
    const float2 part = parts[p * columns + own];
    const double shift = part.x - mean;
    spread += part.y + size * shift * shift;
  }
  spread = total(spread);
  if (empties && all > rows) spread += (all - rows) * mean * mean;
  if (group > 0 || column >= columns) return;
  const double variance = spread / all;
  args.mean[column] = float(mean);
  args.deviation[column] = float(1.0 / sqrt(variance + double(args.eps)));
  args.unbiased[column] = float(variance * (all / (all > 2.0 ? all - 1.0 : 1.0)));
}

__global__ void running_kernel(GuidedForward args) {
  const int64_t columns = args.layers * args.channels;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, split = args.views * args.channels;
  if (i >= columns) return;
  const float variance = i < split ? args.view_variance[i] : args.space_variance[i - split];
  args.mean[i] = i < split ? args.view_mean[i] : args.space_mean[i - split];
  args.deviation[i] = float(1.0 / sqrt(double(variance) + double(args.eps)));
  args.unbiased[i] = variance;
}

struct Workspace {
  float *z, *heads;
  float2* parts;
  char* blend;
  int64_t bytes;

  Workspace(const Guided& args, void* memory) {
    Room room(memory);
    const int64_t rows = args.clouds * args.tokens, pad = coefficients(args.inner);
    z = room.take<float>(args.layers * rows * args.channels);
    heads = room.take<float>(args.views * rows * pad);
    parts = room.take<float2>(args.clouds * args.layers * args.channels);
    blend = room.take<char>(blend_workspace(args));
    bytes = room.used;
  }
};

int forward(const GuidedForward& args, const Workspace& work, cudaStream_t stream) {
  const int64_t rows = args.clouds * args.tokens;
  if (rows > 0) {
    if (const int error = attention_forward(args, work.heads, args.inner_means, stream)) return error;
    const Rows rows_args{work.heads, args.inner_means, work.z, work.parts};
    if (const int error = pool_rows(args, rows_args, args.training, stream)) return error;
  }
  const int columns = static_cast<int>(args.layers * args.channels);
  if (args.training) {
    statistics_kernel<<<(columns + kWarp - 1) / kWarp, kThreads, 0, stream>>>(args, work.parts,
                                                                              rows > 0 ? args.clouds : 0);
  } else {
    running_kernel<<<(columns + kThreads - 1) / kThreads, kThreads, 0, stream>>>(args);
  }
  if (rows == 0) return cudaGetLastError();
  return blend_tokens(args, work.z, work.blend, stream);
}

}  // namespace
}  // namespace guided

int64_t guided_forward_workspace(const Guided& args) { return guided::Workspace(args, nullptr).bytes; }

int guided_forward_cuda(const GuidedForward& args, void* memory, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const guided::Workspace work(args, memory);
  return guided::forward(args, work, stream);
}

}  // namespace any2point
