// Guided aggregation forward on CUDA. Before it LayerNorm and the product with the weights of queries, keys
// and values, for 16-bit features under autocast in one kernel (product.cu). In evaluation of few clouds the
// rest is in small_batch.cu, for most shapes with the attention. Otherwise here attention in cells, and then,
// for 16-bit clouds that fill the processors once, cloud.cu; for others rows of all segments with partial
// sums for the statistics (pool.cu), statistics, activation of the rows, blend (blend.cu).
//
// H200, B = 32, S = 128, C = 768, V = 6, M = 12, 39 cells, 12 blocks in a CUDA graph, forward: bfloat16
// features 1.06 ms in training, 0.81 in evaluation (400 cells: 1.46, 1.07), float32 features that are rounded
// 1.24 in training, with tf32 products 1.53 in training, 1.44 in evaluation. The floor, tokens read and
// written once, is 0.07 ms (bfloat16: 0.04). Of a block in bfloat16 cloud.cu takes 49 us in training, 31 in
// evaluation, LayerNorm and product 28, attention 8. The pool of bfloat16 features takes 32 us of a block
// where cloud.cu is not used, activation 21, blend 11, statistics 3. The pool (13 M instructions, 0.51 a
// cycle and scheduler) and the activation (10 M, 0.49) are limited by instructions that wait for one another,
// not by memory. Kernels that start while the one before ends made it slower (1.36 to 1.40 ms then).
#include "guided_aggregate/cloud.cuh"
#include "guided_aggregate/passes.h"
#include "guided_aggregate/rows.cuh"
#include "guided_aggregate/statistics.cuh"

namespace any2point {
namespace guided {
namespace {

// 32 columns of kParts threads.
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(GuidedForward args, const float2* __restrict__ parts,  // [B, L, C]: mean, spread
                      int64_t count) {                                       // B
  static_assert(kThreads == kParts * kWarp, "a warp of columns");
  __shared__ double shared[kParts][kWarp];
  const int64_t columns = args.layers * args.channels;
  const int64_t column = int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const int part = threadIdx.x / kWarp;
  const auto total = [&](double value) {
    __syncthreads();
    shared[part][threadIdx.x % kWarp] = value;
    __syncthreads();
    double sum = 0.0;
    for (int g = 0; g < kParts; g++) sum += shared[g][threadIdx.x % kWarp];
    return sum;
  };
  batch_column(args, parts, nullptr, count, column < columns ? column : columns - 1, part,
               part == 0 && column < columns, total);
}

__global__ void running_kernel(GuidedForward args) {
  const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (column < args.layers * args.channels) running_column(args, column, true);
}

struct Workspace {
  float *z, *heads;
  float2* parts;
  char *blend, *clouds;
  int64_t bytes;

  Workspace(const Guided& args, void* memory) {
    Room room(memory);
    const int64_t rows = args.clouds * args.tokens, pad = coefficients(args.inner);
    z = heads = nullptr;
    parts = nullptr;
    blend = clouds = nullptr;
    if (is_small_batch(args)) {
      if (!small_batch_attends(args)) heads = room.take<float>(args.views * rows * pad);
      bytes = room.used;
      return;
    }
    if (fits_clouds(args)) {
      clouds = room.take<char>(clouds_workspace(args));
      bytes = room.used;
      return;
    }
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
    const bool few = is_small_batch(args), fits = !few && fits_clouds(args);
    if (few && small_batch_attends(args)) return forward_of_small_batch(args, stream);
    const CloudWork clouds = fits ? work_of_clouds(args, work.clouds) : CloudWork{};
    if (const int error =
            attention_forward(args, work.heads, args.inner_means, stream, fits ? &clouds : nullptr)) {
      return error;
    }
    if (few) return forward_of_small_batch(args, stream);
    if (fits) return forward_of_clouds(args, work.clouds, stream);
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
