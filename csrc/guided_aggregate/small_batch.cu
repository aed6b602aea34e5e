// Evaluation of a few clouds (sm_90), in one kernel with the attention if its heads have two channels: a
// cluster of four blocks has kRows tokens, each of its blocks a quarter of their channels, each warp a layer
// at kSlice channels. A token's rows are pooled again for every token of the same cell, so that nothing but
// the tokens' agreement passes from block to block.
//
// H200, 128 tokens of bfloat16, C = 768, V = 6, M = 12: 37 us with 39 cells, 24 with 400. Of one cloud 12
// blocks take 0.50 ms, with 400 cells 0.34 (in the kernels of wide clouds before 0.53 and 0.60). Of two they
// took 0.76 here, since time grows with the tokens beyond a block for each processor, and take 0.43 in the
// kernels for more. Next: with few cells one cloud may be faster there, too.
#include <cooperative_groups.h>

#include "guided_aggregate/passes.h"
#include "guided_aggregate/rows.cuh"
#include "guided_aggregate/statistics.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kCluster = 4;
constexpr int kRows = 4;                     // tokens of a cluster
constexpr int kSlice = 2 * kWarp;            // channels of a warp
constexpr int kMostWarps = 24;               // of a block
[[maybe_unused]] constexpr int kAtOnce = 4;  // tokens of a row fetched together
constexpr int kFactors = 16;                 // M + 1 at most
constexpr int kStagedTokens = 32;            // of a cell whose queries, keys and values are in shared memory
constexpr int kHeads = kWarp / 4;            // at most, with two channels each
constexpr int64_t kMostRows = 128;           // tokens of all clouds: a block for each processor

__host__ __device__ inline int slices_of(const Guided& args) {  // of a block
  return static_cast<int>((args.channels + kCluster * kSlice - 1) / (kCluster * kSlice));
}

// The attention's mean over the cell of `count` tokens, from `order` on, with `staged` [kStagedTokens, 3M] to
// a factor for every row of the projection: eight lanes for the heads of every fourth query. By a warp.
template <typename Q>
__device__ inline void attend_cell(const Guided& args, int view, const int32_t* order, int count,
                                   float* staged, float* to) {
  const int inner = static_cast<int>(args.inner), width = 3 * inner, lane = threadIdx.x % kWarp;
  const int64_t stride = args.views * width;
  const Q* const qkv = static_cast<const Q*>(args.qkv) + view * width;
  const bool fits = count <= kStagedTokens;
  __syncwarp();
#pragma unroll 4
  for (int i = lane; fits && i < count * width; i += kWarp) {
    staged[i] = widen(qkv[order[i / width] * stride + i % width]);
  }
  if (lane < kFactors) to[lane] = 0.0f;
  __syncwarp();
  const int head = lane % kHeads;
  const bool inside = head < args.heads;
  const auto two = [&](int place, int which) {  // channels of the head
    const int k = which * inner + 2 * head;
    if (fits) return *reinterpret_cast<const float2*>(staged + place * width + k);
    const Q* const from = qkv + order[place] * stride + k;
    return make_float2(widen(from[0]), widen(from[1]));
  };
  float2 sum = make_float2(0.0f, 0.0f);
  float keeps = 0.0f;
  for (int j = lane / kHeads; j < count; j += kWarp / kHeads) {
    const float keep = args.keep ? args.keep[view * args.clouds * args.tokens + order[j]] : 1.0f;
    keeps += keep;
    if (!inside) continue;
    const float2 query = two(j, 0);
    const auto score = [&](int i) {
      const float2 key = two(i, 1);
      return fmaf(query.x, key.x, query.y * key.y) * args.scale;
    };
    float most = -INFINITY, all = 0.0f;
    for (int i = 0; i < count; i++) most = fmaxf(most, score(i));
    float2 own = make_float2(0.0f, 0.0f);
    for (int i = 0; i < count; i++) {
      const float share = __expf(score(i) - most);
      const float2 value = two(i, 2);
      all += share;
      own.x = fmaf(share, value.x, own.x);
      own.y = fmaf(share, value.y, own.y);
    }
    sum.x = fmaf(own.x, keep / all, sum.x);
    sum.y = fmaf(own.y, keep / all, sum.y);
  }
#pragma unroll
  for (int d = kHeads; d < kWarp; d *= 2) {
    sum.x += __shfl_xor_sync(kAll, sum.x, d);
    sum.y += __shfl_xor_sync(kAll, sum.y, d);
    keeps += __shfl_xor_sync(kAll, keeps, d);
  }
  const float size = static_cast<float>(count);
  if (lane < kHeads && inside) {
    to[2 * head] = sum.x / size;
    to[2 * head + 1] = sum.y / size;
  }
  if (lane == 0) to[inner] = keeps / size;
}

// Grid: clusters of kRows tokens. Block: slices of channels, times layers. kAttends: inner_means is still to
// be made.
template <typename T, typename Q, bool kAttends>
__global__ void __launch_bounds__(kMostWarps* kWarp) small_batch_kernel(GuidedForward args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ float4 room[];
  const auto cluster = cooperative_groups::this_cluster();
  const int views = static_cast<int>(args.views), layers = static_cast<int>(args.layers);
  const int slices = slices_of(args), width = slices * kSlice, inner = static_cast<int>(args.inner);
  const int rank = blockIdx.x % kCluster, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int layer = warp / slices, slice = warp % slices, pad = static_cast<int>(coefficients(inner));
  const int64_t rows = args.clouds * args.tokens, channels = args.channels;
  const int64_t first_row = int64_t(blockIdx.x / kCluster) * kRows;
  const int own = slice * kSlice + 2 * lane;  // channel in the block
  const int64_t column = int64_t(rank) * width + own, c = column < channels ? column : 0;
  const bool active = column<channels, adaptive = layers> views, view = layer < views;
  float* const activated = reinterpret_cast<float*>(room);       // [L, kRows, width]
  float* const factors = activated + layers * kRows * width;     // [L, kRows, kFactors], of inner
  float* const parts = factors + layers * kRows * kFactors;      // [2V + 1, kRows, slices]
  float* const sums = parts + (2 * views + 1) * kRows * slices;  // [2V + 1, kRows], of the block
  float* const weights = sums + (2 * views + 1) * kRows;         // [2V + 1, kRows], of the cluster
  float* const staged = weights + (2 * views + 1) * kRows;       // [warps, kStagedTokens, 3M]

  // Segments of the tokens, by eight lanes each.
  const int mine = lane / 8;
  const int64_t token = first_row + mine;
  const int32_t segment = token < rows ? args.segment[layer * rows + token] : -1;
  int begin = 0, count = 0;
  if (segment >= 0) {
    const int32_t* const start = args.start + layer * (rows + 1) + segment;
    begin = start[0];
    count = start[1] - begin;
  }
  const int32_t* const order = args.order + layer * rows;
  const int32_t near = lane % 8 < count ? order[begin + lane % 8] : 0;
  float2 mean, scale, bias;
  {
    const float2 even = running_column(args, layer * channels + c, active && first_row == 0);
    const float2 odd = running_column(args, layer * channels + c + 1, active && first_row == 0);
    const float* const weight = view ? args.view_weight + layer * channels : args.space_weight;
    const float* const offset = view ? args.view_bias + layer * channels : args.space_bias;
    const float2 two = *reinterpret_cast<const float2*>(weight + c);
    mean = make_float2(even.x, odd.x);
    scale = make_float2(two.x * even.y, two.y * odd.y);
    bias = *reinterpret_cast<const float2*>(offset + c);
  }
  const T* const x = static_cast<const T*>(args.features) + c;
  Lane<2> batch[kRows][kAtOnce];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) {
      const int64_t from = __shfl_sync(kAll, near, 8 * r + j);
      batch[r][j] = load<2>(x + from * channels);
    }
  }
  const float* const own_factors = factors + layer * kRows * kFactors;
  for (int r = slice; view && r < kRows; r += slices) {
    const int held = __shfl_sync(kAll, count, 8 * r), from = __shfl_sync(kAll, begin, 8 * r);
    const int own_segment = __shfl_sync(kAll, segment, 8 * r);
    float* const to = factors + (layer * kRows + r) * kFactors;
    const int64_t row = first_row + r;
    float* const means = args.inner_means + layer * rows * pad;
    if constexpr (kAttends) {
      if (held == 0) continue;  // no token
      attend_cell<Q>(args, layer, order + from, held, staged + warp * kStagedTokens * 3 * inner, to);
      __syncwarp();
      if (rank != 0 || lane >= pad) continue;
      if (order[from] == row) means[own_segment * pad + lane] = to[lane];
      if (row % args.tokens >= args.count[layer * args.clouds + row / args.tokens])
        means[row * pad + lane] = 0.0f;
    } else if (lane < kFactors) {
      to[lane] = held > 0 && lane < pad ? means[own_segment * pad + lane] : 0.0f;
    }
  }
  __syncthreads();
  float2 sum[kRows], most[kRows];
  int tokens[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    tokens[r] = __shfl_sync(kAll, count, 8 * r);
    const int from = __shfl_sync(kAll, begin, 8 * r);
    sum[r] = make_float2(0.0f, 0.0f);
    const auto take = [&](int j, const Lane<2>& two) {
      sum[r].x += two.at[0], sum[r].y += two.at[1];
      most[r].x = j == 0 ? two.at[0] : largest(most[r].x, two.at[0]);
      most[r].y = j == 0 ? two.at[1] : largest(most[r].y, two.at[1]);
    };
    most[r] = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) {
      if (j < tokens[r]) take(j, batch[r][j]);
    }
#pragma unroll 4
    for (int j = kAtOnce; j < tokens[r]; j++) take(j, load<2>(x + int64_t(order[from + j]) * channels));
  }
  if (view) {
    float2 branch[kRows] = {};
    const float* const proj = args.proj + int64_t(layer) * (inner + 1) * channels + c;
#pragma unroll
    for (int k = 0; k < kFactors; k += 4) {
      float2 row[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        row[i] = k + i <= inner ? *reinterpret_cast<const float2*>(proj + (k + i) * channels)
                                : make_float2(0.0f, 0.0f);
      }
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const float4 a = *reinterpret_cast<const float4*>(own_factors + r * kFactors + k);
        const float four[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          branch[r].x = fmaf(four[i], row[i].x, branch[r].x);
          branch[r].y = fmaf(four[i], row[i].y, branch[r].y);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; r++) most[r] = branch[r];
  }
  float2 g[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const float share = tokens[r] > 0 ? reciprocal(static_cast<float>(tokens[r])) : 0.0f;
    const float low = fmaf(sum[r].x, share, most[r].x), high = fmaf(sum[r].y, share, most[r].y);
    g[r].x = active && tokens[r] > 0 ? gelu(fmaf(low - mean.x, scale.x, bias.x)).value : 0.0f;
    g[r].y = active && tokens[r] > 0 ? gelu(fmaf(high - mean.y, scale.y, bias.y)).value : 0.0f;
    *reinterpret_cast<float2*>(activated + (layer * kRows + r) * width + own) = g[r];
  }
  __syncthreads();

  if (adaptive) {
    // Products of views and space, and squared norms of both, in the slice; then in the block.
    float value[2 * kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const float2 s = *reinterpret_cast<const float2*>(activated + (views * kRows + r) * width + own);
      value[r] = fmaf(g[r].x, s.x, g[r].y * s.y);
      value[kRows + r] = fmaf(g[r].x, g[r].x, g[r].y * g[r].y);
    }
    const float total = sums_of_warp(value, lane);
    const int which = lane / (kWarp / (2 * kRows)), r = which % kRows;
    if (lane % (kWarp / (2 * kRows)) == 0 && (view || which >= kRows)) {
      parts[((which < kRows ? layer : views + layer) * kRows + r) * slices + slice] = total;
    }
    __syncthreads();
    const int numbers = (2 * views + 1) * kRows;
    for (int i = threadIdx.x; i < numbers; i += blockDim.x) {
      float all = 0.0f;
      for (int from = 0; from < slices; from++) all += parts[i * slices + from];
      sums[i] = all;
    }
    __syncthreads();
    cluster.sync();
    for (int i = threadIdx.x; i < numbers; i += blockDim.x) {
      float all = 0.0f;
#pragma unroll
      for (int from = 0; from < kCluster; from++) all += cluster.map_shared_rank(sums, from)[i];
      weights[i] = all;
      if (rank == 0 && first_row + i % kRows < rows) {
        args.agreement[i / kRows * rows + first_row + i % kRows] = all;
      }
    }
    __syncthreads();
    if (threadIdx.x < kRows) {
      float* const at = weights + threadIdx.x;
      const auto length = [&](int what) { return rsqrtf(fmaxf(at[what * kRows], kNorm * kNorm)); };
      const float space = length(2 * views);
      float all = 0.0f;
      for (int v = 0; v < views; v++) {
        const float weight = 0.5f * (at[v * kRows] * length(views + v) * space + 1.0f);
        at[v * kRows] = weight;
        all += weight;
      }
      all = args.coefficient / fmaxf(all, kTiny);
      for (int v = 0; v < views; v++) at[v * kRows] *= all;
    }
  } else {
    for (int i = threadIdx.x; i < views * kRows; i += blockDim.x) {
      weights[i] = args.coefficient / static_cast<float>(views);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * width / 2; i += blockDim.x) {
    const int r = i / (width / 2), at = i % (width / 2) * 2;
    const int64_t to = int64_t(rank) * width + at, row = first_row + r;
    if (to >= channels || row >= rows) continue;
    Lane<2> blend = zero<2>();
    for (int v = 0; v < views; v++) {
      const float2 two = *reinterpret_cast<const float2*>(activated + (v * kRows + r) * width + at);
      blend.at[0] = fmaf(weights[v * kRows + r], two.x, blend.at[0]);
      blend.at[1] = fmaf(weights[v * kRows + r], two.y, blend.at[1]);
    }
    const int64_t place = row * channels + to;
    store_out<T>(args, place, load<2>(static_cast<const T*>(args.features) + place), 1.0f, blend);
  }
  __syncthreads();
  cluster.sync();  // other blocks have read this one's sums
#endif
}

}  // namespace

bool is_small_batch(const Guided& args) {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9 && !args.training && !args.maximum && args.ensemble != Ensemble::max &&
         args.clouds * args.tokens <= kMostRows && args.inner < kFactors && args.channels % 2 == 0 &&
         slices_of(args) * args.layers <= kMostWarps;
}

bool small_batch_attends(const Guided& args) {
  return args.inner == 2 * args.heads && args.heads <= kHeads - 1;
}

int forward_of_small_batch(const GuidedForward& args, cudaStream_t stream) {
  const int slices = slices_of(args), warps = static_cast<int>(slices * args.layers);
  const bool attends = small_batch_attends(args);
  const int64_t floats = args.layers * kRows * (slices * kSlice + kFactors) +
                         (2 * args.views + 1) * kRows * (slices + 2) +
                         (attends ? warps * kStagedTokens * 3 * args.inner : 0);
  const auto launch = [&](auto kernel) {
    const int bytes = static_cast<int>(4 * floats);
    if (const int error = allow_shared(kernel, bytes)) return error;
    const int64_t rows = args.clouds * args.tokens;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>((rows + kRows - 1) / kRows * kCluster));
    config.blockDim = dim3(static_cast<unsigned>(warps * kWarp));
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = stream;
    cudaLaunchAttribute cluster{cudaLaunchAttributeClusterDimension};
    cluster.val.clusterDim = {kCluster, 1, 1};
    config.attrs = &cluster;
    config.numAttrs = 1;
    return static_cast<int>(cudaLaunchKernelEx(&config, kernel, args));
  };
  int error = 0;
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (!attends) {
      error = launch(small_batch_kernel<T, float, false>);
      return;
    }
    with_type(args.qkv_dtype, [&](auto qkv) { error = launch(small_batch_kernel<T, decltype(qkv), true>); });
  });
  return error;
}

}  // namespace guided
}  // namespace any2point
