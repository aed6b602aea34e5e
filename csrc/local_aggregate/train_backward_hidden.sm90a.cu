// The gradient of the hidden layer, train_hidden_grad of train.h; times in train_backward.h.
//
// A team of four warps has 64 rows at a time and up to 96 columns: dz' = du weight' + h q', both products in
// one sum. Rows of du and of h are operands in registers, 16 rows a warp; the weights stay in shared memory.
// Below the maximum the rows of du are made of entries, 8 channels of a row by two instructions for each
// pair: a number where the row is its channel's argmax, otherwise 0. Teams wait for nobody but themselves.
#include "local_aggregate/train_backward_rows.cuh"

namespace any2point {
namespace {

// The gradient of the hidden layer.

// The lowest number, in place of y where h is 0.
constexpr uint32_t kMark = 0xfbfffbffu;
__device__ __forceinline__ uint4 marked(const uint4& h, const uint4& y) {
  const auto each = [](uint32_t h, uint32_t y) {
    const uint32_t some = __hneu2_mask(*reinterpret_cast<const __half2*>(&h), __half2{});
    return (y & some) | (kMark & ~some);
  };
  return {each(h.x, y.x), each(h.y, y.y), each(h.z, y.z), each(h.w, y.w)};
}
__device__ __forceinline__ uint4 where_unmarked(const uint4& y, const uint4& value) {
  const auto each = [](uint32_t y, uint32_t value) {
    const uint32_t mark = kMark;
    const __half2 a = *reinterpret_cast<const __half2*>(&y), b = *reinterpret_cast<const __half2*>(&mark);
    return value & __hneu2_mask(a, b);
  };
  return {each(y.x, value.x), each(y.y, value.y), each(y.z, value.z), each(y.w, value.w)};
}

struct HiddenGrad {
  const uint4* before;         // [M, H]
  const uint4* grad;           // [groups, C], 16 bits
  const uint4* argmax;         // [groups, C], 16 bits
  const uint4* near;           // [M, C / 2]: dense rows in two halves of channels
  const uint4* center;         // [M, C / 2]
  const void* weight;          // operand [C -> H], in parts of kColumns
  const void* q;               // operand [H -> H], the same
  const float* operand_scale;  // [2]
  const float *scale, *shift, *constant;
  uint4* dz;    // [M, H]
  float* sums;  // [workers, 2, H]: of dz and of dz y1
  InnerNorm norm;
  int64_t rows;
  int64_t groups;
  int neighbors;
};

// Where registers suffice for another.
template <int H>
constexpr int kHiddenTeams = H == 32 ? kTeams + 1 : kTeams;

// Entries of two groups; with so many neighbours no tile has rows of more.
template <int C>
constexpr int kEntryBytes = 2 * 2 * C * 2;
constexpr int kTwoGroups = kTeamRows - 1;

template <BackwardGiven kGiven>
constexpr bool kHasEntries = kGiven == BackwardGiven::entries || kGiven == BackwardGiven::dy1;
// Bytes of a team's rows of du, or of what it makes them of.
template <int C, int H, BackwardGiven kGiven>
constexpr int kGivenBytes =
    kHasEntries<kGiven> ? 2 * kEntryBytes<C> : (kGiven == BackwardGiven::dense ? C : H) / 16 * 2048;

template <int C, int H, BackwardGiven kGiven>
constexpr int kHiddenGradBytes =
    (C + H) * kColumns<H> * 2 + (2 * H + 5 * kColumns<H>)*4 + (kGiven == BackwardGiven::dy1 ? 12 * H : 0) +
    kHiddenTeams<H> * (H / 16 * 2048 + kGivenBytes<C, H, kGiven>);

// A team has 64 rows at a time and kColumns of their gradient. Rows of the gradient du are operands as they
// are, or made of entries in registers: a number where the row is its channel's argmax, otherwise 0.
template <int C, int H, BackwardGiven kGiven, typename T>
__global__ void __launch_bounds__(kHiddenTeams<H> * 128, 1)
    hidden_grad_kernel(const __grid_constant__ HiddenGrad args) {
  constexpr int kN = kColumns<H>, kSlices = H / kN;
  constexpr bool kDense = kGiven == BackwardGiven::dense, kAdded = kGiven == BackwardGiven::added;
  constexpr bool kEntries = kHasEntries<kGiven>, kNormed = kGiven == BackwardGiven::dy1;
  static_assert(kSlices == 1 || kGiven == BackwardGiven::entries, "all columns at once");
  extern __shared__ __align__(1024) char room[];
  char* const weight = room;
  char* const q = weight + C * kN * 2;
  float* const scale = reinterpret_cast<float*>(q + H * kN * 2);  // [H]
  float* const shift = scale + H;
  float* const constant = shift + H;  // [kN]
  float* const norm = constant + kN;  // [3, H] of dy1
  char* const slots = reinterpret_cast<char*>(norm + (kNormed ? 3 * H : 0));
  const int slice = blockIdx.x % kSlices, worker = blockIdx.x / kSlices, workers = gridDim.x / kSlices;
  if (!kAdded) copy_operand(static_cast<const char*>(args.weight) + slice * C * kN * 2, C * kN * 2, weight);
  if (kNormed) load_norm<H>(args.norm, norm);
  copy_operand(static_cast<const char*>(args.q) + slice * H * kN * 2, H * kN * 2, q);
  for (int i = threadIdx.x; i < H; i += blockDim.x) {
    scale[i] = args.scale[i];
    shift[i] = args.shift[i];
  }
  for (int i = threadIdx.x; i < kN; i += blockDim.x) {
    constant[i] = args.constant[slice * kN + i] * args.operand_scale[0];
  }
  const float unscale = args.operand_scale[1];
  publish();

  const int t = threadIdx.x % 4, lane = threadIdx.x % 32;
  const int place = threadIdx.x % 128 / 32 * 16 + lane / 4;  // of the first of a thread's two rows
  const uint32_t slot = shared_address(slots) + threadIdx.x / 128 * (H / 16 * 2048) + threadIdx.x % 128 * 16;
  char* const behind = slots + kHiddenTeams<H> * (H / 16 * 2048);
  const uint32_t dense_slot =
      shared_address(behind) + threadIdx.x / 128 * kGivenBytes<C, H, kGiven> + threadIdx.x % 128 * 16;
  char* const entry_slots = behind + threadIdx.x / 128 * 2 * kEntryBytes<C>;  // [2][gradient, argmax][2][C]
  const bool few = args.neighbors < kTwoGroups;
  const int64_t tiles = (args.rows + kTeamRows - 1) / kTeamRows;
  const auto row_at = [&](int64_t tile, int i) {
    return min(tile * kTeamRows + place + 8 * i, args.rows - 1);
  };
  const auto fetch_hidden = [&](int64_t tile) {
    if (tile < tiles) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint4* from = args.before + row_at(tile, i) * (H / 8) + t;
#pragma unroll
        for (int b = 0; b < H / 32; b++) copy_async(slot + (2 * b + i) * 2048, from + 4 * b);
      }
    }
    copy_commit();
  };
  const auto fetch_dense = [&](int64_t tile) {
    if (kAdded && tile < tiles) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint4* from = args.dz + row_at(tile, i) * (H / 8) + t;
#pragma unroll
        for (int b = 0; b < H / 32; b++) copy_async(dense_slot + (2 * b + i) * 2048, from + 4 * b);
      }
    }
    if (kDense && tile < tiles) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int64_t from = row_at(tile, i) * (C / 16) + t;
#pragma unroll
        for (int b = 0; b < C / 32; b++) {
          const uint4* half = b < C / 64 ? args.near + 4 * b : args.center + 4 * b - C / 16;
          copy_async(dense_slot + (2 * b + i) * 2048, half + from);
        }
      }
    }
    copy_commit();
  };

  const auto fetch_entries = [&](int64_t tile, int number) {
    if (tile < tiles && !few) {
      const uint32_t first = static_cast<uint32_t>(tile * kTeamRows) / args.neighbors;
      for (int i = threadIdx.x % 128; i < kEntryBytes<C> / 16; i += 128) {
        const int64_t group = min(static_cast<int64_t>(first) + i / (C / 8) % 2, args.groups - 1);
        const uint4* from = i < C / 4 ? args.grad : args.argmax;
        copy_async(shared_address(entry_slots) + number % 2 * kEntryBytes<C> + i * 16,
                   from + group * (C / 8) + i % (C / 8));
      }
    }
    copy_commit();
  };

  float total[kN / 4] = {}, product[kN / 4] = {};
  int64_t tile = static_cast<int64_t>(worker) * kHiddenTeams<H> + threadIdx.x / 128;
  const int64_t step = static_cast<int64_t>(workers) * kHiddenTeams<H>;
  if (kEntries) {
    fetch_entries(tile, 0);
  } else {
    fetch_dense(tile);
  }
  fetch_hidden(tile);
  for (int number = 0; tile < tiles; tile += step, number++) {
    copy_wait<1>();
    const uint4 *grad[2], *argmax[2];
    uint32_t at[2];
    bool other = false;  // group, of the second row
    if (kEntries) {
      team_barrier();
      const uint32_t first = static_cast<uint32_t>(tile * kTeamRows) / args.neighbors;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t row = static_cast<uint32_t>(row_at(tile, i)), group = row / args.neighbors;
        at[i] = (row - group * args.neighbors) * 0x10001u;
        if (few) {
          grad[i] = args.grad + static_cast<int64_t>(group) * (C / 8) + t;
          argmax[i] = args.argmax + static_cast<int64_t>(group) * (C / 8) + t;
        } else {
          grad[i] = reinterpret_cast<const uint4*>(entry_slots + number % 2 * kEntryBytes<C>) +
                    (group - first) * (C / 8) + t;
          argmax[i] = grad[i] + C / 4;
        }
      }
    }
    if (kEntries) other = grad[0] != grad[1];
    uint4 next[2][2];
    const auto load = [&](int b) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (!kEntries) {
          next[i][0] = load_shared(dense_slot + (2 * b + i) * 2048);
        } else if (i == 0) {
          next[0][0] = grad[0][4 * b];
          next[0][1] = argmax[0][4 * b];
        } else {
          load_if(other, grad[1] + 4 * b, next[0][0], next[1][0]);
          load_if(other, argmax[1] + 4 * b, next[0][1], next[1][1]);
        }
      }
    };
    if (!kAdded) load(0);
    uint4 addend[kN / 32][2];
    if (kAdded) {
#pragma unroll
      for (int b = 0; b < kN / 32; b++) {
#pragma unroll
        for (int i = 0; i < 2; i++) addend[b][i] = load_shared(dense_slot + (2 * b + i) * 2048);
      }
    }
    float d[kN / 2];
#pragma unroll
    for (int b = 0; b < kN / 32; b++) {
      const Eight c = eight(constant + 32 * b + 8 * t);
#pragma unroll
      for (int j = 0; j < 16; j++) d[16 * b + j] = c.v[j / 4 * 2 + j % 2];
    }
    uint32_t a[2][2][4];
    pin(d);
#pragma unroll
    for (int b = 0; b < (kAdded ? 0 : C / 32); b++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint4 v = kDense ? next[i][0] : entries_at(next[i][0], next[i][1], at[i]);
        set_operands(v, i, a[b % 2]);
      }
      if (b + 1 < C / 32) load(b + 1);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 2; k++) {
        wgmma<kN, T>(d, a[b % 2][k], descriptor(weight + b * kN * kBlockBytes + k * 32));
      }
      wgmma_commit();
      wgmma_wait<1>();
    }
    copy_wait<0>();
    if (kEntries) {
      fetch_entries(tile + step, number + 1);
    } else {
      fetch_dense(tile + step);
    }
    uint4 before[kN / 32][2];  // of this block's columns
#pragma unroll
    for (int n = 0; n < H / 32; n++) {
      const int block = (slice ^ n / (kN / 32)) * (kN / 32) + n % (kN / 32);  // its own columns first
      const Eight f = eight(scale + 32 * block + 8 * t), s = eight(shift + 32 * block + 8 * t);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint4 y = load_shared(slot + (2 * block + i) * 2048), h = hidden_of<T>(y, f, s);
        set_operands(h, i, a[n % 2]);
        if (n < kN / 32) before[n][i] = kNormed ? y : marked(h, y);
      }
      if (n + 1 == H / 32) fetch_hidden(tile + step);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 2; k++) {
        wgmma<kN, T>(d, a[n % 2][k], descriptor(q + block * kN * kBlockBytes + k * 32));
      }
      wgmma_commit();
      if (n + 1 < H / 32) wgmma_wait<1>();
    }
    wgmma_wait<0>();
    pin(d);

#pragma unroll
    for (int b = 0; b < kN / 32; b++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int64_t row = tile * kTeamRows + place + 8 * i;
        Eight grad;
#pragma unroll
        for (int j = 0; j < 8; j++) grad.v[j] = d[16 * b + j / 2 * 4 + 2 * i + j % 2] * unscale;
        uint4* const to = args.dz + row * (H / 8) + slice * (kN / 8) + 4 * b + t;
        if constexpr (kNormed) {
          const int c = 32 * b + 8 * t;
          const uint4 h = hidden_of<T>(before[b][i], eight(scale + c), eight(shift + c));
          const uint4 dz = where_positive(h, rounded<T>(grad));
          if (row < args.rows) __stcs(to, normed_grad<T>(dz, before[b][i], line_of<H>(norm, c)));
          continue;
        }
        if (kAdded) {
          const Eight other = eight_of<T>(addend[b][i]);
#pragma unroll
          for (int j = 0; j < 8; j++) grad.v[j] += other.v[j];
        }
        uint4 out = where_unmarked(before[b][i], rounded<T>(grad));
        if (row < args.rows) {
          if (args.dz) __stcs(to, out);
        } else {
          out = {0, 0, 0, 0};
        }
        grad = eight_of<T>(out);
        const Eight y = eight_of<T>(before[b][i]);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          total[8 * b + j] += grad.v[j];
          product[8 * b + j] = __fmaf_rn(grad.v[j], y.v[j], product[8 * b + j]);
        }
      }
    }
  }
  copy_wait<0>();
  if (kNormed) return;
  __syncthreads();
  float* const room_sums = reinterpret_cast<float*>(slots);  // [warps][2][kN]
#pragma unroll
  for (int j = 0; j < kN / 4; j++) {
#pragma unroll
    for (int each = 0; each < 2; each++) {
      float v = each ? product[j] : total[j];
      for (int x = 4; x < 32; x *= 2) v += __shfl_xor_sync(kLanes, v, x);
      if (lane < 4) room_sums[(threadIdx.x / 32 * 2 + each) * kN + j / 8 * 32 + 8 * t + j % 8] = v;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * kN; i += blockDim.x) {
    float v = 0;
    for (int w = 0; w < 4 * kHiddenTeams<H>; w++) v += room_sums[w * 2 * kN + i];
    args.sums[(worker * 2 + i / kN) * H + slice * kN + i % kN] = v;
  }
}

constexpr int kShares = 16;  // of the parts of a sum

// sums [count, 2, H], of dz and of dz y1. A block for 32 channels; each row of threads adds up some parts.
__global__ void __launch_bounds__(32 * kShares)
    hidden_sums_kernel(const float* sums, int count, int hidden, const float* mean, const float* deviation,
                       float* sum, float* normed) {
  __shared__ double room[2][kShares][32];
  const int lane = threadIdx.x % 32, share = threadIdx.x / 32, h = blockIdx.x * 32 + lane;
  const int first = count * share / kShares, each = count * (share + 1) / kShares - first;
  const float* const from = sums + static_cast<int64_t>(first) * 2 * hidden + h;
  room[0][share][lane] = part_sum(from, 2 * hidden, each);
  room[1][share][lane] = part_sum(from + hidden, 2 * hidden, each);
  __syncthreads();
  if (share > 0) return;
  double total = 0, product = 0;
  for (int i = 0; i < kShares; i++) {
    total += room[0][i][lane];
    product += room[1][i][lane];
  }
  sum[h] = static_cast<float>(total);
  normed[h] = static_cast<float>((product - mean[h] * total) * deviation[h]);
}

template <int C, int H, BackwardGiven kGiven, typename T>
int hidden_grad(const BackwardSize& size, const BackwardHiddenGrad& from, void* scratch, cudaStream_t stream,
                int64_t* bytes = nullptr) {
  constexpr int kN = kColumns<H>, kSlices = H / kN;
  const int workers = size.processors / kSlices;
  constexpr bool kDense = kGiven == BackwardGiven::dense;
  const int64_t entries = kHasEntries<kGiven> ? size.groups * C : 0;
  Pieces pieces(scratch);
  T* const weight = pieces.take<T>(C * H);
  T* const q = pieces.take<T>(H * H);
  float* const operand_scale = pieces.take<float>(2);
  uint32_t* const grad = pieces.take<uint32_t>(entries / 2);
  uint32_t* const argmax = pieces.take<uint32_t>(entries / 2);
  float* const sums = pieces.take<float>(int64_t{workers} * 2 * H);
  if (bytes) {
    *bytes = pieces.bytes();
    return 0;
  }
  const Operand dense{from.q, H, 1, H, H, kN, false, q};
  const Operand carried{from.weight, kDense ? C : 1, kDense ? 1 : H, H, C, kN, false, weight};
  const Prepare first{{dense, kGiven == BackwardGiven::added ? dense : carried},
                      operand_scale,
                      from.entries,
                      entries,
                      grad,
                      argmax};
  int error = prepare<T>(first, size.processors, stream);
  if (error) return error;
  const HiddenGrad args{static_cast<const uint4*>(from.hidden.before),
                        reinterpret_cast<const uint4*>(grad),
                        reinterpret_cast<const uint4*>(argmax),
                        static_cast<const uint4*>(from.near),
                        static_cast<const uint4*>(from.center),
                        weight,
                        q,
                        operand_scale,
                        from.hidden.scale,
                        from.hidden.shift,
                        from.constant,
                        static_cast<uint4*>(from.dz),
                        sums,
                        InnerNorm{from.mean, from.deviation, from.factor, from.m1, from.m2},
                        size.groups * size.neighbors,
                        size.groups,
                        size.neighbors};
  error = launch_shared(hidden_grad_kernel<C, H, kGiven, T>, args, workers * kSlices, kHiddenTeams<H> * 128,
                        kHiddenGradBytes<C, H, kGiven>, stream);
  if (error || kGiven == BackwardGiven::dy1) return error;
  hidden_sums_kernel<<<H / 32, 32 * kShares, 0, stream>>>(sums, workers, H, from.mean, from.deviation,
                                                          from.sum, from.sum_normed);
  return cudaGetLastError();
}

template <typename T>
int hidden_grad_of(const BackwardSize& size, const BackwardHiddenGrad& args, void* scratch,
                   cudaStream_t stream, int64_t* bytes = nullptr) {
  using Given = BackwardGiven;
  switch (size.width) {
    case 192:
      switch (args.given) {
        case Given::entries:
          return hidden_grad<192, 96, Given::entries, T>(size, args, scratch, stream, bytes);
        case Given::dense:
          return hidden_grad<192, 96, Given::dense, T>(size, args, scratch, stream, bytes);
        case Given::added:
          return hidden_grad<192, 96, Given::added, T>(size, args, scratch, stream, bytes);
        default:
          return hidden_grad<192, 96, Given::dy1, T>(size, args, scratch, stream, bytes);
      }
    case 384:
      return hidden_grad<384, 192, Given::entries, T>(size, args, scratch, stream, bytes);
    default:
      return hidden_grad<768, 32, Given::entries, T>(size, args, scratch, stream, bytes);
  }
}

}  // namespace

int64_t backward_hidden_grad_scratch(const BackwardSize& size, BackwardGiven given) {
  int64_t bytes = 0;
  BackwardHiddenGrad args{};
  args.given = given;
  hidden_grad_of<__half>(size, args, nullptr, nullptr, &bytes);
  return bytes;
}

int backward_hidden_grad(const BackwardSize& size, const BackwardHiddenGrad& args, void* scratch,
                         void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  return size.bfloat16 ? hidden_grad_of<__nv_bfloat16>(size, args, scratch, stream)
                       : hidden_grad_of<__half>(size, args, scratch, stream);
}

}  // namespace any2point
