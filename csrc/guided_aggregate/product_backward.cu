// Gradients of LayerNorm and the product with the weights of all views' queries, keys and values. With x^ =
// (x - m) d the normalised token, G the gradient of the product and dn = G W,
//
//   dx = d (dn - sum dn / C - x^ sum dn x^ / C),  dW = G' x^,  db = sum G.
//
// The sums over channels are products with what is there: sum dn = G sum(W'), sum dn x^ = G (qkv - b). One
// kernel takes them and rounds d G to 16 bits; of that both products are plain ones on tensor cores, whose
// operands are copied as they are: dW = (d G)' x - (d G)' m, where the last is a number for each column. A
// third kernel adds the parts of dW that the tokens were taken in.
#include <type_traits>

#include "guided_aggregate/copy.cuh"
#include "guided_aggregate/device.cuh"
#include "guided_aggregate/matrix.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kWarps = kThreads / kWarp;
constexpr int kEach = 4;  // tokens of a warp that scales
constexpr int kScaled = kWarps * kEach;
constexpr int kChunk = 4 * kWarp;      // columns that it takes at once
constexpr int kTall = 128;             // tokens of a block of the first product
constexpr int kWide = 96;              // its channels
constexpr int kDeep = 224;             // columns of G at once
constexpr int kFirst = 128;            // of those, what is waited for first
constexpr int kGradPitch = kDeep + 8;  // elements: rows lie in different banks
constexpr int kWidePitch = kWide + 8;
constexpr int kChannels = 64;  // of a block of the second product
constexpr int kPart = 256;     // its tokens
constexpr int kStep = 64;      // of those at once
constexpr int kStages = 2;
constexpr int kChannelPitch = kChannels + 8;
constexpr int kDeepWarps = kDeep / 32;
static_assert(kPart % kScaled == 0 && kDeepWarps <= kWarps, "parts are whole, and all columns have a warp");

// Two numbers, rounded, the first in the low half.
template <typename T>
__device__ inline uint32_t rounded(float low, float high) {
  uint32_t both = 0;
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
#else
  T parts[2];
  narrow(low, parts);
  narrow(high, parts + 1);
  both = parts[0].bits | uint32_t(parts[1].bits) << 16;
#endif
  return both;
}

// Columns [first, first + 4) of a row of `columns`, zeros beyond.
__device__ inline float4 four_of(const float* row, int first, int columns, bool aligned) {
  if (aligned && first + 4 <= columns) return *reinterpret_cast<const float4*>(row + first);
  float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (first < columns) four.x = row[first];
  if (first + 1 < columns) four.y = row[first + 1];
  if (first + 2 < columns) four.z = row[first + 2];
  if (first + 3 < columns) four.w = row[first + 3];
  return four;
}

// What the first kernel leaves for the others.
template <typename T>
struct Scaled {
  T* grad;        // [R, pitch]: d G
  float2* means;  // [R]: d times the means of dn and of dn x^
  float2* sums;   // [blocks of kScaled tokens, N]: of G, of d G m
  int pitch;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) scale_kernel(GuidedProductBackward args, Scaled<T> to) {
  __shared__ float2 totals[kWarps][kChunk];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int columns = static_cast<int>(args.columns);
  const bool aligned = columns % 4 == 0;
  const int64_t first = int64_t(blockIdx.x) * kScaled + warp * kEach;
  const int count = static_cast<int>(first < args.rows ? min(int64_t(kEach), args.rows - first) : 0);
  float2 moments[kEach];
#pragma unroll
  for (int j = 0; j < kEach; j++) {
    moments[j] = make_float2(0.0f, 0.0f);
    if (j < count) moments[j] = make_float2(args.moments[first + j], args.moments[args.rows + first + j]);
  }
  float value[2 * kEach] = {};
  for (int chunk = 0; chunk < columns; chunk += kChunk) {
    const int n = chunk + 4 * lane;
    float4 grad[kEach], made[kEach];
#pragma unroll
    for (int j = 0; j < kEach; j++) {
      grad[j] = made[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (j >= count) continue;
      grad[j] = four_of(args.grad + (first + j) * columns, n, columns, aligned);
      made[j] = four_of(args.product + (first + j) * columns, n, columns, aligned);
    }
    const float4 bias = four_of(args.bias, n, columns, aligned);
    const float4 sum = four_of(args.sums, n, columns, aligned);
    float4 plain = make_float4(0.0f, 0.0f, 0.0f, 0.0f), moved = plain;
#pragma unroll
    for (int j = 0; j < kEach; j++) {
      const float4 g = grad[j];
      const float mean = moments[j].x, inverse = moments[j].y;
      value[2 * j] += fmaf(g.x, sum.x, g.y * sum.y) + fmaf(g.z, sum.z, g.w * sum.w);
      value[2 * j + 1] += fmaf(g.x, made[j].x - bias.x, g.y * (made[j].y - bias.y)) +
                          fmaf(g.z, made[j].z - bias.z, g.w * (made[j].w - bias.w));
      const uint2 four =
          make_uint2(rounded<T>(g.x * inverse, g.y * inverse), rounded<T>(g.z * inverse, g.w * inverse));
      const Lane<4> scaled = load<4>(reinterpret_cast<const T*>(&four));
      plain = make_float4(plain.x + g.x, plain.y + g.y, plain.z + g.z, plain.w + g.w);
      moved = make_float4(fmaf(scaled.at[0], mean, moved.x), fmaf(scaled.at[1], mean, moved.y),
                          fmaf(scaled.at[2], mean, moved.z), fmaf(scaled.at[3], mean, moved.w));
      if (j < count && n < to.pitch) *reinterpret_cast<uint2*>(to.grad + (first + j) * to.pitch + n) = four;
    }
    float4* const own = reinterpret_cast<float4*>(totals[warp] + 4 * lane);
    own[0] = make_float4(plain.x, moved.x, plain.y, moved.y);
    own[1] = make_float4(plain.z, moved.z, plain.w, moved.w);
    __syncthreads();
    if (threadIdx.x < kChunk && chunk + threadIdx.x < columns) {
      float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < kWarps; w++) {
        total.x += totals[w][threadIdx.x].x;
        total.y += totals[w][threadIdx.x].y;
      }
      to.sums[int64_t(blockIdx.x) * columns + chunk + threadIdx.x] = total;
    }
    __syncthreads();
  }
  const float total = sums_of_warp(value, lane);
  const int which = lane / (kWarp / (2 * kEach)), token = which / 2;
  if (lane % (kWarp / (2 * kEach)) == 0 && token < count) {
    const float inverse = args.moments[args.rows + first + token] / static_cast<float>(args.channels);
    reinterpret_cast<float*>(to.means + first + token)[which % 2] = total * inverse;
  }
}

// dx of kTall tokens and kWide channels, by warps of 32 tokens and 48 channels.
template <typename T>
__device__ __forceinline__ void multiply_features(const GuidedProductBackward& args, const Scaled<T>& from,
                                                  int tile, char* memory) {
  T* const left = reinterpret_cast<T*>(memory);  // [kTall, kGradPitch]: d G
  T* const right = left + kTall * kGradPitch;    // [kDeep, kWidePitch]: W
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int columns = static_cast<int>(args.columns), channels = static_cast<int>(args.channels);
  const int across = (channels + kWide - 1) / kWide;
  const int64_t first = int64_t(tile / across) * kTall;
  const int channel = tile % across * kWide, top = warp / 2 * 32, side = warp % 2 * 48;
  const T* const weight = static_cast<const T*>(args.weight);
  const auto fetch = [&](int deep, int begin, int end) {
    const int chunks = (end - begin) / 8;
#pragma unroll 1
    for (int i = threadIdx.x; i < kTall * chunks; i += kThreads) {
      const int r = i / chunks, n = begin + i % chunks * 8;
      const bool inside = first + r < args.rows && deep + n < from.pitch;
      copy_async<16>(left + r * kGradPitch + n,
                     inside ? from.grad + (first + r) * from.pitch + deep + n : from.grad, inside);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < (end - begin) * (kWide / 8); i += kThreads) {
      const int n = begin + i / (kWide / 8), c = i % (kWide / 8) * 8;
      const bool inside = deep + n < columns && channel + c < channels;
      copy_async<16>(right + n * kWidePitch + c,
                     inside ? weight + int64_t(deep + n) * channels + channel + c : weight, inside);
    }
    copy_commit();
  };
  float sum[2][6][4] = {};
  const auto multiply_all = [&](int begin, int end) {
#pragma unroll 2
    for (int k = begin; k < end; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; m++) {
        load_matrices(a[m], left + (top + 16 * m + lane % 16) * kGradPitch + k + lane / 16 * 8);
      }
#pragma unroll
      for (int n = 0; n < 3; n++) {
        uint32_t b[4];
        load_transposed(b, right + (k + lane % 16) * kWidePitch + side + 16 * n + lane / 16 * 8);
#pragma unroll
        for (int m = 0; m < 2; m++) {
          multiply<T>(sum[m][2 * n], a[m], b[0], b[1]);
          multiply<T>(sum[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  };
  fetch(0, 0, kFirst);
  fetch(0, kFirst, kDeep);
  Pack<T, 2> x[2][2][6];
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int64_t row = min(first + top + 16 * m + lane / 4 + i * 8, args.rows - 1);
      const T* const at = static_cast<const T*>(args.features) + row * channels;
#pragma unroll
      for (int n = 0; n < 6; n++) {
        const int c = channel + side + 8 * n + lane % 4 * 2;
        x[m][i][n] = *reinterpret_cast<const Pack<T, 2>*>(at + (c < channels ? c : 0));
      }
    }
  }
  for (int deep = 0; deep < columns; deep += kDeep) {
    if (deep > 0) {
      __syncthreads();
      fetch(deep, 0, kFirst);
      fetch(deep, kFirst, kDeep);
    }
    copy_wait<1>();
    __syncthreads();
    multiply_all(0, kFirst);
    copy_wait<0>();
    __syncthreads();
    multiply_all(kFirst, kDeep);
  }
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int64_t row = first + top + 16 * m + lane / 4 + i * 8;
      if (row >= args.rows) continue;
      const float2 mean = from.means[row];
      const float center = args.moments[row], inverse = args.moments[args.rows + row];
      T* const out = static_cast<T*>(args.grad_features) + row * channels;
#pragma unroll
      for (int n = 0; n < 6; n++) {
        const int c = channel + side + 8 * n + lane % 4 * 2;
        if (c >= channels) continue;
        Lane<2> dx;
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const float normed = (widen(x[m][i][n].at[j]) - center) * inverse;
          dx.at[j] = fmaf(-normed, mean.y, sum[m][n][2 * i + j] - mean.x);
        }
        store(out + c, dx);
      }
    }
  }
}

// A part of dW, of kPart tokens, kDeep columns of G and kChannels channels, by warps of 32 columns.
template <typename T>
__device__ __forceinline__ void multiply_weights(const GuidedProductBackward& args, const Scaled<T>& from,
                                                 int tile,
                                                 float* __restrict__ all,  // [parts, N, C]
                                                 char* memory) {
  constexpr int kStage = kStep * (kGradPitch + kChannelPitch);
  T* const stages =
      reinterpret_cast<T*>(memory);  // [kStages]: d G [kStep, kGradPitch], x [.., kChannelPitch]
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int columns = static_cast<int>(args.columns), channels = static_cast<int>(args.channels);
  const int across = (channels + kChannels - 1) / kChannels, deeps = (columns + kDeep - 1) / kDeep;
  const int part = tile / (across * deeps), deep = tile / across % deeps * kDeep;
  const int channel = tile % across * kChannels, top = warp * 32;
  const int64_t first = int64_t(part) * kPart;
  const int count = static_cast<int>(min(int64_t(kPart), args.rows - first));
  const T* const x = static_cast<const T*>(args.features);
  const auto fetch = [&](int step) {
    T* const left = stages + step % kStages * kStage;
    T* const right = left + kStep * kGradPitch;
    const int64_t row = first + step * kStep;
    const int rows = count - step * kStep;
    if (rows > 0) {
#pragma unroll 1
      for (int i = threadIdx.x; i < kStep * (kDeep / 8); i += kThreads) {
        const int r = i / (kDeep / 8), n = i % (kDeep / 8) * 8;
        const bool inside = r < rows && deep + n < from.pitch;
        copy_async<16>(left + r * kGradPitch + n,
                       inside ? from.grad + (row + r) * from.pitch + deep + n : from.grad, inside);
      }
#pragma unroll 1
      for (int i = threadIdx.x; i < kStep * (kChannels / 8); i += kThreads) {
        const int r = i / (kChannels / 8), c = i % (kChannels / 8) * 8;
        const bool inside = r < rows && channel + c < channels;
        copy_async<16>(right + r * kChannelPitch + c, inside ? x + (row + r) * channels + channel + c : x,
                       inside);
      }
    }
    copy_commit();
  };
#pragma unroll
  for (int s = 0; s < kStages; s++) fetch(s);
  float moved = 0.0f;  // of column top + lane
  if (warp < kDeepWarps && deep + top + lane < columns) {
    const float2* const sums = from.sums + first / kScaled * columns + deep + top + lane;
    const int blocks = (count + kScaled - 1) / kScaled;
#pragma unroll 8
    for (int b = 0; b < blocks; b++) moved += sums[int64_t(b) * columns].y;
  }
  float sum[2][8][4] = {};
  for (int step = 0; step * kStep < count; step++) {
    const T* const left = stages + step % kStages * kStage;
    const T* const right = left + kStep * kGradPitch;
    copy_wait<kStages - 1>();
    __syncthreads();
    if (warp < kDeepWarps) {
#pragma unroll
      for (int k = 0; k < kStep; k += 16) {
        uint32_t a[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++) {
          load_transposed(
              a[m], left + (k + lane / 16 * 8 + lane % 8) * kGradPitch + top + 16 * m + lane / 8 % 2 * 8);
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
          uint32_t b[4];
          load_transposed(b, right + (k + lane % 16) * kChannelPitch + 16 * n + lane / 16 * 8);
#pragma unroll
          for (int m = 0; m < 2; m++) {
            multiply<T>(sum[m][2 * n], a[m], b[0], b[1]);
            multiply<T>(sum[m][2 * n + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
    __syncthreads();
    fetch(step + kStages);
  }
  float* const to = all + int64_t(part) * columns * channels;
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = 16 * m + lane / 4 + i * 8, n = deep + top + r;
      const float less = __shfl_sync(kAll, moved, r);
      if (warp >= kDeepWarps || n >= columns) continue;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int c = channel + 8 * j + lane % 4 * 2;
        if (c >= channels) continue;
        store(to + int64_t(n) * channels + c,
              Lane<2>{{sum[m][j][2 * i] - less, sum[m][j][2 * i + 1] - less}});
      }
    }
  }
}

// Both products, that of the weights in the first blocks, which take longer.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    products_kernel(GuidedProductBackward args, Scaled<T> from, int weights, float* __restrict__ parts) {
  extern __shared__ float4 room[];
  char* const memory = reinterpret_cast<char*>(room);
  const int tile = static_cast<int>(blockIdx.x);
  if (tile < weights) {
    multiply_weights(args, from, tile, parts, memory);
  } else {
    multiply_features(args, from, tile - weights, memory);
  }
}

// Sums over the parts of the tokens, four numbers of dW by each thread or one of db by each warp.
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(GuidedProductBackward args, const float* __restrict__ all, int parts,  // [parts, N, C]
                  const float2* __restrict__ sums, int blocks) {                         // [blocks, N]
  const int64_t weights = args.columns * args.channels;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t matrix = (weights / 4 + kWarp - 1) / kWarp * kWarp, column = (i - matrix) / kWarp;
  if (i < matrix) {
    if (4 * i >= weights) return;
    Lane<4> sum = zero<4>();
#pragma unroll 8
    for (int p = 0; p < parts; p++) add(&sum, 1.0f, load<4>(all + p * weights + 4 * i));
    store(args.grad_weight + 4 * i, sum);
  } else if (column < args.columns) {
    float sum = 0.0f;
    for (int p = threadIdx.x % kWarp; p < blocks; p += kWarp) sum += sums[p * args.columns + column].x;
    sum = sum_of_warp(sum);
    if (threadIdx.x % kWarp == 0) args.grad_bias[column] = sum;
  }
}

int64_t blocks_of(int64_t items, int64_t each) { return (items + each - 1) / each; }

// The arrays of the workspace.
struct Sizes {
  int64_t pitch, parts, blocks;  // of d G; of dW; of the sums
  int64_t grad, means, sums, all, bytes = 0;

  explicit Sizes(const GuidedProductBackward& args) {
    pitch = blocks_of(args.columns, 8) * 8;
    parts = blocks_of(args.rows, kPart);
    blocks = blocks_of(args.rows, kScaled);
    grad = take(2 * args.rows * pitch);
    means = take(8 * args.rows);
    sums = take(8 * blocks * args.columns);
    all = take(4 * parts * args.columns * args.channels);
  }
  int64_t take(int64_t size) {
    const int64_t at = bytes;
    bytes += (size + 255) / 256 * 256;
    return at;
  }
};

}  // namespace
}  // namespace guided

int64_t guided_product_backward_workspace(const GuidedProductBackward& args) {
  return guided::Sizes(args).bytes;
}

int guided_product_backward_cuda(const GuidedProductBackward& args, void* workspace, void* stream_) {
  using namespace guided;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Sizes sizes(args);
  char* const memory = static_cast<char*>(workspace);
  float2* const sums = reinterpret_cast<float2*>(memory + sizes.sums);
  float* const all = reinterpret_cast<float*>(memory + sizes.all);
  const int parts = static_cast<int>(sizes.parts), blocks = static_cast<int>(sizes.blocks);
  int error = 0;
  const auto launch = [&](auto type) {
    using T = decltype(type);
    constexpr int kFeatures = 2 * (kTall * kGradPitch + kDeep * kWidePitch);
    constexpr int kWeights = 2 * kStages * kStep * (kGradPitch + kChannelPitch);
    constexpr int kBytes = kFeatures > kWeights ? kFeatures : kWeights;
    error = allow_shared(products_kernel<T>, kBytes);
    if (error || args.rows == 0) return;
    const Scaled<T> scaled{reinterpret_cast<T*>(memory + sizes.grad),
                           reinterpret_cast<float2*>(memory + sizes.means), sums,
                           static_cast<int>(sizes.pitch)};
    scale_kernel<T><<<blocks, kThreads, 0, stream>>>(args, scaled);
    const int64_t weights = parts * blocks_of(args.channels, kChannels) * blocks_of(args.columns, kDeep);
    const int64_t features = blocks_of(args.rows, kTall) * blocks_of(args.channels, kWide);
    products_kernel<T><<<static_cast<unsigned>(weights + features), kThreads, kBytes, stream>>>(
        args, scaled, static_cast<int>(weights), all);
  };
  if (args.dtype == Dtype::f16) {
    launch(Half{});
  } else {
    launch(BFloat16{});
  }
  if (error) return error;
  const int64_t items = blocks_of(args.columns * args.channels / 4, kWarp) * kWarp + args.columns * kWarp;
  reduce_kernel<<<static_cast<unsigned>(blocks_of(items, kThreads)), kThreads, 0, stream>>>(args, all, parts,
                                                                                            sums, blocks);
  return cudaGetLastError();
}

}  // namespace any2point
