// The Gram matrix of a hidden layer h = ReLU(scale y1 + shift) [M, H] on sm_90a, and its sum. A block of
// three teams turns tiles of rows into both operands of products over rows, in shared memory, while the
// products of the tile before run. Rows of y1 come by asynchronous copies, some tiles ahead; what a thread
// copies only it reads.
//
// H200: 94 us for 1.3 M rows of 96, 99 us for 0.66 M of 192, of which reading them takes 60 each; schedulers
// issue in half of the cycles.
#include "local_aggregate/hopper_rows.cuh"
#include "local_aggregate/hopper_train.h"

namespace any2point {
namespace {

constexpr int kTeams = 3;
constexpr int kThreads = 128 * kTeams;
constexpr int kAhead = 4;  // tiles

template <int H>
struct GramShape {
  static constexpr int kFold = H < 64 ? 64 / H : 1;     // rows that stand beside each other
  static constexpr int kWide = H * kFold;               // columns of an operand
  static constexpr bool kByRows = kWide < 64 * kTeams;  // teams share the rows of a tile, or the columns
  static constexpr int kLines = kByRows ? 96 : 64;      // of an operand
  static constexpr int kRowsTile = kLines * kFold;
  static constexpr int kChunks = kLines * kWide / 8 / kThreads;  // of 16 bytes, per thread
  static constexpr int kBlock = kLines * kBlockBytes;
  static constexpr int kBuffer = kWide / 32 * kBlock;
  static constexpr int kUpper = kByRows ? (kWide + 63) / 64 : 1;  // products of 64 rows of the result
  static constexpr int kSteps = kLines / 16 / (kByRows ? kTeams : 1);
  static constexpr int kPartsBlock = kByRows ? kTeams * kFold : 1;
};

template <int H, typename T>
__global__ void __launch_bounds__(kThreads, 1) gram_kernel(const HopperGram args) {
  using Shape = GramShape<H>;
  extern __shared__ __align__(1024) char room[];
  constexpr int kColumns = H / 8;
  static_assert(kThreads % kColumns == 0, "a thread keeps its columns");
  const int column = threadIdx.x % kColumns, team = threadIdx.x / 128;
  float scale[8], shift[8], sum[8] = {};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    scale[i] = args.scale[8 * column + i];
    shift[i] = args.shift[8 * column + i];
  }
  const int64_t tiles = divided(args.rows, Shape::kRowsTile);
  const uint32_t copies =
      static_cast<uint32_t>(__cvta_generic_to_shared(room)) + 2 * Shape::kBuffer + threadIdx.x * 16;
  const auto place = [&](int j) { return static_cast<int>(threadIdx.x + kThreads * j) / kColumns; };
  const auto bring = [&](int64_t tile, int slot) {
#pragma unroll
    for (int j = 0; j < Shape::kChunks; j++) {
      const int64_t row = tile * Shape::kRowsTile + place(j);
      const bool used = row < args.rows;
      const uint4* from = static_cast<const uint4*>(args.before) + (used ? row : 0) * kColumns + column;
      const uint32_t to = copies + slot * Shape::kBuffer + j * kThreads * 16;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(used ? 16 : 0));
    }
    asm volatile("cp.async.commit_group;");
  };

  float d[Shape::kUpper][Shape::kWide / 2];
#pragma unroll
  for (auto& upper : d) {
#pragma unroll
    for (float& each : upper) each = 0;
  }
  for (int i = 0; i < kAhead; i++) bring(blockIdx.x + i * int64_t{gridDim.x}, i);
  int turn = 0, slot = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, turn ^= 1) {
    char* const buffer = room + turn * Shape::kBuffer;
    asm volatile("cp.async.wait_group %0;" ::"n"(kAhead - 1) : "memory");
#pragma unroll
    for (int j = 0; j < Shape::kChunks; j++) {
      const bool used = tile * Shape::kRowsTile + place(j) < args.rows;
      uint32_t pairs[4];
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                   : "r"(copies + slot * Shape::kBuffer + j * kThreads * 16)
                   : "memory");
      uint32_t h[4];
#pragma unroll
      for (int q = 0; q < 4; q++) {
        h[q] = hidden_pair<T>(pairs[q], {scale[2 * q], scale[2 * q + 1]}, {shift[2 * q], shift[2 * q + 1]});
        if (!used) h[q] = 0;
        const float2 v = Two<T>::floats(h[q]);
        sum[2 * q] += v.x;
        sum[2 * q + 1] += v.y;
      }
      const int wide = place(j) / Shape::kLines * H + 8 * column, line = place(j) % Shape::kLines;
      const uint32_t at = wide / 32 * Shape::kBlock + swizzle(line * kBlockBytes + wide % 32 * 2);
      *reinterpret_cast<uint4*>(buffer + at) = {h[0], h[1], h[2], h[3]};
    }
    bring(tile + kAhead * int64_t{gridDim.x}, slot);
    slot = slot + 1 == kAhead ? 0 : slot + 1;
    wgmma_wait<0>();  // products that read the other buffer
    publish();
#pragma unroll
    for (auto& upper : d) pin(upper);
    wgmma_fence();
    const int first = Shape::kByRows ? team * Shape::kSteps : 0;
    const uint64_t b = outer_descriptor(buffer, Shape::kBlock) + first * (16 * kBlockBytes / 16);
#pragma unroll
    for (int s = 0; s < Shape::kSteps; s++) {
#pragma unroll
      for (int u = 0; u < Shape::kUpper; u++) {
        // The last product of several ends with the last column.
        const int block = Shape::kByRows ? min(2 * u, Shape::kWide / 32 - 2) : 2 * team;
        wgmma_outer<Shape::kWide, T>(d[u], b + (block * Shape::kBlock + s * 16 * kBlockBytes) / 16,
                                     b + s * 16 * kBlockBytes / 16);
      }
    }
    wgmma_commit();
  }
  wgmma_wait<0>();
#pragma unroll
  for (auto& upper : d) pin(upper);

  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int u = 0; u < Shape::kUpper; u++) {
    const int top = Shape::kByRows ? min(64 * u, Shape::kWide - 64) : 64 * team;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = top + threadIdx.x % 128 / 32 * 16 + lane / 4 + 8 * i, fold = row / H;
      if (row < 64 * u) continue;  // written by the product before
      const int64_t part =
          Shape::kByRows ? (int64_t{blockIdx.x} * kTeams + team) * Shape::kFold + fold : blockIdx.x;
      float* to = args.gram + (part * H + row % H) * H;
#pragma unroll
      for (int j = 0; j < Shape::kWide / 8; j++) {
        const int at = 8 * j + lane % 4 * 2;
        if (at / H == fold) {
          *reinterpret_cast<float2*>(to + at % H) = {d[u][4 * j + 2 * i], d[u][4 * j + 2 * i + 1]};
        }
      }
    }
  }
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(room);
#pragma unroll
  for (int i = 0; i < 8; i++) sums[threadIdx.x * 8 + i] = sum[i];
  __syncthreads();
  if (threadIdx.x < H) {
    float total = 0;
    for (int i = threadIdx.x / 8; i < kThreads; i += kColumns) total += sums[i * 8 + threadIdx.x % 8];
    args.sum[int64_t{blockIdx.x} * H + threadIdx.x] = total;
  }
}

template <int H, typename T>
int launch(const HopperGram& args, int64_t blocks, cudaStream_t stream) {
  const int bytes = (2 + kAhead) * GramShape<H>::kBuffer;
  const cudaError_t error =
      cudaFuncSetAttribute(gram_kernel<H, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  gram_kernel<H, T><<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(args);
  return cudaGetLastError();
}

template <int H>
int gram_of(const HopperGram& args, int64_t blocks, cudaStream_t stream) {
  return args.bfloat16 ? launch<H, __nv_bfloat16>(args, blocks, stream)
                       : launch<H, __half>(args, blocks, stream);
}

}  // namespace

HopperGramParts hopper_gram_parts(int64_t rows, int64_t hidden, int processors) {
  const int64_t tile = hidden == 192  ? GramShape<192>::kRowsTile
                       : hidden == 96 ? GramShape<96>::kRowsTile
                                      : GramShape<32>::kRowsTile;
  const int64_t each = hidden == 192  ? GramShape<192>::kPartsBlock
                       : hidden == 96 ? GramShape<96>::kPartsBlock
                                      : GramShape<32>::kPartsBlock;
  const int64_t blocks = std::min<int64_t>(processors, divided(rows, tile));
  return {blocks * each, blocks};
}

int hopper_gram(const HopperGram& args, int64_t hidden, int processors, void* stream_) {
  if (args.rows == 0) return 0;
  const int64_t blocks = hopper_gram_parts(args.rows, hidden, processors).sum;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  switch (hidden) {
    case 192:
      return gram_of<192>(args, blocks, stream);
    case 96:
      return gram_of<96>(args, blocks, stream);
    default:
      return gram_of<32>(args, blocks, stream);
  }
}

}  // namespace any2point
