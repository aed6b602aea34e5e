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
  const uint4 *near, *center;  // du [M, C] in two halves of channels
  const uint4* before;         // [M, H]
  const float *scale, *shift;
  float* by_group;  // [groups, C / 2]
  float* parts;     // [workers, C, H]
  float* totals;    // [workers, C]
  int64_t groups;
  int neighbors;
};

template <int C, int H>
constexpr int kDenseBytes =
    3 * kOuterRows * C * 2 + 2 * kOuterRows * H * 2 + 2 * H / 32 * 16 * kTeams * 128 + 8 * H;

// A block has whole groups. Rows come two tiles ahead. A warp adds up eight channels of each half, by
// products with ones.
template <int C, int H, typename T>
__global__ void __launch_bounds__(kTeams * 128, 1) dense_sums_kernel(const __grid_constant__ DenseSums args) {
  static_assert(C == kSlice, "all channels at once");
  static_assert(C / 16 == 4 * kTeams, "a warp's channels");
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
  const int t = threadIdx.x % 4, in_tile = threadIdx.x / 4, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = static_cast<int>(args.groups * blockIdx.x / gridDim.x);
  const int begin = first * args.neighbors;  // rows are fewer than 2^31
  const int end = static_cast<int>(args.groups * (blockIdx.x + 1) / gridDim.x) * args.neighbors;
  const int tiles = (end - begin + kOuterRows - 1) / kOuterRows;
  const uint32_t slot = shared_address(slots) + threadIdx.x * 16;
  const uint32_t own = shared_address(room) + swizzle(in_tile * kBlockBytes + t * 16);
  const auto fetch = [&](int tile) {
    if (tile < tiles) {
      const int row = begin + tile * kOuterRows + in_tile;
      const int64_t real = min(row, end - 1);
      const uint32_t to = own + tile % 3 * kX;
#pragma unroll
      for (int b = 0; b < C / 32; b++) {  // of no bytes: zeros
        const uint4* half = b < C / 64 ? args.near + 4 * b : args.center + 4 * b - C / 16;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + b * kOuterRows * kBlockBytes),
                     "l"(half + real * (C / 16) + t), "r"(row < end ? 16 : 0)
                     : "memory");
      }
#pragma unroll
      for (int b = 0; b < H / 32; b++) {
        copy_async(slot + (tile % 2 * (H / 32) + b) * kSlot, args.before + real * (H / 8) + 4 * b + t);
      }
    }
    copy_commit();
  };

  // Makes h of a tile an operand.
  const auto build = [&](int tile) {
    copy_wait<1>();
#pragma unroll
    for (int b = 0; b < H / 32; b++) {
      const uint4 v = load_shared(slot + (tile % 2 * (H / 32) + b) * kSlot);
      const Eight f = eight(scale + 32 * b + 8 * t), s = eight(shift + 32 * b + 8 * t);
      put<kOuterRows>(y + tile % 2 * kY, 4 * b + t, in_tile, hidden_of<T>(v, f, s));
    }
  };

  constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3c003c00 : 0x3f803f80;
  const bool few = args.neighbors < kFewestNeighbors;
  float sums[H / 2] = {}, near_total[4] = {}, center_total[4] = {};
  GroupSums group_sums{first, args.neighbors};
  fetch(0);
  fetch(1);
  if (tiles > 0) build(0);
  for (int tile = 0; tile < tiles; tile++) {
    publish();
    const char* const x = room + tile % 3 * kX;
    fetch(tile + 2);
    pin(sums);
    outer_product<kOuterRows, H, T>(sums, x, y + tile % 2 * kY);
#pragma unroll
    for (int n = 0; n < kOuterRows / 32; n++) {
      uint32_t near[4], center[4];
      load_across<kOuterRows>(x, warp, n, near);
      load_across<kOuterRows>(x, C / 16 + warp, n, center);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        small_product<T>(near_total, kOnes, kOnes, near[i], near[i + 1]);
        small_product<T>(center_total, kOnes, kOnes, center[i], center[i + 1]);
      }
    }
    if (!few) {
      const int rows = min(end - begin - tile * kOuterRows, kOuterRows);
      group_sums.add<kOuterRows, T>(
          x, C / 16 + warp, rows, args.neighbors, [&](int64_t group, int channel, float2 sum) {
            *reinterpret_cast<float2*>(args.by_group + group * (C / 2) + warp * 8 + channel) = sum;
          });
    }
    build(tile + 1);
    wgmma_wait<0>();
    pin(sums);
  }
  copy_wait<0>();
  store_sums<H>(sums, args.parts + static_cast<int64_t>(blockIdx.x) * C * H, warp);
  if (lane < 4) {
    float* const to = args.totals + blockIdx.x * C + warp * 8 + lane * 2;
    *reinterpret_cast<float2*>(to) = {near_total[0], near_total[1]};
    *reinterpret_cast<float2*>(to + C / 2) = {center_total[0], center_total[1]};
  }
}

// Sums of groups of few rows; a thread has two channels of one.
template <typename T>
__global__ void few_rows_kernel(const uint32_t* rows, int64_t pairs, int neighbors, int half, float2* to) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= pairs) return;
  const uint32_t* from = rows + i / half * neighbors * half + i % half;
  float2 sum = {0, 0};
  for (int k = 0; k < neighbors; k++) {
    const float2 v = Two<T>::floats(from[k * half]);
    sum = {sum.x + v.x, sum.y + v.y};
  }
  to[i] = sum;
}

template <typename T>
int dense_sums(const BackwardSize& size, const BackwardDenseSums& from, cudaStream_t stream) {
  constexpr int C = 192, H = 96;
  const DenseSums args{static_cast<const uint4*>(from.near),
                       static_cast<const uint4*>(from.center),
                       static_cast<const uint4*>(from.hidden.before),
                       from.hidden.scale,
                       from.hidden.shift,
                       from.by_group,
                       from.parts,
                       from.totals,
                       size.groups,
                       size.neighbors};
  const int error = launch_shared(dense_sums_kernel<C, H, T>, args, size.processors, kTeams * 128,
                                  kDenseBytes<C, H>, stream);
  if (error) return error;
  if (size.neighbors < kFewestNeighbors) {
    const int64_t pairs = size.groups * (C / 4);
    few_rows_kernel<T><<<static_cast<unsigned>(divided(pairs, 256)), 256, 0, stream>>>(
        static_cast<const uint32_t*>(from.center), pairs, size.neighbors, C / 4,
        reinterpret_cast<float2*>(from.by_group));
  }
  out_sums_kernel<<<C, H, 0, stream>>>(from.sums, from.parts, from.totals, size.processors);
  return cudaGetLastError();
}

}  // namespace

int64_t backward_entry_sums_scratch(const BackwardSize& size) {
  const int slices = size.hidden == 192 ? 192 / kSumColumns<192> : 1;
  return (int64_t{size.processors / slices} * size.width * (size.hidden + 1)) * 4 + 512;
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
