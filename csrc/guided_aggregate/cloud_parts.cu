// Parts of the statistics of 16-bit clouds (see cloud.cu), and rows of the voxels, which alone are kept: a
// block for each cloud and slice of its channels, whose tokens are in shared memory.
#include "guided_aggregate/cloud.cuh"

namespace any2point {
namespace guided {
namespace {

// Two warps beside each other.
constexpr int kPartWidth = 2 * kRange;
constexpr int kPartPitch = kPartWidth + 8;  // elements: no two rows of a fragment in the same banks

struct PartMemory {
  int64_t x, cloud, sums, spreads, voxels, bytes;
  __host__ __device__ explicit PartMemory(const Guided& args) {
    x = 0;
    cloud = kTokens * kPartPitch * 2;
    sums = cloud + (Cloud::bytes(args.views) + 15) / 16 * 16;
    spreads = sums + kRowGroups * args.views * kPartWidth * 8;
    voxels = spreads + kWarps * kPartWidth * 8;
    bytes = voxels + kTokens * 16;
  }
};

[[maybe_unused]] __device__ __forceinline__ float largest(float a, float b) {  // NaN if one is
  float most = a;
#if __CUDA_ARCH__ >= 900
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
#endif
  return most;
}

// Voxels are of the cloud that their first token is of. How many this one has,
// and of each its number, first token and end in `order`; by all threads, three
// times synchronised.
[[maybe_unused]] __device__ inline int find_voxels(const Guided& args, int64_t cloud, int4* to) {
  __shared__ int found[kTokens / kWarp];
  const int64_t rows = args.clouds * args.tokens, layer = args.views,
                token = cloud * args.tokens + threadIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int4 voxel = {};
  bool first = false;
  if (threadIdx.x < args.tokens) {
    const int32_t segment = args.segment[layer * rows + token];
    if (segment >= 0) {
      const int32_t* const start = args.start + layer * (rows + 1) + segment;
      voxel = make_int4(segment, static_cast<int>(token), start[0] + 1, start[1]);
      first = args.order[layer * rows + start[0]] == token;
    }
  }
  const unsigned before = __ballot_sync(kAll, first);
  if (warp < kTokens / kWarp && lane == 0) found[warp] = __popc(before);
  __syncthreads();
  int all = 0, at = __popc(before & ((1u << lane) - 1));
  for (int w = 0; w < kTokens / kWarp; w++) {
    if (w < warp) at += found[w];
    all += found[w];
  }
  if (first) to[at] = voxel;
  __syncthreads();
  return all;
}

// Grid: clouds, slices of channels. In evaluation, rows of voxels alone.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) parts_kernel(GuidedForward args, CloudWork to) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ float4 room[];
  char* const memory = reinterpret_cast<char*>(room);
  const int64_t cloud = blockIdx.x, channels = args.channels;
  const int64_t column = int64_t(blockIdx.y) * kPartWidth;
  const PartMemory places(args);
  const int views = static_cast<int>(args.views), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, q = lane % 4, from = warp % 2 * kRange, group = warp / 2;
  T* const x = reinterpret_cast<T*>(memory + places.x);
  float2* const sums = reinterpret_cast<float2*>(memory + places.sums);
  const Cloud tokens(memory + places.cloud, views);
  float2* const spreads = reinterpret_cast<float2*>(memory + places.spreads);
  int4* const voxels = reinterpret_cast<int4*>(memory + places.voxels);
  fetch_tokens<kPartWidth>(args, cloud, column, x, kPartPitch);
  if (args.training) tokens.fetch(args, cloud);
  for (int i = threadIdx.x; i < kRowGroups * views * kPartWidth; i += kThreads) {
    sums[i] = make_float2(0.0f, 0.0f);
  }
  const int held = args.layers > views ? find_voxels(args, cloud, voxels) : 0;
  copy_wait<0>();
  __syncthreads();

  // Voxels, one by half a warp.
  {
    constexpr int kPairs = kPartWidth / kWarp;  // of channels
    const int half = lane % 16 * 2;
    const int64_t rows = args.clouds * args.tokens, layer = args.views;
    const int base = static_cast<int>(cloud * args.tokens);
    float pivot[kPairs][2], sum[kPairs][2] = {}, square[kPairs][2] = {};
#pragma unroll
    for (int j = 0; j < kPairs; j++) {
#pragma unroll
      for (int n = 0; n < 2; n++) pivot[j][n] = widen(x[half + kWarp * j + n]);
    }
    for (int i = warp * 2 + lane / 16; i < held; i += 2 * kWarps) {
      const int4 voxel = voxels[i];
      float mean[kPairs][2] = {}, most[kPairs][2];
      int token = voxel.y;
      for (int p = voxel.z; p <= voxel.w; p++) {
        const unsigned own = token - base;
        const bool inside = own < args.tokens;
#pragma unroll
        for (int j = 0; j < kPairs; j++) {
          const int c = half + kWarp * j;
          Lane<2> two = zero<2>();
          if (inside) {
            two = load<2>(x + own * kPartPitch + c);
          } else if (column + c < channels) {
            two = load<2>(static_cast<const T*>(args.features) + token * channels + column + c);
          }
#pragma unroll
          for (int n = 0; n < 2; n++) {
            mean[j][n] += two.at[n];
            most[j][n] = p == voxel.z ? two.at[n] : largest(most[j][n], two.at[n]);
          }
        }
        if (p < voxel.w) token = args.order[layer * rows + p];
      }
      const float share = reciprocal(static_cast<float>(voxel.w - voxel.z + 1));
      float* const z = to.z + voxel.x * channels + column + half;
#pragma unroll
      for (int j = 0; j < kPairs; j++) {
        Lane<2> row;
#pragma unroll
        for (int n = 0; n < 2; n++) {
          row.at[n] = fmaf(mean[j][n], share, most[j][n]);
          const float away = row.at[n] - pivot[j][n];
          sum[j][n] += away;
          square[j][n] = fmaf(away, away, square[j][n]);
        }
        if (column + half + kWarp * j < channels) store(z + kWarp * j, row);
      }
    }
    if (column == 0 && threadIdx.x == 0) {
      to.arrived[1 + cloud] = 0;
      if (cloud == 0) to.arrived[0] = 0;
    }
    if (!args.training) return;
#pragma unroll
    for (int j = 0; j < kPairs; j++) {
#pragma unroll
      for (int n = 0; n < 2; n++) {
        sum[j][n] += __shfl_xor_sync(kAll, sum[j][n], 16);
        square[j][n] += __shfl_xor_sync(kAll, square[j][n], 16);
        if (lane < 16) {
          spreads[warp * kPartWidth + half + kWarp * j + n] = make_float2(sum[j][n], square[j][n]);
        }
      }
    }
    if (column == 0 && threadIdx.x == 0) to.voxels[cloud] = held;
  }
  CellRows<T> rows(args, args.inner_means, tokens, cloud, x, kPartPitch, from);
  // Rows are near the first token's channels, about which squares are summed.
  float pivot[kTall][2], sum[kTall][2] = {}, square[kTall][2] = {};
#pragma unroll
  for (int m = 0; m < kTall; m++) {
#pragma unroll
    for (int i = 0; i < 2; i++) pivot[m][i] = widen(x[from + 16 * m + 8 * i + g]);
  }
  rows.each(
      0, views, group, [&](int view) { rows.fetch(view, column + from); },
      [&](int view, int first, int) {
        const Tile tile = rows(view, first);
        const float2 share = rows.shares(tile);
#pragma unroll
        for (int m = 0; m < kTall; m++) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float own = i % 2 == 0 ? share.x : share.y;
            const float away = own > 0.0f ? fmaf(tile.at[m][i], own, -pivot[m][i / 2]) : 0.0f;
            sum[m][i / 2] += away;
            square[m][i / 2] = fmaf(away, away, square[m][i / 2]);
          }
        }
      },
      [&](int view) {
#pragma unroll
        for (int m = 0; m < kTall; m++) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int d = 1; d < 4; d *= 2) {
              sum[m][i] += __shfl_xor_sync(kAll, sum[m][i], d);
              square[m][i] += __shfl_xor_sync(kAll, square[m][i], d);
            }
            if (q == 0) {
              sums[(group * views + view) * kPartWidth + from + 16 * m + 8 * i + g] =
                  make_float2(sum[m][i], square[m][i]);
            }
            sum[m][i] = square[m][i] = 0.0f;
          }
        }
      });
  __syncthreads();
  for (int i = threadIdx.x; i < static_cast<int>(args.layers) * kPartWidth; i += kThreads) {
    const int layer = i / kPartWidth, c = i % kPartWidth,
              rows_held = layer < views ? tokens.held[layer] : held;
    if (column + c >= channels) continue;
    const float2* const from_at = layer < views ? sums + i : spreads + c;
    const int step = layer < views ? views * kPartWidth : kPartWidth;
    float total = 0.0f, squares = 0.0f;
    for (int w = 0; w < (layer < views ? kRowGroups : kWarps); w++) {
      total += from_at[w * step].x;
      squares += from_at[w * step].y;
    }
    const float mean = rows_held > 0 ? total / static_cast<float>(rows_held) : 0.0f;
    to.parts[(cloud * args.layers + layer) * channels + column + c] =
        make_float2(widen(x[c]) + mean, squares - total * mean);
  }
#endif
}

}  // namespace

int pool_parts(const GuidedForward& args, const CloudWork& work, cudaStream_t stream) {
  const int shared = static_cast<int>(PartMemory(args).bytes);
  const dim3 grid(static_cast<unsigned>(args.clouds),
                  static_cast<unsigned>((args.channels + kPartWidth - 1) / kPartWidth));
  const auto kernel = args.dtype == Dtype::f16 ? parts_kernel<Half> : parts_kernel<BFloat16>;
  if (const int error = allow_shared(kernel, shared)) return error;
  kernel<<<grid, kThreads, shared, stream>>>(args, work);
  return cudaGetLastError();
}

}  // namespace guided
}  // namespace any2point
