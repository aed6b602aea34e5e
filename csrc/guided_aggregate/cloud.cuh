// What the kernels of 16-bit clouds of up to kTokens tokens share (sm_90): tokens of a slice of channels in
// shared memory, and the rows of cells as products of matrices, eight cells at a time.
//
// Tokens are in the order of their cells, so that eight cells are a run of tokens: the fragments of their
// channels come from any rows of shared memory through ldmatrix, and those of the membership (0 or 1, exact
// in 16 bits) are made in registers. A row of n tokens is 1 / n times
//
//   [x; proj]' [membership; n inner],
//
// inner and proj split into two bfloat16 each, of whose products the smallest is left out (2^-17 of the
// attention branch).
#pragma once

#include "guided_aggregate/copy.cuh"
#include "guided_aggregate/matrix.cuh"
#include "guided_aggregate/passes.h"
#include "guided_aggregate/rows.cuh"

namespace any2point {
namespace guided {

constexpr int kTokens = 128;
constexpr int kFactors = 16;               // M + 1 at most
constexpr int kCells = 8;                  // of a tile
constexpr int kTall = 3;                   // tiles of 16 channels of a warp
constexpr int kRange = 16 * kTall;         // channels of a warp
constexpr int kRowGroups = 4;              // of warps that share channels
constexpr int kOrderPitch = kTokens + 16;  // a fragment of tokens may begin at the last
constexpr int kStartPitch = kTokens + 16;

// Tokens and cells of a cloud in shared memory.
struct Cloud {
  uint8_t* order;  // [V, kOrderPitch]: tokens by cell
  uint8_t* row;    // [V, kTokens]: cell of each token
  uint8_t* start;  // [V, kStartPitch]: first place of each cell in `order`
  int* held;       // [V]: cells that hold tokens

  __host__ __device__ static int64_t bytes(int64_t views) {
    return views * (kOrderPitch + kTokens + kStartPitch) + (views * 4 + 15) / 16 * 16;
  }
  __device__ Cloud(void* room, int views) {
    held = static_cast<int*>(room);
    order = static_cast<uint8_t*>(room) + (views * 4 + 15) / 16 * 16;
    row = order + views * kOrderPitch;
    start = row + views * kTokens;
  }
  // By all threads.
  __device__ void fetch(const Guided& args, int64_t cloud) const {
    const int64_t rows = args.clouds * args.tokens;
    const int32_t base = static_cast<int32_t>(cloud * args.tokens);
    const int count = static_cast<int>(args.tokens), views = static_cast<int>(args.views);
    for (int i = threadIdx.x; i < views * kOrderPitch; i += blockDim.x) {
      const int view = i / kOrderPitch, at = i % kOrderPitch;
      const bool inside = at < count;
      const int64_t from = view * rows + base + at;
      order[i] = inside ? static_cast<uint8_t>(args.order[from] - base) : 0;
      start[i] = inside ? static_cast<uint8_t>(args.start[from + view] - base) : static_cast<uint8_t>(count);
      if (at < kTokens)
        row[view * kTokens + at] = inside ? static_cast<uint8_t>(args.segment[from] - base) : 0;
    }
    if (threadIdx.x < views) held[threadIdx.x] = args.count[threadIdx.x * args.clouds + cloud];
  }
  __device__ int tiles(int view) const { return static_cast<unsigned>(held[view] + kCells - 1) / kCells; }
};
static_assert(kStartPitch == kOrderPitch, "fetched together");

// Copies the tokens' kWidth channels from `column` on to rows of `pitch` elements, a row by a warp; others
// are zero.
template <int kWidth, typename T>
__device__ inline void fetch_tokens(const Guided& args, int64_t cloud, int64_t column, T* to, int pitch) {
  const int count = static_cast<int>(args.tokens), warps = blockDim.x / kWarp;
  const int c = threadIdx.x % kWarp * 8, first = threadIdx.x / kWarp;
  if (c < kWidth) {
    const T* const x = static_cast<const T*>(args.features);
    const T* from = x + (cloud * args.tokens + first) * args.channels + column + c;
    const bool inside = column + c < args.channels;
    for (int token = first; token < kTokens; token += warps, from += warps * args.channels) {
      const bool both = inside && token < count;
      copy_async<16>(to + token * pitch + c, both ? from : x, both);
    }
  }
  copy_commit();
}

// Sums over the tokens of eight cells, times n of each: at[m][i], in the fragments of a product of
// 16 channels by eight cells.
struct Tile {
  float at[kTall][4];
  int tokens;  // n of cell lane / 4
};

[[maybe_unused]] __device__ inline void split(float a, float b, uint32_t* high, uint32_t* low) {
  *high = narrow_two(a, b, BFloat16{});
  *low = narrow_two(a - detail::float_of_bits(*high << 16), b - detail::float_of_bits(*high & 0xffff0000u),
                    BFloat16{});
}

// Tiles of 16 channels that the slices of all blocks have.
__host__ __device__ inline int64_t tiles_of(const Guided& args) {
  constexpr int kWidest = 4 * kRange;
  return (args.channels + kWidest - 1) / kWidest * (kWidest / 16);
}

// The projection as the fragments of products have it: rounded, and what rounding left. By all threads of the
// grid.
__device__ inline void split_projection(const Guided& args, uint4* to) {
  const int tiles = static_cast<int>(tiles_of(args)), inner = static_cast<int>(args.inner);
  const int all = static_cast<int>(args.views) * tiles * kWarp;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < all; i += gridDim.x * blockDim.x) {
    const int lane = i % kWarp, tile = i / kWarp % tiles, view = i / kWarp / tiles;
    uint32_t high[4], low[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int k = lane % 4 * 2 + j / 2 * 8, c = 16 * tile + lane / 4 + j % 2 * 8;
      const float* const from = args.proj + (int64_t(view) * (inner + 1) + k) * args.channels + c;
      const float a = c < args.channels && k <= inner ? from[0] : 0.0f;
      const float b = c < args.channels && k < inner ? from[args.channels] : 0.0f;
      split(a, b, &high[j], &low[j]);
    }
    uint4* const at = to + (view * tiles + tile) * (2 * kWarp) + lane;
    at[0] = make_uint4(high[0], high[1], high[2], high[3]);
    at[kWarp] = make_uint4(low[0], low[1], low[2], low[3]);
  }
}

// What the attention gives the lane's cell of eight, g.
struct Inner {
  float2 low, high;  // coefficients from 2q and from 2q + 8 on
};

// Rows of a view's cells at kRange channels, by a warp.
template <typename T>
struct CellRows {
  const Guided& args;
  const Cloud& cloud;
  const float* inner;  // [V, R, K], at the lane's cell of the first eight
  const T* x;          // rows of the warp's channels, as this lane gives them to ldmatrix
  int rows, pitch, lane, pad;
  uint32_t proj[kTall][4], rest[kTall][4];  // rounded, and what rounding left

  // x: the slice's rows, of whose channels the warp's begin at `from`
  __device__ CellRows(const Guided& args, const Cloud& cloud, const float* inner_means, int64_t number,
                      const T* slice, int pitch, int from)
      : args(args), cloud(cloud), pitch(pitch) {
    lane = threadIdx.x % kWarp;
    pad = static_cast<int>(coefficients(args.inner));
    rows = static_cast<int>(args.clouds * args.tokens);
    inner = inner_means + (number * args.tokens + lane / 4) * pad + lane % 4 * 2;
    x = slice + from + lane / 8 % 2 * 8;
  }
  // The projection of a view at the warp's channels, which begin at `column`.
  __device__ void fetch(const uint4* __restrict__ fragments, int view, int64_t column) {
    const uint4* const from = fragments + (view * tiles_of(args) + column / 16) * (2 * kWarp) + lane;
#pragma unroll
    for (int m = 0; m < kTall; m++) {
      const uint4 high = from[2 * m * kWarp], low = from[(2 * m + 1) * kWarp];
      proj[m][0] = high.x, proj[m][1] = high.y, proj[m][2] = high.z, proj[m][3] = high.w;
      rest[m][0] = low.x, rest[m][1] = low.y, rest[m][2] = low.z, rest[m][3] = low.w;
    }
  }
  // What the attention gives cells `first` on.
  __device__ Inner fetch_inner(int view, int first) const {
    const float* const from = inner + (view * rows + first) * pad;
    Inner found = {};
    if (first + lane / 4 < cloud.held[view]) {
      if (lane % 4 * 2 < pad) found.low = *reinterpret_cast<const float2*>(from);
      if (lane % 4 * 2 + 8 < pad) found.high = *reinterpret_cast<const float2*>(from + 8);
    }
    return found;
  }
  // Of cells `first` on.
  __device__ Tile operator()(int view, int first, const Inner& inner) const {
    constexpr uint32_t kOne = std::is_same<T, Half>::value ? 0x3c00 : 0x3f80;
    const int g = lane / 4, q = lane % 4;
    const uint8_t* const start = cloud.start + view * kStartPitch + first;
    const uint8_t* const order = cloud.order + view * kOrderPitch + lane % 8 + lane / 16 * 8;
    const int begin = start[0], end = start[kCells];  // behind the last cell all tokens end
    const int own = start[g], tokens = first + g < cloud.held[view] ? start[g + 1] - own : 0;
    Tile tile = {};
    tile.tokens = tokens;
    for (int place = begin; place < end; place += 16) {
      const T* const at = x + order[place] * pitch;
      const unsigned p = place + 2 * q - own, n = tokens;
      const uint32_t b0 = (p < n ? kOne : 0) | (p + 1 < n ? kOne << 16 : 0);
      const uint32_t b1 = (p + 8 < n ? kOne : 0) | (p + 9 < n ? kOne << 16 : 0);
#pragma unroll
      for (int m = 0; m < kTall; m++) {
        uint32_t a[4];
        load_transposed(a, at + 16 * m);
        multiply<T>(tile.at[m], a, b0, b1);
      }
    }
    const float n = static_cast<float>(tokens);
    uint32_t most[2], left[2];
    split(inner.low.x * n, inner.low.y * n, &most[0], &left[0]);
    split(inner.high.x * n, inner.high.y * n, &most[1], &left[1]);
#pragma unroll
    for (int m = 0; m < kTall; m++) {
      multiply<BFloat16>(tile.at[m], proj[m], left[0], left[1]);
      multiply<BFloat16>(tile.at[m], rest[m], most[0], most[1]);
      multiply<BFloat16>(tile.at[m], proj[m], most[0], most[1]);
    }
    return tile;
  }
  // 1 / n of the cells of the lane's columns, 0 where there are none.
  __device__ static float2 shares(const Tile& tile) {
    const float share = tile.tokens > 0 ? reciprocal(static_cast<float>(tile.tokens)) : 0.0f;
    const int q = threadIdx.x % 4;
    return make_float2(__shfl_sync(kAll, share, 8 * q), __shfl_sync(kAll, share, 8 * q + 4));
  }
  // Calls use(view, first cell, number of the tile, inner) for this warp's part of the tiles of views [first,
  // last), begin(view) before and finish(view) after those of each.
  template <typename Begin, typename Use, typename Finish>
  __device__ void each(int first, int last, int group, const Begin& begin, const Use& use,
                       const Finish& finish) const {
    int total = 0;
    for (int view = first; view < last; view++) total += cloud.tiles(view);
    const int stop = total * (group + 1) / kRowGroups;
    int view = first, tile = total * group / kRowGroups, before = 0;
    if (tile >= stop) return;
    const auto find = [&] {  // the view of a tile
      while (tile - before >= cloud.tiles(view)) before += cloud.tiles(view++);
    };
    find();
    Inner next = fetch_inner(view, (tile - before) * kCells);
    begin(view);
    while (tile < stop) {
      const Inner inner = next;
      const int own = view, at = (tile - before) * kCells, number = tile++;
      if (tile < stop) {
        find();
        next = fetch_inner(view, (tile - before) * kCells);
      }
      use(own, at, number, inner);
      if (tile == stop || view > own) finish(own);
      if (tile < stop && view > own) begin(view);
    }
  }
};

// Workspace of the kernels of clouds.
struct CloudWork {
  float2* parts;     // [B, L, C]: mean and spread about it
  int* voxels;       // [B]: how many the parts of the last layer are of
  int* arrived;      // [2 + B]: blocks that have parts, statistics; slices of each cloud that have products
  float* slices;     // [blocks, numbers]: those products
  uint4* fragments;  // [V, tiles, 2, 32]: the projection, by split_projection
  Half* spilled;     // [blocks, V - 1, kTokens, slice]: activated rows that a block has no room for
};

// A part from `count` sums and squares about a pivot, `apart` from one another, of `held` rows in all.
__device__ inline void store_part(const GuidedForward& args, const CloudWork& work, int64_t cloud,
                                  int64_t layer, int64_t channel, float pivot, const float2* from, int apart,
                                  int count, int held) {
  if (channel >= args.channels) return;
  float total = 0.0f, squares = 0.0f;
  for (int i = 0; i < count; i++) {
    total += from[i * apart].x;
    squares += from[i * apart].y;
  }
  const float mean = held > 0 ? total / static_cast<float>(held) : 0.0f;
  work.parts[(cloud * args.layers + layer) * args.channels + channel] =
      make_float2(pivot + mean, squares - total * mean);
}

}  // namespace guided
}  // namespace any2point
