// Gradients of LayerNorm and the product with the weights of all views' queries, keys and values. With x^ =
// (x - m) d the normalised token, G the gradient of the product and dn = G W,
//
//   dx = d (dn - sum dn / C - x^ sum dn x^ / C),  dW = G' x^,  db = sum G.
//
// The sums over channels are products with what is there: sum dn = G sum(W'), sum dn x^ = G (qkv - b). One
// kernel takes them and rounds d G to 16 bits; of that both products are plain ones on tensor cores, whose
// operands are copied as they are: dW = (d G)' x - (d G)' m, where the last is a number for each column. Of
// 256 tokens and 96 channels, that are one block for each processor in the model's case, all three operands
// fit in shared memory at once. A third kernel adds the parts of dW that the tokens were taken in.
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
constexpr int kWide = 96;              // channels of a block of the products
constexpr int kDeep = 224;             // columns of G at once
constexpr int kFirst = 128;            // of those, what is waited for first
constexpr int kGradPitch = kDeep + 8;  // elements: rows lie in different banks
constexpr int kWidePitch = kWide + 8;
constexpr int kTalls[] = {256, 64};  // tokens of a block, as many as there is memory for
static_assert(kTalls[0] % kScaled == 0 && kTalls[1] % kScaled == 0, "parts are whole");

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
          make_uint2(pack_two<T>(g.x * inverse, g.y * inverse), pack_two<T>(g.z * inverse, g.w * inverse));
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

// dx of kTall tokens and kWide channels by warps of 32 tokens and 48 channels, and the part of dW of these
// tokens by warps of 32 columns and 48 channels. One block for each processor, if kTall is 256.
template <typename T, int kTall>
__global__ void __launch_bounds__(2 * kTall, 1) products_kernel(GuidedProductBackward args, Scaled<T> from,
                                                                float* __restrict__ all) {  // [parts, N, C]
  extern __shared__ float4 room[];
  constexpr int kBlock = 2 * kTall, kGroups = kTall / 16;  // threads, warps
  T* const grad = reinterpret_cast<T*>(room);              // [kTall, kGradPitch]: d G
  T* const weight = grad + kTall * kGradPitch;             // [kDeep, kWidePitch]: W
  T* const x = weight + kDeep * kWidePitch;                // [kTall, kWidePitch]
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  const int columns = static_cast<int>(args.columns), channels = static_cast<int>(args.channels);
  const int64_t first = int64_t(blockIdx.x) * kTall;
  const int count = static_cast<int>(min(int64_t(kTall), args.rows - first)), channel = blockIdx.y * kWide;
  const auto fetch_grad = [&](int deep, auto begin, auto end) {  // columns of it
    constexpr int kFrom = decltype(begin)::value, kChunks = (decltype(end)::value - kFrom) / 8;
#pragma unroll 4
    for (int i = threadIdx.x; i < kTall * kChunks; i += kBlock) {
      const int r = i / kChunks, n = kFrom + i % kChunks * 8;
      const bool inside = r < count && deep + n < from.pitch;
      copy_async<16>(grad + r * kGradPitch + n,
                     inside ? from.grad + (first + r) * from.pitch + deep + n : from.grad, inside);
    }
  };
  const auto fetch_rows = [&](T* to, const void* source, int64_t row, int rows, int last) {
    const T* const matrix = static_cast<const T*>(source);
#pragma unroll 4
    for (int i = threadIdx.x; i < rows * (kWide / 8); i += kBlock) {
      const int r = i / (kWide / 8), c = i % (kWide / 8) * 8;
      const bool inside = r < last && channel + c < channels;
      copy_async<16>(to + r * kWidePitch + c, inside ? matrix + (row + r) * channels + channel + c : matrix,
                     inside);
    }
  };
  const int top = warp / 2 * 32, side = warp % 2 * 48;
  float sum[2][6][4] = {};
  const auto multiply_all = [&](const T* left, const T* right, int depth, auto transposed) {
#pragma unroll 2
    for (int k = 0; k < depth; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; m++) {
        if constexpr (decltype(transposed)::value) {
          load_transposed(a[m],
                          left + (k + lane / 16 * 8 + lane % 8) * kGradPitch + 16 * m + lane / 8 % 2 * 8);
        } else {
          load_matrices(a[m], left + (16 * m + lane % 16) * kGradPitch + k + lane / 16 * 8);
        }
      }
#pragma unroll
      for (int n = 0; n < 3; n++) {
        uint32_t b[4];
        load_transposed(b, right + (k + lane % 16) * kWidePitch + 16 * n + lane / 16 * 8);
#pragma unroll
        for (int m = 0; m < 2; m++) {
          multiply<T>(sum[m][2 * n], a[m], b[0], b[1]);
          multiply<T>(sum[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  };
  constexpr std::integral_constant<int, 0> kBegin;
  constexpr std::integral_constant<int, kFirst> kMiddle;
  constexpr std::integral_constant<int, kDeep> kEnd;
  for (int deep = 0; deep < columns; deep += kDeep) {
    if (deep > 0) __syncthreads();
    const T* const rows = static_cast<const T*>(args.weight) + int64_t(deep) * channels;
    fetch_rows(weight, rows, 0, kFirst, columns - deep);
    fetch_grad(deep, kBegin, kMiddle);
    copy_commit();
    fetch_rows(weight + kFirst * kWidePitch, rows, kFirst, kDeep - kFirst, columns - deep - kFirst);
    fetch_grad(deep, kMiddle, kEnd);
    copy_commit();
    if (deep == 0) fetch_rows(x, args.features, first, kTall, count);
    copy_commit();
    copy_wait<2>();
    __syncthreads();
    multiply_all(grad + top * kGradPitch, weight + side, kFirst, std::false_type{});
    copy_wait<1>();
    __syncthreads();
    multiply_all(grad + top * kGradPitch + kFirst, weight + kFirst * kWidePitch + side, kDeep - kFirst,
                 std::false_type{});
  }
  copy_wait<0>();
  __syncthreads();
#pragma unroll
  for (int m = 0; m < 2; m++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = top + 16 * m + g + i * 8;
      if (r >= count) continue;
      const int64_t row = first + r;
      const float2 mean = from.means[row];
      const float center = args.moments[row], inverse = args.moments[args.rows + row];
      T* const out = static_cast<T*>(args.grad_features) + row * channels + channel;
#pragma unroll
      for (int n = 0; n < 6; n++) {
        const int c = side + 8 * n + 2 * q;
        if (channel + c >= channels) continue;
        const Lane<2> value = load<2>(x + r * kWidePitch + c);
        Lane<2> dx;
#pragma unroll
        for (int j = 0; j < 2; j++) {
          dx.at[j] = fmaf(-(value.at[j] - center) * inverse, mean.y, sum[m][n][2 * i + j] - mean.x);
        }
        store(out + c, dx);
      }
    }
  }
  float* const to = all + int64_t(blockIdx.x) * columns * channels + channel;
  for (int deep = 0; deep < columns; deep += kDeep) {
    if (columns > kDeep) {
      __syncthreads();
      fetch_grad(deep, kBegin, kEnd);
      copy_commit();
      copy_wait<0>();
      __syncthreads();
    }
    for (int unit = warp; unit < kDeep / 32 * 2; unit += kGroups) {
      const int upper = unit / 2 * 32, left = unit % 2 * 48, own = deep + upper + lane;
      float moved = 0.0f;
      if (own < columns) {
        const float2* const sums = from.sums + first / kScaled * columns + own;
        const int blocks = (count + kScaled - 1) / kScaled;
#pragma unroll 8
        for (int b = 0; b < blocks; b++) moved += sums[int64_t(b) * columns].y;
      }
#pragma unroll
      for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < 6; n++) {
#pragma unroll
          for (int i = 0; i < 4; i++) sum[m][n][i] = 0.0f;
        }
      }
      multiply_all(grad + upper, x + left, kTall, std::true_type{});
#pragma unroll
      for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int r = 16 * m + g + i * 8, column = deep + upper + r;
          const float less = __shfl_sync(kAll, moved, r);
          if (column >= columns) continue;
#pragma unroll
          for (int n = 0; n < 6; n++) {
            const int c = left + 8 * n + 2 * q;
            if (channel + c >= channels) continue;
            store(to + int64_t(column) * channels + c,
                  Lane<2>{{sum[m][n][2 * i] - less, sum[m][n][2 * i + 1] - less}});
          }
        }
      }
    }
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

// Bytes of shared memory of a block of products_kernel.
constexpr int bytes_of(int tall) { return 2 * (tall * kGradPitch + kDeep * kWidePitch + tall * kWidePitch); }
int tall() { return bytes_of(kTalls[0]) <= shared_limit(kOptIn) ? kTalls[0] : kTalls[1]; }

// The arrays of the workspace.
struct Sizes {
  int64_t pitch, parts, blocks;  // of d G; of dW; of the sums
  int64_t grad, means, sums, all, bytes = 0;

  explicit Sizes(const GuidedProductBackward& args) {
    pitch = blocks_of(args.columns, 8) * 8;
    parts = blocks_of(args.rows, tall());
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
    const Scaled<T> scaled{reinterpret_cast<T*>(memory + sizes.grad),
                           reinterpret_cast<float2*>(memory + sizes.means), sums,
                           static_cast<int>(sizes.pitch)};
    const auto multiply_both = [&](auto constant) {
      constexpr int kTall = decltype(constant)::value, kBytes = bytes_of(kTall);
      error = allow_shared(products_kernel<T, kTall>, kBytes);
      if (error || args.rows == 0) return;
      scale_kernel<T><<<blocks, kThreads, 0, stream>>>(args, scaled);
      const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(blocks_of(args.channels, kWide)));
      products_kernel<T, kTall><<<grid, 2 * kTall, kBytes, stream>>>(args, scaled, all);
    };
    if (tall() == kTalls[0]) {
      multiply_both(std::integral_constant<int, kTalls[0]>{});
    } else {
      multiply_both(std::integral_constant<int, kTalls[1]>{});
    }
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
