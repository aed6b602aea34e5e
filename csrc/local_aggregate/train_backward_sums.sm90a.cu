// Sums of a unit's gradient over its rows, train_out_sums of train.h; times are in train_backward.h.
//
// Entries, one row of each group and channel, are too few for products: an entry adds its multiple of a row
// of h, which is in shared memory, to sums in registers. Dense rows are multiplied, as in
// train_backward_rows. That of du times the normalised product follows from the sum of du' h, whose columns
// it is a combination of.
#include "local_aggregate/train_backward.cuh"

namespace any2point {
namespace {

// A block per channel, a thread per hidden channel. parts [count, C, H], totals [count, C] of du.
__global__ void out_sums_kernel(const BackwardOutSums sums, const float* parts, const float* totals,
                                int count) {
  __shared__ double room[32];
  const int c = blockIdx.x, h = threadIdx.x, width = gridDim.x, hidden = blockDim.x;
  const float outer =
      part_sum(parts + static_cast<int64_t>(c) * hidden + h, static_cast<int64_t>(width) * hidden, count);
  sums.outer[c * hidden + h] = outer;
  double total = 0;
  for (int p = h; p < count; p += hidden) total += totals[p * width + c];
  total = block_sum(total, room);
  const double product = block_sum(static_cast<double>(sums.weight[c * hidden + h]) * outer, room);
  if (h == 0) {
    sums.grad[c] = static_cast<float>(total);
    const double shift = static_cast<double>(sums.bias[c]) - sums.mean[c];
    sums.grad_normed[c] = static_cast<float>((product + shift * total) * sums.deviation[c]);
  }
}

// The sums of entries.

constexpr int kSumThreads = 512;

// Columns of h that a block takes; 64 leave no lane idle.
template <int H>
constexpr int kSumColumns = H == 192 ? 64 : kColumns<H>;
// Rows that threads bring at the same time, each 16 bytes, and rows of a tile.
template <int kN>
constexpr int kBroughtRows = kSumThreads / (kN / 8);
template <int kN>
constexpr int kSumRows = 128 / kBroughtRows<kN> * kBroughtRows<kN>;

struct EntrySums {
  const void* before;  // [M, H]
  const float *scale, *shift;
  const float* grad;      // [groups, C]
  const int32_t* argmax;  // [groups, C]
  float* parts;           // [workers, C, H]
  float* totals;          // [workers, C]
  int64_t groups;
  int neighbors;
};

// Warps own channels, lanes eight columns of h: an entry adds its multiple of one row of h, which are in
// shared memory, to a sum in registers.
template <int C, int H, typename T>
__global__ void __launch_bounds__(kSumThreads, 1) entry_sums_kernel(const __grid_constant__ EntrySums args) {
  constexpr int kN = kSumColumns<H>, kSlices = H / kN, kChunks = kN / 8;
  constexpr int kEach = kBroughtRows<kN>, kRowsAtOnce = kSumRows<kN>, kLoads = kRowsAtOnce / kEach;
  constexpr int kLanesEach = kN / 8, kAtOnce = 32 / kLanesEach, kMine = C / 16 / kAtOnce;
  constexpr int kEntries = (C + kSumThreads - 1) / kSumThreads;
  extern __shared__ __align__(1024) char room[];
  char* const rows = room;                                                         // [2][kRowsAtOnce][kN]
  float2* const entries = reinterpret_cast<float2*>(room + 4 * kRowsAtOnce * kN);  // [2][C]
  float* const scale = reinterpret_cast<float*>(entries + 2 * C);                  // [kN]
  float* const shift = scale + kN;
  const int slice = blockIdx.x % kSlices, worker = blockIdx.x / kSlices, workers = gridDim.x / kSlices;
  for (int i = threadIdx.x; i < kN; i += blockDim.x) {
    scale[i] = args.scale[slice * kN + i];
    shift[i] = args.shift[slice * kN + i];
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int own = min(lane / kLanesEach, kAtOnce - 1), column = lane % kLanesEach * 8;
  const int64_t end = args.groups * (worker + 1) / workers;
  int64_t group = args.groups * worker / workers;
  int first = 0;  // row of the group where the tile begins

  const int chunk = threadIdx.x % kChunks, place = threadIdx.x / kChunks;  // of what it brings
  const Eight own_scale = eight(scale + chunk * 8), own_shift = eight(shift + chunk * 8);
  uint4 ahead[kLoads];
  float grad[kEntries];
  int argmax[kEntries];
  const auto load = [&]() {
    if (group >= end) return;
#pragma unroll
    for (int n = 0; n < kLoads; n++) {
      const int row = first + place + n * kEach;
      if (place < kEach && row < args.neighbors) {
        const int64_t at = (group * args.neighbors + row) * (H / 8) + slice * kChunks + chunk;
        ahead[n] = __ldcs(static_cast<const uint4*>(args.before) + at);
      }
    }
#pragma unroll
    for (int n = 0; n < kEntries; n++) {
      const int c = threadIdx.x + n * kSumThreads;
      if (c < C) {
        grad[n] = args.grad[group * C + c];
        argmax[n] = args.argmax[group * C + c];
      }
    }
  };

  float sums[kMine][8] = {}, total[kEntries] = {};
  load();
  for (int buffer = 0; group < end; buffer ^= 1) {
    const int from = first;
    char* const tile = rows + buffer * 2 * kRowsAtOnce * kN;
    float2* const here = entries + buffer * C;
#pragma unroll
    for (int n = 0; n < kLoads; n++) {
      const int row = place + n * kEach;
      if (place < kEach && first + row < args.neighbors) {
        reinterpret_cast<uint4*>(tile)[row * kChunks + chunk] = hidden_of<T>(ahead[n], own_scale, own_shift);
      }
    }
#pragma unroll
    for (int n = 0; n < kEntries; n++) {
      const int c = threadIdx.x + n * kSumThreads;
      if (c < C) {
        here[c] = {grad[n], __int_as_float(argmax[n])};
        if (from == 0) total[n] += grad[n];
      }
    }
    __syncthreads();
    first += kRowsAtOnce;
    if (first >= args.neighbors) {
      first = 0;
      group++;
    }
    load();
    const auto add = [&](int j, float grad, uint32_t row) {
      const Eight h = eight_of<T>(*reinterpret_cast<const uint4*>(tile + (row * kN + column) * 2));
#pragma unroll
      for (int i = 0; i < 8; i++) sums[j][i] = __fmaf_rn(grad, h.v[i], sums[j][i]);
    };
    const float2* const own_entries = here + warp * (C / 16) + own;
    const bool has_entries = lane < kLanesEach * kAtOnce;  // the others would only cost time
    if (has_entries && args.neighbors <= kRowsAtOnce) {
#pragma unroll
      for (int j = 0; j < kMine; j++) {
        const float2 entry = own_entries[j * kAtOnce];
        add(j, entry.x, __float_as_uint(entry.y));
      }
    } else if (has_entries) {
#pragma unroll
      for (int j = 0; j < kMine; j++) {
        const float2 entry = own_entries[j * kAtOnce];
        const uint32_t row = __float_as_uint(entry.y) - from;
        if (row < kRowsAtOnce) add(j, entry.x, row);
      }
    }
  }
  if (lane < kLanesEach * kAtOnce) {
    float* const to = args.parts + static_cast<int64_t>(worker) * C * H + slice * kN + column;
#pragma unroll
    for (int j = 0; j < kMine; j++) {
      const int c = warp * (C / 16) + j * kAtOnce + own;
      reinterpret_cast<float4*>(to + c * H)[0] = {sums[j][0], sums[j][1], sums[j][2], sums[j][3]};
      reinterpret_cast<float4*>(to + c * H)[1] = {sums[j][4], sums[j][5], sums[j][6], sums[j][7]};
    }
  }
  if (slice == 0) {
#pragma unroll
    for (int n = 0; n < kEntries; n++) {
      const int c = threadIdx.x + n * kSumThreads;
      if (c < C) args.totals[worker * C + c] = total[n];
    }
  }
}

template <int C, int H, typename T>
int entry_sums(const BackwardSize& size, const BackwardEntrySums& from, void* scratch, cudaStream_t stream) {
  constexpr int kN = kSumColumns<H>, kSlices = H / kN;
  const int workers = size.processors / kSlices;
  Pieces pieces(scratch);
  const EntrySums args{from.hidden.before,
                       from.hidden.scale,
                       from.hidden.shift,
                       from.entries.grad,
                       from.entries.argmax,
                       pieces.take<float>(int64_t{workers} * C * H),
                       pieces.take<float>(int64_t{workers} * C),
                       size.groups,
                       size.neighbors};
  const int error = launch_shared(entry_sums_kernel<C, H, T>, args, workers * kSlices, kSumThreads,
                                  4 * kSumRows<kN> * kN + 16 * C + 8 * kN, stream);
  if (error) return error;
  out_sums_kernel<<<C, H, 0, stream>>>(from.sums, args.parts, args.totals, workers);
  return cudaGetLastError();
}

template <typename T>
int entry_sums_of(const BackwardSize& size, const BackwardEntrySums& args, void* scratch,
                  cudaStream_t stream) {
  switch (size.width) {
    case 192:
      return entry_sums<192, 96, T>(size, args, scratch, stream);
    case 384:
      return entry_sums<384, 192, T>(size, args, scratch, stream);
    default:
      return entry_sums<768, 32, T>(size, args, scratch, stream);
  }
}

// The sums of dense rows.

struct DenseSums {
  const uint4* du;      // [M, C]
  const uint4* before;  // [M, H]
  const float *scale, *shift;
  float* parts;   // [workers, C, H]
  float* totals;  // [workers, C]
  int64_t rows;
};

template <int C, int H>
constexpr int kDenseBytes =
    3 * kOuterRows * C * 2 + 2 * kOuterRows * H * 2 + 2 * H / 32 * 16 * kTeams * 128 + 8 * H;

// Rows come two tiles ahead.
template <int C, int H, typename T>
__global__ void __launch_bounds__(kTeams * 128, 1) dense_sums_kernel(const __grid_constant__ DenseSums args) {
  static_assert(C == kSlice, "all channels at once");
  constexpr int kX = kOuterRows * C * 2, kY = kOuterRows * H * 2, kThreads = kTeams * 128;
  constexpr int kSlot = 16 * kThreads;
  extern __shared__ __align__(1024) char room[];
  char* const y = room + 3 * kX;
  char* const slots = y + 2 * kY;
  float* const scale = reinterpret_cast<float*>(slots + 2 * H / 32 * kSlot);
  float* const shift = scale + H;
  for (int i = threadIdx.x; i < H; i += blockDim.x) {
    scale[i] = args.scale[i];
    shift[i] = args.shift[i];
  }
  __syncthreads();
  const int t = threadIdx.x % 4, in_tile = threadIdx.x / 4;
  const int64_t tiles = (args.rows + kOuterRows - 1) / kOuterRows;
  const uint32_t slot = shared_address(slots) + threadIdx.x * 16;
  const uint32_t own = shared_address(room) + swizzle(in_tile * kBlockBytes + t * 16);
  const auto fetch = [&](int64_t tile, int number) {
    if (tile < tiles) {
      const int64_t row = tile * kOuterRows + in_tile, real = min(row, args.rows - 1);
      const uint32_t to = own + number % 3 * kX;
#pragma unroll
      for (int b = 0; b < C / 32; b++) {  // of no bytes: zeros
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + b * kOuterRows * kBlockBytes),
                     "l"(args.du + real * (C / 8) + 4 * b + t), "r"(row < args.rows ? 16 : 0)
                     : "memory");
      }
#pragma unroll
      for (int b = 0; b < H / 32; b++) {
        copy_async(slot + (number % 2 * (H / 32) + b) * kSlot, args.before + real * (H / 8) + 4 * b + t);
      }
    }
    copy_commit();
  };

  float sums[H / 2] = {}, total[C / 4] = {};
  fetch(blockIdx.x, 0);
  fetch(blockIdx.x + gridDim.x, 1);
  int number = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, number++) {
    copy_wait<1>();
    char* const to_y = y + number % 2 * kY;
#pragma unroll
    for (int b = 0; b < H / 32; b++) {
      const uint4 v = load_shared(slot + (number % 2 * (H / 32) + b) * kSlot);
      const Eight f = eight(scale + 32 * b + 8 * t), s = eight(shift + 32 * b + 8 * t);
      put<kOuterRows>(to_y, 4 * b + t, in_tile, hidden_of<T>(v, f, s));
    }
#pragma unroll
    for (int b = 0; b < C / 32; b++) {
      const Eight v = eight_of<T>(load_shared(own + number % 3 * kX + b * kOuterRows * kBlockBytes));
#pragma unroll
      for (int j = 0; j < 8; j++) total[8 * b + j] += v.v[j];
    }
    wgmma_wait<0>();
    pin(sums);
    publish();
    outer_product<kOuterRows, H, T>(sums, room + number % 3 * kX, to_y);
    fetch(tile + 2 * gridDim.x, number + 2);
  }
  wgmma_wait<0>();
  pin(sums);
  copy_wait<0>();
  __syncthreads();
  store_sums<H>(sums, args.parts + static_cast<int64_t>(blockIdx.x) * C * H);
  float* const room_sums = reinterpret_cast<float*>(room);  // [warps][C]
#pragma unroll
  for (int j = 0; j < C / 4; j++) {
    float v = total[j];
    for (int e = 4; e < 32; e *= 2) v += __shfl_xor_sync(kLanes, v, e);
    if (threadIdx.x % 32 < 4) room_sums[threadIdx.x / 32 * C + j / 8 * 32 + 8 * t + j % 8] = v;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < C; i += blockDim.x) {
    float v = 0;
    for (int w = 0; w < kThreads / 32; w++) v += room_sums[w * C + i];
    args.totals[blockIdx.x * C + i] = v;
  }
}

template <typename T>
int dense_sums(const BackwardSize& size, const BackwardDenseSums& from, cudaStream_t stream) {
  constexpr int C = 192, H = 96;
  const DenseSums args{static_cast<const uint4*>(from.du),
                       static_cast<const uint4*>(from.hidden.before),
                       from.hidden.scale,
                       from.hidden.shift,
                       from.parts,
                       from.totals,
                       size.groups * size.neighbors};
  const int error = launch_shared(dense_sums_kernel<C, H, T>, args, size.processors, kTeams * 128,
                                  kDenseBytes<C, H>, stream);
  if (error) return error;
  out_sums_kernel<<<C, H, 0, stream>>>(from.sums, from.parts, from.totals, size.processors);
  return cudaGetLastError();
}

}  // namespace

int64_t backward_entry_sums_scratch(const BackwardSize& size) {
  return (int64_t{size.processors} * size.width * (size.hidden + 1)) * 4 + 512;
}

int backward_entry_sums(const BackwardSize& size, const BackwardEntrySums& args, void* scratch,
                        void* stream) {
  return (size.bfloat16 ? entry_sums_of<__nv_bfloat16>
                        : entry_sums_of<__half>)(size, args, scratch, static_cast<cudaStream_t>(stream));
}

int backward_dense_sums(const BackwardSize& size, const BackwardDenseSums& args, cudaStream_t stream) {
  return size.bfloat16 ? dense_sums<__nv_bfloat16>(size, args, stream)
                       : dense_sums<__half>(size, args, stream);
}

}  // namespace any2point
