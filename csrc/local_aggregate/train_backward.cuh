// Pieces of train_backward*.sm90a.cu: operands in shared memory and in registers, and sums over blocks.
//
// A block of an operand is 32 channels of all its rows, 64 bytes a row (wgmma.cuh). Where a product's rows
// are in registers, position 8 q + 2 t + e of a block is channel 8 t + 2 q + e, so that a thread owns 8 in a
// row.
#pragma once

#include <algorithm>
#include <type_traits>

#include "local_aggregate/hopper_rows.cuh"
#include "local_aggregate/train_backward.h"

namespace any2point {

constexpr int kTeams = 3;  // of four warps
constexpr int kTeamRows = 64;
constexpr int kOuterRows = 96;  // of a tile that an outer product takes
constexpr int kSlice = 192;     // channels of x that a block takes into an outer product

// Columns of the hidden layer that a block takes.
template <int H>
constexpr int kColumns = H < 96 ? H : 96;

__host__ __device__ constexpr int channel_at(int position) {
  return position / 32 * 32 + position % 8 / 2 * 8 + position % 32 / 8 * 2 + position % 2;
}

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ uint4 load_shared(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at)
               : "memory");
  return v;
}

// Two numbers rounded, what is below 0 to 0.
template <typename T>
__device__ __forceinline__ uint32_t relu_of(float low, float high);
template <>
__device__ __forceinline__ uint32_t relu_of<__half>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
template <>
__device__ __forceinline__ uint32_t relu_of<__nv_bfloat16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

__device__ __forceinline__ void team_barrier() {
  asm volatile("bar.sync %0, 128;" ::"r"(threadIdx.x / 128 + 1) : "memory");
}
// Shared memory that was written before is read by products of the team after it.
__device__ __forceinline__ void team_publish() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  team_barrier();
}

// Rows of bytes, a multiple of 16, into the L2 cache.
__device__ __forceinline__ void to_cache(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Barriers in shared memory, between threads and whoever works for them.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Until the phase of this parity is over; a new barrier is in phase 0, and the one before is over.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}" ::
          "r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Bytes, a multiple of 16, that the barrier counts when they are there.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

struct Eight {
  float v[8];
};
__device__ __forceinline__ Eight eight(const float* from) {
  const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
template <typename T>
__device__ __forceinline__ Eight eight_of(const uint4& v) {
  const float2 a = Two<T>::floats(v.x), b = Two<T>::floats(v.y), c = Two<T>::floats(v.z),
               d = Two<T>::floats(v.w);
  return {{a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y}};
}
template <typename T>
__device__ __forceinline__ uint4 rounded(const Eight& a) {
  return {Two<T>::of(a.v[0], a.v[1]), Two<T>::of(a.v[2], a.v[3]), Two<T>::of(a.v[4], a.v[5]),
          Two<T>::of(a.v[6], a.v[7])};
}
template <typename T>
__device__ __forceinline__ uint4 relu(const Eight& a) {
  return {relu_of<T>(a.v[0], a.v[1]), relu_of<T>(a.v[2], a.v[3]), relu_of<T>(a.v[4], a.v[5]),
          relu_of<T>(a.v[6], a.v[7])};
}
template <typename T>
__device__ __forceinline__ uint4 add(const uint4& a, const uint4& b) {
  return {Two<T>::add(a.x, b.x), Two<T>::add(a.y, b.y), Two<T>::add(a.z, b.z), Two<T>::add(a.w, b.w)};
}
template <typename T>
__device__ __forceinline__ uint4 hidden_of(const uint4& before, const Eight& scale, const Eight& shift) {
  Eight h = eight_of<T>(before);
#pragma unroll
  for (int j = 0; j < 8; j++) h.v[j] = __fmaf_rn(h.v[j], scale.v[j], shift.v[j]);
  return relu<T>(h);
}

// 16 bytes of two rows as half of the operands of a block: [k][..].
__device__ __forceinline__ void set_operands(const uint4& v, int row, uint32_t (*a)[4]) {
  a[0][row] = v.x;
  a[0][row + 2] = v.y;
  a[1][row] = v.z;
  a[1][row + 2] = v.w;
}

// v = *from, or `otherwise`; without a branch, which would not go well with products.
__device__ __forceinline__ void load_if(bool condition, const uint4* from, const uint4& otherwise, uint4& v) {
  v = otherwise;
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p ld.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
               : "l"(from), "r"(static_cast<uint32_t>(condition)));
}

// Entries at the row `at` (twice) of a group; others become 0.
__device__ __forceinline__ uint4 entries_at(const uint4& grad, const uint4& argmax, uint32_t at) {
  const auto only = [at](uint32_t grad, uint32_t argmax) {  // numbers of 15 bits are equal as halves are
    const __half2 a = *reinterpret_cast<const __half2*>(&argmax), b = *reinterpret_cast<const __half2*>(&at);
    return grad & __heq2_mask(a, b);
  };
  return {only(grad.x, argmax.x), only(grad.y, argmax.y), only(grad.z, argmax.z), only(grad.w, argmax.w)};
}

// d [64, N] += a [64, 16] b [N, 16]^T, both in shared memory.
template <int N, typename T>
__device__ void wgmma_shared(float (&d)[N / 2], uint64_t a, uint64_t b);
#define A2P_WGMMA_SHARED(N, T, type, registers, inputs, ...)                                                 \
  template <>                                                                                                \
  __device__ __forceinline__ void wgmma_shared<N, T>(float (&d)[N / 2], uint64_t a, uint64_t b) {            \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" registers "}, " inputs \
                 ", 1, 1, 1, 0, 0;"                                                                          \
                 : __VA_ARGS__                                                                               \
                 : "l"(a), "l"(b));                                                                          \
  }
#define A2P_SHARED_BOTH(N, ...)                   \
  A2P_WGMMA_SHARED(N, __half, "f16", __VA_ARGS__) \
  A2P_WGMMA_SHARED(N, __nv_bfloat16, "bf16", __VA_ARGS__)
A2P_SHARED_BOTH(32, A2P_R16, "%16, %17", A2P_D16(0))
A2P_SHARED_BOTH(64, A2P_R32, "%32, %33", A2P_D32(0))
A2P_SHARED_BOTH(96, A2P_R48, "%48, %49", A2P_D32(0), A2P_D16(32))
#undef A2P_SHARED_BOTH
#undef A2P_WGMMA_SHARED

// What of `value` stands where `z`, which is not negative, is positive. A bfloat16 that is not 0 is none as a
// half, either.
__device__ __forceinline__ uint4 where_positive(const uint4& z, const uint4& value) {
  const auto only = [](uint32_t z, uint32_t value) {
    const __half2 a = *reinterpret_cast<const __half2*>(&z);
    return value & __hneu2_mask(a, __half2{});
  };
  return {only(z.x, value.x), only(z.y, value.y), only(z.z, value.z), only(z.w, value.w)};
}

// An operand as it will lie in shared memory, in parts of `rows` rows, blocks of 32 columns after each other,
// for a product whose other operand is in registers, or in shared memory in `natural` order.
// `from` [rows of all, columns], with any strides.
template <typename T>
__device__ __forceinline__ void write_operand(const float* from, int64_t row_stride, int64_t column_stride,
                                              int all, int columns, int rows, bool natural, float scale,
                                              T* to, int index, int step) {
  for (int i = index; i < all * columns; i += step) {
    const int n = i / columns, k = i % columns, part = n / rows, row = n % rows;
    const int column = natural ? k : channel_at(k);
    const float value = from[channel_at(n) * row_stride + column * column_stride] * scale;
    const uint32_t at =
        (part * (columns / 32) + k / 32) * rows * kBlockBytes + swizzle(row * kBlockBytes + k % 32 * 2);
    const uint32_t two = Two<T>::of(value, 0.0f);
    reinterpret_cast<uint16_t*>(to)[at / 2] = static_cast<uint16_t>(two);
  }
}

__device__ __forceinline__ void copy_operand(const void* from, int64_t bytes, char* to) {
  const uint4* source = static_cast<const uint4*>(from);
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) reinterpret_cast<uint4*>(to)[i] = source[i];
}

// 16 bytes of a row, the `chunk`th, of an operand of kRowsAll rows.
template <int kRowsAll>
__device__ __forceinline__ uint32_t chunk_at(int chunk, int row) {
  return chunk / 4 * kRowsAll * kBlockBytes + swizzle(row * kBlockBytes + chunk % 4 * 16);
}
template <int kRowsAll>
__device__ __forceinline__ void put(char* operand, int chunk, int row, const uint4& v) {
  *reinterpret_cast<uint4*>(operand + chunk_at<kRowsAll>(chunk, row)) = v;
}
template <int kRowsAll>
__device__ __forceinline__ uint4 take(const char* operand, int chunk, int row) {
  return *reinterpret_cast<const uint4*>(operand + chunk_at<kRowsAll>(chunk, row));
}

// Begins sums [64, N] += x' y for a team's 64 of the 192 channels.
template <int kRowsAll, int N, typename T>
__device__ __forceinline__ void outer_product(float (&sums)[N / 2], const char* x, const char* y) {
  const int team = __shfl_sync(kLanes, threadIdx.x / 128, 0);  // known to be the warp's
  const char* const own = x + team * 2 * kRowsAll * kBlockBytes;
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kRowsAll / 16; k++) {
    wgmma_outer<N, T>(sums, outer_descriptor(own + k * 1024, kRowsAll * kBlockBytes),
                      outer_descriptor(y + k * 1024, kRowsAll * kBlockBytes));
  }
  wgmma_commit();
}

// A warp's sums into rows of N, its place among those of 16 rows.
template <int N>
__device__ __forceinline__ void store_sums(const float (&sums)[N / 2], float* to, int warp) {
  const int lane = threadIdx.x % 32;
  to += (warp * 16 + lane / 4) * N + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    *reinterpret_cast<float2*>(to + 8 * j) = {sums[4 * j], sums[4 * j + 1]};
    *reinterpret_cast<float2*>(to + 8 * N + 8 * j) = {sums[4 * j + 2], sums[4 * j + 3]};
  }
}

// d [16, 8] += a [16, 16] b [16, 8], a warp's; of a only the first eight rows.
template <typename T>
__device__ __forceinline__ void small_product(float (&d)[4], uint32_t first, uint32_t second, uint32_t b0,
                                              uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %5}, {%7, %8}, "
        "{%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(first), "r"(0), "r"(second), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %5}, {%7, %8}, "
        "{%0, "
        "%1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(first), "r"(0), "r"(second), "r"(b0), "r"(b1));
  }
}
// Eight channels, the `chunk`th, of the rows [32 n, 32 n + 32) of an operand, as two b of small products.
template <int kRowsAll>
__device__ __forceinline__ void load_across(const char* operand, int chunk, int n, uint32_t (&b)[4]) {
  const int row = 32 * n + threadIdx.x % 32;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(shared_address(operand) + chunk_at<kRowsAll>(chunk, row))
               : "memory");
}

// Sums of eight channels over the rows of each group, of a warp that goes through them tile by tile: products
// with ones and zeros, a group after the other. A lane has two channels of one group.
struct GroupSums {
  static constexpr int kGroups = 8;  // of a tile, at most

  int group;  // of the tile's first row
  int left;   // rows of it that are still to come
  float sum[4] = {};

  // Adds the tile's rows, those behind the first `rows` zeros; done(group, channel, two sums) where one ends.
  template <int kRowsAll, typename T, typename Done>
  __device__ __forceinline__ void add(const char* operand, int chunk, int rows, int neighbors, Done done) {
    constexpr uint32_t kOne = std::is_same_v<T, __half> ? 0x3c00 : 0x3f80;
    const int lane = threadIdx.x % 32, slot = lane / 4;
    const int begin = slot == 0 ? 0 : left + (slot - 1) * neighbors;
    const uint32_t count = left + slot * neighbors - begin;
    const auto ones = [&](int row) {
      const uint32_t at = row - begin;
      return (at < count ? kOne : 0) | (at + 1 < count ? kOne << 16 : 0);
    };
#pragma unroll
    for (int n = 0; n < kRowsAll / 32; n++) {
      uint32_t b[4];
      load_across<kRowsAll>(operand, chunk, n, b);
      const int row = 32 * n + lane % 4 * 2;
      small_product<T>(sum, ones(row), ones(row + 8), b[0], b[1]);
      small_product<T>(sum, ones(row + 16), ones(row + 24), b[2], b[3]);
    }
    const int ended = rows < left ? 0 : 1 + (rows - left) / neighbors;
    if (slot < ended) done(group + slot, lane % 4 * 2, float2{sum[0], sum[1]});
    const float first = __shfl_sync(kLanes, sum[0], ended * 4 + lane % 4);
    const float second = __shfl_sync(kLanes, sum[1], ended * 4 + lane % 4);
    sum[0] = slot == 0 ? first : 0;
    sum[1] = slot == 0 ? second : 0;
    group += ended;
    left += ended * neighbors - rows;
  }
};
// With so many neighbours a tile of kOuterRows rows has no more groups.
constexpr int kFewestNeighbors = 14;

// What a pass needs in another form: two operands, and entries in 16 bits.
struct Operand {
  const float* from;
  int64_t row_stride, column_stride;
  int all, columns, rows;
  bool natural;
  void* to;
};
struct Prepare {
  Operand operands[2];
  float* scale;  // [2]: what both are multiplied by, found here, and its reciprocal; null: 1
  BackwardEntries entries;
  int64_t count;  // of entries; 0: none
  uint32_t* grad;
  uint32_t* argmax;
};

constexpr int kPrepareThreads = 512, kOperandBlocks = 32;

__device__ __forceinline__ float largest_of(const Operand& o, float largest) {
  const float4* from = reinterpret_cast<const float4*>(o.from);
#pragma unroll 16
  for (int i = threadIdx.x; i < o.all * o.columns / 4; i += kPrepareThreads) {
    const float4 v = from[i];
    largest = fmaxf(fmaxf(fmaxf(largest, fabsf(v.x)), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
  }
  return largest;
}

// The first blocks bring the operands, the others entries.
template <typename T>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const __grid_constant__ Prepare args) {
  if (blockIdx.x < kOperandBlocks) {
    float scale = 1;
    if (args.scale) {
      // A power of two that brings the largest to about 2^14: so the small ones keep their bits in float16.
      __shared__ float largest[kPrepareThreads / 32];
      float m = largest_of(args.operands[1], largest_of(args.operands[0], 0));
      for (int d = 16; d > 0; d /= 2) m = fmaxf(m, __shfl_xor_sync(kLanes, m, d));
      if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = m;
      __syncthreads();
      for (const float each : largest) m = fmaxf(m, each);
      if (m > 0 && isfinite(m)) scale = exp2f(static_cast<float>(min(max(14 - ilogbf(m), -100), 100)));
      if (blockIdx.x == 0 && threadIdx.x == 0) {
        args.scale[0] = scale;
        args.scale[1] = 1 / scale;
      }
    }
    for (const Operand& o : args.operands) {
      write_operand<T>(o.from, o.row_stride, o.column_stride, o.all, o.columns, o.rows, o.natural, scale,
                       static_cast<T*>(o.to), blockIdx.x * kPrepareThreads + threadIdx.x,
                       kOperandBlocks * kPrepareThreads);
    }
  } else {
    const int64_t step = static_cast<int64_t>(gridDim.x - kOperandBlocks) * kPrepareThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x - kOperandBlocks) * kPrepareThreads + threadIdx.x;
         i < args.count / 4; i += step) {
      const float4 grad = reinterpret_cast<const float4*>(args.entries.grad)[i];
      const uint4 argmax = reinterpret_cast<const uint4*>(args.entries.argmax)[i];
      reinterpret_cast<uint2*>(args.grad)[i] = {Two<T>::of(grad.x, grad.y), Two<T>::of(grad.z, grad.w)};
      reinterpret_cast<uint2*>(args.argmax)[i] = {argmax.x | argmax.y << 16, argmax.z | argmax.w << 16};
    }
  }
}

template <typename T>
int prepare(const Prepare& args, int processors, cudaStream_t stream) {
  prepare_kernel<T><<<kOperandBlocks + (args.count ? 3 * processors : 0), kPrepareThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

// The sum of a value over the block, in double and always in the same order. `room` [32].
__device__ __forceinline__ double block_sum(double value, double* room) {
  for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(kLanes, value, d);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < blockDim.x / 32; i++) sum += room[i];
  __syncthreads();
  return sum;
}

// The sum of parts, so many at a time for the latency of memory.
__device__ __forceinline__ float part_sum(const float* parts, int64_t stride, int count) {
  float sum = 0;
  int p = 0;
  const auto some = [&](auto ahead) {
    constexpr int kAhead = decltype(ahead)::value;
    for (; p + kAhead <= count; p += kAhead) {
      float v[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; i++) v[i] = parts[(p + i) * stride];
#pragma unroll
      for (int i = 0; i < kAhead; i++) sum += v[i];
    }
  };
  some(std::integral_constant<int, 32>{});
  some(std::integral_constant<int, 4>{});
  some(std::integral_constant<int, 1>{});
  return sum;
}

// Scratch is cut into pieces of 256 bytes; from a null pointer on it is only measured.
class Pieces {
 public:
  explicit Pieces(void* scratch) : scratch_(static_cast<char*>(scratch)) {}
  template <typename P>
  P* take(int64_t count) {
    char* const found = scratch_ ? scratch_ + bytes_ : nullptr;
    bytes_ += (count * static_cast<int64_t>(sizeof(P)) + 255) / 256 * 256;
    return reinterpret_cast<P*>(found);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* scratch_;
  int64_t bytes_ = 0;
};

template <typename Kernel, typename Args>
int launch_shared(Kernel kernel, const Args& args, int blocks, int threads, size_t shared,
                  cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  kernel<<<blocks, threads, shared, stream>>>(args);
  return cudaGetLastError();
}

// The sums of du [M, C], rows of 16 bits in two halves of channels. parts [processors, C, H], totals
// [processors, C]: scratch.
struct BackwardDenseSums {
  BackwardHidden hidden;
  const void *near, *center;
  BackwardOutSums sums;
  float* by_group;  // [B S, C / 2]: sums of the second half
  float *parts, *totals;
};
int backward_dense_sums(const BackwardSize& size, const BackwardDenseSums& args, cudaStream_t stream);

}  // namespace any2point
