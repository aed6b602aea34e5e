// Local aggregation in training on sm_90a, forward: the passes of train.h over the rows x, which are built in
// registers as in evaluation (hopper.sm90a.cu), 16 of them a warp. Hidden channels come in the order that
// lets a thread read and write 16 bytes of y1 at a time.
//
// H200, 32 clouds, K = 81, float16, us:
//   points, centres, channels, hidden    y1, first unit   second   Gram matrix of each   maximum
//     1024      512       192      96               192      311                    96       504
//      512      256       384     192               250                            100       406
//      256      128       768      32               122                             10       312
// Floors of y1 and the maximum are 61 us of sines and cosines each, and products of 62, 124 and 21 us a
// layer; y1 of the first two stages takes 60 us to write and as much for each time that it is read.
// Schedulers issue in 33 to 47 % of the cycles, as registers leave them three warps: a third of what these
// wait for is memory (y1 where a tile begins, and the index of a neighbour that does not stay in registers),
// a fifth the instruction before.
#include "local_aggregate/hopper_rows.cuh"
#include "local_aggregate/hopper_train.h"

namespace any2point {
namespace {

constexpr int kTeams = 3;  // of four warps, in a block
constexpr int kWarps = 4 * kTeams;

// How the tiles of all rows are cut: so many a warp.
struct Plan {
  int each;
  int64_t blocks, warps;

  Plan(int64_t groups, int64_t neighbors, int processors) {
    const int64_t tiles = divided(groups * neighbors, kRows);
    const int64_t most = std::max<int64_t>(1, (int64_t{kGroups - 1} * neighbors + 1) / kRows);
    each =
        static_cast<int>(std::max<int64_t>(1, std::min(most, divided(tiles, int64_t{kWarps} * processors))));
    blocks = divided(tiles, int64_t{kWarps} * each);
    warps = blocks * kWarps;
  }
};

// Where a group goes on in the next warps: maxima of its later parts, [warps, C].
struct Heads {
  float* value;
  int32_t* row;
};

// The unit's W1 [H, C] for products with x.
template <int C, int H>
__device__ void load_next_weight(const void* weight, char* to) {
  const uint4* from = static_cast<const uint4*>(weight);
  for (int i = threadIdx.x; i < H * C / 8; i += blockDim.x) {
    const int n = i / (C / 8), b = i % (C / 8) / 4, t = i % 4;
    store_weight(from[hidden_channel(n) * (C / 8) + Order<C>::block(b) * 4 + t], to + b * H * kBlockBytes, n,
                 t);
  }
}

// A done unit's W2 [C, H] for products with h.
template <int C, int H>
__device__ void load_done_weight(const void* weight, char* to) {
  const uint4* from = static_cast<const uint4*>(weight);
  for (int i = threadIdx.x; i < C * H / 8; i += blockDim.x) {
    const int n = i / (H / 8), b = i % (H / 8) / 4, t = i % 4;
    store_weight(from[Order<C>::channel(n) * (H / 8) + b * 4 + t], to + b * C * kBlockBytes, n, t);
  }
}

template <int H>
__device__ void load_scales(const HopperDone& unit, float* to) {
  for (int i = threadIdx.x; i < H; i += blockDim.x) {
    to[i] = unit.scale[i];
    to[H + i] = unit.shift[i];
  }
}

// Two rows of y1, as a thread reads them: of those that it writes if a next unit's y1 takes their place.
template <int H>
struct Before {
  uint4 v[2][H / 32];

  __device__ __forceinline__ Before(const void* before, const Walk& walk, int64_t first, int tile) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int place = min(tile * kRows + static_cast<int>(threadIdx.x % 32 / 4) + 8 * i, walk.rows - 1);
      const uint4* from = static_cast<const uint4*>(before) + (first + place) * (H / 8) + threadIdx.x % 4;
#pragma unroll
      for (int b = 0; b < H / 32; b++) v[i][b] = from[4 * b];
    }
  }
};

// h = ReLU(scale y1 + shift) as an operand.
template <int H, typename T>
__device__ __forceinline__ void hidden_operand(const Before<H>& before, const float* scale,
                                               uint32_t (&h)[H / 16][4]) {
#pragma unroll
  for (int b = 0; b < H / 32; b++) {
    const float* at = scale + 32 * b + threadIdx.x % 4 * 8;
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const float2 factor = *reinterpret_cast<const float2*>(at + 2 * q);
      const float2 shift = *reinterpret_cast<const float2*>(at + H + 2 * q);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint4& v = before.v[i][b];
        const uint32_t y = q == 0 ? v.x : q == 1 ? v.y : q == 2 ? v.z : v.w;
        h[2 * b + q / 2][q % 2 * 2 + i] = hidden_pair<T>(y, factor, shift);
      }
    }
  }
}

// The sum over the lanes that hold the same channels; each lane ends up with another one of the 8.
__device__ __forceinline__ float sum_of_lanes(const float (&v)[8]) {
  const bool a = threadIdx.x & 16, b = threadIdx.x & 8, c = threadIdx.x & 4;
  float u[4], w[2];
#pragma unroll
  for (int i = 0; i < 4; i++) u[i] = (a ? v[i + 4] : v[i]) + __shfl_xor_sync(kLanes, a ? v[i] : v[i + 4], 16);
#pragma unroll
  for (int i = 0; i < 2; i++) w[i] = (b ? u[i + 2] : u[i]) + __shfl_xor_sync(kLanes, b ? u[i] : u[i + 2], 8);
  return (c ? w[1] : w[0]) + __shfl_xor_sync(kLanes, c ? w[0] : w[1], 4);
}

// Rows of a tile that there are.
__device__ __forceinline__ int used_rows(const Walk& walk, int tile) {
  return walk.groups == 0 ? 0 : max(0, min(kRows, walk.rows - tile * kRows));
}

// A tile's rows of y1, the first `used` of them.
template <int H, typename T>
__device__ __forceinline__ void store_before(const float (&d)[H / 2], int64_t first, int used, void* before) {
  const int row = threadIdx.x % 32 / 4;
  uint4* to = static_cast<uint4*>(before) + (first + row) * (H / 8) + threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (row + 8 * i < used) {
#pragma unroll
      for (int b = 0; b < H / 32; b++) {
        const float* from = d + 16 * b + 2 * i;
        to[i * H + 4 * b] = {Two<T>::of(from[0], from[1]), Two<T>::of(from[4], from[5]),
                             Two<T>::of(from[8], from[9]), Two<T>::of(from[12], from[13])};
      }
    }
  }
}

// Mean and spread of a warp's rows of y1, tile by tile: of 32 channels a lane has one.
template <int H>
struct Statistics {
  float mean[H / 32] = {}, spread[H / 32] = {};
  int count = 0;

  // kWhole: all rows of the tile are there.
  template <bool kWhole>
  __device__ __forceinline__ void take(const float (&d)[H / 2], int used) {
    const int row = threadIdx.x % 32 / 4;
    const bool one = kWhole || row < used, two = kWhole || row + 8 < used;
    const int all = count + used;
    const float each = used > 0 ? 1.0f / static_cast<float>(used) : 0.0f;
    const float part = used > 0 ? static_cast<float>(used) / static_cast<float>(all) : 0.0f;
    const float both = static_cast<float>(count) * part;
    count = all;
#pragma unroll
    for (int b = 0; b < H / 32; b++) {
      const float* from = d + 16 * b;
      float sum[8], square[8];
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float low = one ? from[j / 2 * 4 + j % 2] : 0.0f,
                    high = two ? from[j / 2 * 4 + j % 2 + 2] : 0.0f;
        sum[j] = low + high;
        square[j] = __fmaf_rn(low, low, high * high);
      }
      const float total = sum_of_lanes(sum), squares = sum_of_lanes(square);
      const float here = total * each, delta = here - mean[b];
      mean[b] = __fmaf_rn(delta, part, mean[b]);
      // Not below 0; NaN stays.
      const float own = __fmaf_rn(-total, here, squares);
      spread[b] += __fmaf_rn(delta * delta, both, own < 0 ? 0.0f : own);
    }
  }

  // Those of the whole block, in the order of its warps; `room`: floats [warps, 2, H] and [warps], which
  // nobody else uses by then.
  __device__ __forceinline__ void store(float* room, float* means, float* spreads, float* counts) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int channel = lane % 4 * 8 + lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2;
    float* const sizes = room + warps * 2 * H;
    __syncthreads();
#pragma unroll
    for (int b = 0; b < H / 32; b++) {
      room[warp * 2 * H + 32 * b + channel] = mean[b];
      room[(warp * 2 + 1) * H + 32 * b + channel] = spread[b];
    }
    if (lane == 0) sizes[warp] = static_cast<float>(count);
    __syncthreads();
    for (int i = threadIdx.x; i < H; i += blockDim.x) {
      float all = 0, total = 0, squares = 0;
      for (int w = 0; w < warps; w++) {
        if (sizes[w] == 0) break;
        const float part = sizes[w] / (all + sizes[w]), delta = room[w * 2 * H + i] - total;
        total = __fmaf_rn(delta, part, total);
        squares += room[(w * 2 + 1) * H + i] + delta * delta * (all * part);
        all += sizes[w];
      }
      means[int64_t{blockIdx.x} * H + i] = total;
      spreads[int64_t{blockIdx.x} * H + i] = squares;
      if (i == 0) counts[blockIdx.x] = all;
    }
  }
};

// x + h W2' + bias, 64 channels at a time, to `take`. While it has some the products of the next ones run.
template <int C, int H, typename T, typename Take>
__device__ __forceinline__ void apply_unit(const uint32_t (&h)[H / 16][4], const char* weight,
                                           const float* bias, Channels (&x)[C / 64], Take take) {
  constexpr int kPairs = C / 64;
  float d[2][32];
#pragma unroll
  for (int p = 0; p <= kPairs; p++) {
    if (p < kPairs) {
#pragma unroll
      for (int b = 0; b < 2; b++) set_residual<T>(x[p][b], bias + 64 * p + 32 * b, d[p % 2] + 16 * b);
      out_product<C, H, 64, T>(d[p % 2], h, weight, 64 * p);
    }
    if (p > 0) {
      if (p < kPairs) {
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      pin(d[(p + 1) % 2]);
      take(p - 1, d[(p + 1) % 2]);
    }
  }
}

// y1 = x W1' + b1 after kDone units, perhaps with its statistics. Without a unit before, rows are built while
// the products of those before run.
template <int C, int H, int kDone, bool kStatistics, typename T>
__global__ void __launch_bounds__(kWarps * 32, 1)
    project_kernel(const __grid_constant__ HopperProject args, const Part part) {
  extern __shared__ __align__(1024) char room[];
  constexpr int kWeight = C * H * 2, kPairs = C / 64;
  char* const features = room + (1 + kDone) * kWeight;
  float* const bias = reinterpret_cast<float*>(features + kTeams * Feed<C>::kBytes);
  float* const frequency = bias + H;
  float* const scale = frequency + C / 6;          // of the unit that is done, and its shift
  float* const done_bias = scale + kDone * 2 * H;  // of the unit that is done
  Group* const groups = reinterpret_cast<Group*>(done_bias + kDone * C) + threadIdx.x / 32 * kGroups;
  load_next_weight<C, H>(args.weight, room);
  for (int i = threadIdx.x; i < H; i += blockDim.x) bias[i] = args.bias[hidden_channel(i)];
  load_frequency<C>(args.rows, frequency);
  if constexpr (kDone > 0) {
    load_done_weight<C, H>(args.done[0].weight, room + kWeight);
    load_out_bias<C>(args.done[0].bias, done_bias);
    load_scales<H>(args.done[0], scale);
  }
  const Walk walk = walk_of(args.rows, part, this_warp());
  const int64_t first = walk.first * args.rows.neighbors + walk.begin;
  load_groups(args.rows, part, walk, groups);
  publish();

  Feed<C> feed(args.rows, walk, groups, features);
  Rows rows = feed.next(0);
  Statistics<H> statistics;
  for (int tile = 0; tile < part.tiles; tile++) {
    float d[H / 2];
    if constexpr (kDone == 0) {
      set_bias<H>(bias, d);
      pin(d);
      feed.wait();
      const Rows current = rows;
      constexpr int kAhead = H < 192 ? 2 : 1;  // as many as there are registers for
      Channels x[kAhead];
#pragma unroll
      for (int p = 0; p < kPairs; p++) {
        feed.load(current, p, x[p % kAhead]);
        if (p == kLastNear<C>) rows = feed.next(tile + 1);
        add_encoding<C, T>(current, frequency, p, x[p % kAhead]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) {
          uint32_t a[4];
          operand(x[p % kAhead], k, a);
          wgmma<H, T>(d, a, descriptor(room + (2 * p + k / 2) * H * kBlockBytes + k % 2 * 32));
        }
        wgmma_commit();
        if (p + 1 < kPairs) wgmma_wait<kAhead - 1>();
      }
      wgmma_wait<0>();
    } else {
      const Before<H> before(args.done[0].before, walk, first, tile);
      Channels x[kPairs];
      feed.wait();
#pragma unroll
      for (int p = 0; p < kPairs; p++) feed.load(rows, p, x[p]);
      const Rows current = rows;
      rows = feed.next(tile + 1);
#pragma unroll
      for (int p = 0; p < kPairs; p++) add_encoding<C, T>(current, frequency, p, x[p]);
      uint32_t h[H / 16][4];
      hidden_operand<H, T>(before, scale, h);
      apply_unit<C, H, T>(h, room + kWeight, done_bias, x, [&](int p, const float (&z)[32]) {
#pragma unroll
        for (int b = 0; b < 2; b++) relu_channels<T>(z + 16 * b, x[p][b]);
      });
      set_bias<H>(bias, d);
      pin(d);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < C / 16; k++) {
        uint32_t a[4];
        operand(x[k / 4], k % 4, a);
        wgmma<H, T>(d, a, descriptor(room + k / 2 * H * kBlockBytes + k % 2 * 32));
      }
      wgmma_commit();
      wgmma_wait<0>();
    }
    pin(d);
    const int used = used_rows(walk, tile);
    store_before<H, T>(d, first + tile * kRows, used, args.before);
    if constexpr (kStatistics) {
      if (used == kRows) {
        statistics.template take<true>(d, used);
      } else {
        statistics.template take<false>(d, used);
      }
    }
  }
  if constexpr (kStatistics) {
    statistics.store(reinterpret_cast<float*>(room), args.mean, args.spread, args.count);
  }
}

// The largest value of a group so far, and the rows (of the group) that have it: of two channels. Values are
// compared as integers, which is their order from 0 on, with the four lowest bits cleared.
struct Best {
  int value[2] = {0, 0};
  uint32_t rows = 0;
};

// The largest over the lanes that hold the same channels; each lane ends up with another two of the 64.
__device__ __forceinline__ void largest_keys(const int (&v)[2][4][2], int (&to)[2]) {
  const bool a = threadIdx.x & 16, b = threadIdx.x & 8, c = threadIdx.x & 4;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    int w[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int u[2];
#pragma unroll
      for (int q = 0; q < 2; q++) {
        const int other = __shfl_xor_sync(kLanes, a ? v[i][q][e] : v[i][q + 2][e], 16);
        u[q] = max(a ? v[i][q + 2][e] : v[i][q][e], other);
      }
      w[i] = max(b ? u[1] : u[0], __shfl_xor_sync(kLanes, b ? u[0] : u[1], 8));
    }
    to[e] = max(c ? w[1] : w[0], __shfl_xor_sync(kLanes, c ? w[0] : w[1], 4));
  }
}

// Takes 64 channels of a tile's rows, before their ReLU, into the maximum of their group, and writes it where
// the group ends, or the warp's rows. `segment`: the group of the tile's first row.
template <int C>
__device__ __forceinline__ void take_best(const HopperMaximum& args, const Heads& heads, const Walk& walk,
                                          int tile, int tiles, int segment, int pair, const float (&d)[32],
                                          Best* best) {
  const int lane = threadIdx.x % 32, row = lane / 4, neighbors = args.rows.neighbors;
  for (int s = segment; s < walk.groups; s++) {
    const int low = s * neighbors - walk.begin - tile * kRows, high = low + neighbors;
    if (low >= kRows) break;
    const bool whole = low <= 0 && high >= kRows;
    const bool one = row >= low && row < high, two = row + 8 >= low && row + 8 < high;
    int v[2][4][2], key[2];
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const int at = i / 8 * 16 + i / 2 % 4 * 4 + i % 2;
      int a = (__float_as_int(d[at]) & ~15) | (15 - row), b = (__float_as_int(d[at + 2]) & ~15) | (7 - row);
      if (!whole) {
        a = one ? a : 0;
        b = two ? b : 0;
      }
      v[i / 8][i / 2 % 4][i % 2] = max(a, b);
    }
    largest_keys(v, key);
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int value = key[e] & ~15;
      if (value > best->value[e]) {
        const uint32_t k = 15 - (key[e] & 15) - low;
        best->value[e] = value;
        best->rows = e == 0 ? (best->rows & 0xffff0000u) | k : (best->rows & 0xffffu) | k << 16;
      }
    }
    if (high <= kRows || tile + 1 == tiles) {
      const int block = Order<C>::block(2 * pair) + lane / 4 % 2 * Order<C>::kParts;
      const int64_t channel = block * 32 + lane % 4 * 8 + lane / 8 * 2;
      const bool head = s == 0 && walk.begin > 0;
      const int64_t at = (head ? this_warp() : walk.first + s) * C + channel;
      *reinterpret_cast<float2*>((head ? heads.value : args.out) + at) = {__int_as_float(best->value[0]),
                                                                          __int_as_float(best->value[1])};
      *reinterpret_cast<int2*>((head ? heads.row : args.argmax) + at) = {
          static_cast<int>(best->rows & 0xffff), static_cast<int>(best->rows >> 16)};
      *best = Best();
    }
  }
}

// out = max over k of the rows after all units, and where it is. While the products of 64 channels run, the
// next 64 are built.
template <int C, int H, typename T>
__global__ void __launch_bounds__(kWarps * 32, 1)
    maximum_kernel(const __grid_constant__ HopperMaximum args, const Part part, const Heads heads) {
  extern __shared__ __align__(1024) char room[];
  constexpr int kPairs = C / 64;
  char* const features = room + C * H * 2;
  float* const bias = reinterpret_cast<float*>(features + kTeams * Feed<C>::kBytes);
  float* const frequency = bias + C;
  float* const scale = frequency + C / 6;
  Group* const groups = reinterpret_cast<Group*>(scale + 2 * H) + threadIdx.x / 32 * kGroups;
  load_done_weight<C, H>(args.done[0].weight, room);
  load_out_bias<C>(args.done[0].bias, bias);
  load_scales<H>(args.done[0], scale);
  load_frequency<C>(args.rows, frequency);
  const Walk walk = walk_of(args.rows, part, this_warp());
  const int64_t first = walk.first * args.rows.neighbors + walk.begin;
  load_groups(args.rows, part, walk, groups);
  publish();

  Feed<C> feed(args.rows, walk, groups, features);
  Rows rows = feed.next(0);
  Best best[kPairs];
  int segment = 0;
  for (int tile = 0; tile < part.tiles; tile++) {
    uint32_t h[H / 16][4];
    {
      const Before<H> before(args.done[0].before, walk, first, tile);
      hidden_operand<H, T>(before, scale, h);
    }
    feed.wait();
    const Rows current = rows;
    float d[2][32];
#pragma unroll
    for (int p = 0; p <= kPairs; p++) {
      if (p < kPairs) {
        Channels x;
        feed.load(current, p, x);
        if (p == kLastNear<C>) rows = feed.next(tile + 1);
        add_encoding<C, T>(current, frequency, p, x);
#pragma unroll
        for (int b = 0; b < 2; b++) set_residual<T>(x[b], bias + 64 * p + 32 * b, d[p % 2] + 16 * b);
        out_product<C, H, 64, T>(d[p % 2], h, room, 64 * p);
      }
      if (p > 0) {
        if (p < kPairs) {
          wgmma_wait<1>();
        } else {
          wgmma_wait<0>();
        }
        pin(d[(p + 1) % 2]);
        take_best<C>(args, heads, walk, tile, part.tiles, segment, p - 1, d[(p + 1) % 2], &best[p - 1]);
      }
    }
    segment = segment_after(args.rows, walk, tile, segment);
  }
}

// The same for two units.
template <int C, int H, typename T>
__global__ void __launch_bounds__(kWarps * 32, 1)
    maximum_of_two_kernel(const __grid_constant__ HopperMaximum args, const Part part, const Heads heads) {
  extern __shared__ __align__(1024) char room[];
  constexpr int kWeight = C * H * 2, kPairs = C / 64;
  char* const features = room + 2 * kWeight;
  float* const bias = reinterpret_cast<float*>(features + kTeams * Feed<C>::kBytes);
  float* const frequency = bias + 2 * C;
  float* const scale = frequency + C / 6;
  Group* const groups = reinterpret_cast<Group*>(scale + 4 * H) + threadIdx.x / 32 * kGroups;
  for (int u = 0; u < 2; u++) {
    load_done_weight<C, H>(args.done[u].weight, room + u * kWeight);
    load_out_bias<C>(args.done[u].bias, bias + u * C);
    load_scales<H>(args.done[u], scale + 2 * u * H);
  }
  load_frequency<C>(args.rows, frequency);
  const Walk walk = walk_of(args.rows, part, this_warp());
  const int64_t first = walk.first * args.rows.neighbors + walk.begin;
  load_groups(args.rows, part, walk, groups);
  publish();

  Feed<C> feed(args.rows, walk, groups, features);
  Rows rows = feed.next(0);
  Best best[kPairs];
  int segment = 0;
  for (int tile = 0; tile < part.tiles; tile++) {
    uint32_t h[H / 16][4];
    const Before<H> before(args.done[0].before, walk, first, tile);
    Channels x[kPairs];
    feed.wait();
#pragma unroll
    for (int p = 0; p < kPairs; p++) feed.load(rows, p, x[p]);
    const Rows current = rows;
    rows = feed.next(tile + 1);
#pragma unroll
    for (int p = 0; p < kPairs; p++) add_encoding<C, T>(current, frequency, p, x[p]);
    hidden_operand<H, T>(before, scale, h);
    const Before<H> second(args.done[1].before, walk, first, tile);
    apply_unit<C, H, T>(h, room, bias, x, [&](int p, const float (&z)[32]) {
#pragma unroll
      for (int b = 0; b < 2; b++) relu_channels<T>(z + 16 * b, x[p][b]);
    });
    hidden_operand<H, T>(second, scale + 2 * H, h);
    apply_unit<C, H, T>(h, room + kWeight, bias + C, x, [&](int p, const float (&z)[32]) {
      take_best<C>(args, heads, walk, tile, part.tiles, segment, p, z, &best[p]);
    });
    segment = segment_after(args.rows, walk, tile, segment);
  }
}

// Where a group goes on in the next warps, the maximum of its parts; a block per warp, a thread per channel.
__global__ void join_kernel(const HopperMaximum args, const Part part, const Heads heads, int64_t warps) {
  Walk walk = walk_of(args.rows, part, blockIdx.x);
  const int64_t group = walk.first;
  if (walk.groups == 0 || walk.begin == 0) return;
  if (walk.begin > part.tiles * kRows && blockIdx.x > 0) return;  // the warp before goes on with it, too
  const int width = blockDim.x;
  const int64_t at = group * width + threadIdx.x;
  int largest = __float_as_int(args.out[at]), row = args.argmax[at];
  for (int64_t warp = blockIdx.x; warp < warps; warp++) {
    walk = walk_of(args.rows, part, warp);
    if (walk.groups == 0 || walk.first != group) break;
    const int value = __float_as_int(heads.value[warp * width + threadIdx.x]);
    if (value > largest) {
      largest = value;
      row = heads.row[warp * width + threadIdx.x];
    }
  }
  args.out[at] = __int_as_float(largest);
  args.argmax[at] = row;
}

template <typename Kernel, typename... Args>
int launch(Kernel kernel, int64_t blocks, size_t shared, cudaStream_t stream, const Args&... args) {
  const int bytes = static_cast<int>(shared);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), kWarps * 32, bytes, stream>>>(args...);
  return cudaGetLastError();
}

// What kernels keep beside weights.
template <int C>
constexpr size_t around(int floats) {
  return kTeams * Feed<C>::kBytes + 4 * (C / 6 + floats) + sizeof(Group) * kGroups * kWarps;
}

template <int C, int H, int kDone, typename T>
int project(const HopperProject& args, const Part& part, int64_t blocks, cudaStream_t stream) {
  const size_t shared = (1 + kDone) * 2 * C * H + around<C>(H + kDone * (2 * H + C));
  const auto kernel =
      args.mean ? project_kernel<C, H, kDone, true, T> : project_kernel<C, H, kDone, false, T>;
  return launch(kernel, blocks, shared, stream, args, part);
}

template <typename T>
int project_of(const HopperProject& args, int64_t width, const Part& part, int64_t blocks,
               cudaStream_t stream) {
  switch (width) {
    case 192:
      return args.units == 0 ? project<192, 96, 0, T>(args, part, blocks, stream)
                             : project<192, 96, 1, T>(args, part, blocks, stream);
    case 384:
      return project<384, 192, 0, T>(args, part, blocks, stream);
    default:
      return project<768, 32, 0, T>(args, part, blocks, stream);
  }
}

template <int C, int H, typename T>
int maximum(const HopperMaximum& args, const Part& part, const Heads& heads, int64_t blocks,
            cudaStream_t stream) {
  const size_t shared = 2 * C * H + around<C>(C + 2 * H);
  return launch(maximum_kernel<C, H, T>, blocks, shared, stream, args, part, heads);
}

template <typename T>
int maximum_of(const HopperMaximum& args, int64_t width, const Part& part, const Heads& heads, int64_t blocks,
               cudaStream_t stream) {
  switch (width) {
    case 192:
      return launch(maximum_of_two_kernel<192, 96, T>, blocks, 4 * 192 * 96 + around<192>(2 * 192 + 4 * 96),
                    stream, args, part, heads);
    case 384:
      return maximum<384, 192, T>(args, part, heads, blocks, stream);
    default:
      return maximum<768, 32, T>(args, part, heads, blocks, stream);
  }
}

Part part_of(const HopperAggregate& rows, const Plan& plan, float4* scales, cudaStream_t stream) {
  scale_kernel<<<static_cast<unsigned>(divided(rows.groups, 4)), 128, 0, stream>>>(rows, scales);
  return {0, rows.groups * rows.neighbors, plan.each, scales, nullptr, nullptr};
}

}  // namespace

int64_t hopper_train_parts(int64_t groups, int64_t neighbors, int processors) {
  return Plan(groups, neighbors, processors).blocks;
}

int64_t hopper_train_scratch(int64_t width, int64_t groups, int64_t neighbors, int processors) {
  return groups * static_cast<int64_t>(sizeof(float4)) +
         Plan(groups, neighbors, processors).warps * width * 8;
}

int hopper_project(const HopperProject& args, int64_t width, int64_t, int processors, void* scratch,
                   void* stream_) {
  if (args.rows.groups == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Plan plan(args.rows.groups, args.rows.neighbors, processors);
  const Part part = part_of(args.rows, plan, static_cast<float4*>(scratch), stream);
  return args.rows.bfloat16 ? project_of<__nv_bfloat16>(args, width, part, plan.blocks, stream)
                            : project_of<__half>(args, width, part, plan.blocks, stream);
}

int hopper_maximum(const HopperMaximum& args, int64_t width, int64_t, int processors, void* scratch,
                   void* stream_) {
  if (args.rows.groups == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Plan plan(args.rows.groups, args.rows.neighbors, processors);
  float4* const scales = static_cast<float4*>(scratch);
  const Part part = part_of(args.rows, plan, scales, stream);
  float* const values = reinterpret_cast<float*>(scales + args.rows.groups);
  const Heads heads{values, reinterpret_cast<int32_t*>(values + plan.warps * width)};
  const int error = args.rows.bfloat16
                        ? maximum_of<__nv_bfloat16>(args, width, part, heads, plan.blocks, stream)
                        : maximum_of<__half>(args, width, part, heads, plan.blocks, stream);
  if (error) return error;
  join_kernel<<<static_cast<unsigned>(plan.warps), static_cast<unsigned>(width), 0, stream>>>(
      args, part, heads, plan.warps);
  return cudaGetLastError();
}

}  // namespace any2point
