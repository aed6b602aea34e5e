// What follows the attention for 16-bit clouds of up to kTokens tokens (sm_90), in one kernel. Blocks have a
// cloud and a slice of its channels. In training rows of cells and voxels are pooled for the statistics first
// (cloud_parts.cuh): all blocks wait for the parts of all, add them up, each for some columns, and wait for
// one another again; then rows are pooled once more. The slices of a cloud wait for one another to add up how
// views and space agree. What is in between stays in shared memory. Activated rows are float16.
//
// Agreement and blend go by token, so that they cost the same whatever the cells are. Eight tokens' rows of
// space lie above their rows of a view in one matrix, and those of the view beside: of its product the
// diagonal is what is needed, products and squared norms. Fragments have 16 bytes of a row for two products,
// since any order of channels is as good. The blend is a sum of rows of eight channels each lane.
//
// Where a cloud has more rows than a block has room for, its views go in groups, of which all but the last
// are kept in memory for the blend.
//
// H200, B = 32, S = 128, C = 768, V = 6, bfloat16: 49 us in training, 31 in evaluation with 39 cells, 84 and
// 57 with 400. The floor, tokens read and written once, is 2.6 us.
#include "guided_aggregate/cloud_parts.cuh"
#include "guided_aggregate/statistics.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kBlock = 512;
constexpr int kBeside = 4;  // warps, with kRange channels each
constexpr int kWidth = kBeside * kRange;
constexpr int kPitch = kWidth + 8;
static_assert(kBlock / kWarp * 8 == kTokens, "a warp for eight tokens");

struct Plan {
  int slices, room;  // blocks of a cloud; tiles of rows that there is room for
  int64_t x, cloud, norm, sums, tiles, bytes;

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
    norm = take(3 * args.layers * kWidth * 4);
    sums = take((2 * args.views + 1) * kTokens * 4);
    tiles = used;
    const int64_t each = kCells * kPitch * 2;
    room = static_cast<int>(most > used ? (most - used) / each : 0);
    // With a group of one view at least.
    const int needed = (kTokens / kCells) * (args.layers > args.views ? 2 : 1);
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
// Until `number` blocks are here, which then see what all of them have written. By all threads.
[[maybe_unused]] __device__ __forceinline__ void wait_for_all(int* count, int number) {
#if __CUDA_ARCH__ >= 900
  __syncthreads();
  if (threadIdx.x == 0) {
    int arrived;
    __threadfence();
    atomicAdd(count, 1);
    do {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(arrived) : "l"(count) : "memory");
    } while (arrived < number);
  }
  __syncthreads();
#endif
}
[[maybe_unused]] __device__ __forceinline__ float2 floats_of(uint32_t two) {
  float2 pair = make_float2(0.0f, 0.0f);
#if __CUDA_ARCH__ >= 900
  asm("{\n .reg .b16 low, high;\n mov.b32 {low, high}, %2;\n"
      " cvt.f32.f16 %0, low;\n cvt.f32.f16 %1, high;\n}"
      : "=f"(pair.x), "=f"(pair.y)
      : "r"(two));
#endif
  return pair;
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
  const int space_tiles = adaptive ? kTokens / kCells : 0;
  T* const x = reinterpret_cast<T*>(memory + plan.x);
  Half* const tiles = reinterpret_cast<Half*>(memory + plan.tiles);
  float* const center = reinterpret_cast<float*>(memory + plan.norm);  // [3, L, width]
  float *const scale = center + layers * kWidth, *const bias = scale + layers * kWidth;
  // [2V + 1, kTokens], of tokens: products of cells and space, squared norms of cells, of space; then all
  // slices', and at last weights [V, kTokens].
  float* const sums = reinterpret_cast<float*>(memory + plan.sums);
  const Cloud tokens(memory + plan.cloud, views);
  Half* const spilled = work.spilled + int64_t(blockIdx.x) * (views - 1) * kTokens * kWidth;

  fetch_tokens<kWidth>(args, cloud, column, x, kPitch);
  tokens.fetch(args, cloud);
  using Space = SpaceRows<T, kWidth, kPitch, kBlock>;
  Space space(args, cloud, column);
  Half* const cells = tiles + space_tiles * (kCells * kPitch);
  copy_wait<0>();
  __syncthreads();
  // Statistics of the batch: parts of all clouds, and then a share of the columns by every block.
  if (args.training) {
    view_parts<T, kWidth, kPitch>(args, work, tokens, cloud, column, x, reinterpret_cast<float2*>(tiles));
  }
  if (adaptive) space.pool(x);
  if (args.training) {
    if (adaptive) space.parts(work, x, reinterpret_cast<float2*>(tiles));
    wait_for_all(work.arrived, gridDim.x);
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
    wait_for_all(work.arrived + 1, gridDim.x);
  }
  if (threadIdx.x < 2 * kWidth) {  // layers 0, 2, .. or 1, 3, ..
    constexpr int kAtOnce = 4;
    const int64_t c = column + threadIdx.x % kWidth;
    for (int first = threadIdx.x / kWidth; first < layers; first += 2 * kAtOnce) {
      float2 moments[kAtOnce] = {};
      float weight[kAtOnce] = {}, offset[kAtOnce] = {};  // GELU(0) = 0
#pragma unroll
      for (int j = 0; j < kAtOnce; j++) {
        const int layer = first + 2 * j;
        const int64_t at = layer * channels + c;
        if (layer >= layers || c >= channels) continue;
        moments[j] = args.training ? make_float2(__ldcg(args.mean + at), __ldcg(args.deviation + at))
                                   : running_column(args, at, cloud == 0);
        weight[j] = layer == views ? args.space_weight[c] : args.view_weight[at];
        offset[j] = layer == views ? args.space_bias[c] : args.view_bias[at];
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; j++) {
        const int at = (first + 2 * j) * kWidth + threadIdx.x % kWidth;
        if (first + 2 * j >= layers) break;
        center[at] = moments[j].x;
        scale[at] = weight[j] * moments[j].y;
        bias[at] = offset[j];
      }
    }
  }
  __syncthreads();
  if (adaptive) {
#pragma unroll
    for (int k = 0; k < Space::kSteps; k++) {
      const int norm = views * kWidth + Space::channel(k);
      const Lane<8> middle = load<8>(center + norm), factor = load<8>(scale + norm),
                    offset = load<8>(bias + norm);
#pragma unroll
      for (int i = 0; i < Space::kEach; i++) {
        uint32_t two[4];
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
          float y[2];
#pragma unroll
          for (int j = 0; j < 2; j++) {
            y[j] = fmaf(space.at[i][k].at[n + j] - middle.at[n + j], factor.at[n + j], offset.at[n + j]);
          }
          two[n / 2] = space.held(i) ? activate_two<T>(y[0], y[1]) : 0;
        }
        *reinterpret_cast<uint4*>(tiles + Space::token(i) * kPitch + Space::channel(k)) =
            make_uint4(two[0], two[1], two[2], two[3]);
      }
    }
  }
  __syncthreads();

  const int from = warp % kBeside * kRange;
  // Activated rows of views [first, last) from `cells` on.
  const auto activate_rows = [&](int first_view, int last_view) {
    CellRows<T> pooled(args, tokens, args.inner_means, cloud, x, kPitch, from);
    float norm[kTall][2][3];
    pooled.each(
        first_view, last_view, warp / kBeside,
        [&](int view) {
          pooled.fetch(work.fragments, view, column + from);
#pragma unroll
          for (int m = 0; m < kTall; m++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
              const int at = view * kWidth + from + 16 * m + 8 * i + g;
              norm[m][i][0] = center[at];
              norm[m][i][1] = scale[at];
              norm[m][i][2] = bias[at];
            }
          }
        },
        [&](int view, int first, int number, const Inner& inner) {
          Tile tile = pooled(view, first, inner);
          const float2 share = pooled.shares(tile);
          uint32_t two[kTall][2];
#pragma unroll
          for (int m = 0; m < kTall; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const float away = fmaf(tile.at[m][i], i % 2 == 0 ? share.x : share.y, -norm[m][i / 2][0]);
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
  // Products of the tokens' cells of views [first, last) with space, and squared norms of both, by eight
  // tokens of each warp: rows of space above those of cells, times cells.
  const auto products = [&](int first_view, int last_view) {
    constexpr int kDeep = kWidth / 32;  // times 16 bytes of each lane
    const int own = warp * 8 + g;
    const bool diagonal = g / 2 == q;
    uint4 s[kDeep];
#pragma unroll
    for (int k = 0; k < kDeep; k++) {
      s[k] = *reinterpret_cast<const uint4*>(tiles + own * kPitch + 32 * k + 8 * q);
    }
    if (first_view == 0) {
      float norm[4] = {};
#pragma unroll
      for (int k = 0; k < kDeep; k++) {
        multiply<Half>(norm, {s[k].x, 0, s[k].y, 0}, s[k].x, s[k].y);
        multiply<Half>(norm, {s[k].z, 0, s[k].w, 0}, s[k].z, s[k].w);
      }
      if (diagonal) sums[2 * views * kTokens + own] = g % 2 == 0 ? norm[0] : norm[1];
    }
    const Half* group = cells + 8 * q;
    for (int view = first_view; view < last_view; view++) {
      const Half* const at = group + tokens.row[view * kTokens + own] * kPitch;
      float sum[2][4] = {};
#pragma unroll
      for (int k = 0; k < kDeep; k++) {
        const uint4 b = *reinterpret_cast<const uint4*>(at + 32 * k);
        multiply<Half>(sum[0], {s[k].x, b.x, s[k].y, b.y}, b.x, b.y);
        multiply<Half>(sum[1], {s[k].z, b.z, s[k].w, b.w}, b.z, b.w);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) sum[0][i] += sum[1][i];
      if (diagonal) {
        sums[view * kTokens + own] = g % 2 == 0 ? sum[0][0] : sum[0][1];
        sums[(views + view) * kTokens + own] = g % 2 == 0 ? sum[0][2] : sum[0][3];
      }
      group += tokens.tiles(view) * kCells * kPitch;
    }
  };
  // What all slices add up to, in the same order in every block; then weights.
  const auto weigh = [&] {
    const int numbers = (2 * views + 1) * kTokens;
    float* const all = work.slices + cloud * plan.slices * numbers;
    for (int i = threadIdx.x * 4; i < numbers; i += kBlock * 4) {
      *reinterpret_cast<float4*>(all + rank * numbers + i) = *reinterpret_cast<const float4*>(sums + i);
    }
    wait_for_all(work.arrived + 2 + cloud, plan.slices);
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
    for (int what = rank; t < count && what <= 2 * views; what += plan.slices) {
      args.agreement[what * rows + base + t] = sums[what * kTokens + t];
    }
    const auto length = [&](int what) { return rsqrtf(fmaxf(sums[what * kTokens + t], kNorm * kNorm)); };
    const float space_length = length(2 * views);
    float sum = 0.0f;
    for (int view = 0; view < views; view++) {
      const float weight = 0.5f * (sums[view * kTokens + t] * length(views + view) * space_length + 1.0f);
      sums[view * kTokens + t] = weight;
      sum += weight;
    }
    sum = 1.0f / fmaxf(sum, kTiny);
    for (int view = 0; view < views; view++) sums[view * kTokens + t] *= sum;
  };
  // Views before `first` lie in `spilled`.
  const auto blend = [&](int first) {
    constexpr int kSteps = Space::kSteps;
    for (int t = Space::token(0); t < count; t += Space::kOnce) {
      Lane<8> sum[kSteps] = {};
      const auto add_row = [&](int view, const Half* row) {
        const float weight = sums[view * kTokens + t];
#pragma unroll
        for (int k = 0; k < kSteps; k++) {
          const uint4 eight = *reinterpret_cast<const uint4*>(row + Space::channel(k));
          const uint32_t two[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float2 pair = floats_of(two[i]);
            sum[k].at[2 * i] = fmaf(weight, pair.x, sum[k].at[2 * i]);
            sum[k].at[2 * i + 1] = fmaf(weight, pair.y, sum[k].at[2 * i + 1]);
          }
        }
      };
#pragma unroll 4
      for (int view = 0; view < first; view++) {
        add_row(view, spilled + (view * kTokens + tokens.row[view * kTokens + t]) * kWidth);
      }
      const Half* group = cells;
#pragma unroll 2
      for (int view = first; view < views; view++) {
        add_row(view, group + tokens.row[view * kTokens + t] * kPitch);
        group += tokens.tiles(view) * kCells * kPitch;
      }
#pragma unroll
      for (int k = 0; k < kSteps; k++) {
        const int c = Space::channel(k);
        if (column + c >= channels) continue;
        store_out<T>(args, (base + t) * channels + column + c, load<8>(x + t * kPitch + c), args.coefficient,
                     sum[k]);
      }
    }
  };
  // Views that there is room for at once, from `first` on.
  const auto group_from = [&](int first) {
    int left = plan.room - space_tiles, view = first;
    while (view < views && tokens.tiles(view) <= left) left -= tokens.tiles(view++);
    return view;
  };

  int kept = 0;
  for (int first = 0; first < views;) {
    const int last = group_from(first);
    activate_rows(first, last);
    __syncthreads();
    if (adaptive) products(first, last);
    if (last < views) {
      constexpr int kEights = kWidth / 8;
      const Half* group = cells;
      for (int view = first; view < last; view++) {
        for (int i = threadIdx.x; i < tokens.held[view] * kEights; i += kBlock) {
          const int row = i / kEights, c = i % kEights * 8;
          *reinterpret_cast<uint4*>(spilled + (view * kTokens + row) * kWidth + c) =
              *reinterpret_cast<const uint4*>(group + row * kPitch + c);
        }
        group += tokens.tiles(view) * kCells * kPitch;
      }
      kept = last;
    }
    __syncthreads();
    first = last;
  }
  if (adaptive) {
    weigh();
  } else {
    for (int i = threadIdx.x; i < views * kTokens; i += kBlock) sums[i] = 1.0f / static_cast<float>(views);
  }
  __syncthreads();
  blend(kept);
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
  const int64_t numbers = (2 * args.views + 1) * kTokens;
  work.parts = room.take<float2>(args.clouds * args.layers * args.channels);
  work.voxels = room.take<int>(args.clouds);
  work.arrived = room.take<int>(2 + args.clouds);
  work.slices = room.take<float>(args.clouds * plan.slices * numbers);
  work.fragments = room.take<uint4>(args.views * tiles_of(args) * 2 * kWarp);
  work.spilled = room.take<Half>(args.clouds * plan.slices * (args.views - 1) * kTokens * kWidth);
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

CloudWork work_of_clouds(const Guided& args, void* memory) {
  int64_t bytes = 0;
  return workspace(args, plan_of(args), memory, &bytes);
}

int64_t clouds_workspace(const Guided& args) {
  int64_t bytes = 0;
  workspace(args, plan_of(args), nullptr, &bytes);
  return bytes;
}

int forward_of_clouds(const GuidedForward& args, void* memory, cudaStream_t stream) {
  const Plan plan = plan_of(args);
  const CloudWork work = work_of_clouds(args, memory);
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
