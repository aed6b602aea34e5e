// Activation of all rows, agreement of views and space, blend, in two kernels of a block for each cloud and
// slice of channels. The first activates every row once and keeps it in shared memory, where tokens find
// their rows for the products of views and space over the slice; the second adds these up over the slices,
// weighs, and blends the activated rows, which it reads through the processors' first caches.
#include "guided_aggregate/passes.h"
#include "guided_aggregate/rows.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kBlock = 512;
constexpr int kLanes = 8;  // of a row's slice
constexpr int kGroups = kBlock / kLanes;
constexpr uint16_t kNone = 0xffff;

struct Plan {
  int slices, tokens;
  int rows, kept;          // of a cloud at most, and how many of them shared memory has room for
  int pitch, index_pitch;  // elements from one row, or token's rows, to the next
  int64_t index, norms, norm, offsets, kept_at, bytes;  // places in shared memory
  int64_t blend_bytes;                                  // of the second kernel
};

template <typename T, int kSteps>
Plan plan_of(const Guided& args, int64_t most) {
  constexpr int kWidth = 4 * kLanes * kSteps;
  Plan plan{};
  const int layers = static_cast<int>(args.layers);
  plan.slices = static_cast<int>((args.channels + kWidth - 1) / kWidth);
  plan.tokens = static_cast<int>(args.tokens);
  plan.rows = layers * plan.tokens;
  plan.pitch = kWidth + 16 / static_cast<int>(sizeof(T));  // rows begin in different banks
  plan.index_pitch = (layers + 7) / 8 * 8;
  int64_t used = 0;
  const auto take = [&](int64_t size) {
    const int64_t at = used;
    used += (size + 15) / 16 * 16;
    return at;
  };
  plan.offsets = take((layers + 2) * 4);
  plan.index = take(int64_t(plan.tokens) * plan.index_pitch * 2);
  plan.blend_bytes = (2 * args.views + 1) * int64_t(plan.tokens) * 4;
  plan.norms = take(int64_t(plan.rows) * 4);
  plan.norm = take(int64_t(3) * layers * kWidth * 4);
  plan.kept_at = used;
  const int64_t each = plan.pitch * int64_t(sizeof(T)), left = (most - used) / each;
  plan.kept = static_cast<int>(left < 0 ? 0 : left < plan.rows ? left : plan.rows);
  plan.bytes = used + plan.kept * each;
  return plan;
}

// Where rows of a cloud are: numbered layer by layer, in shared memory.
struct Index {
  int* offsets;      // [L + 1]: first row of each layer; first voxel, or -1
  uint16_t* rows;    // [S, L]: of each token
  int total, voxel;  // rows; first voxel

  // By all threads.
  __device__ Index(const Guided& args, const Plan& plan, char* memory, int64_t cloud)
      : offsets(reinterpret_cast<int*>(memory + plan.offsets)),
        rows(reinterpret_cast<uint16_t*>(memory + plan.index)) {
    const int views = static_cast<int>(args.views), layers = static_cast<int>(args.layers);
    const int64_t count = args.clouds * args.tokens;
    const int32_t base = static_cast<int32_t>(cloud * args.tokens);
    if (threadIdx.x < kWarp) {
      int least = INT32_MAX, most = -1;
      for (int t = threadIdx.x; layers > views && t < plan.tokens; t += kWarp) {
        const int32_t segment = args.segment[views * count + base + t];
        if (segment >= 0) least = min(least, segment);
        most = max(most, segment);
      }
#pragma unroll
      for (int d = kWarp / 2; d > 0; d /= 2) {
        least = min(least, __shfl_xor_sync(kAll, least, d));
        most = max(most, __shfl_xor_sync(kAll, most, d));
      }
      int held = 0;  // lane v: rows of view v, and then of the views before too
      if (threadIdx.x < views) held = args.count[threadIdx.x * args.clouds + cloud];
#pragma unroll
      for (int d = 1; d < kWarp; d *= 2) {
        const int before = __shfl_up_sync(kAll, held, d);
        if (threadIdx.x >= d) held += before;
      }
      if (threadIdx.x < views) offsets[threadIdx.x + 1] = held;
      if (threadIdx.x == views) {
        // Voxels that are not together have a row for each of their tokens.
        const bool together = most >= least && most - least < plan.tokens;
        offsets[0] = 0;
        if (layers > views) {
          offsets[layers] = held + (together ? most - least + 1 : most < 0 ? 0 : plan.tokens);
        }
        offsets[layers + 1] = together ? least : -1;
      }
    }
    __syncthreads();
    total = offsets[layers];
    voxel = offsets[layers + 1];
    for (int layer = 0; layer < layers; layer++) {
      for (int t = threadIdx.x; t < plan.tokens; t += kBlock) {
        const int32_t segment = args.segment[layer * count + base + t];
        const int row = layer < views ? segment - base : voxel < 0 ? t : segment - voxel;
        rows[t * plan.index_pitch + layer] =
            segment < 0 ? kNone : static_cast<uint16_t>(offsets[layer] + row);
      }
    }
  }
};

// kViews: 0 for any number. Rows that shared memory has no room for are read from `activated` again.
template <typename T, int kSteps, int kViews>
__global__ void __launch_bounds__(kBlock, 2)
    activate_kernel(GuidedForward args, const float* __restrict__ z,  // [L, R, C]
                    Plan plan, T* activated,                          // [B, slices, rows, pitch]
                    uint16_t* __restrict__ found,                     // [R, L]: rows of each token
                    float* __restrict__ parts) {  // [slices, 2V + 1, R]: products and squared norms
  extern __shared__ float4 room[];
  constexpr int kWidth = 4 * kLanes * kSteps;
  char* const memory = reinterpret_cast<char*>(room);
  float* const norms = reinterpret_cast<float*>(memory + plan.norms);  // of rows, squared, in the slice
  float* const center = reinterpret_cast<float*>(memory + plan.norm);  // [3, L, width]
  const int rank = blockIdx.x, views = kViews > 0 ? kViews : static_cast<int>(args.views);
  const int layers = static_cast<int>(args.layers), tokens = plan.tokens;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int64_t cloud = blockIdx.y, rows = args.clouds * args.tokens, channels = args.channels;
  const int32_t base = static_cast<int32_t>(cloud * args.tokens);
  const int64_t column = int64_t(rank) * kWidth + 4 * lane;
  float *const scale = center + layers * kWidth, *const bias = scale + layers * kWidth;
  const auto inside = [&](int step) { return column + 4 * kLanes * step < channels; };

  for (int i = threadIdx.x; i < layers * kWidth; i += kBlock) {
    const int layer = i / kWidth;
    const int64_t c = int64_t(rank) * kWidth + i % kWidth;
    center[i] = scale[i] = bias[i] = 0.0f;  // GELU(0) = 0
    if (c >= channels) continue;
    const Norm<1> norm(args, args.mean, args.deviation, layer, c);
    center[i] = norm.center.at[0];
    scale[i] = norm.scale.at[0];
    bias[i] = norm.bias.at[0];
  }
  const Index index(args, plan, memory, cloud);
  __syncthreads();
  for (int i = threadIdx.x; rank == 0 && i < tokens * plan.index_pitch; i += kBlock) {
    found[base * int64_t(plan.index_pitch) + i] = index.rows[i];
  }
  const int total = index.total;
  T* const kept = reinterpret_cast<T*>(memory + plan.kept_at) + 4 * lane;
  activated += (cloud * plan.slices + rank) * plan.rows * plan.pitch + 4 * lane;
  // The next row is on its way while one is activated.
  Lane<4> next[kSteps];
  int next_layer = 0;
  const auto fetch = [&](int row) {
    if (row >= total) return;
    while (row >= index.offsets[next_layer + 1]) next_layer++;
    const int at = row - index.offsets[next_layer];
    int32_t segment = base + at;
    if (next_layer == views) {
      segment = index.voxel < 0 ? max(args.segment[next_layer * rows + base + at], 0) : index.voxel + at;
    }
    const float* const from = z + (next_layer * rows + segment) * channels + column;
#pragma unroll
    for (int j = 0; j < kSteps; j++) next[j] = inside(j) ? load<4>(from + 4 * kLanes * j) : zero<4>();
  };
  fetch(group);
  for (int row = group; row < total; row += kGroups) {
    const int layer = next_layer;
    Lane<4> lanes[kSteps];
#pragma unroll
    for (int j = 0; j < kSteps; j++) lanes[j] = next[j];
    fetch(row + kGroups);
    const int norm_at = layer * kWidth + 4 * lane;
    float norm = 0.0f;
#pragma unroll
    for (int j = 0; j < kSteps; j++) {
      const Lane<4> middle = load<4>(center + norm_at + 4 * kLanes * j);
      const Lane<4> factor = load<4>(scale + norm_at + 4 * kLanes * j);
      const Lane<4> offset = load<4>(bias + norm_at + 4 * kLanes * j);
#pragma unroll
      for (int n = 0; n < 4; n++) {
        lanes[j].at[n] = activate<T>(fmaf(lanes[j].at[n] - middle.at[n], factor.at[n], offset.at[n]));
        norm = fmaf(lanes[j].at[n], lanes[j].at[n], norm);
      }
      if (row < plan.kept) store(kept + row * plan.pitch + 4 * kLanes * j, lanes[j]);
      if (row >= plan.kept || layer < views) store(activated + row * plan.pitch + 4 * kLanes * j, lanes[j]);
    }
    const unsigned mask = 0xffu << (threadIdx.x & (kWarp - kLanes));
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) norm += __shfl_xor_sync(mask, norm, d);
    if (lane == 0) norms[row] = norm;
  }
  if (args.ensemble != Ensemble::adaptive) return;
  __syncthreads();

  parts += int64_t(rank) * (2 * views + 1) * rows + base;
  const auto work = [&](const auto& row_at) {
    // All groups go round equally often, since their lanes add up together.
    for (int first = 0; first < tokens; first += kGroups) {
      const int t = min(first + group, tokens - 1);
      const uint16_t* const row = index.rows + t * plan.index_pitch;
      const int space = row[views];
      Lane<4> s[kSteps];
      const T* const space_at = row_at(space != kNone ? space : 0);
#pragma unroll
      for (int j = 0; j < kSteps; j++) {
        s[j] = space != kNone ? load<4>(space_at + 4 * kLanes * j) : zero<4>();
      }
      const auto product = [&](int v) {
        const T* const from = row_at(row[v]);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kSteps; j++) {
          const Lane<4> g = load<4>(from + 4 * kLanes * j);
#pragma unroll
          for (int n = 0; n < 4; n++) sum = fmaf(g.at[n], s[j].at[n], sum);
        }
        return sum;
      };
      if constexpr (kViews > 0 && kViews <= kLanes) {
        float value[kLanes] = {};
#pragma unroll
        for (int v = 0; v < kViews; v++) value[v] = product(v);
        const float sum = sums_of_warp<kLanes, kLanes / 2>(value, lane);
        if (lane < views && first + group < tokens) parts[lane * rows + t] = sum;
      } else {
        for (int v = 0; v < views; v++) {
          float sum = product(v);
#pragma unroll
          for (int d = kLanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(kAll, sum, d);
          if (lane == 0 && first + group < tokens) parts[v * rows + t] = sum;
        }
      }
    }
  };
  if (total <= plan.kept) {
    work([&](int row) -> const T* { return kept + row * plan.pitch; });
  } else {
    work([&](int row) -> const T* {
      return row < plan.kept ? kept + row * plan.pitch : activated + int64_t(row) * plan.pitch;
    });
  }
  for (int layer = threadIdx.x / kWarp; layer <= views; layer += kBlock / kWarp) {
    for (int t = threadIdx.x % kWarp; t < tokens; t += kWarp) {
      const int row = index.rows[t * plan.index_pitch + layer];
      parts[(views + layer) * rows + t] = row != kNone ? norms[row] : 0.0f;
    }
  }
}

template <typename T, int kSteps, int kViews>
__global__ void __launch_bounds__(kBlock, 2)
    blend_kernel(GuidedForward args, Plan plan,
                 const T* __restrict__ activated,     // [B, slices, rows, pitch]
                 const uint16_t* __restrict__ found,  // [R, L]
                 const float* __restrict__ parts) {   // [slices, 2V + 1, R]
  extern __shared__ float4 room[];
  constexpr int kWidth = 4 * kLanes * kSteps;
  float* const weights = reinterpret_cast<float*>(room);  // [2V + 1, S]
  const int rank = blockIdx.x, views = kViews > 0 ? kViews : static_cast<int>(args.views);
  const int tokens = plan.tokens, lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int64_t cloud = blockIdx.y, rows = args.clouds * args.tokens, channels = args.channels;
  const int32_t base = static_cast<int32_t>(cloud * args.tokens);
  const int64_t column = int64_t(rank) * kWidth + 4 * lane;
  const bool adaptive = args.ensemble == Ensemble::adaptive;
  const auto inside = [&](int step) { return column + 4 * kLanes * step < channels; };

  if (adaptive) {  // every block of the cloud does the same
    for (int what = threadIdx.x / kWarp; what <= 2 * views; what += kBlock / kWarp) {
      for (int t = threadIdx.x % kWarp; t < tokens; t += kWarp) {
        const float* const own = parts + what * rows + base + t;
        float sum = 0.0f;
#pragma unroll 8
        for (int from = 0; from < plan.slices; from++) sum += own[from * int64_t(2 * views + 1) * rows];
        weights[what * tokens + t] = sum;
        if (rank == 0) args.agreement[what * rows + base + t] = sum;
      }
    }
    __syncthreads();
    for (int t = threadIdx.x; t < tokens; t += kBlock) {
      const auto length = [&](int what) { return rsqrtf(fmaxf(weights[what * tokens + t], kNorm * kNorm)); };
      const float space = length(2 * views);
      float all = 0.0f;
      for (int v = 0; v < views; v++) {
        const float cosine = weights[v * tokens + t] * length(views + v) * space;
        const float weight = 0.5f * (cosine + 1.0f);
        weights[v * tokens + t] = weight;
        all += weight;
      }
      all = args.coefficient / fmaxf(all, kTiny);
      for (int v = 0; v < views; v++) weights[v * tokens + t] *= all;
    }
  }
  __syncthreads();

  activated += (cloud * plan.slices + rank) * plan.rows * plan.pitch + 4 * lane;
  const bool largest = args.ensemble == Ensemble::max;
  for (int t = group; t < tokens; t += kGroups) {
    const int64_t at = int64_t(base + t) * channels + column;
    const uint16_t* const row_at = found + int64_t(base + t) * plan.index_pitch;
    uint4 eight = {};
    if (kViews > 0) eight = *reinterpret_cast<const uint4*>(row_at);
    Lane<4> x[kSteps], blend[kSteps];
#pragma unroll
    for (int j = 0; j < kSteps; j++) {
      const T* const own = static_cast<const T*>(args.features) + at + 4 * kLanes * j;
      x[j] = inside(j) ? load<4>(own) : zero<4>();
      blend[j] = zero<4>();
    }
#pragma unroll
    for (int v = 0; v < views; v++) {
      const uint32_t two = v < 2 ? eight.x : v < 4 ? eight.y : v < 6 ? eight.z : eight.w;
      const int row = kViews == 0 ? row_at[v] : v % 2 == 0 ? two & 0xffff : two >> 16;
      const T* const from = activated + row * plan.pitch;
      const float weight = adaptive ? weights[v * tokens + t] : args.coefficient / float(views);
#pragma unroll
      for (int j = 0; j < kSteps; j++) {
        const Lane<4> g = load<4>(from + 4 * kLanes * j);
        if (!largest) {
          add(&blend[j], weight, g);
          continue;
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
          if (v == 0 || exceeds(g.at[n], blend[j].at[n])) blend[j].at[n] = g.at[n];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kSteps; j++) {
      if (!inside(j)) continue;
      store_out<T>(args, at + 4 * kLanes * j, x[j], largest ? args.coefficient : 1.0f, blend[j]);
    }
  }
}

// Calls function(element, integral constant of the steps, plan) if there is room; whether there is.
template <typename F>
bool with_plan(const Guided& args, const F& function) {
  if (args.channels % 4 != 0 || args.views >= kWarp || args.clouds > 65535) return false;
  const int64_t most = shared_limit(kStaged);
  bool done = false;
  with_type(args.dtype, [&](auto type) {
    const auto with = [&](auto steps) {
      const Plan plan = plan_of<decltype(type), decltype(steps)::value>(args, most);
      if (plan.bytes > most || plan.blend_bytes > most || plan.rows >= kNone) return;
      function(type, steps, plan);
      done = true;
    };
    // Narrow slices where there would be too few blocks.
    if (args.clouds * args.channels <= 96 * 132) {
      with(std::integral_constant<int, 1>{});
    } else {
      with(std::integral_constant<int, 3>{});
    }
  });
  return done;
}

struct Workspace {
  void* activated;
  float* parts;
  uint16_t* found;
  int64_t bytes;

  Workspace(const Guided& args, const Plan& plan, int64_t element, void* memory) {
    Room room(memory);
    activated = room.take<char>(args.clouds * plan.slices * plan.rows * plan.pitch * element);
    parts = room.take<float>(plan.slices * (2 * args.views + 1) * args.clouds * args.tokens);
    found = room.take<uint16_t>(args.clouds * args.tokens * plan.index_pitch);
    bytes = room.used;
  }
};

}  // namespace

int64_t blend_workspace(const Guided& args) {
  int64_t bytes = 0;
  with_plan(args, [&](auto type, auto, const Plan& plan) {
    bytes = Workspace(args, plan, sizeof(type), nullptr).bytes;
  });
  return bytes;
}

int blend_tokens(const GuidedForward& args, const float* z, void* memory, cudaStream_t stream) {
  int error = 0;
  const bool done = with_plan(args, [&](auto type, auto steps, const Plan& plan) {
    using T = decltype(type);
    constexpr int kSteps = decltype(steps)::value;
    const Workspace work(args, plan, sizeof(T), memory);
    T* const activated = static_cast<T*>(work.activated);
    const bool six = args.views == 6 && args.ensemble == Ensemble::adaptive;
    const dim3 grid(plan.slices, static_cast<unsigned>(args.clouds));
    const auto first = six ? activate_kernel<T, kSteps, 6> : activate_kernel<T, kSteps, 0>;
    error = allow_shared(first, static_cast<int>(plan.bytes));
    if (error) return;
    first<<<grid, kBlock, plan.bytes, stream>>>(args, z, plan, activated, work.found, work.parts);
    const auto second = six ? blend_kernel<T, kSteps, 6> : blend_kernel<T, kSteps, 0>;
    error = allow_shared(second, static_cast<int>(plan.blend_bytes));
    if (error) return;
    second<<<grid, kBlock, plan.blend_bytes, stream>>>(args, plan, activated, work.found, work.parts);
    error = cudaGetLastError();
  });
  return done ? error : blend_each_token(args, z, stream);
}

}  // namespace guided
}  // namespace any2point
