// Warpgroup matrix products of sm_90a: d [64, N] += a [64, 16] b [N, 16]^T, a in registers, b in shared
// memory. Thread 4 g + t of warp w holds of d[4 j ..] the elements (16 w + g, 8 j + 2 t) and the next, and
// those of row 16 w + g + 8; of a the pairs k = 2 t of rows g and g + 8, then k = 8 + 2 t of both. So d
// rounded in pairs is the a of a next product. Products over rows (outer) have both operands in shared
// memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace any2point {

// b in shared memory: 32 k of all N rows make a block, a row takes 64 bytes of it, in the 64-byte swizzle,
// which repeats every 8 rows. A product takes half of a block's k, `at` that many bytes further on.
constexpr int kBlockBytes = 64;

__device__ __forceinline__ uint32_t swizzle(uint32_t offset) { return offset ^ (offset >> 3 & 0x30); }

__device__ __forceinline__ uint64_t descriptor(const char* at) {
  const uint64_t address = (static_cast<uint32_t>(__cvta_generic_to_shared(at)) & 0x3ffff) >> 4;
  return address | uint64_t{1} << 16 | uint64_t{8 * kBlockBytes >> 4} << 32 | uint64_t{2} << 62;
}

// An operand [k, 64 or N] of an outer product, rows of k in the same layout: blocks of 32 columns, `block`
// bytes each, a row takes 64 of them. A product takes 16 rows, the next ones begin 1024 bytes further on.
__device__ __forceinline__ uint64_t outer_descriptor(const char* at, int block) {
  const uint64_t address = (static_cast<uint32_t>(__cvta_generic_to_shared(at)) & 0x3ffff) >> 4;
  return address | static_cast<uint64_t>(block >> 4) << 16 | uint64_t{8 * kBlockBytes >> 4} << 32 |
         uint64_t{2} << 62;
}

// Registers written before are read by products after it.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending of the committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler may not move accesses of d across it: products write d at times that it does not know.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

template <int N, typename T>
__device__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b);
// d [64, N] += a [16, 64]^T b [16, N].
template <int N, typename T>
__device__ void wgmma_outer(float (&d)[N / 2], uint64_t a, uint64_t b);

#define A2P_D8(i)                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define A2P_D16(i) A2P_D8(i), A2P_D8(i + 8)
#define A2P_D32(i) A2P_D16(i), A2P_D16(i + 16)
#define A2P_WGMMA(N, T, type, registers, inputs, ...)                                                        \
  template <>                                                                                                \
  __device__ __forceinline__ void wgmma<N, T>(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" registers "}, " inputs \
                 ", 1, 1, 1, 0;"                                                                             \
                 : __VA_ARGS__                                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                      \
  }
#define A2P_WGMMA_OUTER(N, T, type, registers, inputs, ...)                                                  \
  template <>                                                                                                \
  __device__ __forceinline__ void wgmma_outer<N, T>(float (&d)[N / 2], uint64_t a, uint64_t b) {             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" registers "}, " inputs \
                 ", 1, 1, 1, 1, 1;"                                                                          \
                 : __VA_ARGS__                                                                               \
                 : "l"(a), "l"(b));                                                                          \
  }
#define A2P_WGMMA_BOTH(N, ...)             \
  A2P_WGMMA(N, __half, "f16", __VA_ARGS__) \
  A2P_WGMMA(N, __nv_bfloat16, "bf16", __VA_ARGS__)
#define A2P_OUTER_BOTH(N, ...)                   \
  A2P_WGMMA_OUTER(N, __half, "f16", __VA_ARGS__) \
  A2P_WGMMA_OUTER(N, __nv_bfloat16, "bf16", __VA_ARGS__)

// clang-format off
#define A2P_R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define A2P_R32 A2P_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define A2P_R48 A2P_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define A2P_R64 A2P_R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define A2P_R80 A2P_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define A2P_R96 A2P_R80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
A2P_WGMMA_BOTH(32, A2P_R16, "{%16, %17, %18, %19}, %20", A2P_D16(0))
A2P_WGMMA_BOTH(64, A2P_R32, "{%32, %33, %34, %35}, %36", A2P_D32(0))
A2P_WGMMA_BOTH(96, A2P_R48, "{%48, %49, %50, %51}, %52", A2P_D32(0), A2P_D16(32))
A2P_WGMMA_BOTH(192, A2P_R96, "{%96, %97, %98, %99}, %100", A2P_D32(0), A2P_D32(32), A2P_D32(64))
A2P_OUTER_BOTH(32, A2P_R16, "%16, %17", A2P_D16(0))
A2P_OUTER_BOTH(64, A2P_R32, "%32, %33", A2P_D32(0))
A2P_OUTER_BOTH(96, A2P_R48, "%48, %49", A2P_D32(0), A2P_D16(32))
A2P_OUTER_BOTH(192, A2P_R96, "%96, %97", A2P_D32(0), A2P_D32(32), A2P_D32(64))
// clang-format on

}  // namespace any2point
