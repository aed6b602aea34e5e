// What kernels for sm_90a share, in evaluation and training: pairs of 16-bit numbers, the rows x as operands
// of warpgroup products, and the maximum over neighbours.
//
// Channels stand in another order than in memory, so that a thread owns 8 in a row of every 32: position
// 8 q + 2 t + e of a block is channel 8 t + 2 q + e (q, t < 4; e < 2), for t of the thread. Blocks come in
// pairs, sine and cosine of the same wavelengths. Weights are brought into this order on their way to shared
// memory.
#pragma once

#include <float.h>
#include <math_constants.h>

#include <algorithm>

#include "local_aggregate/hopper.h"
#include "local_aggregate/wgmma.cuh"

namespace any2point {

constexpr int kGroups = 16;  // of a warp, at most
constexpr int kRows = 16;    // of a warp in a tile
constexpr unsigned kLanes = 0xffffffff;

template <typename T>
struct Two;

#define A2P_TWO(T, type)                                                        \
  template <>                                                                   \
  struct Two<T> {                                                               \
    static __device__ __forceinline__ uint32_t of(float low, float high) {      \
      uint32_t d;                                                               \
      asm("cvt.rn." type "x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low)); \
      return d;                                                                 \
    }                                                                           \
    static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) {    \
      uint32_t d;                                                               \
      asm("add." type "x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));             \
      return d;                                                                 \
    }                                                                           \
    /* NaN if one of the two is. */                                             \
    static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {    \
      uint32_t d;                                                               \
      asm("max.NaN." type "x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));         \
      return d;                                                                 \
    }                                                                           \
    static __device__ __forceinline__ float2 floats(uint32_t a);                \
  };
A2P_TWO(__half, "f16")
A2P_TWO(__nv_bfloat16, "bf16")
#undef A2P_TWO

__device__ __forceinline__ float2 Two<__half>::floats(uint32_t a) {
  return __half22float2(*reinterpret_cast<__half2*>(&a));
}
__device__ __forceinline__ float2 Two<__nv_bfloat16>::floats(uint32_t a) {
  return {__uint_as_float(a << 16), __uint_as_float(a & 0xffff0000u)};
}

// 64 channels of a thread's two rows: [sine, cosine][row][q], two channels each.
using Channels = uint32_t[2][2][4];

template <int C>
struct Order {
  static_assert(C % 192 == 0, "an axis has whole blocks of sines");
  static constexpr int kParts = C / 192;  // blocks of sines of an axis
  static constexpr int kPairs = C / 64;
  // Which 32 channels are block b.
  static __host__ __device__ constexpr int block(int b) {
    return b / (2 * kParts) * 2 * kParts + b % 2 * kParts + b % (2 * kParts) / 2;
  }
  static __host__ __device__ constexpr int channel(int position) {
    return block(position / 32) * 32 + position % 8 / 2 * 8 + position % 32 / 8 * 2 + position % 2;
  }
};

// Hidden channels in memory stand in natural order, in registers where training has them in that of
// positions.
__host__ __device__ constexpr int hidden_channel(int position) {
  return position / 32 * 32 + position % 8 / 2 * 8 + position % 32 / 8 * 2 + position % 2;
}

// Two hidden channels: h = ReLU(scale y1 + shift).
template <typename T>
__device__ __forceinline__ uint32_t hidden_pair(uint32_t y, float2 scale, float2 shift) {
  const float2 v = Two<T>::floats(y);
  return Two<T>::max(Two<T>::of(__fmaf_rn(v.x, scale.x, shift.x), __fmaf_rn(v.y, scale.y, shift.y)), 0);
}

// The last pair with channels of a neighbour (the others are the centre's).
template <int C>
constexpr int kLastNear =
    (C / 64 - 1) / (2 * Order<C>::kParts) * Order<C>::kParts + (C / 64 - 1) % Order<C>::kParts;

// Eight channels of row n of a block of 32, in the order of positions; t: which of the four.
__device__ __forceinline__ void store_weight(const uint4& v, char* block, int n, int t) {
  const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int q = 0; q < 4; q++) {
    *reinterpret_cast<uint32_t*>(block + swizzle(n * kBlockBytes + 16 * q + 4 * t)) = pairs[q];
  }
}

template <int C>
__device__ void load_out_bias(const float* bias, float* to) {
  for (int n = threadIdx.x; n < C; n += blockDim.x) to[n] = bias[Order<C>::channel(n)];
}

// What a launch covers: rows from `first` (a multiple of kRows), so many tiles a warp.
struct Part {
  int64_t first, end;
  int tiles;
  const float4* scales;  // [B S]: reciprocals of the divisors
  uint4* hidden;         // [teams, tiles, H / 16, 128]
  uint32_t* heads;       // [warps, C / 2]: maxima of rows whose group began in the warp before
};

// The rows of a warp, which it goes through one tile after the other.
struct Walk {
  int64_t first;  // group of the first row
  int begin;      // of that row in its group
  int rows;
  int groups;  // may be 0: the warp goes along with the others of its team
};

__device__ __forceinline__ Walk walk_of(const HopperAggregate& args, const Part& part, int64_t warp) {
  const int64_t row = part.first + warp * part.tiles * kRows, left = part.end - row;
  if (left <= 0) return {part.first / args.neighbors, 0, args.neighbors, 0};
  const int rows = left < part.tiles * kRows ? static_cast<int>(left) : part.tiles * kRows;
  const int begin = static_cast<int>(row % args.neighbors);
  return {row / args.neighbors, begin, rows, (begin + rows - 1) / args.neighbors + 1};
}

__device__ __forceinline__ int64_t this_warp() {
  return static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
}

struct Group {
  float center[3], scale[3];
  int64_t first;   // row of the features where the cloud begins
  int64_t middle;  // row of the centre; -1: none; -2: not in the cloud
};

constexpr int64_t kOutside = -2;

__device__ __forceinline__ int64_t row_of(const HopperAggregate& args, int64_t index, int64_t first) {
  return index >= 0 && index < args.rows ? first + index : index == -1 ? -1 : kOutside;
}
__device__ __forceinline__ float coordinate(const HopperAggregate& args, int64_t row, int axis) {
  return row >= 0 ? args.points[row * 3 + axis] : row == -1 ? 0.0f : CUDART_NAN_F;
}

__device__ __forceinline__ void load_groups(const HopperAggregate& args, const Part& part, const Walk& walk,
                                            Group* groups) {
  const int s = threadIdx.x % 32;
  if (s < max(walk.groups, 1)) {
    const int64_t group = walk.first + s, first = group / args.centers * args.rows;
    const int64_t middle = row_of(args, args.center[group], first);
    const float4 scale = part.scales[group];
    groups[s] = {{coordinate(args, middle, 0), coordinate(args, middle, 1), coordinate(args, middle, 2)},
                 {scale.x, scale.y, scale.z},
                 first,
                 middle};
  }
  __syncwarp();
}

// Two rows of a tile, as a thread sees them.
struct Rows {
  float offset[2][3];  // beta times the normalised offset
  int middle[2];       // where this thread's channels of the centre are, in 16 bytes; below 0: none
};

// Features of a tile's rows: those of neighbours come by asynchronous copies, and what a thread copies only
// it reads.
template <int C>
class Features {
 public:
  static constexpr int kBlocks = C / 64;                 // of a neighbour
  static constexpr int kBytes = 2 * kBlocks * 16 * 128;  // of a team of four warps

  __device__ __forceinline__ Features(const void* features, char* room)
      : features_(static_cast<const uint4*>(features)) {
    room += threadIdx.x / 128 * kBytes + threadIdx.x % 128 * 16;
    room_ = static_cast<uint32_t>(__cvta_generic_to_shared(room));
  }

  __device__ __forceinline__ void wait() const { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

  __device__ __forceinline__ void load(const Rows& rows, int pair, Channels& x) const {
#pragma unroll
    for (int wave = 0; wave < 2; wave++) {
      const int block = Order<C>::block(2 * pair + wave);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        uint4 v = {0, 0, 0, 0};
        if (block < kBlocks) {
          asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                       : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                       : "r"(room_ + (2 * block + i) * 2048));
        } else {  // predicated: products want no branches between them
          const uint4* from = features_ + rows.middle[i] + (block - kBlocks) * 4;
          asm volatile(
              "{\n.reg .pred p;\nsetp.ge.s32 p, %5, 0;\n"
              "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
              : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
              : "l"(from), "r"(rows.middle[i]));
        }
        x[wave][i][0] = v.x;
        x[wave][i][1] = v.y;
        x[wave][i][2] = v.z;
        x[wave][i][3] = v.w;
      }
    }
  }

 protected:
  // Begins to bring those of a neighbour, of row i of the thread's two; below 0: zeros.
  __device__ __forceinline__ void bring(int i, int64_t row) const {
    const uint4* near = features_ + (row >= 0 ? row * (C / 16) : 0) + threadIdx.x % 4;
#pragma unroll
    for (int b = 0; b < kBlocks; b++) {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(room_ + (2 * b + i) * 2048),
                   "l"(near + 4 * b), "r"(row >= 0 ? 16 : 0));
    }
  }
  __device__ __forceinline__ void commit() const { asm volatile("cp.async.commit_group;"); }

 private:
  const uint4* features_;
  uint32_t room_;
};

// Beyond the last row of a walk it is that row again.
__device__ __forceinline__ int row_of_tile(const Walk& walk, int tile, int row) {
  return min(tile * kRows + row, walk.rows - 1);
}

// Brings rows, a tile ahead of their use; an index is read two tiles ahead.
template <int C>
class Feed : public Features<C> {
 public:
  __device__ __forceinline__ Feed(const HopperAggregate& args, const Walk& walk, const Group* groups,
                                  char* room)
      : Features<C>(args.features, room), args_(args), walk_(walk), groups_(groups) {
    find(0);
  }

  // The rows of a tile, the first one or the one after that of the last call, whose features are gone then.
  __device__ __forceinline__ Rows next(int tile) {
    Rows rows;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const Group& group = groups_[(walk_.begin + place(tile, i)) / args_.neighbors];
      const int64_t row = index_[i] < 0 ? group.middle : row_of(args_, index_[i], group.first);
#pragma unroll
      for (int axis = 0; axis < 3; axis++) {
        const float from = coordinate(args_, row, axis) - group.center[axis];
        rows.offset[i][axis] = from * group.scale[axis] * args_.beta;
      }
      rows.middle[i] = group.middle >= 0 ? static_cast<int>(group.middle * (C / 16) + threadIdx.x % 4) : -1;
      this->bring(i, row);
    }
    this->commit();
    find(tile + 1);
    return rows;
  }

 private:
  __device__ __forceinline__ int place(int tile, int i) const {
    return row_of_tile(walk_, tile, threadIdx.x % 32 / 4 + 8 * i);
  }
  __device__ __forceinline__ void find(int tile) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      index_[i] = args_.neighbor[walk_.first * args_.neighbors + walk_.begin + place(tile, i)];
    }
  }

  const HopperAggregate& args_;
  const Walk& walk_;
  const Group* groups_;
  int64_t index_[2];
};

// x += sine and cosine, for the offsets of two rows and eight frequencies. The sine unit is within 2^-20.9
// for the angle that it is given, and the angle within 2^-23 of its own size: less than the rounding of x.
template <typename T>
__device__ __forceinline__ void add_sines(const float (&offset)[2], const float* frequency, Channels& x) {
  const float4 low = *reinterpret_cast<const float4*>(frequency);
  const float4 high = *reinterpret_cast<const float4*>(frequency + 4);
  const float f[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const float a = offset[i] * f[2 * q], b = offset[i] * f[2 * q + 1];
      x[0][i][q] = Two<T>::add(x[0][i][q], Two<T>::of(__sinf(a), __sinf(b)));
      x[1][i][q] = Two<T>::add(x[1][i][q], Two<T>::of(__cosf(a), __cosf(b)));
    }
  }
}

template <int C, typename T>
__device__ __forceinline__ void add_encoding(const Rows& rows, const float* frequency, int pair,
                                             Channels& x) {
  const int axis = pair / Order<C>::kParts, first = pair % Order<C>::kParts * 32 + threadIdx.x % 4 * 8;
  const float offset[2] = {rows.offset[0][axis], rows.offset[1][axis]};
  add_sines<T>(offset, frequency + first, x);
}

// a of the product with half a block (k = 0..3 of a pair).
__device__ __forceinline__ void operand(const Channels& x, int k, uint32_t (&a)[4]) {
  const int q = k % 2 * 2;
  a[0] = x[k / 2][0][q];
  a[1] = x[k / 2][1][q];
  a[2] = x[k / 2][0][q + 1];
  a[3] = x[k / 2][1][q + 1];
}

template <int N>
__device__ __forceinline__ void set_bias(const float* bias, float (&d)[N / 2]) {
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    const float2 b = *reinterpret_cast<const float2*>(bias + 8 * j + threadIdx.x % 4 * 2);
    d[4 * j] = d[4 * j + 2] = b.x;
    d[4 * j + 1] = d[4 * j + 3] = b.y;
  }
}

// Channels of x and of the bias in d: 32 of them in 16 of d, from [row][q].
template <typename T>
__device__ __forceinline__ void set_residual(const uint32_t (&x)[2][4], const float* bias, float* d) {
#pragma unroll
  for (int q = 0; q < 4; q++) {
    const float2 b = *reinterpret_cast<const float2*>(bias + 8 * q + threadIdx.x % 4 * 2);
    const float2 r = Two<T>::floats(x[0][q]), s = Two<T>::floats(x[1][q]);
    d[4 * q] = r.x + b.x;
    d[4 * q + 1] = r.y + b.y;
    d[4 * q + 2] = s.x + b.x;
    d[4 * q + 3] = s.y + b.y;
  }
}

template <typename T>
__device__ __forceinline__ void relu_channels(const float* d, uint32_t (&x)[2][4]) {
#pragma unroll
  for (int q = 0; q < 4; q++) {
    x[0][q] = Two<T>::max(Two<T>::of(d[4 * q], d[4 * q + 1]), 0);
    x[1][q] = Two<T>::max(Two<T>::of(d[4 * q + 2], d[4 * q + 3]), 0);
  }
}

__device__ __forceinline__ int segment_after(const HopperAggregate& args, const Walk& walk, int tile,
                                             int segment) {
  while ((segment + 1) * args.neighbors - walk.begin <= (tile + 1) * kRows) segment++;
  return segment;
}

template <int C>
__device__ void load_frequency(const HopperAggregate& args, float* frequency) {
  for (int i = threadIdx.x; i < C / 6; i += blockDim.x) frequency[i] = 1 / args.wavelength[i];
}

// Generic writes to shared memory become visible to the products.
__device__ __forceinline__ void publish() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
}

// What the offsets of a warp's group are multiplied by.
__device__ __forceinline__ float4 scale_of(const HopperAggregate& args, int64_t group) {
  const int lane = threadIdx.x % 32;
  const int64_t cloud = group / args.centers, first = cloud * args.rows;
  float divisor[3] = {0, 0, 0};
  if (args.divisor) {
    for (float& each : divisor) each = args.divisor[cloud];
  } else {
    const int64_t middle = row_of(args, args.center[group], first);
    const int64_t* neighbor = args.neighbor + group * args.neighbors;
    constexpr int kAhead = 4;
    const float center[3] = {coordinate(args, middle, 0), coordinate(args, middle, 1),
                             coordinate(args, middle, 2)};
    for (int first_k = 0; first_k < args.neighbors; first_k += 32 * kAhead) {
      int64_t row[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; i++) {  // beyond the end the last one again
        const int64_t index = neighbor[min(first_k + 32 * i + lane, args.neighbors - 1)];
        row[i] = index < 0 ? middle : row_of(args, index, first);
      }
#pragma unroll
      for (int i = 0; i < kAhead; i++) {
#pragma unroll
        for (int axis = 0; axis < 3; axis++) {
          divisor[axis] = fmaxf(divisor[axis], fabsf(coordinate(args, row[i], axis) - center[axis]));
        }
      }
    }
    for (float& each : divisor) {
      for (int d = 16; d > 0; d /= 2) each = fmaxf(each, __shfl_xor_sync(kLanes, each, d));
      if (args.guard && !(each > FLT_MIN)) each = 1;
    }
  }
  return {1 / divisor[0], 1 / divisor[1], 1 / divisor[2], 0};
}

// A warp per group.
static __global__ void scale_kernel(const HopperAggregate args, float4* scales) {
  const int64_t group = this_warp();
  if (group >= args.groups) return;
  const float4 scale = scale_of(args, group);
  if (threadIdx.x % 32 == 0) scales[group] = scale;
}

// Begins d += h weight^T for N channels from position `first`.
template <int C, int H, int N, typename T>
__device__ __forceinline__ void out_product(float (&d)[N / 2], const uint32_t (&h)[H / 16][4],
                                            const char* weight, int first) {
  pin(d);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < H / 16; k++) {
    wgmma<N, T>(d, h[k], descriptor(weight + (k / 2 * C + first) * kBlockBytes + k % 2 * 32));
  }
  wgmma_commit();
}

__host__ __device__ inline int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace any2point
