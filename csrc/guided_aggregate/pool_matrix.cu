// Tokens pooled into rows as products of matrices: 16-bit features of clouds of up to kTokens tokens, means
// over cells. A row of n tokens is 1 / n times
//
//   [membership (0 or 1)  n inner] [x; proj],
//
// whose first part is exact in 16 bits; inner and proj are split into two bfloat16 each. A warp has kWide
// channels of all rows, so that its sums for batch normalisation are complete. Where all rows of a channel
// are nearly the same, normalisation makes much of small errors: so the smallest product of the parts counts,
// too, and squares are summed about a row.
#include "guided_aggregate/copy.cuh"
#include "guided_aggregate/matrix.cuh"
#include "guided_aggregate/pool.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kTokens = 128;
constexpr int kWide = 16;  // channels of a warp
constexpr int kWidth = kWarps * kWide;
constexpr int kChunk = 64;    // rows at once
constexpr int kFactors = 16;  // M + 1 at most
constexpr int kColumns = kTokens + 2 * kFactors;
constexpr int kRowPitch = kColumns + 8, kTokenPitch = kWidth + 8;  // elements: no two rows in the same banks
constexpr int kViews = 3;                                          // of a block at most
static_assert(kWidth == kWarp * 4, "slices of voxels are those of views");

struct Memory {
  uint16_t x[kTokens][kTokenPitch];
  uint16_t rows[kChunk][kRowPitch];  // membership; n inner, rounded; what rounding left
  float share[kChunk];               // 1 / n
  float pivot[kWidth];               // the view's first row
  int held[kViews];                  // rows of each view
};
struct VoxelMemory {
  float2 spreads[kWarps * kWidth];
  int32_t sizes[kWarps];
};

__device__ inline uint32_t rounded(float low, float high) { return narrow_two(low, high, BFloat16{}); }
__device__ inline float first_of(uint32_t two) { return detail::float_of_bits(two << 16); }
__device__ inline float second_of(uint32_t two) { return detail::float_of_bits(two & 0xffff0000u); }

// What a thread fetches ahead for a chunk of rows of a view.
struct Ahead {
  int32_t segment;   // of token threadIdx.x
  int tokens;        // n of row threadIdx.x / 4
  Lane<4> inner;     // of that row, the coefficients from threadIdx.x % 4 * 4 on
  float proj[2][4];  // of two tiles of channels, as the fragments of a product have them
};

// Grid: clouds, slices of channels, voxels if there are any and then groups of `group` views.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    pool_matrix_kernel(Guided args, Rows to, int group, bool statistics) {
  extern __shared__ float4 room[];
  // Voxels first: they wait for memory the longest.
  const bool voxels = args.layers > args.views;
  const int64_t first_view = int64_t(blockIdx.z - voxels) * group;
  if (blockIdx.z < voxels) {
    VoxelMemory& memory = *reinterpret_cast<VoxelMemory*>(room);
    return pool_voxels<T, 4>(args, to, memory.spreads, memory.sizes, statistics);
  }
  Memory& memory = *reinterpret_cast<Memory*>(room);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  const int64_t cloud = blockIdx.x, rows = args.clouds * args.tokens, channels = args.channels;
  const int32_t base = static_cast<int32_t>(cloud * args.tokens);
  const int64_t column = int64_t(blockIdx.y) * kWidth;
  const int count = static_cast<int>(args.tokens), inner = static_cast<int>(args.inner);
  const int pad = static_cast<int>(coefficients(inner));
  const int last_view = static_cast<int>(min(first_view + group, args.views));

  for (int i = threadIdx.x; i < kTokens * (kWidth / 8); i += kThreads) {
    const int token = i / (kWidth / 8), c = i % (kWidth / 8) * 8;
    const bool inside = token < count && column + c < channels;
    const T* const x = static_cast<const T*>(args.features);
    copy_async<16>(memory.x[token] + c, inside ? x + (base + token) * channels + column + c : x, inside);
  }
  copy_commit();

  int view = static_cast<int>(first_view), chunk = 0, held = args.count[view * args.clouds + cloud];
  if (threadIdx.x < last_view - view) {
    memory.held[threadIdx.x] = args.count[(view + threadIdx.x) * args.clouds + cloud];
  }
  Ahead ahead;
  const int own_row = threadIdx.x / 4, own_factor = threadIdx.x % 4 * 4, pitch = static_cast<int>(channels);
  const bool inside[2] = {column + warp * kWide < channels, column + warp * kWide + 8 < channels};
  const auto fetch = [&] {
    const int64_t first = view * rows + base;
    const int32_t* const segment_at = args.segment + first + threadIdx.x;
    const int32_t* const start_at = args.start + first + view + chunk + own_row;
    const float* const inner_at = to.inner + (first + chunk + own_row) * pad + own_factor;
    const float* const proj_at =
        args.proj + (int64_t(view) * (inner + 1) + 2 * q) * channels + column + warp * kWide + g;
    ahead.segment = threadIdx.x < count ? *segment_at - base : -1;
    ahead.tokens = 0;
    ahead.inner = zero<4>();
    if (chunk + own_row < held) {
      ahead.tokens = start_at[1] - start_at[0];
      if (own_factor < pad) ahead.inner = load<4>(inner_at);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int k = i % 2 + i / 2 * 8;
#pragma unroll
      for (int n = 0; n < 2; n++) {
        ahead.proj[n][i] = inside[n] && 2 * q + k <= inner ? proj_at[k * pitch + 8 * n] : 0.0f;
      }
    }
  };
  fetch();
  for (int i = threadIdx.x; i < int(sizeof(memory.rows) / 16); i += kThreads) {
    reinterpret_cast<float4*>(memory.rows)[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  copy_wait<0>();
  __syncthreads();
  const uint16_t* const x_at = memory.x[lane % 16] + warp * kWide + lane / 16 * 8;

  constexpr uint16_t kOne = std::is_same<T, Half>::value ? 0x3c00 : 0x3f80;
  int32_t member = -1;  // row whose membership this thread's token has
  // About the view's first row, not a token: the branch moves all rows away from their tokens.
  float sums[2][2] = {}, squares[2][2] = {};
  float* const pivot_at = memory.pivot + warp * kWide + 2 * q;
  while (view < last_view) {
    // Each thread has a column of the membership and four coefficients of a row.
    if (member >= 0) memory.rows[member][threadIdx.x] = 0;
    member = ahead.segment - chunk;
    if (member < 0 || member >= kChunk) member = -1;
    if (member >= 0) memory.rows[member][threadIdx.x] = kOne;
    {
      const int row = threadIdx.x / 4, k = kTokens + threadIdx.x % 4 * 4;
      const float tokens = float(ahead.tokens);
      uint32_t high[2], low[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float a = ahead.inner.at[2 * i] * tokens, b = ahead.inner.at[2 * i + 1] * tokens;
        high[i] = rounded(a, b);
        low[i] = rounded(a - first_of(high[i]), b - second_of(high[i]));
      }
      *reinterpret_cast<uint2*>(memory.rows[row] + k) = make_uint2(high[0], high[1]);
      *reinterpret_cast<uint2*>(memory.rows[row] + k + kFactors) = make_uint2(low[0], low[1]);
      if (threadIdx.x % 4 == 0) memory.share[row] = ahead.tokens > 0 ? reciprocal(tokens) : 0.0f;
    }
    uint32_t proj[2][2], rest[2][2];  // rounded, and what rounding left
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float a = ahead.proj[n][2 * i], b = ahead.proj[n][2 * i + 1];
        proj[n][i] = rounded(a, b);
        rest[n][i] = rounded(a - first_of(proj[n][i]), b - second_of(proj[n][i]));
      }
    }
    __syncthreads();
    const int own = view, own_chunk = chunk, own_held = held;
    chunk += kChunk;
    if (chunk >= held) {
      view++;
      chunk = 0;
      if (view < last_view) held = memory.held[view - first_view];
    }
    if (view < last_view) fetch();

    const int tiles = (min(own_held - own_chunk, kChunk) + 15) / 16;
    const uint16_t* const from = memory.rows[lane % 16] + lane / 16 * 8;
    float sum[kChunk / 16][2][4] = {};
#pragma unroll
    for (int k = 0; k < kTokens; k += 16) {
      uint32_t x[4];
      load_transposed(x, x_at + k * kTokenPitch);
#pragma unroll
      for (int m = 0; m < kChunk / 16; m++) {
        if (m >= tiles) break;
        uint32_t a[4];
        load_matrices(a, from + 16 * m * kRowPitch + k);
#pragma unroll
        for (int n = 0; n < 2; n++) multiply<T>(sum[m][n], a, x[2 * n], x[2 * n + 1]);
      }
    }
#pragma unroll
    for (int m = 0; m < kChunk / 16; m++) {
      if (m >= tiles) break;
      uint32_t high[4], low[4];
      load_matrices(high, from + 16 * m * kRowPitch + kTokens);
      load_matrices(low, from + 16 * m * kRowPitch + kTokens + kFactors);
#pragma unroll
      for (int n = 0; n < 2; n++) {
        multiply<BFloat16>(sum[m][n], low, rest[n][0], rest[n][1]);
        multiply<BFloat16>(sum[m][n], low, proj[n][0], proj[n][1]);
        multiply<BFloat16>(sum[m][n], high, rest[n][0], rest[n][1]);
        multiply<BFloat16>(sum[m][n], high, proj[n][0], proj[n][1]);
      }
    }
    if (own_chunk == 0) {
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const Lane<2> two{{sum[0][n][0] * memory.share[0], sum[0][n][1] * memory.share[0]}};
        if (g == 0) store(pivot_at + 8 * n, two);
      }
      __syncwarp();
    }
    const Lane<2> pivot[2] = {load<2>(pivot_at), load<2>(pivot_at + 8)};
    float* const z_at = to.z + (own * rows + base + own_chunk + g) * channels + column + warp * kWide + 2 * q;
    const int left = own_held - own_chunk - g;
#pragma unroll
    for (int m = 0; m < kChunk / 16; m++) {
      if (m >= tiles) break;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int row = 16 * m + 8 * i;
        if (row >= left) continue;
        const float share = memory.share[row + g];
#pragma unroll
        for (int n = 0; n < 2; n++) {
          const float2 two = make_float2(sum[m][n][2 * i] * share, sum[m][n][2 * i + 1] * share);
          if (inside[n]) *reinterpret_cast<float2*>(z_at + row * pitch + 8 * n) = two;
          const float away[2] = {two.x - pivot[n].at[0], two.y - pivot[n].at[1]};
#pragma unroll
          for (int j = 0; j < 2; j++) {
            sums[n][j] += away[j];
            squares[n][j] = fmaf(away[j], away[j], squares[n][j]);
          }
        }
      }
    }
    if (view > own && statistics) {
      const float share = own_held > 0 ? 1.0f / float(own_held) : 0.0f;
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const int64_t c = column + warp * kWide + 8 * n + 2 * q;
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
          for (int d = 4; d < kWarp; d *= 2) {
            sums[n][j] += __shfl_xor_sync(kAll, sums[n][j], d);
            squares[n][j] += __shfl_xor_sync(kAll, squares[n][j], d);
          }
          const float mean = sums[n][j] * share;
          if (g == 0 && c < channels) {
            to.parts[(cloud * args.layers + own) * channels + c + j] =
                make_float2(pivot[n].at[j] + mean, squares[n][j] - sums[n][j] * mean);
          }
          sums[n][j] = squares[n][j] = 0.0f;
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace

bool pools_by_matrix(const Guided& args) {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 8 && args.dtype != Dtype::f32 && !args.maximum && args.tokens <= kTokens &&
         args.inner < kFactors && args.channels % 8 == 0;
}

int pool_by_matrix(const Guided& args, const Rows& rows, bool statistics, cudaStream_t stream) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t slices = (args.channels + kWidth - 1) / kWidth;
  const auto groups = [&](int group) { return (args.views + group - 1) / group; };
  int group = kViews;  // fewer where there would be fewer than two blocks for each processor
  while (group > 1 && args.clouds * slices * groups(group) < 2 * processors) group--;
  const dim3 grid(static_cast<unsigned>(args.clouds), static_cast<unsigned>(slices),
                  static_cast<unsigned>(groups(group) + (args.layers > args.views)));
  constexpr int kBytes = sizeof(Memory) > sizeof(VoxelMemory) ? sizeof(Memory) : sizeof(VoxelMemory);
  const auto kernel = args.dtype == Dtype::f16 ? pool_matrix_kernel<Half> : pool_matrix_kernel<BFloat16>;
  if (const int error = allow_shared(kernel, kBytes)) return error;
  kernel<<<grid, kThreads, kBytes, stream>>>(args, rows, group, statistics);
  return cudaGetLastError();
}

}  // namespace guided
}  // namespace any2point
