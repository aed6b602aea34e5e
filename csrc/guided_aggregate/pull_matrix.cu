// Rows pooled again, activated, and how the gradient pulls at the views of every token, as products of
// matrices: 16-bit features of clouds of up to kTokens tokens, means over cells. A block takes a cloud and 64
// channels, and kChunk rows of a view at once:
//
// - rows are pooled as in pool_matrix.cu, of which a warp has eight channels,
// - wait normalised for the passes to come, and activated in shared memory,
// - and are multiplied with all tokens of the cloud. Of a token's products, that with its own row is kept.
//   The tokens' gradient is in 16 bits as it is; rows are two numbers of 16 bits that add up to them.
//
// Another kernel takes the voxels.
#include "guided_aggregate/copy.cuh"
#include "guided_aggregate/gradient.cuh"
#include "guided_aggregate/matrix.cuh"
#include "guided_aggregate/pool.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kTokens = 128;
constexpr int kChunk = 48;          // rows at once
constexpr int kFactors = 16;        // M + 1 at most
constexpr int kPitch = kSlice + 8;  // elements: rows lie in different banks
constexpr int kStretch = 4;         // voxels of a warp
constexpr int kMemberPitch = kTokens + 2 * kFactors + 8;
static_assert(kTokens == 16 * kWarps && kSlice == 8 * kWarps && kChunk == 48, "whole tiles");

struct Memory {
  uint16_t grad[kTokens][kPitch], x[kTokens][kPitch];
  uint16_t rows[2][kChunk][kPitch];        // activated
  uint16_t members[kChunk][kMemberPitch];  // membership (0 or 1); n inner, rounded; what rounding left
  float share[kChunk];                     // 1 / n
  int32_t segment[2][kTokens];             // row of a token in the chunk, or less or more; two in turn
};

__device__ inline uint32_t rounded(float low, float high) { return narrow_two(low, high, BFloat16{}); }
__device__ inline float first_of(uint32_t two) { return __uint_as_float(two << 16); }
__device__ inline float second_of(uint32_t two) { return __uint_as_float(two & 0xffff0000u); }

// Activations as two parts that add up to them.
__device__ inline void split_to(uint16_t (&to)[2][kChunk][kPitch], int row, int c, Lane<2> g, Half) {
  Half* const high = reinterpret_cast<Half*>(to[0][row] + c);
  keep(high, g);
#pragma unroll
  for (int n = 0; n < 2; n++) g.at[n] -= widen(high[n]);
  keep(reinterpret_cast<Half*>(to[1][row] + c), g);
}
__device__ inline void split_to(uint16_t (&to)[2][kChunk][kPitch], int row, int c, const Lane<2>& g,
                                BFloat16) {
  const uint32_t high = rounded(g.at[0], g.at[1]);
  *reinterpret_cast<uint32_t*>(to[0][row] + c) = high;
  *reinterpret_cast<uint32_t*>(to[1][row] + c) = rounded(g.at[0] - first_of(high), g.at[1] - second_of(high));
}

// What a thread fetches ahead for a chunk.
struct Ahead {
  int segment;    // of token threadIdx.x
  int tokens;     // n of row threadIdx.x / 4
  Lane<4> inner;  // of that row, the coefficients from threadIdx.x % 4 * 4 on
  float proj[4];  // of the warp's channels, as the fragments of a product have them
};

// A warp takes the voxels of a stretch, a lane two channels. Grid: clouds, slices of channels, parts of S.
template <typename T>
__global__ void __launch_bounds__(kThreads) voxels_kernel(GuidedBackward args, GradientWork work) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t rows = args.clouds * args.tokens, channels = args.channels, layer = args.views;
  const int64_t own = int64_t(blockIdx.y) * kSlice + 2 * lane, base = blockIdx.x * args.tokens;
  const bool active = own < channels;
  const int64_t c = active ? own : 0, first = base + (int64_t(blockIdx.z) * kWarps + warp) * kStretch;
  const int64_t last = min(base + args.tokens, first + kStretch);
  const Activation<T, 2, false> activation(args, args.mean, args.deviation, layer, c);
  const T* const x = static_cast<const T*>(args.features) + c;
  Half* const normed = static_cast<Half*>(work.rows) + layer * rows * channels + c;
  Half* const space = static_cast<Half*>(work.space) + c;
  walk<2, true>(
      args.start + layer * (rows + 1), args.order + layer * rows, first, last, lane,
      [&](int32_t token) { return load<2>(x + token * channels); },
      [&](int64_t segment, const Lane<2>& sum, const Lane<2>& most, int tokens) {
        const float share = reciprocal(float(tokens));
        Lane<2> row, s;
#pragma unroll
        for (int n = 0; n < 2; n++) {
          row.at[n] = activation.normed(n, fmaf(sum.at[n], share, most.at[n]));
          s.at[n] = activation(n, row.at[n]).value;
        }
        if (!active) return;
        keep(normed + segment * channels, row);
        keep(space + segment * channels, s);
      });
  if (active && blockIdx.x == 0 && blockIdx.z == 0 && warp == 0) store(space + rows * channels, zero<2>());
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) pull_matrix_kernel(GuidedBackward args, GradientWork work) {
  extern __shared__ float4 room[];
  Memory& memory = *reinterpret_cast<Memory*>(room);
  int32_t* const held = reinterpret_cast<int32_t*>(&memory + 1);  // [V]: rows
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, q = lane % 4;
  const int tokens = static_cast<int>(args.tokens), views = static_cast<int>(args.views);
  const int channels = static_cast<int>(args.channels), slice = blockIdx.y * kSlice;
  const int inner = static_cast<int>(args.inner), pad = static_cast<int>(coefficients(inner));
  const int64_t rows = args.clouds * args.tokens, cloud = blockIdx.x;
  const int32_t base = static_cast<int32_t>(cloud * tokens);
  const T* const grad = static_cast<const T*>(args.grad) + int64_t(base) * channels + slice;
  const T* const x = static_cast<const T*>(args.features) + int64_t(base) * channels + slice;
  for (int i = threadIdx.x; i < kTokens * (kSlice / 8); i += kThreads) {
    const int token = i / (kSlice / 8), c = i % (kSlice / 8) * 8;
    const bool inside = token < tokens && slice + c < channels;
    const int at = inside ? token * channels + c : 0;
    copy_async<16>(memory.x[token] + c, x + at, inside);
    copy_async<16>(memory.grad[token] + c, grad + at, inside);
  }
  copy_commit();
  for (int i = threadIdx.x; i < views; i += kThreads) held[i] = args.count[i * args.clouds + cloud];
  for (int i = threadIdx.x; i < int(sizeof(memory.members) / 4); i += kThreads) {
    reinterpret_cast<uint32_t*>(memory.members)[i] = 0;
  }
  __syncthreads();

  const int own_row = threadIdx.x / 4, own_factor = q * 4, column = 8 * warp + 2 * q;
  const bool active = slice + 8 * warp < channels;
  const int c = active ? slice + column : 0;
  int view = 0, chunk = 0;
  Ahead ahead;
  const auto fetch = [&] {
    while (view < views && chunk >= held[view]) {
      view++;
      chunk = 0;
    }
    if (view == views) return;
    const int64_t first = view * rows + base, row = first + chunk + own_row;
    const int32_t* const start = args.start + row + view;
    const float* const proj =
        args.proj + (int64_t(view) * (inner + 1) + 2 * q) * channels + slice + 8 * warp + g;
    ahead.segment = threadIdx.x < tokens ? args.segment[first + threadIdx.x] - base : -1;
    ahead.tokens = 0;
    ahead.inner = zero<4>();
    if (own_row < kChunk && chunk + own_row < held[view]) {
      ahead.tokens = start[1] - start[0];
      if (own_factor < pad) ahead.inner = load<4>(args.inner_means + row * pad + own_factor);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int k = i % 2 + i / 2 * 8;
      ahead.proj[i] = active && 2 * q + k <= inner ? proj[k * channels] : 0.0f;
    }
  };
  fetch();
  copy_wait<0>();
  constexpr uint16_t kOne = std::is_same_v<T, Half> ? 0x3c00 : 0x3f80;
  int member = -1;  // row whose membership this thread's token has
  for (int turn = 0; view < views; turn ^= 1) {
    // Each thread has a column of the membership and four coefficients of a row.
    if (threadIdx.x < kTokens) {
      if (member >= 0) memory.members[member][threadIdx.x] = 0;
      member = ahead.segment - chunk;
      memory.segment[turn][threadIdx.x] = member;
      if (member >= kChunk) member = -1;
      if (member >= 0) memory.members[member][threadIdx.x] = kOne;
    }
    if (own_row < kChunk) {
      const float count = float(ahead.tokens);
      uint32_t high[2], low[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float a = ahead.inner.at[2 * i] * count, b = ahead.inner.at[2 * i + 1] * count;
        high[i] = rounded(a, b);
        low[i] = rounded(a - first_of(high[i]), b - second_of(high[i]));
      }
      uint16_t* const to = memory.members[own_row] + kTokens + own_factor;
      *reinterpret_cast<uint2*>(to) = make_uint2(high[0], high[1]);
      *reinterpret_cast<uint2*>(to + kFactors) = make_uint2(low[0], low[1]);
      if (q == 0) memory.share[own_row] = ahead.tokens > 0 ? reciprocal(count) : 0.0f;
    }
    uint32_t proj[2], rest[2];  // rounded, and what rounding left
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float a = ahead.proj[2 * i], b = ahead.proj[2 * i + 1];
      proj[i] = rounded(a, b);
      rest[i] = rounded(a - first_of(proj[i]), b - second_of(proj[i]));
    }
    __syncthreads();
    const Activation<T, 2, false> activation(args, args.mean, args.deviation, view, c);
    const int count = min(held[view] - chunk, kChunk), tiles = (count + 15) / 16;
    Half* const normed = static_cast<Half*>(work.rows) + (view * rows + base + chunk) * channels + c;
    float* const pulls = work.pulls + (int64_t(blockIdx.y) * views + view) * rows + base;
    chunk += kChunk;
    fetch();

    {
      const uint16_t* const from = memory.members[lane % 16] + lane / 16 * 8;
      float sum[kChunk / 16][4] = {};
#pragma unroll
      for (int k = 0; k < kTokens; k += 32) {
        uint32_t b[4];
        load_transposed(b, memory.x[k + lane] + 8 * warp);
#pragma unroll
        for (int m = 0; m < kChunk / 16; m++) {
          if (m >= tiles) break;
#pragma unroll
          for (int half = 0; half < 2; half++) {
            uint32_t a[4];
            load_matrices(a, from + 16 * m * kMemberPitch + k + 16 * half);
            multiply<T>(sum[m], a, b[2 * half], b[2 * half + 1]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kChunk / 16; m++) {
        if (m >= tiles) break;
        uint32_t high[4], low[4];
        load_matrices(high, from + 16 * m * kMemberPitch + kTokens);
        load_matrices(low, from + 16 * m * kMemberPitch + kTokens + kFactors);
        multiply<BFloat16>(sum[m], low, proj[0], proj[1]);
        multiply<BFloat16>(sum[m], high, rest[0], rest[1]);
        multiply<BFloat16>(sum[m], high, proj[0], proj[1]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int row = 16 * m + 8 * i + g;
          const float share = memory.share[row];
          Lane<2> z, activated;
#pragma unroll
          for (int n = 0; n < 2; n++) {
            z.at[n] = activation.normed(n, sum[m][2 * i + n] * share);
            activated.at[n] = active ? activation(n, z.at[n]).value : 0.0f;
          }
          if (active && row < count) keep(normed + row * channels, z);
          split_to(memory.rows, row, column, activated, T{});
        }
      }
    }
    __syncthreads();

    float sum[kChunk / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kSlice; k += 16) {
      uint32_t a[4];
      load_matrices(a, memory.grad[16 * warp + lane % 16] + k + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < kChunk / 8; n += 2) {
        if (n / 2 >= tiles) break;
#pragma unroll
        for (int part = 0; part < 2; part++) {
          uint32_t b[4];
          load_matrices(b, memory.rows[part][8 * n + lane / 16 * 8 + lane % 8] + k + lane / 8 % 2 * 8);
          multiply<T>(sum[n], a, b[0], b[1]);
          multiply<T>(sum[n + 1], a, b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int token = 16 * warp + g + 8 * i, place = memory.segment[turn][token];
      // By masks, bit by bit of the place: of a choice the compiler would make an array in memory.
      const auto choose = [&](int bit, uint32_t set, uint32_t clear) {
        const uint32_t mask = place & bit ? ~0u : 0u;
        return (mask & set) | (~mask & clear);
      };
      uint32_t of[kChunk / 8];
#pragma unroll
      for (int n = 0; n < kChunk / 8; n++) {
        of[n] = choose(1, __float_as_uint(sum[n][2 * i + 1]), __float_as_uint(sum[n][2 * i]));
      }
      const uint32_t near = choose(16, choose(8, of[3], of[2]), choose(8, of[1], of[0]));
      const uint32_t mine = choose(32, choose(8, of[5], of[4]), near);
      if (place >= 0 && place < kChunk && place / 2 % 4 == q) pulls[token] = __uint_as_float(mine);
    }
  }
}

}  // namespace

bool pulls_by_matrix(const Guided& args) { return args.tokens <= kTokens && pools_by_matrix(args); }

int pull_by_matrix(const GuidedBackward& args, const GradientWork& work, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.clouds), slices_of(args, kSlice));
  int error = 0;
  const auto launch = [&](auto type) {
    using T = decltype(type);
    const int bytes = static_cast<int>(sizeof(Memory) + 4 * args.views);
    error = allow_shared(pull_matrix_kernel<T>, bytes);
    if (error) return;
    const int64_t each = kWarps * kStretch;
    const dim3 stretches(grid.x, grid.y, static_cast<unsigned>((args.tokens + each - 1) / each));
    voxels_kernel<T><<<stretches, kThreads, 0, stream>>>(args, work);
    pull_matrix_kernel<T><<<grid, kThreads, bytes, stream>>>(args, work);
  };
  if (args.dtype == Dtype::f16) {
    launch(Half{});
  } else {
    launch(BFloat16{});
  }
  return error ? error : cudaGetLastError();
}

}  // namespace guided
}  // namespace any2point
