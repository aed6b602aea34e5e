// What follows the attention for 16-bit clouds of up to kTokens tokens (sm_90), in two kernels: the parts of
// the statistics (cloud_parts.cu), and here everything else, for which rows of cells are pooled again. Blocks
// have a cloud and a slice of its channels. All of them add up the parts, each for some columns, and then
// wait for one another; so do the slices of a cloud, which add up how views and space agree. What is in
// between stays in shared memory. Activated rows are float16, products with them in fragments that ldmatrix
// gathers:
//
//   agreement: rows of 16 voxels x rows of eight cells, which the tokens that have both then take;
//   blend:     weights of 16 tokens, on a diagonal, x rows of the tokens' cells.
//
// Where a cloud has more rows than a block has room for, its views go in groups, and are pooled a third time
// for the blend.
//
// What limits it: one block of 16 warps for each processor, whose phases follow one another and wait for
// shared memory, where ldmatrix meets rows of any tokens in the same banks. Of a block's cycles, with the
// shapes in cuda.cu, 17,500 go to rows and their activation, 8,500 to the blend, 7,000 to the other slices'
// products and the weights, 13,000 to all before the rows.
#include "guided_aggregate/cloud.cuh"
#include "guided_aggregate/statistics.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kBlock = 512;
constexpr int kBeside = 4;  // warps, with kRange channels each
constexpr int kWidth = kBeside * kRange;
constexpr int kPitch = kWidth + 8;
[[maybe_unused]] constexpr int kBlendTiles = kWidth / 16;  // of 8 channels, of half the slice

struct Plan {
  int slices, room;  // blocks of a cloud; tiles of rows that there is room for
  int64_t x, cloud, voxel, norm, sums, weights, tiles, bytes;

  Plan(const Guided& args, int64_t most) {
    slices = static_cast<int>((args.channels + kWidth - 1) / kWidth);
    int64_t used = 0;
    const auto take = [&](int64_t size) {
      const int64_t at = used;
      used += (size + 15) / 16 * 16;
      return at;
    };
    x = take(kTokens * kPitch * 2);
    cloud = take(Cloud::bytes(args.views));
    voxel = take(kTokens + 16);
    norm = take(3 * args.layers * kWidth * 4);
    sums = take((2 * args.views + 2) * kTokens * 4);
    weights = take(args.views * kTokens * 2);
    tiles = used;
    const int64_t each = kCells * kPitch * 2;
    room = static_cast<int>(most > used ? (most - used) / each : 0);
    // With a group of one view at least.
    const int needed = (kTokens / kCells) * (args.layers > args.views ? 2 : 1) + 1;
    const int64_t all = needed + (args.views - 1) * (kTokens / kCells);
    if (room < needed) room = 0;
    if (room > all) room = static_cast<int>(all);
    bytes = used + room * each;
  }
};

[[maybe_unused]] __device__ __forceinline__ void store_transposed(void* at, uint32_t a, uint32_t b,
                                                                  uint32_t c, uint32_t d) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, "
      "%4};" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(at))),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
#endif
}
[[maybe_unused]] __device__ __forceinline__ void store_transposed(void* at, uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(at))),
               "r"(a), "r"(b)
               : "memory");
#endif
}
// What the block has written before is seen by those that wait for `number` to arrive; by one thread.
[[maybe_unused]] __device__ __forceinline__ void arrive(int* count) {
  __threadfence();
  atomicAdd(count, 1);
}
[[maybe_unused]] __device__ __forceinline__ void wait_for(const int* count, int number) {
#if __CUDA_ARCH__ >= 900
  int arrived;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(arrived) : "l"(count) : "memory");
  } while (arrived < number);
#endif
}
// Two float16 of which none is infinite.
[[maybe_unused]] __device__ __forceinline__ uint32_t half_two(float low, float high) {
  uint32_t both = 0;
#if __CUDA_ARCH__ >= 900
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
  return both;
}

// GELU of two, for bfloat16 in float16: to 2^-10 where it is near 1, less than what bfloat16 leaves.
template <typename T>
__device__ __forceinline__ uint32_t activate_two(float low, float high) {
  if constexpr (std::is_same<T, Half>::value) return half_two(activate<T>(low), activate<T>(high));
  const uint32_t y = half_two(low, high);
  uint32_t result = 0;
#if __CUDA_ARCH__ >= 900
  // 50, -3.51516e-4, 3.70056e-2, 0.797507, 0.5 as in activate()
  asm("{\n .reg .b32 square, factor, tail, half;\n"
      " mul.rn.f16x2 square, %1, %1;\n"
      " min.f16x2 square, square, %2;\n"
      " fma.rn.f16x2 factor, square, %3, %4;\n"
      " fma.rn.f16x2 factor, square, factor, %5;\n"
      " mul.rn.f16x2 factor, factor, %1;\n"
      " tanh.approx.f16x2 tail, factor;\n"
      " mul.rn.f16x2 half, %1, %6;\n"
      " fma.rn.f16x2 %0, half, tail, half;\n}"
      : "=r"(result)
      : "r"(y), "r"(0x52405240), "r"(0x8dc28dc2), "r"(0x28bd28bd), "r"(0x3a613a61), "r"(0x38003800));
#endif
  return result;
}

// Grid: slices of channels times clouds; all run at the same time, and wait for one another.
template <typename T>
__global__ void __launch_bounds__(kBlock, 1) cloud_kernel(GuidedForward args, CloudWork work, Plan plan) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ float4 room[];
  char* const memory = reinterpret_cast<char*>(room);
  const int views = static_cast<int>(args.views), layers = static_cast<int>(args.layers);
  const int rank = blockIdx.x % plan.slices, count = static_cast<int>(args.tokens);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  const int64_t cloud = blockIdx.x / plan.slices, rows = args.clouds * args.tokens;
  const int64_t channels = args.channels, base = cloud * args.tokens, column = int64_t(rank) * kWidth;
  const bool adaptive = layers > views;
  T* const x = reinterpret_cast<T*>(memory + plan.x);
  Half* const tiles = reinterpret_cast<Half*>(memory + plan.tiles);
  uint8_t* const voxel = reinterpret_cast<uint8_t*>(memory + plan.voxel);  // [S]: row of each token
  float* const center = reinterpret_cast<float*>(memory + plan.norm);      // [3, L, width]
  float *const scale = center + layers * kWidth, *const bias = scale + layers * kWidth;
  // [2V + 2, kTokens]: products of tokens with space, squared norms of cells, of voxels; then all slices'.
  float* const sums = reinterpret_cast<float*>(memory + plan.sums);
  Half* const weights = reinterpret_cast<Half*>(memory + plan.weights);  // [V, kTokens]
  const Cloud tokens(memory + plan.cloud, views);
  __shared__ int space[2];  // first voxel, or -1; voxels, behind which is a row of zeros

  fetch_tokens<kWidth>(args, cloud, column, x, kPitch);
  int32_t segment[kTokens / kWarp];  // of tokens, in the first warp
#pragma unroll
  for (int i = 0; i < kTokens / kWarp; i++) {
    const int t = lane + i * kWarp;
    const bool known = adaptive && warp == 0 && t < count;
    segment[i] = known ? args.segment[views * rows + base + t] : -1;
  }
  tokens.fetch(args, cloud);
  // Statistics of the batch, a share of the columns by every block.
  if (args.training) {
    const int columns = layers * static_cast<int>(channels), each = (columns + gridDim.x - 1) / gridDim.x;
    const int part = lane % kParts, last = min(columns, (int(blockIdx.x) + 1) * each);
    for (int first = blockIdx.x * each; first < last; first += kBlock / kParts) {
      const int own = first + static_cast<int>(threadIdx.x) / kParts;
      batch_column(args, work.parts, adaptive ? work.voxels : nullptr, args.clouds, min(own, last - 1), part,
                   part == 0 && own < last, [](double value) {
#pragma unroll
                     for (int d = 1; d < kParts; d *= 2) value += __shfl_xor_sync(kAll, value, d);
                     return value;
                   });
    }
    __syncthreads();
    if (threadIdx.x == 0) arrive(work.arrived);
  }
  if (adaptive && warp == 0) {
    int least = INT32_MAX, most = -1;
#pragma unroll
    for (int i = 0; i < kTokens / kWarp; i++) {
      if (segment[i] >= 0) least = min(least, segment[i]);
      most = max(most, segment[i]);
    }
#pragma unroll
    for (int d = kWarp / 2; d > 0; d /= 2) {
      least = min(least, __shfl_xor_sync(kAll, least, d));
      most = max(most, __shfl_xor_sync(kAll, most, d));
    }
    // Voxels that are not together have a row for each of their tokens.
    const bool together = most >= least && most - least < count;
    const int held = together ? most - least + 1 : most < 0 ? 0 : count;
#pragma unroll
    for (int i = 0; i < kTokens / kWarp; i++) {
      const int t = lane + i * kWarp;
      voxel[t] = static_cast<uint8_t>(segment[i] < 0 ? held : together ? segment[i] - least : t);
    }
    if (lane < 16) voxel[kTokens + lane] = 0;
    if (lane == 0) {
      space[0] = together ? least : -1;
      space[1] = held;
    }
  }
  __syncthreads();

  // Voxels: each thread has four channels of every kOnce-th.
  constexpr int kFours = kWidth / 4, kOnce = kBlock / kFours, kAhead = 8;
  const int held = adaptive ? space[1] : 0, space_tiles = adaptive ? held / kCells + 1 : 0;
  const int four = threadIdx.x % kFours * 4;
  Half* const cells = tiles + space_tiles * (kCells * kPitch);
  const auto fetch_voxels = [&](int first, Lane<4>(&z)[kAhead]) {
#pragma unroll
    for (int j = 0; j < kAhead; j++) {
      const int row = first + j * kOnce;
      z[j] = zero<4>();
      if (row >= held || column + four >= channels) continue;
      const int number = space[0] < 0 ? max(args.segment[views * rows + base + row], 0) : space[0] + row;
      z[j] = load<4>(work.z + number * channels + column + four);
    }
  };
  Lane<4> z[kAhead];
  if (threadIdx.x < kFours * kOnce) fetch_voxels(threadIdx.x / kFours, z);
  if (args.training && threadIdx.x == 0) wait_for(work.arrived, gridDim.x);
  __syncthreads();
  if (threadIdx.x < 2 * kWidth) {  // layers 0, 2, .. or 1, 3, ..
    constexpr int kOnce = 4;
    const int64_t c = column + threadIdx.x % kWidth;
    for (int first = threadIdx.x / kWidth; first < layers; first += 2 * kOnce) {
      float2 moments[kOnce] = {};
      float weight[kOnce] = {}, offset[kOnce] = {};  // GELU(0) = 0
#pragma unroll
      for (int j = 0; j < kOnce; j++) {
        const int layer = first + 2 * j;
        const int64_t at = layer * channels + c;
        if (layer >= layers || c >= channels) continue;
        moments[j] = args.training ? make_float2(__ldcg(args.mean + at), __ldcg(args.deviation + at))
                                   : running_column(args, at, cloud == 0);
        weight[j] = layer == views ? args.space_weight[c] : args.view_weight[at];
        offset[j] = layer == views ? args.space_bias[c] : args.view_bias[at];
      }
#pragma unroll
      for (int j = 0; j < kOnce; j++) {
        const int at = (first + 2 * j) * kWidth + threadIdx.x % kWidth;
        if (first + 2 * j >= layers) break;
        center[at] = moments[j].x;
        scale[at] = weight[j] * moments[j].y;
        bias[at] = offset[j];
      }
    }
  }
  __syncthreads();
  if (adaptive && threadIdx.x < kFours * kOnce) {
    const int at = views * kWidth + four;
    const Lane<4> middle = load<4>(center + at), factor = load<4>(scale + at), offset = load<4>(bias + at);
    for (int first = threadIdx.x / kFours; first < space_tiles * kCells; first += kAhead * kOnce) {
      if (first >= kAhead * kOnce) fetch_voxels(first, z);
#pragma unroll
      for (int j = 0; j < kAhead; j++) {
        const int row = first + j * kOnce;
        if (row >= space_tiles * kCells) break;
        uint2 pack = make_uint2(0, 0);
        if (row < held) {
          float y[4];
#pragma unroll
          for (int n = 0; n < 4; n++) y[n] = fmaf(z[j].at[n] - middle.at[n], factor.at[n], offset.at[n]);
          pack = make_uint2(activate_two<T>(y[0], y[1]), activate_two<T>(y[2], y[3]));
        }
        *reinterpret_cast<uint2*>(tiles + row * kPitch + four) = pack;
      }
    }
  }
  copy_wait<0>();
  __syncthreads();

  const int from = warp % kBeside * kRange;
  // Activated rows of views [first, last) from `cells` on.
  const auto activate_rows = [&](int first_view, int last_view) {
    CellRows<T> pooled(args, args.inner_means, tokens, cloud, x, kPitch, from);
    float norm[kTall][2][3];
    pooled.each(
        first_view, last_view, warp / kBeside,
        [&](int view) {
          pooled.fetch(view, column + from);
#pragma unroll
          for (int m = 0; m < kTall; m++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
              const int at = view * kWidth + from + 16 * m + 8 * i + g;
              norm[m][i][0] = -center[at];
              norm[m][i][1] = scale[at];
              norm[m][i][2] = bias[at];
            }
          }
        },
        [&](int view, int first, int number) {
          Tile tile = pooled(view, first);
          const float2 share = pooled.shares(tile);
          uint32_t two[kTall][2];
#pragma unroll
          for (int m = 0; m < kTall; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const float away = fmaf(tile.at[m][i], i % 2 == 0 ? share.x : share.y, norm[m][i / 2][0]);
              tile.at[m][i] = fmaf(away, norm[m][i / 2][1], norm[m][i / 2][2]);
            }
            two[m][0] = activate_two<T>(tile.at[m][0], tile.at[m][1]);
            two[m][1] = activate_two<T>(tile.at[m][2], tile.at[m][3]);
          }
          Half* const to = cells + (number * kCells + lane % 8) * kPitch + from;
          store_transposed(to + lane / 8 * 8, two[0][0], two[0][1], two[1][0], two[1][1]);
          store_transposed(to + 32 + lane / 8 % 2 * 8, two[2][0], two[2][1]);
        },
        [](int) {});
  };
  // Products of all voxels and the cells of views [first, last), and squared norms of both: a warp keeps 16
  // voxels, whose products with every kShare-th eight cells the tokens that have both then take.
  const auto products = [&](int first_view, int last_view) {
    const int parts = (held + 16) / 16, share = (kBlock / kWarp) / parts;  // with the row of zeros
    const int part = warp % parts, group = warp / parts;
    if (group >= share) return;
    uint32_t a[kWidth / 16][4];
    const Half* const space_at = tiles + (part * 16 + lane % 16) * kPitch + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kWidth / 16; k++) load_matrices(a[k], space_at + 16 * k);
    if (group == 0 && first_view == 0) {
      float low[4] = {}, high[4] = {};  // of voxels g and g + 8 at column g
#pragma unroll
      for (int k = 0; k < kWidth / 16; k++) {
        multiply<Half>(low, a[k], a[k][0], a[k][2]);
        multiply<Half>(high, a[k], a[k][1], a[k][3]);
      }
      float* const to = sums + 2 * views * kTokens + part * 16 + g;
      if (g / 2 == q) {
        to[0] = g % 2 == 0 ? low[0] : low[1];
        to[8] = g % 2 == 0 ? high[2] : high[3];
      }
    }
    int number = 0, wait = group, turn = 0;  // until this group's next; of the warps that take the norms
    for (int view = first_view; view < last_view; view++) {
      const uint8_t *const order = tokens.order + view * kOrderPitch, *const own =
                                                                          tokens.row + view * kTokens;
      for (int first = 0; first < tokens.held[view]; first += kCells, number++) {
        if (wait-- > 0) continue;
        wait = share - 1;
        const uint8_t* const start = tokens.start + view * kStartPitch + first;
        const Half* const at = cells + (number * kCells + lane % 8) * kPitch + lane / 8 * 8;
        const bool norms = turn == part;
        turn = turn + 1 < parts ? turn + 1 : 0;
        float sum[2][4] = {}, norm[4] = {};
#pragma unroll
        for (int k = 0; k < kWidth / 16; k += 2) {
          uint32_t b[4];
          load_matrices(b, at + 16 * k);
          multiply<Half>(sum[0], a[k], b[0], b[1]);
          multiply<Half>(sum[1], a[k + 1], b[2], b[3]);
          if (!norms) continue;
          const uint32_t low[4] = {b[0], 0, b[1], 0}, high[4] = {b[2], 0, b[3], 0};
          multiply<Half>(norm, low, b[0], b[1]);
          multiply<Half>(norm, high, b[2], b[3]);
        }
        if (norms && g / 2 == q) sums[(views + view) * kTokens + first + g] = g % 2 == 0 ? norm[0] : norm[1];
#pragma unroll
        for (int i = 0; i < 4; i++) sum[0][i] += sum[1][i];
        for (int place = start[0]; place < start[kCells]; place += kWarp) {
          const bool inside = place + lane < start[kCells];
          const int token = order[inside ? place + lane : place], cell = own[token] - first;
          const int row = voxel[token] - part * 16, from = row % 8 * 4 + cell / 2;
          float value[4];
#pragma unroll
          for (int i = 0; i < 4; i++) value[i] = __shfl_sync(kAll, sum[0][i], from & (kWarp - 1));
          if (!inside || row < 0 || row >= 16) continue;
          const float even = row < 8 ? value[0] : value[2], odd = row < 8 ? value[1] : value[3];
          sums[view * kTokens + token] = cell % 2 == 0 ? even : odd;
        }
      }
    }
  };
  // What all slices add up to, in the same order in every block; then weights [V, kTokens].
  const auto weigh = [&] {
    const int numbers = (2 * views + 2) * kTokens;
    float* const all = work.slices + cloud * plan.slices * numbers;
    for (int i = threadIdx.x * 4; i < numbers; i += kBlock * 4) {
      *reinterpret_cast<float4*>(all + rank * numbers + i) = *reinterpret_cast<const float4*>(sums + i);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      arrive(work.arrived + 1 + cloud);
      wait_for(work.arrived + 1 + cloud, plan.slices);
    }
    __syncthreads();
    for (int i = threadIdx.x * 4; i < numbers; i += kBlock * 4) {
      float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
      for (int r = 0; r < plan.slices; r++) {
        const float4 four = __ldcg(reinterpret_cast<const float4*>(all + r * numbers + i));
        total.x += four.x, total.y += four.y, total.z += four.z, total.w += four.w;
      }
      *reinterpret_cast<float4*>(sums + i) = total;
    }
    __syncthreads();
    const int t = threadIdx.x;
    if (t >= kTokens) return;
    const auto total_of = [&](int what) {
      const int at = what < views       ? t
                     : what < 2 * views ? tokens.row[(what - views) * kTokens + t]
                                        : voxel[t];
      return sums[what * kTokens + at];
    };
    for (int what = rank; t < count && what <= 2 * views; what += plan.slices) {
      args.agreement[what * rows + base + t] = total_of(what);
    }
    const float space_norm = rsqrtf(fmaxf(total_of(2 * views), kNorm * kNorm));
    float sum = 0.0f;
    for (int view = 0; view < views; view++) {
      const float norm = rsqrtf(fmaxf(total_of(views + view), kNorm * kNorm));
      const float weight = 0.5f * (total_of(view) * norm * space_norm + 1.0f);
      sums[view * kTokens + t] = weight;
      sum += weight;
    }
    sum = t < count ? 1.0f / fmaxf(sum, kTiny) : 0.0f;
    for (int view = 0; view < views; view++) {
      narrow(sum > 0.0f ? sums[view * kTokens + t] * sum : 0.0f, weights + view * kTokens + t);
    }
  };
  // Each warp has 16 tokens and half of the slice.
  const int token = warp / 2 * 16, half = warp % 2 * (kWidth / 2);
  const auto blend = [&](int first_view, int last_view) {
    float blend[kBlendTiles][4] = {};
    float* const partial_at = work.partial + (base + token + g) * channels + column + half + 2 * q;
    const auto each_two = [&](const auto& use) {
#pragma unroll
      for (int n = 0; n < kBlendTiles; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          if (token + g + 8 * i >= count || column + half + 8 * n >= channels) continue;
          use(partial_at + 8 * i * channels + 8 * n, blend[n][2 * i], blend[n][2 * i + 1]);
        }
      }
    };
    if (first_view > 0) {
      each_two([](const float* at, float& a, float& b) {
        const float2 two = *reinterpret_cast<const float2*>(at);
        a = two.x, b = two.y;
      });
    }
    const Half* group = cells;
    for (int view = first_view; view < last_view; view++) {
      const int row = tokens.row[view * kTokens + token + lane % 16];
      const Half* const at = group + row * kPitch + half + lane / 16 * 8;
      const Half* const weight = weights + view * kTokens + token + g;
      const bool own = g / 2 == q;
      const uint32_t a[4] = {own ? uint32_t(weight[0].bits) << 16 * (g % 2) : 0, 0, 0,
                             own ? uint32_t(weight[8].bits) << 16 * (g % 2) : 0};
#pragma unroll
      for (int n = 0; n < kBlendTiles; n += 2) {
        uint32_t b[4];
        load_transposed(b, at + 8 * n);
        multiply<Half>(blend[n], a, b[0], b[1]);
        multiply<Half>(blend[n + 1], a, b[2], b[3]);
      }
      group += tokens.tiles(view) * kCells * kPitch;
    }
    if (last_view < views) {
      each_two([](float* at, float a, float b) { *reinterpret_cast<float2*>(at) = make_float2(a, b); });
      return;
    }
#pragma unroll
    for (int n = 0; n < kBlendTiles; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        T* const at = x + (token + g + 8 * i) * kPitch + half + 8 * n + 2 * q;
        Lane<2> two = args.residual ? load<2>(at) : Lane<2>{};
        two.at[0] = fmaf(args.coefficient, blend[n][2 * i], two.at[0]);
        two.at[1] = fmaf(args.coefficient, blend[n][2 * i + 1], two.at[1]);
        store(at, two);
      }
    }
    __syncwarp();
    constexpr int kChunks = kWidth / 16;
    for (int i = lane; i < 16 * kChunks; i += kWarp) {
      const int t = token + i / kChunks, c = half + i % kChunks * 8;
      if (t >= count || column + c >= channels) continue;
      T* const to = static_cast<T*>(args.out) + (base + t) * channels + column + c;
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(x + t * kPitch + c);
    }
  };
  // Views that there is room for at once, from `first` on.
  const auto group_from = [&](int first) {
    int left = plan.room - space_tiles, view = first;
    while (view < views && tokens.tiles(view) <= left) left -= tokens.tiles(view++);
    return view;
  };

  if (!adaptive) {
    for (int i = threadIdx.x; i < views * kTokens; i += kBlock) {
      narrow(i % kTokens < count ? 1.0f / static_cast<float>(views) : 0.0f, weights + i);
    }
  }
  // All groups of views to be weighed, then all to be blended; a group that is alone stays where it is.
  bool weighed = !adaptive;
  for (int first = 0; first < views;) {
    int last = group_from(first);
    const bool kept = adaptive && weighed && first == 0 && last == views;
    if (!kept) {
      activate_rows(first, last);
      __syncthreads();
    }
    if (weighed) {
      blend(first, last);
    } else {
      products(first, last);
      __syncthreads();
      if (last == views) {
        weigh();
        weighed = true;
        last = 0;
      }
    }
    __syncthreads();
    first = last;
  }
#endif
}

bool is_hopper() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}

// The static shared memory of the kernel counts too.
Plan plan_of(const Guided& args) { return Plan(args, shared_limit(kOptIn) - 64); }

// Whether all blocks run at the same time, and half of the processors or more have one: for a single cloud of
// 768 channels the kernels of narrow slices are faster (12 blocks in evaluation: 0.60 ms to 0.87).
bool fills(int64_t blocks) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  return blocks <= processors && 2 * blocks >= processors;
}

CloudWork workspace(const Guided& args, const Plan& plan, void* memory, int64_t* bytes) {
  Room room(memory);
  CloudWork work{};
  const int64_t rows = args.clouds * args.tokens, numbers = (2 * args.views + 2) * kTokens;
  work.z = room.take<float>(rows * args.channels);
  work.parts = room.take<float2>(args.clouds * args.layers * args.channels);
  work.voxels = room.take<int>(args.clouds);
  work.arrived = room.take<int>(1 + args.clouds);
  work.slices = room.take<float>(args.clouds * plan.slices * numbers);
  work.partial = room.take<float>(rows * args.channels);
  *bytes = room.used;
  return work;
}

}  // namespace

bool fits_clouds(const Guided& args) {
  if (args.dtype == Dtype::f32 || args.maximum || args.ensemble == Ensemble::max) return false;
  if (args.tokens > kTokens || args.inner >= kFactors || args.channels % 8 != 0) return false;
  if (args.views > 16 || !is_hopper()) return false;
  if (args.clouds * args.tokens * args.channels >> 31 != 0) return false;  // 32 bits count
  const Plan plan = plan_of(args);
  return plan.room > 0 && fills(args.clouds * plan.slices);
}

int64_t clouds_workspace(const Guided& args) {
  int64_t bytes = 0;
  workspace(args, plan_of(args), nullptr, &bytes);
  return bytes;
}

int forward_of_clouds(const GuidedForward& args, void* memory, cudaStream_t stream) {
  const Plan plan = plan_of(args);
  int64_t bytes = 0;
  const CloudWork work = workspace(args, plan, memory, &bytes);
  if (args.training || args.layers > args.views) {
    if (const int error = pool_parts(args, work, stream)) return error;
  }
  const auto kernel = args.dtype == Dtype::f16 ? cloud_kernel<Half> : cloud_kernel<BFloat16>;
  if (const int error = allow_shared(kernel, static_cast<int>(plan.bytes))) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.slices * args.clouds));
  config.blockDim = dim3(kBlock);
  config.dynamicSmemBytes = static_cast<size_t>(plan.bytes);
  config.stream = stream;
  cudaLaunchAttribute waits{cudaLaunchAttributeCooperative};
  waits.val.cooperative = 1;
  config.attrs = &waits;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args, work, plan);
}

}  // namespace guided
}  // namespace any2point
