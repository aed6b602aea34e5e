// Gradients of LayerNorm and the product with the weights of all views' queries, keys and values. With x^ the
// normalised token, d its 1 / deviation, G the gradient of the product and dn = G W,
//
//   dx = d (dn - sum dn / C - x^ sum dn x^ / C),  dW = G' x^,  db = sum G.
//
// The sums over channels are products with what is there: sum dn = G sum(W'), sum dn x^ = G (qkv - b), so
// that both passes are plain matrix products, on tensor cores, of operands that are rounded on their way to
// shared memory. The second one takes the tokens in parts, which one more kernel adds in order.
#include <type_traits>

#include "guided_aggregate/copy.cuh"
#include "guided_aggregate/device.cuh"
#include "guided_aggregate/matrix.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kManyWarps = 16, kManyThreads = kManyWarps * kWarp;
constexpr int kTall = 128;             // tokens of a block of the first product
constexpr int kWide = 192;             // its channels
constexpr int kDeep = 224;             // columns of G at once
constexpr int kGradPitch = kDeep + 8;  // elements: rows lie in different banks
constexpr int kWidePitch = kWide + 8;
constexpr int kChannels = 128;  // of a block of the second product
constexpr int kPart = 192;      // its tokens
constexpr int kStep = 64;       // of those at once
constexpr int kChannelPitch = kChannels + 8;

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

template <typename T>
__device__ inline uint2 narrowed(const float4& four) {
  return make_uint2(rounded<T>(four.x, four.y), rounded<T>(four.z, four.w));
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

// 16 warps of 32 tokens and 48 channels.
template <typename T>
__global__ void __launch_bounds__(kManyThreads, 1)
    features_kernel(GuidedProductBackward args, float* __restrict__ biases) {  // [blocks of tokens, N]

  extern __shared__ float4 room[];
  T* const left = reinterpret_cast<T*>(room);                                   // [kTall, kGradPitch]: G
  T* const right = left + kTall * kGradPitch;                                   // [kDeep, kWidePitch]: W
  float2* const means = reinterpret_cast<float2*>(right + kDeep * kWidePitch);  // [kTall]: of dn, dn x^
  float* const totals = reinterpret_cast<float*>(means + kTall);                // [warps, kDeep]: of G
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int columns = static_cast<int>(args.columns), channels = static_cast<int>(args.channels);
  const int64_t first = int64_t(blockIdx.x) * kTall;
  const int channel = blockIdx.y * kWide, top = warp / 4 * 32, side = warp % 4 * (kWide / 4);
  const bool aligned = columns % 4 == 0;
  const T* const weight = static_cast<const T*>(args.weight);
  float sum[2][6][4] = {};
  for (int deep = 0; deep < columns; deep += kDeep) {
    if (deep > 0) __syncthreads();
    for (int i = threadIdx.x; i < kDeep * (kWide / 8); i += kManyThreads) {
      const int n = i / (kWide / 8), c = i % (kWide / 8) * 8;
      const bool inside = deep + n < columns && channel + c < channels;
      const T* from = inside ? weight + int64_t(deep + n) * channels + channel + c : weight;
      copy_async<16>(right + n * kWidePitch + c, from, inside);
    }
    copy_commit();
    // A warp takes a row, a lane 4 columns of it: their part in the sums on the way.
    float4 total_of[2] = {};
#pragma unroll 4
    for (int r = warp; r < kTall; r += kManyWarps) {
      const int64_t row = first + r;
      float value[2] = {};
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int n = half * 128 + lane * 4;
        if (n >= kDeep) continue;
        float4 grad = make_float4(0.0f, 0.0f, 0.0f, 0.0f), made = grad, bias = grad, total = grad;
        if (row < args.rows) {
          grad = four_of(args.grad + row * columns, deep + n, columns, aligned);
          made = four_of(args.product + row * columns, deep + n, columns, aligned);
          bias = four_of(args.bias, deep + n, columns, aligned);
          total = four_of(args.sums, deep + n, columns, aligned);
        }
        total_of[half].x += grad.x;
        total_of[half].y += grad.y;
        total_of[half].z += grad.z;
        total_of[half].w += grad.w;
        value[0] += fmaf(grad.x, total.x, grad.y * total.y) + fmaf(grad.z, total.z, grad.w * total.w);
        value[1] += fmaf(grad.x, made.x - bias.x, grad.y * (made.y - bias.y)) +
                    fmaf(grad.z, made.z - bias.z, grad.w * (made.w - bias.w));
        *reinterpret_cast<uint2*>(left + r * kGradPitch + n) = narrowed<T>(grad);
      }
      const float mean = sums_of_warp(value, lane) / float(channels);
      if (lane == 0) means[r].x = deep > 0 ? means[r].x + mean : mean;
      if (lane == 16) means[r].y = deep > 0 ? means[r].y + mean : mean;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int n = half * 128 + lane * 4;
      if (n < kDeep) *reinterpret_cast<float4*>(totals + warp * kDeep + n) = total_of[half];
    }
    copy_wait<0>();
    __syncthreads();
    if (blockIdx.y == 0 && threadIdx.x < kDeep && deep + threadIdx.x < columns) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kManyWarps; w++) total += totals[w * kDeep + threadIdx.x];
      biases[int64_t(blockIdx.x) * columns + deep + threadIdx.x] = total;
    }
#pragma unroll 2
    for (int k = 0; k < kDeep; k += 16) {
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
  }
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = top + 16 * m + lane / 4 + i * 8;
      const int64_t row = first + r;
      if (row >= args.rows) continue;
      const float2 mean = means[r], moment = make_float2(args.moments[row], args.moments[args.rows + row]);
      const T* const x = static_cast<const T*>(args.features) + row * channels;
      T* const out = static_cast<T*>(args.grad_features) + row * channels;
#pragma unroll
      for (int n = 0; n < 6; n++) {
        const int c = channel + side + 8 * n + lane % 4 * 2;
        if (c >= channels) continue;
        const Lane<2> value = load<2>(x + c);
        Lane<2> dx;
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const float normed = (value.at[j] - moment.x) * moment.y;
          dx.at[j] = moment.y * fmaf(-normed, mean.y, sum[m][n][2 * i + j] - mean.x);
        }
        store(out + c, dx);
      }
    }
  }
}

// 16 warps of 112 columns of G and 16 channels.
template <typename T>
__global__ void __launch_bounds__(kManyThreads, 1)
    weight_kernel(GuidedProductBackward args, float* __restrict__ all) {
  extern __shared__ float4 room[];
  T* const left = reinterpret_cast<T*>(room);  // [kStep, kGradPitch]: G
  T* const right = left + kStep * kGradPitch;  // [kStep, kChannelPitch]: x^
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int columns = static_cast<int>(args.columns), channels = static_cast<int>(args.channels);
  const int64_t first = int64_t(blockIdx.x) * kPart;
  const int64_t last = first + kPart < args.rows ? first + kPart : args.rows;
  const int channel = blockIdx.y * kChannels, deep = blockIdx.z * kDeep;
  const int top = warp / 8 * (kDeep / 2), side = warp % 8 * (kChannels / 8);
  const bool aligned = columns % 4 == 0;
  constexpr int kGrads = kStep * (kDeep / 4) / kManyThreads, kValues = kStep * (kChannels / 8) / kManyThreads;
  static_assert(kGrads * kManyThreads == kStep * (kDeep / 4), "as many for every thread");
  static_assert(kValues * kManyThreads == kStep * (kChannels / 8), "as many for every thread");
  float4 grads[kGrads];
  Pack<T, 8> values[kValues];
  float2 moments[kValues];
  const auto fetch = [&](int64_t row) {
    const float* const grad = args.grad + row * columns;
    const T* const x = static_cast<const T*>(args.features) + row * channels;
    const float *const mean = args.moments + row, *const deviation = mean + args.rows;
    const int left_rows = static_cast<int>(last - row);
#pragma unroll
    for (int j = 0; j < kGrads; j++) {
      const int i = j * kManyThreads + threadIdx.x, r = i / (kDeep / 4), n = deep + i % (kDeep / 4) * 4;
      grads[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (r < left_rows) grads[j] = four_of(grad + r * columns, n, columns, aligned);
    }
#pragma unroll
    for (int j = 0; j < kValues; j++) {
      const int i = j * kManyThreads + threadIdx.x, r = i / (kChannels / 8);
      const int c = channel + i % (kChannels / 8) * 8;
      const bool inside = r < left_rows && c < channels;
      values[j] = inside ? *reinterpret_cast<const Pack<T, 8>*>(x + r * channels + c) : Pack<T, 8>{};
      moments[j] = inside ? make_float2(mean[r], deviation[r]) : make_float2(0.0f, 0.0f);
    }
  };
  float sum[7][2][4] = {};
  fetch(first);
  for (int64_t row = first; row < last; row += kStep) {
    if (row > first) __syncthreads();
#pragma unroll
    for (int j = 0; j < kGrads; j++) {
      const int i = j * kManyThreads + threadIdx.x;
      *reinterpret_cast<uint2*>(left + i / (kDeep / 4) * kGradPitch + i % (kDeep / 4) * 4) =
          narrowed<T>(grads[j]);
    }
#pragma unroll
    for (int j = 0; j < kValues; j++) {
      const int i = j * kManyThreads + threadIdx.x;
      const auto normed = [&](int n) { return (widen(values[j].at[n]) - moments[j].x) * moments[j].y; };
      *reinterpret_cast<uint4*>(right + i / (kChannels / 8) * kChannelPitch + i % (kChannels / 8) * 8) =
          make_uint4(rounded<T>(normed(0), normed(1)), rounded<T>(normed(2), normed(3)),
                     rounded<T>(normed(4), normed(5)), rounded<T>(normed(6), normed(7)));
    }
    __syncthreads();
    if (row + kStep < last) fetch(row + kStep);
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      uint32_t b[4];
      load_transposed(b, right + (k + lane % 16) * kChannelPitch + side + lane / 16 * 8);
#pragma unroll
      for (int m = 0; m < 7; m++) {
        uint32_t a[4];
        load_transposed(a,
                        left + (k + lane / 16 * 8 + lane % 8) * kGradPitch + top + 16 * m + lane / 8 % 2 * 8);
        multiply<T>(sum[m][0], a, b[0], b[1]);
        multiply<T>(sum[m][1], a, b[2], b[3]);
      }
    }
  }
  float* const parts = all + int64_t(blockIdx.x) * columns * channels;
#pragma unroll
  for (int m = 0; m < 7; m++) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int r = deep + top + 16 * m + lane / 4 + i * 8, c = channel + side + 8 * n + lane % 4 * 2;
        if (r >= columns || c >= channels) continue;
        store(parts + int64_t(r) * channels + c, Lane<2>{{sum[m][n][2 * i], sum[m][n][2 * i + 1]}});
      }
    }
  }
}

// Sums over the parts of the tokens, four numbers of dW or one of db by each thread.
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(GuidedProductBackward args, const float* __restrict__ all,  // [parts, N, C]
                  int parts, const float* __restrict__ biases, int blocks) {  // [blocks, N]
  const int64_t weights = args.columns * args.channels;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, column = i - weights / 4;
  if (column < 0) {
    Lane<4> sum = zero<4>();
#pragma unroll 8
    for (int p = 0; p < parts; p++) add(&sum, 1.0f, load<4>(all + p * weights + 4 * i));
    store(args.grad_weight + 4 * i, sum);
  } else if (column < args.columns) {
    float sum = 0.0f;
#pragma unroll 8
    for (int p = 0; p < blocks; p++) sum += biases[p * args.columns + column];
    args.grad_bias[column] = sum;
  }
}

unsigned blocks_of(int64_t items, int64_t each) { return static_cast<unsigned>((items + each - 1) / each); }

}  // namespace
}  // namespace guided

int64_t guided_product_backward_workspace(const GuidedProductBackward& args) {
  const int64_t parts = guided::blocks_of(args.rows, guided::kPart),
                tall = guided::blocks_of(args.rows, guided::kTall);
  return 4 * args.columns * (parts * args.channels + tall);
}

int guided_product_backward_cuda(const GuidedProductBackward& args, void* workspace, void* stream_) {
  using namespace guided;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const int parts = blocks_of(args.rows, kPart), tall = blocks_of(args.rows, kTall);
  float* const memory = static_cast<float*>(workspace);
  float* const biases = memory + parts * args.columns * args.channels;
  int error = 0;
  const auto launch = [&](auto type) {
    using T = decltype(type);
    const int wide = 2 * (kTall * kGradPitch + kDeep * kWidePitch) + 8 * kTall + 4 * kManyWarps * kDeep;
    const int deep = 2 * kStep * (kGradPitch + kChannelPitch);
    error = allow_shared(features_kernel<T>, wide);
    if (error || args.rows == 0) return;
    const dim3 blocks(tall, blocks_of(args.channels, kWide));
    features_kernel<T><<<blocks, kManyThreads, wide, stream>>>(args, biases);
    const dim3 grid(parts, blocks_of(args.channels, kChannels), blocks_of(args.columns, kDeep));
    weight_kernel<T><<<grid, kManyThreads, deep, stream>>>(args, memory);
  };
  if (args.dtype == Dtype::f16) {
    launch(Half{});
  } else {
    launch(BFloat16{});
  }
  if (error) return error;
  const int64_t items = args.columns * args.channels / 4 + args.columns;
  reduce_kernel<<<blocks_of(items, kThreads), kThreads, 0, stream>>>(args, memory, parts, biases, tall);
  return cudaGetLastError();
}

}  // namespace any2point
