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
  __device__ int tiles(int view) const { return (held[view] + kCells - 1) / kCells; }
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

// Rows of a view's cells at kRange channels, by a warp.
template <typename T>
struct CellRows {
  const Guided& args;
  const float* inner;  // [V, R, K]
  const Cloud& cloud;
  const T* x;  // rows of the warp's channels, as this lane gives them to ldmatrix
  int64_t base;
  int pitch, lane, pad;
  uint32_t proj[kTall][4], rest[kTall][4];  // rounded, and what rounding left

  // x: the slice's rows, of whose channels the warp's begin at `from`
  __device__ CellRows(const Guided& args, const float* inner, const Cloud& cloud, int64_t number,
                      const T* rows, int pitch, int from)
      : args(args), inner(inner), cloud(cloud), base(number * args.tokens), pitch(pitch) {
    lane = threadIdx.x % kWarp;
    pad = static_cast<int>(coefficients(args.inner));
    x = rows + from + lane / 8 % 2 * 8;
  }
  __device__ static uint32_t rounded(float low, float high) { return narrow_two(low, high, BFloat16{}); }
  __device__ static void split(float a, float b, uint32_t* high, uint32_t* low) {
    *high = rounded(a, b);
    *low = rounded(a - detail::float_of_bits(*high << 16), b - detail::float_of_bits(*high & 0xffff0000u));
  }
  // The projection of a view at the warp's channels, which begin at `column`.
  __device__ void fetch(int view, int64_t column) {
    const int g = lane / 4, q = lane % 4, width = static_cast<int>(args.inner);
    const int channels = static_cast<int>(args.channels), left = channels - static_cast<int>(column);
    const float* from[2] = {args.proj + (int64_t(view) * (width + 1) + 2 * q) * channels + column + g};
    from[1] = from[0] + 8 * channels;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int k = 2 * q + i / 2 * 8, c = g + i % 2 * 8;
      const float* const first = from[i / 2] + i % 2 * 8;
      const float* const second = first + channels;
#pragma unroll
      for (int m = 0; m < kTall; m++) {
        const bool inside = 16 * m + c < left;
        const float a = inside && k <= width ? first[16 * m] : 0.0f;
        const float b = inside && k < width ? second[16 * m] : 0.0f;
        split(a, b, &proj[m][i], &rest[m][i]);
      }
    }
  }
  // Of cells `first` on.
  __device__ Tile operator()(int view, int first) const {
    constexpr uint32_t kOne = std::is_same<T, Half>::value ? 0x3c00 : 0x3f80;
    const int g = lane / 4, q = lane % 4;
    const uint8_t* const start = cloud.start + view * kStartPitch + first;
    const uint8_t* const order = cloud.order + view * kOrderPitch + lane % 8 + lane / 16 * 8;
    const bool held = first + g < cloud.held[view];
    const int begin = start[0], end = start[kCells];  // behind the last cell all tokens end
    const int own = start[g], tokens = held ? start[g + 1] - own : 0;
    const float* const from = inner + ((view * args.clouds * args.tokens) + base + first + g) * pad + 2 * q;
    float2 low = make_float2(0.0f, 0.0f), high = low;
    if (held) {
      if (2 * q < pad) low = *reinterpret_cast<const float2*>(from);
      if (2 * q + 8 < pad) high = *reinterpret_cast<const float2*>(from + 8);
    }
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
    split(low.x * n, low.y * n, &most[0], &left[0]);
    split(high.x * n, high.y * n, &most[1], &left[1]);
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
  // Calls use(view, first cell, number of the tile) for this warp's part of the tiles of views [first, last),
  // begin(view) before and finish(view) after those of each.
  template <typename Begin, typename Use, typename Finish>
  __device__ void each(int first, int last, int group, const Begin& begin, const Use& use,
                       const Finish& finish) const {
    int total = 0;
    for (int view = first; view < last; view++) total += cloud.tiles(view);
    const int stop = total * (group + 1) / kRowGroups;
    int before = 0;
    for (int view = first, tile = total * group / kRowGroups; view < last && tile < stop; view++) {
      const int end = min(before + cloud.tiles(view), stop);
      if (tile < end) {
        begin(view);
        for (; tile < end; tile++) use(view, (tile - before) * kCells, tile);
        finish(view);
      }
      before += cloud.tiles(view);
    }
  }
};

// Workspace of the kernels of clouds.
struct CloudWork {
  float* z;        // [R, C], rows of the voxels
  float2* parts;   // [B, L, C]: mean and spread about it
  int* voxels;     // [B]: how many the parts are of
  int* arrived;    // [1 + B]: blocks that have statistics, and slices of each cloud that have products
  float* slices;   // [blocks, numbers]: those products
  float* partial;  // [R, C]: blends of the first groups of views
};

// In evaluation, rows of voxels alone. The counters of `arrived` begin at zero.
int pool_parts(const GuidedForward& args, const CloudWork& work, cudaStream_t stream);

}  // namespace guided
}  // namespace any2point
