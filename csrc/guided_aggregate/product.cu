// LayerNorm and the product with the weights of all views' queries, keys and values, in one pass: with mean m
// and deviation d of a token's channels,
//
//   LN(x) W' + b = (x W' - m sum(W')) / d + b,
//
// so that 16-bit features go to the tensor cores as they are, and are normalised after the product. A block
// has kRows tokens, whose channels stay in shared memory for the moments, and kColumns columns of the
// product; groups of warps share the depth of every stage.
#include "guided_aggregate/copy.cuh"
#include "guided_aggregate/device.cuh"
#include "guided_aggregate/matrix.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kRows = 64;
constexpr int kTiles = 7;  // of 8 columns, per warp
constexpr int kColumns = 2 * kTiles * 8;
constexpr int kDepth = 64;               // channels of a stage
constexpr int kStages = 4;               // of the weights
constexpr int kPitch = 2 * kDepth + 16;  // bytes of a column's weights in a stage: no two in the same banks
constexpr int kSumPitch = kColumns + 4;
constexpr int kGroups = 4;  // of four warps, that share the depth of a stage
constexpr int kBlock = 4 * kGroups * kWarp;

__host__ __device__ inline int stages_of(int64_t channels) {
  return static_cast<int>((channels + kDepth - 1) / kDepth);
}

template <typename T>
__global__ void __launch_bounds__(kBlock, 1) product_kernel(GuidedProduct args) {
  extern __shared__ float4 room[];
  __shared__ float2 moments[kRows];
  char* const memory = reinterpret_cast<char*>(room);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int stages = stages_of(args.channels), pitch = stages * 2 * kDepth + 16;
  char* const ring = memory + kRows * pitch;
  const int64_t row = int64_t(blockIdx.x) * kRows, column = int64_t(blockIdx.y) * kColumns;
  const T* const x = static_cast<const T*>(args.features);
  const T* const weight = static_cast<const T*>(args.weight);

  // Each thread fetches the same channels of a stage for a few rows and columns.
  constexpr int kChunks = kDepth / 8, kOnce = kBlock / kChunks;
  constexpr int kRowsEach = kRows / kOnce, kColumnsEach = (kColumns + kOnce - 1) / kOnce;
  const int own = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks * 8;
  const T *x_at[kRowsEach], *weight_at[kColumnsEach];
  bool x_inside[kRowsEach], weight_inside[kColumnsEach];
#pragma unroll
  for (int i = 0; i < kRowsEach; i++) {
    const int64_t r = row + own + i * kOnce;
    x_inside[i] = r < args.rows;
    x_at[i] = x + (x_inside[i] ? r : 0) * args.channels + chunk;
  }
#pragma unroll
  for (int i = 0; i < kColumnsEach; i++) {
    const int64_t n = column + own + i * kOnce;
    weight_inside[i] = n < args.columns;
    weight_at[i] = weight + (weight_inside[i] ? n : 0) * args.channels + chunk;
  }
  char* const x_to = memory + own * pitch + 2 * chunk;
  char* const weight_to = ring + own * kPitch + 2 * chunk;
  const auto fetch = [&](int stage) {
    if (stage < stages) {
      const bool inside = stage * kDepth + chunk < args.channels;
#pragma unroll
      for (int i = 0; i < kRowsEach; i++) {
        const bool both = inside && x_inside[i];
        copy_async<16>(x_to + i * kOnce * pitch + stage * 2 * kDepth, both ? x_at[i] + stage * kDepth : x,
                       both);
      }
#pragma unroll
      for (int i = 0; i < kColumnsEach; i++) {
        if (own + i * kOnce >= kColumns) continue;
        const bool both = inside && weight_inside[i];
        copy_async<16>(weight_to + stage % kStages * (kColumns * kPitch) + i * kOnce * kPitch,
                       both ? weight_at[i] + stage * kDepth : weight, both);
      }
    }
    copy_commit();
  };

  const int depth = warp / 4 * (kDepth / kGroups), top = warp % 2 * 32, left = warp / 2 % 2 * kTiles * 8;
  float sum[2][kTiles][4] = {};
  for (int s = 0; s < kStages - 1; s++) fetch(s);
  for (int s = 0; s < stages; s++) {
    copy_wait<kStages - 2>();
    __syncthreads();
    fetch(s + kStages - 1);
    const char* const weights = ring + s % kStages * (kColumns * kPitch);
#pragma unroll
    for (int k = 0; k < kDepth / kGroups; k += 16) {
      uint32_t a[2][4], b[(kTiles + 1) / 2][4];
#pragma unroll
      for (int m = 0; m < 2; m++) {
        const int r = top + 16 * m + lane % 16, c = s * kDepth + depth + k + lane / 16 * 8;
        load_matrices(a[m], memory + r * pitch + 2 * c);
      }
#pragma unroll
      for (int n = 0; n < (kTiles + 1) / 2; n++) {  // the last reads a tile of its neighbour, or padding
        const int r = min(left + 16 * n + lane / 16 * 8 + lane % 8, kColumns - 1);
        load_matrices(b[n], weights + r * kPitch + 2 * (depth + k + lane / 8 % 2 * 8));
      }
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
#pragma unroll
        for (int m = 0; m < 2; m++)
          multiply<T>(sum[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
  copy_wait<0>();
  __syncthreads();

  // The moments of each token, in two passes over its channels.
  const int channels = static_cast<int>(args.channels);
#pragma unroll 2
  for (int r = warp; r < kRows; r += kBlock / kWarp) {
    const T* const from = reinterpret_cast<const T*>(memory + r * pitch);
    float total = 0.0f, spread = 0.0f;
    for (int c = 8 * lane; c < channels; c += 8 * kWarp) {
      const Lane<8> eight = load<8>(from + c);
#pragma unroll
      for (int n = 0; n < 8; n += 4) {
        total += (eight.at[n] + eight.at[n + 1]) + (eight.at[n + 2] + eight.at[n + 3]);
      }
    }
    const float mean = sum_of_warp(total) / float(channels);
    for (int c = 8 * lane; c < channels; c += 8 * kWarp) {
      const Lane<8> eight = load<8>(from + c);
#pragma unroll
      for (int n = 0; n < 8; n++) spread = fmaf(eight.at[n] - mean, eight.at[n] - mean, spread);
    }
    const float inverse = rsqrtf(sum_of_warp(spread) / float(channels) + args.eps);
    if (lane == 0) moments[r] = make_float2(mean, inverse);
  }
  __syncthreads();
  // All groups' sums, where the operands were.
  float* const sums = reinterpret_cast<float*>(memory) + warp / 4 * kRows * kSumPitch;
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
  __syncthreads();
  const int c = threadIdx.x % kWarp * 4;
  float factor[4], offset[4];
#pragma unroll
  for (int n = 0; n < 4; n++) {
    const bool inside = c < kColumns && column + c + n < args.columns;
    factor[n] = inside ? args.sums[column + c + n] : 0.0f;
    offset[n] = inside ? args.bias[column + c + n] : 0.0f;
  }
  for (int r = warp; r < kRows && row + r < args.rows; r += kBlock / kWarp) {
    if (c >= kColumns) continue;
    const float2 moment = moments[r];
    const float* const from = reinterpret_cast<const float*>(memory) + r * kSumPitch + c;
    Lane<4> total = load<4>(from);
#pragma unroll
    for (int i = 1; i < kGroups; i++) add(&total, 1.0f, load<4>(from + i * kRows * kSumPitch));
    float* const to = args.out + (row + r) * args.columns + column + c;
#pragma unroll
    for (int n = 0; n < 4; n++) {
      total.at[n] = fmaf(total.at[n] - moment.x * factor[n], moment.y, offset[n]);
      if (args.columns % 4 != 0 && column + c + n < args.columns) to[n] = total.at[n];
    }
    if (args.columns % 4 == 0 && column + c < args.columns) store(to, total);
  }
  if (blockIdx.y == 0 && threadIdx.x < kRows && row + threadIdx.x < args.rows) {
    args.moments[row + threadIdx.x] = moments[threadIdx.x].x;
    args.moments[args.rows + row + threadIdx.x] = moments[threadIdx.x].y;
  }
}

int64_t bytes_of(int64_t channels) {
  const int64_t operands =
      kRows * (int64_t(stages_of(channels)) * 2 * kDepth + 16) + kStages * kColumns * kPitch;
  const int64_t sums = int64_t(kGroups) * kRows * kSumPitch * 4;
  return operands > sums ? operands : sums;
}

}  // namespace
}  // namespace guided

bool guided_product_fits(int64_t channels) {
  return channels % 8 == 0 && guided::bytes_of(channels) + 1024 <= guided::shared_limit(int64_t(1) << 20);
}

int guided_product_cuda(const GuidedProduct& args, void* stream_) {
  using namespace guided;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (args.rows == 0) return 0;
  int error = 0;
  const auto launch = [&](auto type) {
    const auto kernel = product_kernel<decltype(type)>;
    const int bytes = static_cast<int>(bytes_of(args.channels));
    error = allow_shared(kernel, bytes);
    if (error) return;
    const dim3 grid(static_cast<unsigned>((args.rows + kRows - 1) / kRows),
                    static_cast<unsigned>((args.columns + kColumns - 1) / kColumns));
    kernel<<<grid, kBlock, bytes, stream>>>(args);
    error = cudaGetLastError();
  };
  if (args.dtype == Dtype::f16) {
    launch(Half{});
  } else {
    launch(BFloat16{});
  }
  return error;
}

}  // namespace any2point
