// What the kernels of evaluation share besides hopper_rows.cuh: weights on their way to shared memory,
// products, and the maximum over neighbours, which is taken before the bias and the ReLU of the last layer.
#pragma once

#include "local_aggregate/hopper_rows.cuh"

namespace any2point {

// Launched while the kernels before it run: what they write is there after it.
__device__ __forceinline__ void wait_for_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next one may begin.
__device__ __forceinline__ void let_next_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Minus infinity, twice.
template <typename T>
constexpr uint32_t kLowest = 0xfc00fc00;
template <>
inline constexpr uint32_t kLowest<__nv_bfloat16> = 0xff80ff80;

// What kernels need of a row, written by locate_kernel.
struct Located {
  float4* rows;  // [B S K]: beta times the normalised offset, and the row of the features, below 0: none
  int* middles;  // [B S K]: that of the centre
};

// What a launch covers; its rows are scaled already.
struct Share : Part {
  Located located;
};

// A warp per group.
static __global__ void locate_kernel(const HopperAggregate args, const Located located) {
  let_next_begin();
  const int64_t group = this_warp();
  if (group >= args.groups) return;
  constexpr int kAhead = 4, kStep = 32 * kAhead;
  const int lane = threadIdx.x % 32;
  const int64_t cloud = group / args.centers, first = cloud * args.rows;
  const int64_t middle = row_of(args, args.center[group], first);
  const float center[3] = {coordinate(args, middle, 0), coordinate(args, middle, 1),
                           coordinate(args, middle, 2)};
  int64_t row[kAhead];
  float away[kAhead][3];
  const auto find = [&](int begin) {
#pragma unroll
    for (int i = 0; i < kAhead; i++) {  // beyond the end the last one again
      const int k = min(begin + 32 * i + lane, args.neighbors - 1);
      const int64_t index = args.neighbor[group * args.neighbors + k];
      row[i] = index < 0 ? middle : row_of(args, index, first);
    }
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
#pragma unroll
      for (int axis = 0; axis < 3; axis++) away[i][axis] = coordinate(args, row[i], axis) - center[axis];
    }
  };
  float scale[3] = {0, 0, 0};
  find(0);
  if (args.divisor) {
    for (float& each : scale) each = 1 / args.divisor[cloud];
  } else {
    for (int begin = 0; begin < args.neighbors; begin += kStep) {
      if (begin > 0) find(begin);
#pragma unroll
      for (int i = 0; i < kAhead; i++) {
#pragma unroll
        for (int axis = 0; axis < 3; axis++) scale[axis] = fmaxf(scale[axis], fabsf(away[i][axis]));
      }
    }
    for (float& each : scale) {
      for (int d = 16; d > 0; d /= 2) each = fmaxf(each, __shfl_xor_sync(kLanes, each, d));
      if (args.guard && !(each > FLT_MIN)) each = 1;
      each = 1 / each;
    }
  }
  for (int begin = 0; begin < args.neighbors; begin += kStep) {
    if (args.neighbors > kStep) find(begin);
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int k = begin + 32 * i + lane;
      if (k >= args.neighbors) break;
      const int64_t at = group * args.neighbors + k;
      located.rows[at] = {away[i][0] * scale[0] * args.beta, away[i][1] * scale[1] * args.beta,
                          away[i][2] * scale[2] * args.beta, __int_as_float(static_cast<int>(row[i]))};
      located.middles[at] = static_cast<int>(middle);
    }
  }
}

// What is known of a warp's tiles, in shared memory ahead of its use; of the last kSlots tiles.
template <int kSlots>
class Ring {
 public:
  static constexpr int kBytes = kSlots * kRows * 20;  // of a warp

  __device__ __forceinline__ Ring(const Share& share, const Walk& walk, int neighbors, char* room)
      : walk_(walk) {
    room_ = static_cast<uint32_t>(__cvta_generic_to_shared(room)) + threadIdx.x / 32 * kBytes;
    const int64_t first = walk.first * neighbors + walk.begin;
    rows_ = share.located.rows + first;
    middles_ = share.located.middles + first;
    bring(0);
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncwarp();
  }

  // Begins to bring a tile; without a commit.
  __device__ __forceinline__ void bring(int tile) const {
    const int lane = threadIdx.x % kRows, at = row_of_tile(walk_, tile, lane);
    const uint32_t to = room_ + tile % kSlots * (kRows * 20);
    if (threadIdx.x % 32 < kRows) {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(to + 16 * lane), "l"(rows_ + at));
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to + 16 * kRows + 4 * lane),
                   "l"(middles_ + at));
    }
  }
  __device__ __forceinline__ float4 row(int tile, int i) const {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(room_ + tile % kSlots * (kRows * 20) + (threadIdx.x % 32 / 4 + 8 * i) * 16));
    return v;
  }
  // Of the features of row i: the neighbour's,
  __device__ __forceinline__ int source(int tile, int i) const {
    int v;
    asm volatile("ld.shared.s32 %0, [%1];"
                 : "=r"(v)
                 : "r"(room_ + tile % kSlots * (kRows * 20) + (threadIdx.x % 32 / 4 + 8 * i) * 16 + 12));
    return v;
  }
  // and the centre's.
  __device__ __forceinline__ int middle(int tile, int i) const {
    int v;
    asm volatile(
        "ld.shared.s32 %0, [%1];"
        : "=r"(v)
        : "r"(room_ + tile % kSlots * (kRows * 20) + kRows * 16 + (threadIdx.x % 32 / 4 + 8 * i) * 4));
    return v;
  }

 private:
  const Walk& walk_;
  const float4* rows_;
  const int* middles_;
  uint32_t room_;
};

// Brings rows, a tile ahead of their use. What is known of a row stays for kSlots - 1 tiles.
template <int C, int kSlots>
class Stream : public Features<C> {
 public:
  static constexpr int kBytes = Features<C>::kBytes + 4 * Ring<kSlots>::kBytes;  // of a team of four warps

  // room: of the features of all teams, then of the rings.
  __device__ __forceinline__ Stream(const HopperAggregate& args, const Share& share, const Walk& walk,
                                    char* room)
      : Features<C>(args.features, room),
        ring_(share, walk, args.neighbors, room + blockDim.x / 128 * Features<C>::kBytes) {}

  __device__ __forceinline__ void wait() const {
    Features<C>::wait();
    __syncwarp();
  }

  __device__ __forceinline__ Rows rows(int tile) const {
    Rows rows;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float4 v = ring_.row(tile, i);
      const int middle = ring_.middle(tile, i);
      rows.offset[i][0] = v.x;
      rows.offset[i][1] = v.y;
      rows.offset[i][2] = v.z;
      rows.middle[i] = middle >= 0 ? middle * (C / 16) + static_cast<int>(threadIdx.x % 4) : -1;
    }
    return rows;
  }

  // Begins to bring a tile, the first one or the one after that of the last call, whose features are gone
  // then.
  __device__ __forceinline__ void next(int tile) const {
#pragma unroll
    for (int i = 0; i < 2; i++) this->bring(i, ring_.source(tile, i));
    ring_.bring(tile + 1);
    this->commit();
  }

 private:
  Ring<kSlots> ring_;
};

// Brings rows of which each of three teams has an axis, 64 channels (a pair) at a time, a pair ahead of their
// use. What a thread copies of the features only it reads.
template <int C>
class AxisStream {
 public:
  static constexpr int kBytes = 3 * 128 * 64 + 12 * Ring<2>::kBytes;  // of a block
  static constexpr int kParts = Order<C>::kParts;                     // pairs of an axis
  float offset[2];                                                    // of the tile found last

  __device__ __forceinline__ AxisStream(const HopperAggregate& args, const Share& share, const Walk& walk,
                                        int axis, char* room)
      : ring_(share, walk, args.neighbors, room + 3 * 128 * 64),
        features_(static_cast<const uint4*>(args.features)),
        axis_(axis) {
    room_ = static_cast<uint32_t>(__cvta_generic_to_shared(room)) + axis * 8192 + threadIdx.x % 128 * 16;
    find(0);
    bring(0);
  }

  // The rows of a tile, the first one or the one after that of the last call.
  __device__ __forceinline__ void find(int tile) {
    constexpr int kNear = C / 64;  // blocks of a neighbour, the others are the centre's
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float4 row = ring_.row(tile, i);
      offset[i] = axis_ == 0 ? row.x : axis_ == 1 ? row.y : row.z;
#pragma unroll
      for (int wave = 0; wave < 2; wave++) {
        const int first = (2 * axis_ + wave) * kParts;
        const int source = first < kNear ? __float_as_int(row.w) : ring_.middle(tile, i);
        const int block = first < kNear ? first : first - kNear;
        from_[wave][i] = source >= 0 ? source * (C / 16) + block * 4 + static_cast<int>(threadIdx.x % 4) : -1;
      }
    }
    ring_.bring(tile + 1);
  }

  // Begins to bring a pair of these rows, after the last one was taken.
  __device__ __forceinline__ void bring(int pair) const {
#pragma unroll
    for (int wave = 0; wave < 2; wave++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {  // of no bytes: zeros
        const int from = from_[wave][i];
        asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(room_ + (2 * wave + i) * 2048),
                     "l"(features_ + (max(from, 0) + 4 * pair)), "r"(from >= 0 ? 16 : 0));
      }
    }
    asm volatile("cp.async.commit_group;");
  }

  __device__ __forceinline__ void take(Channels& x) const {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; j++) {
      uint32_t* v = x[j / 2][j % 2];
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                   : "r"(room_ + j * 2048));
    }
  }

 private:
  Ring<2> ring_;
  const uint4* features_;
  uint32_t room_;
  int axis_;
  int from_[2][2];  // where a thread's channels begin, sine and cosine, in 16 bytes; below 0: none
};

// Calls store(i, from[index(i)]) for i < kCount over the threads of a block, with many loads on their way.
template <int kCount, typename Index, typename Store>
__device__ __forceinline__ void bring_weight(const void* from, Index index, Store store) {
  constexpr int kAhead = 8;
  for (int first = threadIdx.x; first < kCount; first += kAhead * blockDim.x) {
    uint4 v[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      const int i = first + a * blockDim.x;
      if (i < kCount) v[a] = __ldg(static_cast<const uint4*>(from) + index(i));
    }
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      const int i = first + a * blockDim.x;
      if (i < kCount) store(i, v[a]);
    }
  }
}

template <int C, int H>
__device__ void load_in_weight(const void* weight, char* to) {
  bring_weight<H * C / 8>(
      weight, [](int i) { return i / (C / 8) * (C / 8) + Order<C>::block(i % (C / 8) / 4) * 4 + i % 4; },
      [&](int i, const uint4& v) {
        store_weight(v, to + i % (C / 8) / 4 * H * kBlockBytes, i / (C / 8), i % 4);
      });
}

template <int C, int H>
__device__ void load_out_weight(const void* weight, char* to) {
  bring_weight<C * H / 8>(
      weight, [](int i) { return Order<C>::channel(i / (H / 8)) * (H / 8) + i % (H / 8); },
      [&](int i, const uint4& v) {
        const int n = i / (H / 8), k = i % (H / 8);
        *reinterpret_cast<uint4*>(to + k / 4 * C * kBlockBytes + swizzle(n * kBlockBytes + k % 4 * 16)) = v;
      });
}

// Begins d += x weight^T for the 64 channels of a pair; weight: descriptor of its blocks.
template <int H, typename T>
__device__ __forceinline__ void in_product(float (&d)[H / 2], const Channels& x, uint64_t weight) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; k++) {
    uint32_t a[4];
    operand(x, k, a);
    wgmma<H, T>(d, a, weight + (k / 2 * H * kBlockBytes + k % 2 * 32) / 16);
  }
  wgmma_commit();
}

// Begins d += h weight^T for the 64 channels of a pair; weight: descriptor of the first one's.
template <int C, int H, typename T>
__device__ __forceinline__ void pair_product(float (&d)[32], const uint32_t (&h)[H / 16][4],
                                             uint64_t weight) {
  pin(d);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < H / 16; k++) {
    wgmma<64, T>(d, h[k], weight + (k / 2 * C * kBlockBytes + k % 2 * 32) / 16);
  }
  wgmma_commit();
}

// Channels of x in d, without a bias: 32 of them in 16 of d, from [row][q].
template <typename T>
__device__ __forceinline__ void set_rows(const uint32_t (&x)[2][4], float* d) {
#pragma unroll
  for (int q = 0; q < 4; q++) {
    const float2 r = Two<T>::floats(x[0][q]), s = Two<T>::floats(x[1][q]);
    d[4 * q] = r.x;
    d[4 * q + 1] = r.y;
    d[4 * q + 2] = s.x;
    d[4 * q + 3] = s.y;
  }
}

// relu_channels() without the ReLU.
template <typename T>
__device__ __forceinline__ void round_channels(const float* d, uint32_t (&x)[2][4]) {
#pragma unroll
  for (int q = 0; q < 4; q++) {
    x[0][q] = Two<T>::of(d[4 * q], d[4 * q + 1]);
    x[1][q] = Two<T>::of(d[4 * q + 2], d[4 * q + 3]);
  }
}

// The largest over the lanes that hold the same channels; each lane ends up with another two of the 64.
template <typename T>
__device__ __forceinline__ uint32_t largest_of_lanes(const uint32_t (&v)[2][4]) {
  const bool a = threadIdx.x & 16, b = threadIdx.x & 8, c = threadIdx.x & 4;
  uint32_t w[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint32_t u[2];
#pragma unroll
    for (int q = 0; q < 2; q++) {
      const uint32_t other = __shfl_xor_sync(kLanes, a ? v[i][q] : v[i][q + 2], 16);
      u[q] = Two<T>::max(a ? v[i][q + 2] : v[i][q], other);
    }
    w[i] = Two<T>::max(b ? u[1] : u[0], __shfl_xor_sync(kLanes, b ? u[0] : u[1], 8));
  }
  return Two<T>::max(c ? w[1] : w[0], __shfl_xor_sync(kLanes, c ? w[0] : w[1], 4));
}

// What a maximum becomes at the end: ReLU(it + bias).
template <typename T>
__device__ __forceinline__ uint32_t finished(uint32_t largest, float2 bias) {
  const float2 value = Two<T>::floats(largest);
  return Two<T>::max(Two<T>::of(value.x + bias.x, value.y + bias.y), 0);
}

// Takes 64 channels of a tile's rows, before bias and ReLU, into the maximum of their group, and writes it
// where the group ends, or the warp's rows; join_kernel finishes groups of several warps. `warp`: of the
// walk; `segment`: the group of the tile's first row; bias in the order of positions.
template <int C, typename T>
__device__ __forceinline__ void take_largest(const HopperAggregate& args, const Share& share,
                                             const Walk& walk, int64_t warp, int tile, int segment, int pair,
                                             const Channels& z, const float* bias, uint32_t* largest) {
  const int lane = threadIdx.x % 32;
  const bool last = tile + 1 == share.tiles;
  const auto write = [&](int s, bool ends) {
    const int q = lane / 8, wave = lane / 4 % 2, t = lane % 4;
    const bool begins = s > 0 || walk.begin == 0;
    uint32_t* to =
        begins ? static_cast<uint32_t*>(args.out) + (walk.first + s) * (C / 2) : share.heads + warp * (C / 2);
    if (begins && ends) {
      const int at = 64 * pair + 32 * wave + 8 * q + 2 * t;
      *largest = finished<T>(*largest, *reinterpret_cast<const float2*>(bias + at));
    }
    to[(Order<C>::block(2 * pair) + wave * Order<C>::kParts) * 16 + t * 4 + q] = *largest;
    *largest = kLowest<T>;
  };
  uint32_t v[2][4];
  int high = (segment + 1) * args.neighbors - walk.begin - tile * kRows;  // where the group ends in the tile
  if (high >= kRows) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i / 4][i % 4] = Two<T>::max(z[i / 4][0][i % 4], z[i / 4][1][i % 4]);
    *largest = Two<T>::max(*largest, largest_of_lanes<T>(v));
    if ((high == kRows || last) && segment < walk.groups) write(segment, high == kRows);
    return;
  }
  const int row = lane / 4;
  for (int s = segment; s < walk.groups; s++, high += args.neighbors) {
    const int low = high - args.neighbors;
    if (low >= kRows) break;
    const bool first = row >= low && row < high, second = row + 8 >= low && row + 8 < high;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      v[i / 4][i % 4] =
          Two<T>::max(first ? z[i / 4][0][i % 4] : kLowest<T>, second ? z[i / 4][1][i % 4] : kLowest<T>);
    }
    *largest = Two<T>::max(*largest, largest_of_lanes<T>(v));
    if (high <= kRows || last) write(s, high <= kRows);
  }
}

}  // namespace any2point
