// The maximum over neighbours in training on sm_90a, and where it is: train_max of train.h. Times are in
// train_forward.sm90a.cu.
#include "local_aggregate/train_forward.cuh"

namespace any2point {
namespace {

// Where a group goes on in the next warps: maxima of its later parts, [warps, C].
struct Heads {
  float* value;
  int32_t* row;
};

// The largest value of a group so far, and the rows (of the group) that have it: of two channels. Values are
// compared as integers, which is their order from 0 on, with the four lowest bits cleared.
struct Best {
  int value[2] = {0, 0};
  uint32_t rows = 0;
};

// The largest over the lanes that hold the same channels; each lane ends up with another two of the 64.
__device__ __forceinline__ void largest_keys(const int (&v)[2][4][2], int (&to)[2]) {
  const bool a = threadIdx.x & 16, b = threadIdx.x & 8, c = threadIdx.x & 4;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    int w[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int u[2];
#pragma unroll
      for (int q = 0; q < 2; q++) {
        const int other = __shfl_xor_sync(kLanes, a ? v[i][q][e] : v[i][q + 2][e], 16);
        u[q] = max(a ? v[i][q + 2][e] : v[i][q][e], other);
      }
      w[i] = max(b ? u[1] : u[0], __shfl_xor_sync(kLanes, b ? u[0] : u[1], 8));
    }
    to[e] = max(c ? w[1] : w[0], __shfl_xor_sync(kLanes, c ? w[0] : w[1], 4));
  }
}

// Takes 64 channels of a tile's rows, before their ReLU, into the maximum of their group, and writes it where
// the group ends, or the warp's rows. `segment`: the group of the tile's first row.
template <int C>
__device__ __forceinline__ void take_best(const HopperMaximum& args, const Heads& heads, const Walk& walk,
                                          int tile, int tiles, int segment, int pair, const float (&d)[32],
                                          Best* best) {
  const int lane = threadIdx.x % 32, row = lane / 4, neighbors = args.rows.neighbors;
  for (int s = segment; s < walk.groups; s++) {
    const int low = s * neighbors - walk.begin - tile * kRows, high = low + neighbors;
    if (low >= kRows) break;
    const bool whole = low <= 0 && high >= kRows;
    const bool one = row >= low && row < high, two = row + 8 >= low && row + 8 < high;
    int v[2][4][2], key[2];
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const int at = i / 8 * 16 + i / 2 % 4 * 4 + i % 2;
      int a = (__float_as_int(d[at]) & ~15) | (15 - row), b = (__float_as_int(d[at + 2]) & ~15) | (7 - row);
      if (!whole) {
        a = one ? a : 0;
        b = two ? b : 0;
      }
      v[i / 8][i / 2 % 4][i % 2] = max(a, b);
    }
    largest_keys(v, key);
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int value = key[e] & ~15;
      if (value > best->value[e]) {
        const uint32_t k = 15 - (key[e] & 15) - low;
        best->value[e] = value;
        best->rows = e == 0 ? (best->rows & 0xffff0000u) | k : (best->rows & 0xffffu) | k << 16;
      }
    }
    if (high <= kRows || tile + 1 == tiles) {
      const int block = Order<C>::block(2 * pair) + lane / 4 % 2 * Order<C>::kParts;
      const int64_t channel = block * 32 + lane % 4 * 8 + lane / 8 * 2;
      const bool head = s == 0 && walk.begin > 0;
      const int64_t at = (head ? this_warp() : walk.first + s) * C + channel;
      *reinterpret_cast<float2*>((head ? heads.value : args.out) + at) = {__int_as_float(best->value[0]),
                                                                          __int_as_float(best->value[1])};
      *reinterpret_cast<int2*>((head ? heads.row : args.argmax) + at) = {
          static_cast<int>(best->rows & 0xffff), static_cast<int>(best->rows >> 16)};
      *best = Best();
    }
  }
}

// out = max over k of the rows after all units, and where it is. While the products of 64 channels run, the
// next 64 are built.
template <int C, int H, typename T>
__global__ void __launch_bounds__(kWarps * 32, 1)
    maximum_kernel(const __grid_constant__ HopperMaximum args, const Part part, const Heads heads) {
  extern __shared__ __align__(1024) char room[];
  constexpr int kPairs = C / 64;
  char* const features = room + C * H * 2;
  float* const bias = reinterpret_cast<float*>(features + kTeams * Feed<C>::kBytes);
  float* const frequency = bias + C;
  float* const scale = frequency + C / 6;
  Group* const groups = reinterpret_cast<Group*>(scale + 2 * H) + threadIdx.x / 32 * kGroups;
  load_done_weight<C, H>(args.done[0].weight, room);
  load_out_bias<C>(args.done[0].bias, bias);
  load_scales<H>(args.done[0], scale);
  load_frequency<C>(args.rows, frequency);
  const Walk walk = walk_of(args.rows, part, this_warp());
  const int64_t first = walk.first * args.rows.neighbors + walk.begin;
  load_groups(args.rows, part, walk, groups);
  publish();

  Feed<C> feed(args.rows, walk, groups, features);
  Rows rows = feed.next(0);
  Best best[kPairs];
  int segment = 0;
  for (int tile = 0; tile < part.tiles; tile++) {
    uint32_t h[H / 16][4];
    {
      const Before<H> before(args.done[0].before, walk, first, tile);
      hidden_operand<H, T>(before, scale, h);
    }
    feed.wait();
    const Rows current = rows;
    float d[2][32];
#pragma unroll
    for (int p = 0; p <= kPairs; p++) {
      if (p < kPairs) {
        Channels x;
        feed.load(current, p, x);
        if (p == kLastNear<C>) rows = feed.next(tile + 1);
        add_encoding<C, T>(current, frequency, p, x);
#pragma unroll
        for (int b = 0; b < 2; b++) set_residual<T>(x[b], bias + 64 * p + 32 * b, d[p % 2] + 16 * b);
        out_product<C, H, 64, T>(d[p % 2], h, room, 64 * p);
      }
      if (p > 0) {
        if (p < kPairs) {
          wgmma_wait<1>();
        } else {
          wgmma_wait<0>();
        }
        pin(d[(p + 1) % 2]);
        take_best<C>(args, heads, walk, tile, part.tiles, segment, p - 1, d[(p + 1) % 2], &best[p - 1]);
      }
    }
    segment = segment_after(args.rows, walk, tile, segment);
  }
}

// The same for two units.
template <int C, int H, typename T>
__global__ void __launch_bounds__(kWarps * 32, 1)
    maximum_of_two_kernel(const __grid_constant__ HopperMaximum args, const Part part, const Heads heads) {
  extern __shared__ __align__(1024) char room[];
  constexpr int kWeight = C * H * 2, kPairs = C / 64;
  char* const features = room + 2 * kWeight;
  float* const bias = reinterpret_cast<float*>(features + kTeams * Feed<C>::kBytes);
  float* const frequency = bias + 2 * C;
  float* const scale = frequency + C / 6;
  Group* const groups = reinterpret_cast<Group*>(scale + 4 * H) + threadIdx.x / 32 * kGroups;
  for (int u = 0; u < 2; u++) {
    load_done_weight<C, H>(args.done[u].weight, room + u * kWeight);
    load_out_bias<C>(args.done[u].bias, bias + u * C);
    load_scales<H>(args.done[u], scale + 2 * u * H);
  }
  load_frequency<C>(args.rows, frequency);
  const Walk walk = walk_of(args.rows, part, this_warp());
  const int64_t first = walk.first * args.rows.neighbors + walk.begin;
  load_groups(args.rows, part, walk, groups);
  publish();

  Feed<C> feed(args.rows, walk, groups, features);
  Rows rows = feed.next(0);
  Best best[kPairs];
  int segment = 0;
  for (int tile = 0; tile < part.tiles; tile++) {
    uint32_t h[H / 16][4];
    const Before<H> before(args.done[0].before, walk, first, tile);
    Channels x[kPairs];
    feed.wait();
#pragma unroll
    for (int p = 0; p < kPairs; p++) feed.load(rows, p, x[p]);
    const Rows current = rows;
    rows = feed.next(tile + 1);
#pragma unroll
    for (int p = 0; p < kPairs; p++) add_encoding<C, T>(current, frequency, p, x[p]);
    hidden_operand<H, T>(before, scale, h);
    const Before<H> second(args.done[1].before, walk, first, tile);
    apply_unit<C, H, T>(h, room, bias, x, [&](int p, const float (&z)[32]) {
#pragma unroll
      for (int b = 0; b < 2; b++) relu_channels<T>(z + 16 * b, x[p][b]);
    });
    hidden_operand<H, T>(second, scale + 2 * H, h);
    apply_unit<C, H, T>(h, room + kWeight, bias + C, x, [&](int p, const float (&z)[32]) {
      take_best<C>(args, heads, walk, tile, part.tiles, segment, p, z, &best[p]);
    });
    segment = segment_after(args.rows, walk, tile, segment);
  }
}

// Where a group goes on in the next warps, the maximum of its parts; a block per warp, a thread per channel.
__global__ void join_kernel(const HopperMaximum args, const Part part, const Heads heads, int64_t warps) {
  Walk walk = walk_of(args.rows, part, blockIdx.x);
  const int64_t group = walk.first;
  if (walk.groups == 0 || walk.begin == 0) return;
  if (walk.begin > part.tiles * kRows && blockIdx.x > 0) return;  // the warp before goes on with it, too
  const int width = blockDim.x;
  const int64_t at = group * width + threadIdx.x;
  int largest = __float_as_int(args.out[at]), row = args.argmax[at];
  for (int64_t warp = blockIdx.x; warp < warps; warp++) {
    walk = walk_of(args.rows, part, warp);
    if (walk.groups == 0 || walk.first != group) break;
    const int value = __float_as_int(heads.value[warp * width + threadIdx.x]);
    if (value > largest) {
      largest = value;
      row = heads.row[warp * width + threadIdx.x];
    }
  }
  args.out[at] = __int_as_float(largest);
  args.argmax[at] = row;
}

template <int C, int H, typename T>
int maximum(const HopperMaximum& args, const Part& part, const Heads& heads, int64_t blocks,
            cudaStream_t stream) {
  const size_t shared = 2 * C * H + around<C>(C + 2 * H);
  return launch(maximum_kernel<C, H, T>, blocks, shared, stream, args, part, heads);
}

template <typename T>
int maximum_of(const HopperMaximum& args, int64_t width, const Part& part, const Heads& heads, int64_t blocks,
               cudaStream_t stream) {
  switch (width) {
    case 192:
      return launch(maximum_of_two_kernel<192, 96, T>, blocks, 4 * 192 * 96 + around<192>(2 * 192 + 4 * 96),
                    stream, args, part, heads);
    case 384:
      return maximum<384, 192, T>(args, part, heads, blocks, stream);
    default:
      return maximum<768, 32, T>(args, part, heads, blocks, stream);
  }
}

}  // namespace

int64_t hopper_train_scratch(int64_t width, int64_t groups, int64_t neighbors, int processors) {
  return groups * static_cast<int64_t>(sizeof(float4)) +
         Plan(groups, neighbors, processors).warps * width * 8;
}

int hopper_maximum(const HopperMaximum& args, int64_t width, int64_t, int processors, void* scratch,
                   void* stream_) {
  if (args.rows.groups == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Plan plan(args.rows.groups, args.rows.neighbors, processors);
  float4* const scales = static_cast<float4*>(scratch);
  const Part part = part_of(args.rows, plan, scales, stream);
  float* const values = reinterpret_cast<float*>(scales + args.rows.groups);
  const Heads heads{values, reinterpret_cast<int32_t*>(values + plan.warps * width)};
  const int error = args.rows.bfloat16
                        ? maximum_of<__nv_bfloat16>(args, width, part, heads, plan.blocks, stream)
                        : maximum_of<__half>(args, width, part, heads, plan.blocks, stream);
  if (error) return error;
  join_kernel<<<static_cast<unsigned>(plan.warps), static_cast<unsigned>(width), 0, stream>>>(
      args, part, heads, plan.warps);
  return cudaGetLastError();
}

}  // namespace any2point
