// Guided aggregation forward on CUDA. Before it LayerNorm and the product with the weights of queries, keys
// and values, for 16-bit features under autocast in one kernel (product.cu). Here attention in cells, and
// then, for 16-bit clouds that fill the processors once, the two kernels of cloud.cu; otherwise rows of all
// segments with partial sums for the statistics (pool.cu), statistics, activation of the rows, blend
// (blend.cu).
//
// H200, B = 32, S = 128, C = 768, V = 6, M = 12, 39 cells, 12 blocks in a CUDA graph, forward: bfloat16
// features 1.10 ms in training, 0.92 in evaluation (B = 1: 0.60); float32 features with tf32 products 1.53
// and 1.44. The floor, tokens read and written once, is 0.04 ms (float32: 0.07). Of a block in bfloat16
// training cloud.cu takes 37 us, the parts of the statistics 19, product 15, attention 8, running statistics
// 2; in evaluation cloud.cu 36, rows of voxels 8. Without the kernels of clouds the pool takes 32, activation
// 21, blend 11, statistics 3. The pool (13 M instructions, 0.51 a cycle and scheduler) and the activation (10
// M, 0.49) are limited by instructions that wait for one another, not by memory. Kernels that start while the
// one before ends made it slower (1.36 to 1.40 ms then).
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
    if (const int error = attention_forward(args, work.heads, args.inner_means, stream)) return error;
    if (fits_clouds(args)) return forward_of_clouds(args, work.clouds, stream);
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
