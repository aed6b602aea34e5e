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

// A warp goes through eight groups together (a bundle), two neighbours of each at a time: a thread's two rows
// are of one group, and the maximum over neighbours is its own. An odd K has its last neighbour twice, a
// bundle beyond the end the last group.
constexpr int kTogether = kRows / 2;

// What kernels need of rows, in the order of tiles; written by locate_kernel.
struct Located {
  float4* rows;  // [bundles, tiles of each, 8, 2]: beta times the normalised offset, and the row of the
                 // features, below 0: none
  int* middles;  // [bundles, 8]: that of the centre
  char* image;   // of the weights, unit by unit, as products read them from shared memory
};

// What a launch covers.
struct Share {
  int64_t first, end;  // tiles
  int tiles;           // of a warp
  Located located;
  uint4* hidden;  // [teams, tiles, H / 16, 128]
  uint4* heads;   // [warps, 8, C / 8]: maxima of bundles that began in the warp before
};

// Tiles of a bundle.
__host__ __device__ __forceinline__ int length_of(const HopperAggregate& args) {
  return (args.neighbors + 1) / 2;
}

// The tiles of a warp, and where it is in them.
struct Course {
  int64_t first;  // tile
  int tiles;      // may be 0: the warp goes along with the others of its team
  int bundle;     // of the tile where it is,
  int begin;      // which is this one of the bundle
  bool whole;     // whether the warp has had the first tile of the bundle

  __device__ __forceinline__ bool ends(const HopperAggregate& args) const {
    return begin + 1 == length_of(args);
  }
  // To the tile after `tile`, the warp's last one included; whether another bundle begins.
  __device__ __forceinline__ bool go_on(const HopperAggregate& args, int tile) {
    const bool on = ends(args) && tile + 1 < tiles;
    begin = on ? 0 : begin + 1;
    bundle += on;
    whole |= on;
    return on;
  }
};

__device__ __forceinline__ Course course_of(const HopperAggregate& args, const Share& share, int64_t warp) {
  const int64_t tile = share.first + warp * share.tiles, left = share.end - tile;
  const int64_t first = left > 0 ? tile : share.end - 1;
  const int bundle = static_cast<int>(first / length_of(args));
  const int tiles = left > 0 ? static_cast<int>(left < share.tiles ? left : share.tiles) : 0;
  const int begin = static_cast<int>(first % length_of(args));
  return {first, tiles, bundle, begin, begin == 0};
}

__device__ __forceinline__ float4 shared_floats(uint32_t at) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(at));
  return v;
}
__device__ __forceinline__ void shared_words(uint32_t at, uint32_t (&v)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(at));
}
// Sixteen bytes of global memory to shared memory, or zeros.
__device__ __forceinline__ void copy(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncwarp();
}

// What is known of a warp's tiles, in shared memory ahead of its use; of the last kSlots tiles.
template <int kSlots>
class Ring {
 public:
  static constexpr int kBytes = kSlots * kRows * 16;  // of a warp

  __device__ __forceinline__ Ring(const Share& share, const Course& course, char* room)
      : rows_(share.located.rows + course.first * kRows + threadIdx.x % kRows),
        last_(max(course.tiles, 1) - 1) {
    room_ = static_cast<uint32_t>(__cvta_generic_to_shared(room)) + threadIdx.x / 32 * kBytes;
    bring(0);
    commit_copies();
    wait_for_copies();
  }

  // Begins to bring a tile, beyond the end the last one again; without a commit.
  __device__ __forceinline__ void bring(int tile) const {
    if (threadIdx.x % 32 < kRows) {
      copy(room_ + tile % kSlots * (kRows * 16) + threadIdx.x % kRows * 16, rows_ + min(tile, last_) * kRows,
           true);
    }
  }
  __device__ __forceinline__ float4 row(int tile, int i) const { return shared_floats(at(tile, i)); }
  // Of the features of row i.
  __device__ __forceinline__ int source(int tile, int i) const {
    int v;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(at(tile, i) + 12));
    return v;
  }

 private:
  __device__ __forceinline__ uint32_t at(int tile, int i) const {
    return room_ + tile % kSlots * (kRows * 16) + threadIdx.x % 32 / 4 * 32 + i * 16;
  }

  const float4* rows_;
  int last_;
  uint32_t room_;
};

// Where this thread's channels of the centre are, in 16 bytes; below 0: none.
template <int C>
__device__ __forceinline__ int middle_of(const Share& share, int bundle) {
  const int middle = share.located.middles[static_cast<int64_t>(bundle) * kTogether + threadIdx.x % 32 / 4];
  return middle >= 0 ? middle * (C / 16) + static_cast<int>(threadIdx.x % 4) : -1;
}

// Brings rows, a tile ahead of their use. What is known of a row stays for kSlots - 1 tiles; what a thread
// copies of the features only it reads.
template <int C, int kSlots>
class Stream {
 public:
  static constexpr int kBlocks = C / 64;                               // of a neighbour
  static constexpr int kFeatures = 2 * kBlocks * 16 * 128;             // bytes of a team of four warps
  static constexpr int kBytes = kFeatures + 4 * Ring<kSlots>::kBytes;  // of such a team

  // room: of the features of all teams, then of the rings.
  __device__ __forceinline__ Stream(const HopperAggregate& args, const Share& share, const Course& course,
                                    char* room)
      : features_(static_cast<const uint4*>(args.features)),
        ring_(share, course, room + blockDim.x / 128 * kFeatures) {
    room_ = static_cast<uint32_t>(__cvta_generic_to_shared(room)) + threadIdx.x / 128 * kFeatures +
            threadIdx.x % 128 * 16;
  }

  __device__ __forceinline__ Rows rows(int tile, int middle) const {
    Rows rows;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float4 v = ring_.row(tile, i);
      rows.offset[i][0] = v.x;
      rows.offset[i][1] = v.y;
      rows.offset[i][2] = v.z;
      rows.middle[i] = middle;
    }
    return rows;
  }

  // Begins to bring a tile, the first one or the one after that of the last call, whose features are gone
  // then.
  __device__ __forceinline__ void next(int tile) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = ring_.source(tile, i);
      const uint4* near = features_ + static_cast<int64_t>(max(row, 0)) * (C / 16) + threadIdx.x % 4;
#pragma unroll
      for (int b = 0; b < kBlocks; b++) copy(room_ + (2 * b + i) * 2048, near + 4 * b, row >= 0);
    }
    __syncwarp();  // the place of a tile that has been read
    ring_.bring(tile + 1);
    commit_copies();
  }

  __device__ __forceinline__ void load(const Rows& rows, int pair, Channels& x) const {
#pragma unroll
    for (int wave = 0; wave < 2; wave++) {
      const int block = Order<C>::block(2 * pair + wave);
      if (block < kBlocks) {
#pragma unroll
        for (int i = 0; i < 2; i++) shared_words(room_ + (2 * block + i) * 2048, x[wave][i]);
      } else {  // predicated: products want no branches between them
        uint32_t v[4] = {0, 0, 0, 0};
        const uint4* from = features_ + rows.middle[0] + (block - kBlocks) * 4;
        asm volatile(
            "{\n.reg .pred p;\nsetp.ge.s32 p, %5, 0;\n"
            "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
            : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3])
            : "l"(from), "r"(rows.middle[0]));
#pragma unroll
        for (int q = 0; q < 4; q++) x[wave][0][q] = x[wave][1][q] = v[q];
      }
    }
  }

 private:
  const uint4* features_;
  Ring<kSlots> ring_;
  uint32_t room_;
};

// Brings rows 64 channels (a pair) at a time, a pair ahead of their use.
template <int C>
class PairStream {
 public:
  static constexpr int kBytes = 384 * 64 + 12 * Ring<2>::kBytes;  // of a block

  __device__ __forceinline__ PairStream(const HopperAggregate& args, const Share& share, const Course& course,
                                        char* room)
      : ring_(share, course, room + 384 * 64), features_(static_cast<const uint4*>(args.features)) {
    room_ = static_cast<uint32_t>(__cvta_generic_to_shared(room)) + threadIdx.x * 16;
    find(0, middle_of<C>(share, course.bundle));
    bring(0);
  }

  // Where the features of a tile are, the first one or the one after that of the last call.
  __device__ __forceinline__ void find(int tile, int middle) {
    middle_ = middle;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int source = ring_.source(tile, i);
      near_[i] = source >= 0 ? source * (C / 16) + static_cast<int>(threadIdx.x % 4) : -1;
    }
  }
  // Their offsets, after they were found and before the next ones are.
  __device__ __forceinline__ Rows rows(int tile) const {
    Rows rows;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float4 v = ring_.row(tile, i);
      rows.offset[i][0] = v.x;
      rows.offset[i][1] = v.y;
      rows.offset[i][2] = v.z;
    }
    ring_.bring(tile + 1);
    return rows;
  }

  // Begins to bring a pair of the tile found last, after the last one was taken.
  __device__ __forceinline__ void bring(int pair) const {
#pragma unroll
    for (int wave = 0; wave < 2; wave++) {
      const int block = Order<C>::block(2 * pair + wave);
#pragma unroll
      for (int i = 0; i < (block < C / 64 ? 2 : 1); i++) {
        const int from = block < C / 64 ? near_[i] : middle_;
        const int at = (block < C / 64 ? block : block - C / 64) * 4;
        copy(room_ + (2 * wave + i) * 384 * 16, features_ + (max(from, 0) + at), from >= 0);
      }
    }
    commit_copies();
  }

  __device__ __forceinline__ void take(int pair, Channels& x) const {
    wait_for_copies();
#pragma unroll
    for (int wave = 0; wave < 2; wave++) {
      const bool near = Order<C>::block(2 * pair + wave) < C / 64;
#pragma unroll
      for (int i = 0; i < 2; i++) shared_words(room_ + (2 * wave + (near ? i : 0)) * 384 * 16, x[wave][i]);
    }
  }

 private:
  Ring<2> ring_;
  const uint4* features_;
  uint32_t room_;
  int near_[2], middle_;  // where a thread's channels are, in 16 bytes; below 0: none
};

// Brings rows of which each of three teams has an axis, 64 channels (a pair) at a time, a pair ahead of their
// use. What a thread copies of the features only it reads.
template <int C>
class AxisStream {
 public:
  static constexpr int kBytes = 3 * 128 * 64 + 12 * Ring<2>::kBytes;  // of a block
  static constexpr int kParts = Order<C>::kParts;                     // pairs of an axis
  float offset[2];                                                    // of the tile found last

  __device__ __forceinline__ AxisStream(const HopperAggregate& args, const Share& share, const Course& course,
                                        int axis, char* room)
      : ring_(share, course, room + 3 * 128 * 64),
        features_(static_cast<const uint4*>(args.features)),
        axis_(axis) {
    room_ = static_cast<uint32_t>(__cvta_generic_to_shared(room)) + axis * 8192 + threadIdx.x % 128 * 16;
    find(0, middle_of<C>(share, course.bundle));
    bring(0);
  }

  // The rows of a tile, the first one or the one after that of the last call.
  __device__ __forceinline__ void find(int tile, int middle) {
    constexpr int kNear = C / 64;  // blocks of a neighbour, the others are the centre's
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float4 row = ring_.row(tile, i);
      const int source = __float_as_int(row.w);
      const int near = source >= 0 ? source * (C / 16) + static_cast<int>(threadIdx.x % 4) : -1;
      offset[i] = axis_ == 0 ? row.x : axis_ == 1 ? row.y : row.z;
#pragma unroll
      for (int wave = 0; wave < 2; wave++) {
        const int block = (2 * axis_ + wave) * kParts;
        const int from = block < kNear ? near : middle;
        from_[wave][i] = from >= 0 ? from + 4 * (block < kNear ? block : block - kNear) : -1;
      }
    }
    ring_.bring(tile + 1);
  }

  // Begins to bring a pair of these rows, after the last one was taken.
  __device__ __forceinline__ void bring(int pair) const {
#pragma unroll
    for (int wave = 0; wave < 2; wave++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int from = from_[wave][i];
        copy(room_ + (2 * wave + i) * 2048, features_ + (max(from, 0) + 4 * pair), from >= 0);
      }
    }
    commit_copies();
  }

  __device__ __forceinline__ void take(Channels& x) const {
    wait_for_copies();
#pragma unroll
    for (int j = 0; j < 4; j++) shared_words(room_ + j * 2048, x[j / 2][j % 2]);
  }

 private:
  Ring<2> ring_;
  const uint4* features_;
  uint32_t room_;
  int axis_;
  int from_[2][2];  // where a thread's channels begin, sine and cosine, in 16 bytes; below 0: none
};

// Bytes, a multiple of 16, to the L2 cache.
__device__ __forceinline__ void to_cache(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// A copy of bytes (a multiple of 16) to shared memory, by one thread for all of the block.
class Delivery {
 public:
  static constexpr int kBytes = 16;  // of the barrier

  // barrier: in shared memory; the block has to meet before begin().
  __device__ __forceinline__ explicit Delivery(char* barrier)
      : barrier_(static_cast<uint32_t>(__cvta_generic_to_shared(barrier))) {
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier_) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
  }
  template <int kBytes>
  __device__ __forceinline__ void begin(char* to, const char* from) const {
    if (threadIdx.x != 0) return;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier_), "r"(kBytes)
                 : "memory");
    constexpr int kPieces = 8;
    static_assert(kBytes % (16 * kPieces) == 0, "whole pieces");
    for (int i = 0; i < kPieces; i++) {
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
              static_cast<uint32_t>(__cvta_generic_to_shared(to)) + i * (kBytes / kPieces)),
          "l"(from + i * (kBytes / kPieces)), "r"(kBytes / kPieces), "r"(barrier_)
          : "memory");
    }
  }
  // Until it is there, also for products.
  __device__ __forceinline__ void wait() const {
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0;\n@!p bra again;\n}" ::
            "r"(barrier_)
        : "memory");
  }

 private:
  uint32_t barrier_;
};

// Biases as set_biases() reads them: those of two rows, which are the same, for every four lanes.
template <int N>
__device__ void load_biases(const float* bias, float* to) {
  for (int i = threadIdx.x; i < 2 * N; i += blockDim.x) to[i] = bias[i / 4 * 2 + i % 2];
}

template <int N>
__device__ __forceinline__ void set_biases(const float* biases, float (&d)[N / 2]) {
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    const float4 b = *reinterpret_cast<const float4*>(biases + 16 * j + threadIdx.x % 4 * 4);
    d[4 * j] = b.x;
    d[4 * j + 1] = b.y;
    d[4 * j + 2] = b.z;
    d[4 * j + 3] = b.w;
  }
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

// Two numbers, not below 0, in 16 bits.
template <typename T>
__device__ __forceinline__ uint32_t positive(float low, float high);
template <>
__device__ __forceinline__ uint32_t positive<__half>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
template <>
__device__ __forceinline__ uint32_t positive<__nv_bfloat16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

template <typename T>
__device__ __forceinline__ void positive_channels(const float* d, uint32_t (&x)[2][4]) {
#pragma unroll
  for (int q = 0; q < 4; q++) {
    x[0][q] = positive<T>(d[4 * q], d[4 * q + 1]);
    x[1][q] = positive<T>(d[4 * q + 2], d[4 * q + 3]);
  }
}

template <typename T, int H>
__device__ __forceinline__ void positive_hidden(const float (&d)[H / 2], uint32_t (&h)[H / 16][4]) {
#pragma unroll
  for (int i = 0; i < H / 4; i++) h[i / 4][i % 4] = positive<T>(d[2 * i], d[2 * i + 1]);
}

// What maxima of eight channels become at the end: ReLU(they + bias).
template <typename T>
__device__ __forceinline__ uint4 finished(uint4 largest, const float* bias) {
  uint32_t v[4] = {largest.x, largest.y, largest.z, largest.w};
#pragma unroll
  for (int q = 0; q < 4; q++) {
    const float2 value = Two<T>::floats(v[q]);
    v[q] = positive<T>(value.x + bias[2 * q], value.y + bias[2 * q + 1]);
  }
  return {v[0], v[1], v[2], v[3]};
}

// The largest numbers of a thread's group so far, 16 channels in each of kPairs pairs (sine, cosine): those
// of the first kRoom pairs in shared memory, those of the others in registers.
template <int kPairs, int kRoom, typename T>
class Largest {
 public:
  static constexpr int kBytes = 384 * 32 * kRoom;  // of a block

  __device__ __forceinline__ explicit Largest(char* room)
      : room_(static_cast<uint32_t>(__cvta_generic_to_shared(room)) + threadIdx.x * 16) {
    forget();
  }

  // Sums of a pair, of both rows, before the last bias and ReLU.
  __device__ __forceinline__ void take(int pair, const float (&d)[32]) {
#pragma unroll
    for (int b = 0; b < 2; b++) {
      uint32_t v[4];
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const float* at = d + 16 * b + 4 * q;
        v[q] = Two<T>::max(Two<T>::of(at[0], at[1]), Two<T>::of(at[2], at[3]));
      }
      const uint4 to = get(pair, b);
      set(pair, b,
          {Two<T>::max(to.x, v[0]), Two<T>::max(to.y, v[1]), Two<T>::max(to.z, v[2]),
           Two<T>::max(to.w, v[3])});
    }
  }

  // After a tile: where the bundle ends, or the warp's tiles, writes the maxima; join_kernel finishes bundles
  // of several warps. `first` of all pairs of C channels is the first one here.
  template <int C>
  __device__ __forceinline__ void write(const HopperAggregate& args, const Share& share, int64_t warp,
                                        const Course& course, int tile, int first, const float* bias) {
    const bool ends = course.ends(args);
    if (!ends && tile + 1 != course.tiles) return;
    const int place = threadIdx.x % 32 / 4;
    const int64_t group = static_cast<int64_t>(course.bundle) * kTogether + place;
    if (group < args.groups && tile < course.tiles) {
      uint4* to = course.whole ? static_cast<uint4*>(args.out) + group * (C / 8)
                               : share.heads + (warp * kTogether + place) * (C / 8);
#pragma unroll
      for (int p = 0; p < kPairs; p++) {
#pragma unroll
        for (int b = 0; b < 2; b++) {
          const int at = (Order<C>::block(2 * (first + p)) + b * Order<C>::kParts) * 4 + threadIdx.x % 4;
          to[at] = course.whole && ends ? finished<T>(get(p, b), bias + 8 * at) : get(p, b);
        }
      }
    }
    forget();
  }

 private:
  __device__ __forceinline__ uint4 get(int pair, int b) const {
    if (pair >= kRoom) return own_[pair - kRoom][b];
    uint32_t v[4];
    shared_words(room_ + (2 * pair + b) * 384 * 16, v);
    return {v[0], v[1], v[2], v[3]};
  }
  __device__ __forceinline__ void set(int pair, int b, const uint4& v) {
    if (pair >= kRoom) {
      own_[pair - kRoom][b] = v;
    } else {
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(room_ + (2 * pair + b) * 384 * 16),
                   "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                   : "memory");
    }
  }
  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int i = 0; i < 2 * kPairs; i++) set(i / 2, i % 2, {kLowest<T>, kLowest<T>, kLowest<T>, kLowest<T>});
  }

  uint32_t room_;
  uint4 own_[kPairs > kRoom ? kPairs - kRoom : 1][2];
};

}  // namespace any2point
