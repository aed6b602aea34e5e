// From the gradient of the hidden layer to that of the first weight, and to the rows of the unit below:
// train_rows_grad of train.h without its sums over points. Times are in train_backward.h.
//
// weight_grad = x' dy1 is a product over rows: both operands lie in shared memory as they are built, channels
// in a row, and are read across; sums stay in registers over all tiles of a block. Of a unit above another x
// is made by a product itself, and the unit below gets its gradient from another, with entries added where it
// becomes 16 bits. At the bottom tiles are built while the products of those before run; channels are cut
// into slices of 192, each by a block of its own, and dy1 is made for each.
#include "local_aggregate/train_backward.cuh"

namespace any2point {
namespace {

// Where a row is: beta times its normalised offset, and the row of the features of its point.
struct Place {
  float offset[3];
  int near;  // below 0: none
};

// A warp per group. middles [groups]: row of its centre. zeros [C / 2]: the features of no point.
__global__ void place_kernel(const HopperAggregate args, int width, Place* places, int* middles,
                             uint4* zeros) {
  const int lane = threadIdx.x % 32;
  const int64_t group = this_warp();
  if (blockIdx.x == 0 && threadIdx.x < width / 16) zeros[threadIdx.x] = {0, 0, 0, 0};
  if (group >= args.groups) return;
  const float4 scale = scale_of(args, group);
  const float each[3] = {scale.x, scale.y, scale.z};
  const int64_t first = group / args.centers * args.rows, middle = row_of(args, args.center[group], first);
  const float from[3] = {coordinate(args, middle, 0), coordinate(args, middle, 1),
                         coordinate(args, middle, 2)};
  for (int64_t i = group * args.neighbors + lane; i < (group + 1) * args.neighbors; i += 32) {
    const int64_t index = args.neighbor[i], near = index < 0 ? middle : row_of(args, index, first);
    Place place;
    for (int axis = 0; axis < 3; axis++) {
      place.offset[axis] = (coordinate(args, near, axis) - from[axis]) * each[axis] * args.beta;
    }
    place.near = static_cast<int>(near);
    places[i] = place;
  }
  if (lane == 0) middles[group] = static_cast<int>(middle);
}

__device__ __forceinline__ Place load_place(const Place* from) {
  const float4 v = __ldg(reinterpret_cast<const float4*>(from));
  return {{v.x, v.y, v.z}, __float_as_int(v.w)};
}

// Features of a point, where this thread's channels of them begin; none: zeros.
template <int C>
__device__ __forceinline__ const uint4* features_of(const uint4* features, const uint4* zeros, int row) {
  const uint4* from = row < 0 ? zeros : features + static_cast<int64_t>(row) * (C / 16);
  return from + threadIdx.x % 4;
}
// A slice of x is six blocks: sines and cosines of the same frequencies for each axis. Block j, of the point
// if j < 3, of its centre otherwise:
template <int C>
__host__ __device__ constexpr int block_of(int slice, int j) {
  return j * Order<C>::kParts + slice;
}
template <int C>
__device__ __forceinline__ uint4 feature(const uint4* near, const uint4* middle, int slice, int j) {
  return __ldg(j < 3 ? near + block_of<C>(slice, j) * 4 : middle + block_of<C>(slice, j - 3) * 4);
}

// 8 channels of a block of sines and of the block of cosines with the same frequencies.
template <typename T>
__device__ __forceinline__ void encode(float offset, const Eight& frequency, uint4& sine, uint4& cosine) {
  Eight s, c;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float angle = offset * frequency.v[j];
    s.v[j] = __sinf(angle);
    c.v[j] = __cosf(angle);
  }
  sine = add<T>(sine, rounded<T>(s));
  cosine = add<T>(cosine, rounded<T>(c));
}

// dy1 = slope dz + bend y1 + level.
struct InnerNorm {
  const float *mean, *deviation, *factor, *m1, *m2;
};

template <int H>
__device__ __forceinline__ void load_norm(const InnerNorm& norm, float* to) {
  for (int i = threadIdx.x; i < H; i += blockDim.x) {
    const float bend = -norm.factor[i] * norm.deviation[i] * norm.m2[i];
    to[i] = norm.factor[i];
    to[H + i] = bend;
    to[2 * H + i] = -__fmaf_rn(bend, norm.mean[i], norm.factor[i] * norm.m1[i]);
  }
}

struct Line {
  Eight slope, bend, level;
};
template <int H>
__device__ __forceinline__ Line line_of(const float* norm, int c) {
  return {eight(norm + c), eight(norm + H + c), eight(norm + 2 * H + c)};
}

template <typename T>
__device__ __forceinline__ uint4 normed_grad(const uint4& dz, const uint4& before, const Line& line) {
  const Eight y = eight_of<T>(before);
  Eight g = eight_of<T>(dz);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    g.v[j] = __fmaf_rn(g.v[j], line.slope.v[j], __fmaf_rn(y.v[j], line.bend.v[j], line.level.v[j]));
  }
  return rounded<T>(g);
}

// 8 channels of a thread's first or second row.
template <int N>
__device__ __forceinline__ Eight of_sums(const float (&d)[N], int block, int row) {
  Eight v;
#pragma unroll
  for (int j = 0; j < 8; j++) v.v[j] = d[16 * block + j / 2 * 4 + 2 * row + j % 2];
  return v;
}

// weight_grad [H, C] of parts [count, slices, 192, H]; a block per channel of the parts.
template <int C>
__global__ void weight_grad_kernel(const float* parts, int count, float* to) {
  const int hidden = blockDim.x, h = threadIdx.x, slice = blockIdx.x / kSlice, at = blockIdx.x % kSlice;
  const int c = block_of<C>(slice, at / 32) * 32 + at % 32;
  const float* from = parts + static_cast<int64_t>(blockIdx.x) * hidden + h;
  to[static_cast<int64_t>(h) * C + c] = part_sum(from, static_cast<int64_t>(C) * hidden, count);
}

// The unit at the bottom: x as it is built.

struct Bottom {
  const Place* places;    // [M]
  const int* middles;     // [groups]
  const uint4* features;  // [B N, C / 2]
  const uint4* zeros;     // [C / 2]
  const float* wavelength;
  const uint4* before;  // [M, H]
  const uint4* dz;      // [M, H]
  InnerNorm norm;
  uint4* dy1;    // [M, H]
  float* parts;  // [workers, slices, 192, H]
  int64_t rows;
  int neighbors;
};

template <int H>
constexpr int kBottomBlocks = H == 32 ? 2 : 1;  // of a multiprocessor
template <int C, int H>
constexpr int kBottomBytes =
    2 * kOuterRows * (kSlice + H) * 2 + H / 32 * 2 * 16 * kTeams * 128 + 12 * H + 4 * (C / 6);

// A warp brings 8 rows of a tile and 192 channels, a thread 8 channels of every 32 of a row, while the
// products of the tile before run. Of dy1 a thread has the same 8 channels in all its rows.
template <int C, int H, typename T>
__global__ void __launch_bounds__(kTeams * 128, kBottomBlocks<H>)
    bottom_kernel(const __grid_constant__ Bottom args) {
  constexpr int kSlices = C / kSlice, kX = kOuterRows * kSlice * 2, kY = kOuterRows * H * 2;
  constexpr int kThreads = kTeams * 128, kSlot = 16 * kThreads;
  constexpr int kEach = kThreads / (H / 8), kTimes = kOuterRows / kEach;  // rows of dy1 at a time
  extern __shared__ __align__(1024) char room[];
  char* const y = room + 2 * kX;
  char* const slots = y + 2 * kY;
  float* const norm = reinterpret_cast<float*>(slots + 2 * kTimes * kSlot);
  float* frequency = norm + 3 * H;
  load_norm<H>(args.norm, norm);
  for (int i = threadIdx.x; i < C / 6; i += blockDim.x) frequency[i] = 1 / args.wavelength[i];
  __syncthreads();

  const int slice = blockIdx.x % kSlices, worker = blockIdx.x / kSlices, workers = gridDim.x / kSlices;
  const int in_tile = threadIdx.x / 4, chunk = threadIdx.x % (H / 8);
  const uint32_t x_at = chunk_at<kOuterRows>(threadIdx.x % 4, in_tile);
  const uint32_t y_at = chunk_at<kOuterRows>(chunk, threadIdx.x / (H / 8));
  const int64_t tiles = (args.rows + kOuterRows - 1) / kOuterRows;
  const uint32_t slot = shared_address(slots) + threadIdx.x * 16;
  Line line = line_of<H>(norm, 8 * chunk);
  frequency += slice * 32 + threadIdx.x % 4 * 8;
  Eight frequencies = eight(frequency);
  // A tile's rows of dz lie in a row, and so do those that the threads have at the same time.
  const auto left_of = [&](int64_t tile) {
    return static_cast<int>(min((args.rows - tile * kOuterRows) * (H / 8), int64_t{kOuterRows * H / 8}));
  };
  const auto fetch = [&](int64_t tile) {
    if (tile < tiles) {
      const int64_t begin = tile * (kOuterRows * H / 8);
      const int last = left_of(tile) - 1;
#pragma unroll
      for (int i = 0; i < kTimes; i++) {
        const int at = min(static_cast<int>(threadIdx.x) + i * kThreads, last);
        copy_async(slot + 2 * i * kSlot, args.dz + begin + at);
        copy_async(slot + (2 * i + 1) * kSlot, args.before + begin + at);
      }
    }
    copy_commit();
  };
  uint4 ahead[6];
  Place here, next;
  int next_middle;
  const auto find = [&](int64_t tile) {
    const int64_t row = min(tile * kOuterRows + in_tile, args.rows - 1);
    next = load_place(args.places + row);
    next_middle = __ldg(args.middles + static_cast<uint32_t>(row) / static_cast<uint32_t>(args.neighbors));
  };
  const auto gather = [&]() {
    const uint4* near = features_of<C>(args.features, args.zeros, next.near);
    const uint4* middle = features_of<C>(args.features, args.zeros, next_middle);
#pragma unroll
    for (int j = 0; j < 6; j++) ahead[j] = feature<C>(near, middle, slice, j);
  };

  float sums[H / 2] = {};
  int64_t tile = worker;
  fetch(tile);
  find(tile);
  gather();
  here = next;
  find(tile + workers);
  for (int buffer = 0; tile < tiles; tile += workers, buffer ^= 1) {
    char* const to_x = room + buffer * kX;
    char* const to_y = y + buffer * kY;
    if (H != 96) frequencies = eight(frequency);  // registers are short
#pragma unroll
    for (int p = 0; p < 3; p++) {
      encode<T>(here.offset[p], frequencies, ahead[2 * p], ahead[2 * p + 1]);
#pragma unroll
      for (int j = 2 * p; j < 2 * p + 2; j++) {
        *reinterpret_cast<uint4*>(to_x + x_at + j * kOuterRows * kBlockBytes) = ahead[j];
      }
    }
    gather();
    here = next;
    find(tile + 2 * workers);
    copy_wait<0>();
    if (H == 32) line = line_of<H>(norm, 8 * chunk);
    const int left = left_of(tile);
    uint4* const dy1 = args.dy1 + tile * (kOuterRows * H / 8) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kTimes; i++) {
      uint4 v =
          normed_grad<T>(load_shared(slot + 2 * i * kSlot), load_shared(slot + (2 * i + 1) * kSlot), line);
      const bool is_row = static_cast<int>(threadIdx.x) + i * kThreads < left;
      if (!is_row) v = {0, 0, 0, 0};
      *reinterpret_cast<uint4*>(to_y + y_at + i * kEach * kBlockBytes) = v;
      if (slice == 0 && is_row) __stcs(dy1 + i * kThreads, v);
    }
    fetch(tile + workers);
    wgmma_wait<0>();
    pin(sums);
    publish();
    outer_product<kOuterRows, H, T>(sums, to_x, to_y);
  }
  wgmma_wait<0>();
  pin(sums);
  copy_wait<0>();
  store_sums<H>(sums, args.parts + static_cast<int64_t>(blockIdx.x) * kSlice * H);
}

// A unit above another: x is z of the unit below, its gradient goes on as rows.

struct Upper {
  const Place* places;    // [M]
  const int* middles;     // [groups]
  const uint4* features;  // [B N, C / 2]
  const uint4* zeros;     // [C / 2]
  const float* wavelength;
  const uint4* below;  // [M, H]: hidden layer of the unit below
  const float *below_scale, *below_shift, *below_bias;
  const void* below_weight;  // operand [H -> C]
  const uint4* before;       // [M, H]
  const uint4* dz;           // [M, H]
  InnerNorm norm;
  const void* weight;   // operand [H -> C]
  const uint4* grad;    // [groups, C], 16 bits
  const uint4* argmax;  // [groups, C], 16 bits
  uint4* du;            // [M, C]
  float* parts;         // [workers, C, H]
  int64_t rows;
  int neighbors;
};

constexpr int kUpperRows = kTeams * kTeamRows;

// Begins d += y weight' for the team's rows of y and 64 channels from `first`.
template <int C, int H, typename T>
__device__ __forceinline__ void team_product(float (&d)[32], const char* y, const char* weight, int first) {
  y += __shfl_sync(kLanes, threadIdx.x / 128, 0) * kTeamRows * kBlockBytes;  // known to be the warp's
  pin(d);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < H / 16; k++) {
    wgmma_shared<T>(d, descriptor(y + k / 2 * kUpperRows * kBlockBytes + k % 2 * 32),
                    descriptor(weight + (k / 2 * C + first) * kBlockBytes + k % 2 * 32));
  }
  wgmma_commit();
}

template <int C, int H>
constexpr int kUpperBytes = 4 * C * H + kUpperRows * (C + 2 * H) * 2 + 4 * (C + 5 * H + C / 6);

template <int C, int H, typename T>
__global__ void __launch_bounds__(kTeams * 128, 1) upper_kernel(const __grid_constant__ Upper args) {
  static_assert(C == kSlice && Order<C>::kParts == 1, "blocks in their own order");
  extern __shared__ __align__(1024) char room[];
  char* const below_weight = room;
  char* const weight = room + C * H * 2;
  char* const x = weight + C * H * 2;
  char* const y = x + kUpperRows * C * 2;
  char* const h = y + kUpperRows * H * 2;
  float* const bias = reinterpret_cast<float*>(h + kUpperRows * H * 2);
  float* const scale = bias + C;
  float* const shift = scale + H;
  float* const norm = shift + H;
  float* const frequency = norm + 3 * H;
  copy_operand(args.below_weight, C * H * 2, below_weight);
  copy_operand(args.weight, C * H * 2, weight);
  load_norm<H>(args.norm, norm);
  for (int i = threadIdx.x; i < C; i += blockDim.x) bias[i] = args.below_bias[i];
  for (int i = threadIdx.x; i < H; i += blockDim.x) {
    scale[i] = args.below_scale[i];
    shift[i] = args.below_shift[i];
  }
  for (int i = threadIdx.x; i < C / 6; i += blockDim.x) frequency[i] = 1 / args.wavelength[i];
  publish();

  const int t = threadIdx.x % 4, lane = threadIdx.x % 32, team = threadIdx.x / 128;
  const int in_tile = threadIdx.x / 32 * 16 + lane / 4;  // the first of a thread's two rows
  const int64_t tiles = (args.rows + kUpperRows - 1) / kUpperRows;
  const Eight frequencies = eight(frequency + 8 * t);
  // Of hidden layers a thread has the same 8 channels in all its rows; a tile of them lies in a row.
  constexpr int kChunks = H / 8, kTile = kUpperRows * kChunks, kTimes = kTile / (kTeams * 128);
  constexpr uint32_t kStep = kUpperRows / kTimes * kBlockBytes;
  const int chunk = threadIdx.x % kChunks;
  const uint32_t own = chunk_at<kUpperRows>(chunk, threadIdx.x / kChunks);
  const auto left_of = [&](int64_t tile) {
    return static_cast<int>(min((args.rows - tile * kUpperRows) * kChunks, int64_t{kTile}));
  };
  const auto fetch = [&](int64_t tile) {  // the team's rows
    if (tile < tiles) {
      const int last = left_of(tile) - 1;
#pragma unroll
      for (int n = 0; n < kTimes; n++) {
        const int i = team * (kTile / kTeams) + n * 128 + threadIdx.x % 128;
        copy_async(shared_address(h) + chunk_at<kUpperRows>(i % kChunks, i / kChunks),
                   args.below + tile * kTile + min(i, last));
      }
    }
    copy_commit();
  };

  const auto to_cache = [&](int64_t tile) {  // its rows of dz and y1
    if (tile < tiles && static_cast<int>(threadIdx.x) * 8 < left_of(tile)) {
      const int64_t line = tile * kTile + threadIdx.x * 8;
      asm volatile("prefetch.global.L2 [%0];" ::"l"(args.dz + line));
      asm volatile("prefetch.global.L2 [%0];" ::"l"(args.before + line));
    }
  };

  float sums[H / 2] = {};
  fetch(blockIdx.x);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int left = left_of(tile);
    uint4 dz[kTimes], before[kTimes];
#pragma unroll
    for (int i = 0; i < kTimes; i++) {
      const int64_t from = tile * kTile + min(static_cast<int>(threadIdx.x) + i * kTeams * 128, left - 1);
      dz[i] = __ldcs(args.dz + from);
      before[i] = __ldcs(args.before + from);
    }
    Place place[2];
    int middle[2];
    uint32_t group[2], at[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t row = static_cast<uint32_t>(min(tile * kUpperRows + in_tile + 8 * i, args.rows - 1));
      group[i] = row / args.neighbors;
      at[i] = (row - group[i] * args.neighbors) * 0x10001u;
      place[i] = load_place(args.places + row);
      middle[i] = __ldg(args.middles + group[i]);
    }
    uint4 ahead[2][2];
    const auto gather = [&](int pair) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint4* near = features_of<C>(args.features, args.zeros, place[i % 2].near);
        const uint4* center = features_of<C>(args.features, args.zeros, middle[i % 2]);
        ahead[i / 2][i % 2] = feature<C>(near, center, 0, 2 * pair + i / 2);
      }
    };
    gather(0);
    copy_wait<0>();
    wgmma_wait<0>();
    pin(sums);
    __syncthreads();  // nobody reads x and y of the tile before
    {
      const Line line = line_of<H>(norm, 8 * chunk);
#pragma unroll
      for (int i = 0; i < kTimes; i++) {
        uint4 v = normed_grad<T>(dz[i], before[i], line);
        if (static_cast<int>(threadIdx.x) + i * kTeams * 128 >= left) v = {0, 0, 0, 0};
        *reinterpret_cast<uint4*>(y + own + i * kStep) = v;
      }
    }
    {
      const Eight f = eight(scale + 8 * chunk), s = eight(shift + 8 * chunk);
#pragma unroll
      for (int i = 0; i < kTimes; i++) {
        uint4* const v = reinterpret_cast<uint4*>(h + own + i * kStep);
        *v = hidden_of<T>(*v, f, s);
      }
    }
    publish();

#pragma unroll
    for (int p = 0; p < C / 64; p++) {
      float d[32];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        encode<T>(place[i].offset[p], frequencies, ahead[0][i], ahead[1][i]);
#pragma unroll
        for (int w = 0; w < 2; w++) {
          const Eight r = eight_of<T>(ahead[w][i]), b = eight(bias + 64 * p + 32 * w + 8 * t);
#pragma unroll
          for (int j = 0; j < 8; j++) d[16 * w + j / 2 * 4 + 2 * i + j % 2] = r.v[j] + b.v[j];
        }
      }
      team_product<C, H, T>(d, h, below_weight, 64 * p);
      if (p + 1 < C / 64) gather(p + 1);
      wgmma_wait<0>();
      pin(d);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        put<kUpperRows>(x, 8 * p + i / 2 * 4 + t, in_tile + 8 * (i % 2), relu<T>(of_sums(d, i / 2, i % 2)));
      }
    }
    team_barrier();  // nobody reads its rows of h
    fetch(tile + gridDim.x);
    to_cache(tile + gridDim.x);

    const bool other = group[0] != group[1];
#pragma unroll
    for (int p = 0; p < C / 64; p++) {
      float d[32] = {};
      team_product<C, H, T>(d, y, weight, 64 * p);
      uint4 entry[4];
#pragma unroll
      for (int w = 0; w < 2; w++) {
        const int block = 8 * p + 4 * w + t;
        const int64_t first = static_cast<int64_t>(group[0]) * (C / 8) + block;
        const int64_t second = static_cast<int64_t>(group[1]) * (C / 8) + block;
        const uint4 grad = __ldg(args.grad + first), argmax = __ldg(args.argmax + first);
        uint4 other_grad, other_argmax;
        load_if(other, args.grad + second, grad, other_grad);
        load_if(other, args.argmax + second, argmax, other_argmax);
        entry[2 * w] = entries_at(grad, argmax, at[0]);
        entry[2 * w + 1] = entries_at(other_grad, other_argmax, at[1]);
      }
      wgmma_wait<0>();
      pin(d);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint4 z = take<kUpperRows>(x, 8 * p + i / 2 * 4 + t, in_tile + 8 * (i % 2));
        const uint4 v = where_positive(z, add<T>(rounded<T>(of_sums(d, i / 2, i % 2)), entry[i]));
        const int64_t row = tile * kUpperRows + in_tile + 8 * (i % 2);
        if (row < args.rows) args.du[row * (C / 8) + 8 * p + i / 2 * 4 + t] = v;
      }
    }
    publish();
    outer_product<kUpperRows, H, T>(sums, x, y);
  }
  wgmma_wait<0>();
  pin(sums);
  copy_wait<0>();
  store_sums<H>(sums, args.parts + static_cast<int64_t>(blockIdx.x) * C * H);
}

template <int C, int H, bool kBelow, typename T>
int rows(const BackwardSize& size, const BackwardRows& from, void* scratch, cudaStream_t stream,
         int64_t* bytes = nullptr) {
  constexpr int kSlices = C / kSlice;
  const int workers = (kBelow ? 1 : kBottomBlocks<H>)*size.processors / kSlices, blocks = workers * kSlices;
  const int64_t count = size.groups * size.neighbors, entries = kBelow ? size.groups * C : 0;
  Pieces pieces(scratch);
  Place* const places = pieces.take<Place>(count);
  int* const middles = pieces.take<int>(size.groups);
  uint4* const zeros = pieces.take<uint4>(C / 16);
  float* const parts = pieces.take<float>(int64_t{blocks} * kSlice * H);
  T* const weight = pieces.take<T>(kBelow ? C * H : 0);
  T* const below_weight = pieces.take<T>(kBelow ? C * H : 0);
  uint32_t* const grad = pieces.take<uint32_t>(entries / 2);
  uint32_t* const argmax = pieces.take<uint32_t>(entries / 2);
  float* const totals = pieces.take<float>(kBelow ? int64_t{blocks} * C : 0);
  if (bytes) {
    *bytes = pieces.bytes();
    return 0;
  }
  const InnerNorm norm{from.mean, from.deviation, from.factor, from.m1, from.m2};
  const uint4* const features = static_cast<const uint4*>(from.from.features);
  const uint4* const before = static_cast<const uint4*>(from.before);
  const uint4* const dz = static_cast<const uint4*>(from.dz);
  place_kernel<<<static_cast<unsigned>(divided(size.groups, 4)), 128, 0, stream>>>(from.from, C, places,
                                                                                   middles, zeros);
  int error = cudaGetLastError();
  if (error) return error;
  if constexpr (kBelow) {
    const Prepare first{
        {{from.below_weight, H, 1, C, H, C, true, below_weight}, {from.weight, H, 1, C, H, C, true, weight}},
        nullptr,
        from.entries,
        entries,
        grad,
        argmax};
    error = prepare<T>(first, size.processors, stream);
    if (error) return error;
    const Upper args{places,
                     middles,
                     features,
                     zeros,
                     from.from.wavelength,
                     static_cast<const uint4*>(from.below.before),
                     from.below.scale,
                     from.below.shift,
                     from.below_bias,
                     below_weight,
                     before,
                     dz,
                     norm,
                     weight,
                     reinterpret_cast<const uint4*>(grad),
                     reinterpret_cast<const uint4*>(argmax),
                     static_cast<uint4*>(from.du),
                     parts,
                     count,
                     size.neighbors};
    error = launch_shared(upper_kernel<C, H, T>, args, blocks, kTeams * 128, kUpperBytes<C, H>, stream);
  } else {
    const Bottom args{places,
                      middles,
                      features,
                      zeros,
                      from.from.wavelength,
                      before,
                      dz,
                      norm,
                      static_cast<uint4*>(from.dy1),
                      parts,
                      count,
                      size.neighbors};
    error = launch_shared(bottom_kernel<C, H, T>, args, blocks, kTeams * 128, kBottomBytes<C, H>, stream);
  }
  if (error) return error;
  weight_grad_kernel<C><<<C, H, 0, stream>>>(parts, workers, from.weight_grad);
  error = cudaGetLastError();
  if constexpr (kBelow) {
    if (error) return error;
    error = backward_dense_sums(size, {from.below, from.du, from.sums, parts, totals}, stream);
  }
  return error;
}

template <typename T>
int rows_of(const BackwardSize& size, const BackwardRows& args, bool below, void* scratch,
            cudaStream_t stream, int64_t* bytes = nullptr) {
  switch (size.width) {
    case 192:
      return below ? rows<192, 96, true, T>(size, args, scratch, stream, bytes)
                   : rows<192, 96, false, T>(size, args, scratch, stream, bytes);
    case 384:
      return rows<384, 192, false, T>(size, args, scratch, stream, bytes);
    default:
      return rows<768, 32, false, T>(size, args, scratch, stream, bytes);
  }
}

}  // namespace

int64_t backward_rows_scratch(const BackwardSize& size, bool below) {
  int64_t bytes = 0;
  rows_of<__half>(size, {}, below, nullptr, nullptr, &bytes);
  return bytes;
}

int backward_rows(const BackwardSize& size, const BackwardRows& args, void* scratch, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const bool below = args.du != nullptr;
  return size.bfloat16 ? rows_of<__nv_bfloat16>(size, args, below, scratch, stream)
                       : rows_of<__half>(size, args, below, scratch, stream);
}

}  // namespace any2point
