// The gradients of a unit above another: of its first weight, and of the rows of the unit below, which are
// its x. train_rows_grad of train.h with units before; times are in train_backward.h.
//
// Three teams of four warps have 64 rows each and wait for nobody but themselves: dy1 and h of the unit below
// become operands in shared memory, x is made by a product, du by another, with entries added where it
// becomes 16 bits. A fourth team multiplies dy1' x of their rows, whose sums are all that it has in
// registers.
#include "local_aggregate/train_backward_rows.cuh"

namespace any2point {
namespace {

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
  uint4* dz;                 // [M, H], in whose place the second half of du is left
  InnerNorm norm;
  const void* weight;   // operand [H -> C]
  const uint4* grad;    // [groups, C], 16 bits
  const uint4* argmax;  // [groups, C], 16 bits
  uint4* near;          // [M, C / 2]: the first half of du
  float* parts;         // [workers, C, H]
  int rows;
  int neighbors;
};

constexpr int kUpperThreads = (kTeams + 1) * 128;
// Registers of a thread: of 512, so many on average.
constexpr int kSumRegisters = 176, kTeamRegisters = 112;

// Begins d += y weight' for the team's rows of y and 64 channels from `first`.
template <int C, int H, typename T>
__device__ __forceinline__ void team_product(float (&d)[32], const char* y, const char* weight, int first) {
  pin(d);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < H / 16; k++) {
    wgmma_shared<64, T>(d, descriptor(y + k / 2 * kTeamRows * kBlockBytes + k % 2 * 32),
                        descriptor(weight + (k / 2 * C + first) * kBlockBytes + k % 2 * 32));
  }
  wgmma_commit();
}

// With so many neighbours no tile has rows of more than two groups.
constexpr int kTwoGroups = kTeamRows - 1;
template <int C>
constexpr int kEntryBytes = 2 * 2 * C * 2;  // of two groups: gradients, then rows
template <int C, int H>
constexpr int kTeamBytes = kTeamRows * (C + 2 * H) * 2;  // x, y, h
template <int C, int H>
constexpr int kUpperBytes =
    4 * C * H + kTeams * (kTeamBytes<C, H> + kEntryBytes<C>)+4 * (C + 5 * H + C / 6) + 24 * kTeams;

template <int C, int H, bool kFew, typename T>
__global__ void __launch_bounds__(kUpperThreads, 1) upper_kernel(const __grid_constant__ Upper args) {
  static_assert(C == kSlice && Order<C>::kParts == 1 && C == 2 * H, "blocks in their own order");
  extern __shared__ __align__(1024) char room[];
  char* const below_weight = room;
  char* const weight = room + C * H * 2;
  char* const teams = weight + C * H * 2;
  char* const entries = teams + kTeams * kTeamBytes<C, H>;
  float* const bias = reinterpret_cast<float*>(entries + kTeams * kEntryBytes<C>);
  float* const scale = bias + C;
  float* const shift = scale + H;
  float* const norm = shift + H;
  float* const frequency = norm + 3 * H;
  uint64_t* const full = reinterpret_cast<uint64_t*>(frequency + C / 6);  // [kTeams]
  uint64_t* const empty = full + kTeams;
  uint64_t* const ready = empty + kTeams;
  copy_operand(args.below_weight, C * H * 2, below_weight);
  copy_operand(args.weight, C * H * 2, weight);
  load_norm<H>(args.norm, norm);
  for (int i = threadIdx.x; i < C; i += blockDim.x) bias[i] = args.below_bias[i];
  for (int i = threadIdx.x; i < H; i += blockDim.x) {
    scale[i] = args.below_scale[i];
    shift[i] = args.below_shift[i];
  }
  for (int i = threadIdx.x; i < C / 6; i += blockDim.x) frequency[i] = 1 / args.wavelength[i];
  if (threadIdx.x == 0) {
    for (int i = 0; i < kTeams; i++) {
      barrier_init(full + i, 128);
      barrier_init(empty + i, 4);
      barrier_init(ready + i, 1);
    }
  }
  publish();

  const int team = __shfl_sync(kLanes, threadIdx.x / 128, 0);  // known to be the warp's
  const int tiles = (args.rows + kTeamRows - 1) / kTeamRows;
  const int begin = blockIdx.x * kTeams, step = gridDim.x * kTeams;
  if (team == kTeams) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kSumRegisters));
    float sums[C / 64][H / 2] = {};
    for (int first = begin, turn = 0; first < tiles; first += step, turn ^= 1) {
      for (int t = 0; t < kTeams && first + t < tiles; t++) {
        const char* const x = teams + t * kTeamBytes<C, H>;
        const char* const y = x + kTeamRows * C * 2;
        barrier_wait(full + t, static_cast<uint32_t>(turn));
        wgmma_fence();
#pragma unroll
        for (int m = 0; m < C / 64; m++) {
          const char* const own = x + m * 2 * kTeamRows * kBlockBytes;
#pragma unroll
          for (int k = 0; k < kTeamRows / 16; k++) {
            wgmma_outer<H, T>(sums[m], outer_descriptor(own + k * 1024, kTeamRows * kBlockBytes),
                              outer_descriptor(y + k * 1024, kTeamRows * kBlockBytes));
          }
        }
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int m = 0; m < C / 64; m++) pin(sums[m]);
        if (threadIdx.x % 32 == 0) barrier_arrive(empty + t);
      }
    }
    float* const to = args.parts + static_cast<int64_t>(blockIdx.x) * C * H;
#pragma unroll
    for (int m = 0; m < C / 64; m++) store_sums<H>(sums[m], to + m * 64 * H, threadIdx.x / 32 % 4);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kTeamRegisters));
    char* const x = teams + team * kTeamBytes<C, H>;
    char* const y = x + kTeamRows * C * 2;
    char* const h = y + kTeamRows * H * 2;
    const int lane = threadIdx.x % 32, t = lane % 4, own = threadIdx.x % 128;
    const int in_tile = own / 32 * 16 + lane / 4;  // the first of a thread's two rows
    // Of hidden layers three warps have the same 8 channels in all their rows; a tile of them lies in a row.
    constexpr int kChunks = H / 8, kTile = kTeamRows * kChunks, kAtOnce = 96, kTimes = kTile / kAtOnce;
    static_assert(kAtOnce % kChunks == 0, "the same channels");
    constexpr uint32_t kStep = kAtOnce / kChunks * kBlockBytes;
    const int chunk = own % kChunks;
    const uint32_t at_chunk = chunk_at<kTeamRows>(chunk, own / kChunks);
    const bool brings = own < kAtOnce;
    const auto left_of = [&](int tile) { return min(args.rows - tile * kTeamRows, kTeamRows) * kChunks; };
    const auto fetch = [&](int tile) {
      if (tile < tiles && brings) {
        const int last = left_of(tile) - 1;
#pragma unroll
        for (int n = 0; n < kTimes; n++) {
          copy_async(shared_address(h) + at_chunk + n * kStep,
                     args.below + int64_t{tile} * kTile + min(own + n * kAtOnce, last));
        }
      }
      copy_commit();
    };
    const auto bring = [&](int tile) {  // dz and y1 to where x will be; by one thread
      const uint32_t bytes = left_of(tile) * 16;
      barrier_expect(ready + team, 2 * bytes);
      bulk_copy(x, args.dz + int64_t{tile} * kTile, bytes, ready + team);
      bulk_copy(x + kTile * 16, args.before + int64_t{tile} * kTile, bytes, ready + team);
    };
    const bool elected = own == kAtOnce;
    char* const own_entries = entries + team * kEntryBytes<C>;
    const auto fetch_entries = [&](int tile) {
      constexpr int kGroup = C / 8, kEach = 2 * kGroup;  // 16 bytes of a group, and of both
      static_assert(kEntryBytes<C> == 16 * kAtOnce, "one copy a thread");
      if (!kFew && brings) {
        const int64_t group = tile * kTeamRows / static_cast<uint32_t>(args.neighbors) + own / kGroup % 2;
        const int64_t last = (args.rows - 1) / static_cast<uint32_t>(args.neighbors);
        const uint4* from = own < kEach ? args.grad : args.argmax;
        copy_async(shared_address(own_entries) + own * 16, from + min(group, last) * kGroup + own % kGroup);
      }
      copy_commit();
    };
    Place next[2];
    int next_middle[2];
    const auto find = [&](int tile) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t row = min(tile * kTeamRows + in_tile + 8 * i, args.rows - 1);
        next[i] = load_place(args.places + row);
        next_middle[i] = __ldg(args.middles + row / static_cast<uint32_t>(args.neighbors));
      }
    };
    if (elected && begin + team < tiles) bring(begin + team);
    fetch(begin + team);
    uint32_t turn = 0;
    for (int tile = begin + team; tile < tiles; tile += step, turn ^= 1) {
      const int left = left_of(tile);
      find(tile);
      fetch_entries(tile);
      const uint4 *near[2], *center[2];
      float offset[2][3];
      uint32_t group[2], at[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t row = min(tile * kTeamRows + in_tile + 8 * i, args.rows - 1);
        group[i] = row / static_cast<uint32_t>(args.neighbors);
        at[i] = (row - group[i] * args.neighbors) * 0x10001u;
        near[i] = features_of<C>(args.features, args.zeros, next[i].near);
        center[i] = features_of<C>(args.features, args.zeros, next_middle[i]);
#pragma unroll
        for (int p = 0; p < 3; p++) offset[i][p] = next[i].offset[p];
      }
      uint4 ahead[2][2];
#pragma unroll
      for (int i = 0; i < 4; i++) ahead[i / 2][i % 2] = feature<C>(near[i % 2], center[i % 2], 0, i / 2);
      if (brings) {
        copy_wait<1>();
        const Eight f = eight(scale + 8 * chunk), s = eight(shift + 8 * chunk);
#pragma unroll
        for (int i = 0; i < kTimes; i++) {
          uint4* const v = reinterpret_cast<uint4*>(h + at_chunk + i * kStep);
          *v = hidden_of<T>(*v, f, s);
        }
      }
      barrier_wait(ready + team, turn);
      if (brings) {
        const Line line = line_of<H>(norm, 8 * chunk);
        const uint4* const slot = reinterpret_cast<const uint4*>(x) + own;
#pragma unroll
        for (int i = 0; i < kTimes; i++) {
          uint4 v = normed_grad<T>(slot[i * kAtOnce], slot[kTile + i * kAtOnce], line);
          if (own + i * kAtOnce >= left) v = {0, 0, 0, 0};
          *reinterpret_cast<uint4*>(y + at_chunk + i * kStep) = v;
        }
      }
      team_publish();
      // The other features to where they will be x.
#pragma unroll
      for (int b = 2; b < C / 32; b++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const uint4* from = b < 3 ? near[i] + block_of<C>(0, b) * 4 : center[i] + block_of<C>(0, b - 3) * 4;
          copy_async(shared_address(x) + chunk_at<kTeamRows>(4 * b + t, in_tile + 8 * i), from);
        }
        if (b % 2) copy_commit();
      }

#pragma unroll
      for (int p = 0; p < C / 64; p++) {
        if (p > 0) {
          if (p + 1 < C / 64) {
            copy_wait<1>();
          } else {
            copy_wait<0>();
          }
#pragma unroll
          for (int i = 0; i < 4; i++) {
            ahead[i / 2][i % 2] = take<kTeamRows>(x, 8 * p + i / 2 * 4 + t, in_tile + 8 * (i % 2));
          }
        }
        float d[32];
        const Eight frequencies = eight(frequency + 8 * t);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          encode<T>(offset[i][p], frequencies, ahead[0][i], ahead[1][i]);
#pragma unroll
          for (int w = 0; w < 2; w++) {
            const Eight r = eight_of<T>(ahead[w][i]), b = eight(bias + 64 * p + 32 * w + 8 * t);
#pragma unroll
            for (int j = 0; j < 8; j++) d[16 * w + j / 2 * 4 + 2 * i + j % 2] = r.v[j] + b.v[j];
          }
        }
        team_product<C, H, T>(d, h, below_weight, 64 * p);
        wgmma_wait<0>();
        pin(d);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          put<kTeamRows>(x, 8 * p + i / 2 * 4 + t, in_tile + 8 * (i % 2), relu<T>(of_sums(d, i / 2, i % 2)));
        }
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      barrier_arrive(full + team);
      team_barrier();  // nobody reads h
      fetch(tile + step);
      if (elected && tile + step < tiles) {
        const uint32_t bytes = left_of(tile + step) * 16;
        to_cache(args.dz + int64_t{tile + step} * kTile, bytes);
        to_cache(args.before + int64_t{tile + step} * kTile, bytes);
      }

      const uint32_t first = tile * kTeamRows / static_cast<uint32_t>(args.neighbors);
#pragma unroll
      for (int p = 0; p < C / 64; p++) {
        float d[32] = {};
        team_product<C, H, T>(d, y, weight, 64 * p);
        uint4 entry[4];
#pragma unroll
        for (int w = 0; w < 2; w++) {
          const int c = 8 * p + 4 * w + t;
#pragma unroll
          for (int i = 0; i < 2; i++) {
            uint4 grad, argmax;
            if (kFew) {
              grad = __ldg(args.grad + static_cast<int64_t>(group[i]) * (C / 8) + c);
              argmax = __ldg(args.argmax + static_cast<int64_t>(group[i]) * (C / 8) + c);
            } else {
              const uint4* from =
                  reinterpret_cast<const uint4*>(own_entries) + (group[i] - first) * (C / 8) + c;
              grad = from[0];
              argmax = from[C / 4];
            }
            entry[2 * w + i] = entries_at(grad, argmax, at[i]);
          }
        }
        wgmma_wait<0>();
        pin(d);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int c = 8 * p + i / 2 * 4 + t;
          const uint4 z = take<kTeamRows>(x, c, in_tile + 8 * (i % 2));
          const uint4 v = where_positive(z, add<T>(rounded<T>(of_sums(d, i / 2, i % 2)), entry[i]));
          const int row = tile * kTeamRows + in_tile + 8 * (i % 2);
          // Rows of dz are in shared memory by now.
          uint4* const to = 2 * p + i / 2 < C / 64 ? args.near + c : args.dz + c - C / 16;
          if (row < args.rows) to[int64_t{row} * (C / 16)] = v;
        }
      }
      team_barrier();  // nobody of the team reads x
      if (elected && tile + step < tiles) {
        barrier_wait(empty + team, turn);
        bring(tile + step);
      }
    }
    copy_wait<0>();
  }
}

template <typename T>
int upper(const BackwardSize& size, const BackwardRows& from, void* scratch, cudaStream_t stream,
          int64_t* bytes) {
  constexpr int C = 192, H = 96;
  const int64_t count = size.groups * size.neighbors, entries = size.groups * C;
  Pieces pieces(scratch);
  Place* const places = pieces.take<Place>(count);
  int* const middles = pieces.take<int>(size.groups);
  uint4* const zeros = pieces.take<uint4>(C / 16);
  float* const parts = pieces.take<float>(int64_t{size.processors} * C * H);
  T* const weight = pieces.take<T>(C * H);
  T* const below_weight = pieces.take<T>(C * H);
  uint32_t* const grad = pieces.take<uint32_t>(entries / 2);
  uint32_t* const argmax = pieces.take<uint32_t>(entries / 2);
  float* const totals = pieces.take<float>(int64_t{size.processors} * C);
  if (bytes) {
    *bytes = pieces.bytes();
    return 0;
  }
  place_kernel<<<static_cast<unsigned>(divided(size.groups, 4)), 128, 0, stream>>>(from.from, C, places,
                                                                                   middles, zeros);
  int error = cudaGetLastError();
  if (error) return error;
  const Prepare first{
      {{from.below_weight, H, 1, C, H, C, true, below_weight}, {from.weight, H, 1, C, H, C, true, weight}},
      nullptr,
      from.entries,
      entries,
      grad,
      argmax};
  error = prepare<T>(first, size.processors, stream);
  if (error) return error;
  uint4* const near = static_cast<uint4*>(from.near);
  const Upper args{places,
                   middles,
                   static_cast<const uint4*>(from.from.features),
                   zeros,
                   from.from.wavelength,
                   static_cast<const uint4*>(from.below.before),
                   from.below.scale,
                   from.below.shift,
                   from.below_bias,
                   below_weight,
                   static_cast<const uint4*>(from.before),
                   static_cast<uint4*>(from.dz),
                   InnerNorm{from.mean, from.deviation, from.factor, from.m1, from.m2},
                   weight,
                   reinterpret_cast<const uint4*>(grad),
                   reinterpret_cast<const uint4*>(argmax),
                   near,
                   parts,
                   static_cast<int>(count),
                   size.neighbors};
  error =
      launch_shared(size.neighbors < kTwoGroups ? upper_kernel<C, H, true, T> : upper_kernel<C, H, false, T>,
                    args, size.processors, kUpperThreads, kUpperBytes<C, H>, stream);
  if (error) return error;
  weight_grad_kernel<C><<<C, H, 0, stream>>>(parts, size.processors, from.weight_grad);
  error = cudaGetLastError();
  if (error) return error;
  return backward_dense_sums(size, {from.below, near, from.dz, from.sums, from.by_group, parts, totals},
                             stream);
}

}  // namespace

int64_t backward_upper_scratch(const BackwardSize& size) {
  int64_t bytes = 0;
  upper<__half>(size, {}, nullptr, nullptr, &bytes);
  return bytes;
}

int backward_upper(const BackwardSize& size, const BackwardRows& args, void* scratch, cudaStream_t stream) {
  return (size.bfloat16 ? upper<__nv_bfloat16> : upper<__half>)(size, args, scratch, stream, nullptr);
}

}  // namespace any2point
