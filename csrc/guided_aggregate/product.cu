// LayerNorm and the product with the weights of all views' queries, keys and values, in one pass: with mean m
// and deviation d of a token's channels,
//
//   LN(x) W' + b = (x W' - m sum(W')) / d + b,
//
// so that 16-bit features go to the tensor cores as they are, and are normalised after the product; float32
// features are rounded on their way. A cluster of four blocks has kRows tokens and kColumns columns, each
// block a quarter of the channels, all of which it fetches at once; then each adds up some tokens' sums of
// all four. Few tokens are for blocks that have all channels of some columns.
//
// H200, 768 channels, 216 columns, bfloat16: 28 us for 4,096 tokens (32 with float32 tokens), 14 for
// 2,048, 3.9 for 128 (5.0). The floor of 4,096, tokens read and products written once, is 2.0 us.
#include <cooperative_groups.h>

#include "guided_aggregate/copy.cuh"
#include "guided_aggregate/device.cuh"
#include "guided_aggregate/matrix.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kCluster = 4;  // blocks that share the channels of kRows tokens
constexpr int kRows = 128;
constexpr int kTiles = 7;  // of 8 columns, per warp
constexpr int kColumns = 4 * kTiles * 8;
constexpr int kBlock = 512;     // four warps above and four beside each other
constexpr int kDepth = 64;      // channels fetched at once
constexpr int kMostDepths = 4;  // of a block
[[maybe_unused]] constexpr int kOwnRows = kRows / kCluster;
constexpr int kSumPitch = kColumns + 4;

__host__ __device__ inline int depths_of(int64_t channels) {  // of a block
  return static_cast<int>((channels + kCluster * kDepth - 1) / (kCluster * kDepth));
}

// Grid: clusters of kRows tokens, columns.
// kWhole: the tokens are rounded here.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kBlock, 1) product_kernel(GuidedProduct args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ float4 room[];
  __shared__ float2 moments[kRows];  // mean and squares about it, of the block's channels
  char* const memory = reinterpret_cast<char*>(room);
  const auto cluster = cooperative_groups::this_cluster();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, rank = blockIdx.x % kCluster;
  const int depths = depths_of(args.channels), width = depths * kDepth, pitch = 2 * width + 16;
  const int64_t row = int64_t(blockIdx.x / kCluster) * kRows, column = int64_t(blockIdx.y) * kColumns;
  const int64_t first = int64_t(rank) * width;  // channel
  const int held = static_cast<int>(max(int64_t(0), min(int64_t(width), args.channels - first)));
  const T* const x = static_cast<const T*>(args.features);
  const T* const weight = static_cast<const T*>(args.weight);
  char* const weights = memory + kRows * pitch;
  constexpr int kChunks = kDepth / 8, kOnce = kBlock / kChunks;
  const int own = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks * 8;
#pragma unroll
  for (int d = 0; d < kMostDepths; d++) {
    const int c = d * kDepth + chunk;
    const bool inside = c < held;
    if (d < depths) {
#pragma unroll
      for (int i = 0; i < kRows / kOnce && !kWhole; i++) {
        const int r = own + i * kOnce;
        const bool both = inside && row + r < args.rows;
        copy_async<16>(memory + r * pitch + 2 * c, both ? x + (row + r) * args.channels + first + c : x,
                       both);
      }
#pragma unroll
      for (int i = 0; i < (kColumns + kOnce - 1) / kOnce; i++) {
        const int n = own + i * kOnce;
        if (n >= kColumns) continue;
        const bool both = inside && column + n < args.columns;
        copy_async<16>(weights + n * pitch + 2 * c,
                       both ? weight + (column + n) * args.channels + first + c : weight, both);
      }
    }
    copy_commit();
  }
  if constexpr (kWhole) {
    uint4 eight[kMostDepths][kRows / kOnce];
#pragma unroll
    for (int d = 0; d < kMostDepths; d++) {
#pragma unroll
      for (int i = 0; i < kRows / kOnce; i++) {
        const int64_t c = d * kDepth + chunk, r = row + own + i * kOnce;
        const bool inside = d < depths && c < held && r < args.rows;
        eight[d][i] =
            inside ? narrow_eight<T>(args.whole + r * args.channels + first + c) : make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int d = 0; d < kMostDepths; d++) {
#pragma unroll
      for (int i = 0; i < kRows / kOnce; i++) {
        const int64_t c = d * kDepth + chunk, r = row + own + i * kOnce;
        if (d >= depths) continue;
        *reinterpret_cast<uint4*>(memory + (own + i * kOnce) * pitch + 2 * c) = eight[d][i];
        if (blockIdx.y > 0 || c >= held || r >= args.rows) continue;
        *reinterpret_cast<uint4*>(static_cast<T*>(args.rounded) + r * args.channels + first + c) =
            eight[d][i];
      }
    }
  }
  const int top = warp % 4 * 32, left = warp / 4 * kTiles * 8;
  float sum[2][kTiles][4] = {};
#pragma unroll
  for (int d = 0; d < kMostDepths; d++) {
    if (d >= depths) break;
    if (d == 0) copy_wait<kMostDepths - 1>();
    if (d == 1) copy_wait<kMostDepths - 2>();
    if (d == 2) copy_wait<kMostDepths - 3>();
    if (d == 3) copy_wait<0>();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[2][4], b[(kTiles + 1) / 2][4];
#pragma unroll
      for (int m = 0; m < 2; m++) {
        load_matrices(a[m],
                      memory + (top + 16 * m + lane % 16) * pitch + 2 * (d * kDepth + k + lane / 16 * 8));
      }
#pragma unroll
      for (int n = 0; n < (kTiles + 1) / 2;
           n++) {  // the last reads a tile of its neighbour, or the last again
        const int r = min(left + 16 * n + lane / 16 * 8 + lane % 8, kColumns - 1);
        load_matrices(b[n], weights + r * pitch + 2 * (d * kDepth + k + lane / 8 % 2 * 8));
      }
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
#pragma unroll
        for (int m = 0; m < 2; m++)
          multiply<T>(sum[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
  // The moments of each token, in two passes over the block's channels.
  constexpr int kPacks = kMostDepths * kDepth / (8 * kWarp);
  static_assert(kPacks == 1, "a lane has eight channels of a token at most");
#pragma unroll 4
  for (int i = 0; i < kRows / (kBlock / kWarp); i++) {
    const int r = warp + i * (kBlock / kWarp);
    Lane<8> eight = zero<8>();
    if (8 * lane < held) eight = load<8>(reinterpret_cast<const T*>(memory + r * pitch) + 8 * lane);
    float total = 0.0f, spread = 0.0f;
#pragma unroll
    for (int n = 0; n < 8; n++) total += eight.at[n];
    const float mean = sum_of_warp(total) / float(max(held, 1));
#pragma unroll
    for (int n = 0; n < 8; n++) spread = fmaf(eight.at[n] - mean, eight.at[n] - mean, spread);
    spread = sum_of_warp(8 * lane < held ? spread : 0.0f);
    if (lane == 0) moments[r] = make_float2(mean, spread);
  }
  __syncthreads();
  // Sums, where the operands were; then those of all blocks, each for some tokens.
  float* const sums = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int r = top + 16 * m + lane / 4 + i * 8, c = left + 8 * n + lane % 4 * 2;
        *reinterpret_cast<float2*>(sums + r * kSumPitch + c) =
            make_float2(sum[m][n][2 * i], sum[m][n][2 * i + 1]);
      }
    }
  }
  cluster.sync();
  const float* all[kCluster];
  const float2* all_moments[kCluster];
#pragma unroll
  for (int i = 0; i < kCluster; i++) {
    all[i] = cluster.map_shared_rank(sums, i);
    all_moments[i] = cluster.map_shared_rank(&moments[0], i);
  }
  __shared__ float2 whole[kOwnRows];
  if (threadIdx.x < kOwnRows) {
    const int r = rank * kOwnRows + threadIdx.x;
    float2 parts[kCluster];
    float mean = 0.0f, spread = 0.0f;
    const auto count = [&](int i) {
      return static_cast<float>(max(int64_t(0), min(int64_t(width), args.channels - int64_t(i) * width)));
    };
#pragma unroll
    for (int i = 0; i < kCluster; i++) parts[i] = all_moments[i][r];
#pragma unroll
    for (int i = 0; i < kCluster; i++) mean = fmaf(parts[i].x, count(i), mean);
    mean /= float(args.channels);
#pragma unroll
    for (int i = 0; i < kCluster; i++) {
      const float away = parts[i].x - mean;
      spread += fmaf(away * away, count(i), parts[i].y);
    }
    const float inverse = rsqrtf(spread / float(args.channels) + args.eps);
    whole[threadIdx.x] = make_float2(mean, inverse);
    if (blockIdx.y == 0 && row + r < args.rows) {
      args.moments[row + r] = mean;
      args.moments[args.rows + row + r] = inverse;
    }
  }
  __syncthreads();
  constexpr int kFours = kColumns / 4;
  for (int i = threadIdx.x; i < kOwnRows * kFours; i += kBlock) {
    const int r = i / kFours, c = i % kFours * 4, from = (rank * kOwnRows + r) * kSumPitch + c;
    const int64_t to = row + rank * kOwnRows + r;
    if (to >= args.rows || column + c >= args.columns) continue;
    float4 four[kCluster];
#pragma unroll
    for (int j = 0; j < kCluster; j++) four[j] = *reinterpret_cast<const float4*>(all[j] + from);
    float value[4] = {four[0].x, four[0].y, four[0].z, four[0].w};
#pragma unroll
    for (int j = 1; j < kCluster; j++) {
      value[0] += four[j].x, value[1] += four[j].y, value[2] += four[j].z, value[3] += four[j].w;
    }
    const float2 moment = whole[r];
    float* const out = args.out + to * args.columns + column + c;
#pragma unroll
    for (int n = 0; n < 4; n++) {
      if (column + c + n >= args.columns) break;
      value[n] = fmaf(value[n] - moment.x * args.sums[column + c + n], moment.y, args.bias[column + c + n]);
      if (args.columns % 4 != 0) out[n] = value[n];
    }
    if (args.columns % 4 == 0)
      *reinterpret_cast<float4*>(out) = make_float4(value[0], value[1], value[2], value[3]);
  }
  cluster.sync();  // other blocks have read
#endif
}

// The same for few tokens: 16 of them and 24 columns a block, whose warps share the depth and take their
// fragments from memory at once, eight channels of a row for two products: any order of channels is the same.
constexpr int kFewRows = 16, kFewTiles = 3, kFewColumns = 8 * kFewTiles, kFewWarps = 8;
constexpr int kFewSteps = 4;   // of 32 channels, of a warp at most
constexpr int64_t kFew = 512;  // tokens
static_assert(kFewSteps * kFewWarps * kWarp == kMostDepths * kDepth * kCluster, "as many channels");

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kFewWarps* kWarp) few_rows_kernel(GuidedProduct args) {
  __shared__ float sums[kFewWarps][kFewRows][kFewColumns + 1];
  __shared__ float totals[kFewWarps][kFewRows], spreads[kFewWarps][kFewRows];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  const int64_t row = int64_t(blockIdx.x) * kFewRows, column = int64_t(blockIdx.y) * kFewColumns;
  const int channels = static_cast<int>(args.channels);
  const T* const x = static_cast<const T*>(args.features);
  const T* const weight = static_cast<const T*>(args.weight);
  uint4 a[kFewSteps][2], b[kFewSteps][kFewTiles];
#pragma unroll
  for (int k = 0; k < kFewSteps; k++) {
    const int c = (warp + k * kFewWarps) * kWarp + 8 * q;
    const auto fetch = [&](const T* from, int64_t at, int64_t count) {
      if (c >= channels || at >= count) return make_uint4(0, 0, 0, 0);
      return *reinterpret_cast<const uint4*>(from + at * channels + c);
    };
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int64_t r = row + g + 8 * i;
      if constexpr (kWhole) {
        a[k][i] = make_uint4(0, 0, 0, 0);
        if (c >= channels || r >= args.rows) continue;
        a[k][i] = narrow_eight<T>(args.whole + r * channels + c);
        if (blockIdx.y == 0) {
          *reinterpret_cast<uint4*>(static_cast<T*>(args.rounded) + r * channels + c) = a[k][i];
        }
      } else {
        a[k][i] = fetch(x, r, args.rows);
      }
    }
#pragma unroll
    for (int n = 0; n < kFewTiles; n++) b[k][n] = fetch(weight, column + 8 * n + g, args.columns);
  }
  float sum[kFewTiles][4] = {}, total[2] = {};
  const auto each = [&](const uint4& eight, const auto& use) {
    const uint32_t two[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const Lane<2> pair = load<2>(reinterpret_cast<const T*>(two + i));
      use(pair.at[0]);
      use(pair.at[1]);
    }
  };
#pragma unroll
  for (int k = 0; k < kFewSteps; k++) {
#pragma unroll
    for (int n = 0; n < kFewTiles; n++) {
      multiply<T>(sum[n], {a[k][0].x, a[k][1].x, a[k][0].y, a[k][1].y}, b[k][n].x, b[k][n].y);
      multiply<T>(sum[n], {a[k][0].z, a[k][1].z, a[k][0].w, a[k][1].w}, b[k][n].z, b[k][n].w);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) each(a[k][i], [&](float value) { total[i] += value; });
  }
#pragma unroll
  for (int n = 0; n < kFewTiles; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) sums[warp][g + i / 2 * 8][8 * n + 2 * q + i % 2] = sum[n][i];
  }
  // The moments of each token, in two passes over its channels.
  const auto all_of = [&](float (&value)[2], float (*to)[kFewRows]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int d = 1; d < 4; d *= 2) value[i] += __shfl_xor_sync(kAll, value[i], d);
      if (q == 0) to[warp][g + 8 * i] = value[i];
    }
    __syncthreads();
  };
  const auto over_warps = [](const float (*from)[kFewRows], int r) {
    float all = 0.0f;
#pragma unroll
    for (int w = 0; w < kFewWarps; w++) all += from[w][r];
    return all;
  };
  all_of(total, totals);
  float spread[2] = {};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float mean = over_warps(totals, g + 8 * i) / float(channels);
#pragma unroll
    for (int k = 0; k < kFewSteps; k++) {
      if ((warp + k * kFewWarps) * kWarp + 8 * q >= channels) continue;
      each(a[k][i], [&](float value) { spread[i] = fmaf(value - mean, value - mean, spread[i]); });
    }
  }
  all_of(spread, spreads);
  for (int i = threadIdx.x; i < kFewRows * kFewColumns; i += kFewWarps * kWarp) {
    const int r = i / kFewColumns;
    const int64_t to = row + r, n = column + i % kFewColumns;
    if (to >= args.rows || n >= args.columns) continue;
    const float mean = over_warps(totals, r) / float(channels);
    const float inverse = rsqrtf(over_warps(spreads, r) / float(channels) + args.eps);
    float product = 0.0f;
#pragma unroll
    for (int w = 0; w < kFewWarps; w++) product += sums[w][r][i % kFewColumns];
    args.out[to * args.columns + n] = fmaf(product - mean * args.sums[n], inverse, args.bias[n]);
    if (n == 0) {
      args.moments[to] = mean;
      args.moments[args.rows + to] = inverse;
    }
  }
}

int product_of_clusters(const GuidedProduct& args, cudaStream_t stream) {
  const int pitch = depths_of(args.channels) * kDepth * 2 + 16;
  const int operands = (kRows + kColumns) * pitch, sums = kRows * kSumPitch * 4;
  const int bytes = operands > sums ? operands : sums;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((args.rows + kRows - 1) / kRows * kCluster),
                        static_cast<unsigned>((args.columns + kColumns - 1) / kColumns));
  config.blockDim = dim3(kBlock);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  cudaLaunchAttribute cluster{cudaLaunchAttributeClusterDimension};
  cluster.val.clusterDim = {kCluster, 1, 1};
  config.attrs = &cluster;
  config.numAttrs = 1;
  const auto launch = [&](auto kernel) {
    if (const int error = allow_shared(kernel, bytes)) return error;
    return static_cast<int>(cudaLaunchKernelEx(&config, kernel, args));
  };
  if (args.dtype == Dtype::f16) {
    return args.whole ? launch(product_kernel<Half, true>) : launch(product_kernel<Half, false>);
  }
  return args.whole ? launch(product_kernel<BFloat16, true>) : launch(product_kernel<BFloat16, false>);
}

}  // namespace
}  // namespace guided

bool guided_product_fits(int64_t channels) {
  using namespace guided;
  return channels % 8 == 0 && channels <= kMostDepths * kDepth * kCluster;
}

int guided_product_cuda(const GuidedProduct& args, void* stream_) {
  using namespace guided;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (args.rows == 0) return 0;
  if (args.rows > kFew) return product_of_clusters(args, stream);
  const auto launch = [&](auto kernel) {
    const dim3 grid(static_cast<unsigned>((args.rows + kFewRows - 1) / kFewRows),
                    static_cast<unsigned>((args.columns + kFewColumns - 1) / kFewColumns));
    kernel<<<grid, kFewWarps * kWarp, 0, stream>>>(args);
    return static_cast<int>(cudaGetLastError());
  };
  if (args.dtype == Dtype::f16) {
    return args.whole ? launch(few_rows_kernel<Half, true>) : launch(few_rows_kernel<Half, false>);
  }
  return args.whole ? launch(few_rows_kernel<BFloat16, true>) : launch(few_rows_kernel<BFloat16, false>);
}

}  // namespace any2point
