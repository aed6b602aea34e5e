// Local aggregation in training on sm_90a, forward: the passes of train.h over the rows x, which are built in
// registers as in evaluation (hopper.sm90a.cu), 16 of them a warp. Hidden channels come in the order that
// lets a thread read and write 16 bytes of y1 at a time.
//
// H200, 32 clouds, K = 81, float16, us:
//   points, centres, channels, hidden    y1, first unit   second   Gram matrix of each   maximum
//     1024      512       192      96               192      311                    96       504
//      512      256       384     192               250                            100       406
//      256      128       768      32               122                             10       312
// Floors of y1 and the maximum are 61 us of sines and cosines each, and products of 62, 124 and 21 us a
// layer; y1 of the first two stages takes 60 us to write and as much for each time that it is read.
// Schedulers issue in 33 to 47 % of the cycles, as registers leave them three warps: a third of what these
// wait for is memory (y1 where a tile begins, and the index of a neighbour that does not stay in registers),
// a fifth the instruction before.
#include "local_aggregate/train_forward.cuh"

namespace any2point {
namespace {

// The unit's W1 [H, C] for products with x.
template <int C, int H>
__device__ void load_next_weight(const void* weight, char* to) {
  const uint4* from = static_cast<const uint4*>(weight);
  for (int i = threadIdx.x; i < H * C / 8; i += blockDim.x) {
    const int n = i / (C / 8), b = i % (C / 8) / 4, t = i % 4;
    store_weight(from[hidden_channel(n) * (C / 8) + Order<C>::block(b) * 4 + t], to + b * H * kBlockBytes, n,
                 t);
  }
}

// The sum over the lanes that hold the same channels; each lane ends up with another one of the 8.
__device__ __forceinline__ float sum_of_lanes(const float (&v)[8]) {
  const bool a = threadIdx.x & 16, b = threadIdx.x & 8, c = threadIdx.x & 4;
  float u[4], w[2];
#pragma unroll
  for (int i = 0; i < 4; i++) u[i] = (a ? v[i + 4] : v[i]) + __shfl_xor_sync(kLanes, a ? v[i] : v[i + 4], 16);
#pragma unroll
  for (int i = 0; i < 2; i++) w[i] = (b ? u[i + 2] : u[i]) + __shfl_xor_sync(kLanes, b ? u[i] : u[i + 2], 8);
  return (c ? w[1] : w[0]) + __shfl_xor_sync(kLanes, c ? w[0] : w[1], 4);
}

// Rows of a tile that there are.
__device__ __forceinline__ int used_rows(const Walk& walk, int tile) {
  return walk.groups == 0 ? 0 : max(0, min(kRows, walk.rows - tile * kRows));
}

// A tile's rows of y1, the first `used` of them.
template <int H, typename T>
__device__ __forceinline__ void store_before(const float (&d)[H / 2], int64_t first, int used, void* before) {
  const int row = threadIdx.x % 32 / 4;
  uint4* to = static_cast<uint4*>(before) + (first + row) * (H / 8) + threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (row + 8 * i < used) {
#pragma unroll
      for (int b = 0; b < H / 32; b++) {
        const float* from = d + 16 * b + 2 * i;
        to[i * H + 4 * b] = {Two<T>::of(from[0], from[1]), Two<T>::of(from[4], from[5]),
                             Two<T>::of(from[8], from[9]), Two<T>::of(from[12], from[13])};
      }
    }
  }
}

// Mean and spread of a warp's rows of y1, tile by tile: of 32 channels a lane has one.
template <int H>
struct Statistics {
  float mean[H / 32] = {}, spread[H / 32] = {};
  int count = 0;

  // kWhole: all rows of the tile are there.
  template <bool kWhole>
  __device__ __forceinline__ void take(const float (&d)[H / 2], int used) {
    const int row = threadIdx.x % 32 / 4;
    const bool one = kWhole || row < used, two = kWhole || row + 8 < used;
    const int all = count + used;
    const float each = used > 0 ? 1.0f / static_cast<float>(used) : 0.0f;
    const float part = used > 0 ? static_cast<float>(used) / static_cast<float>(all) : 0.0f;
    const float both = static_cast<float>(count) * part;
    count = all;
#pragma unroll
    for (int b = 0; b < H / 32; b++) {
      const float* from = d + 16 * b;
      float sum[8], square[8];
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float low = one ? from[j / 2 * 4 + j % 2] : 0.0f,
                    high = two ? from[j / 2 * 4 + j % 2 + 2] : 0.0f;
        sum[j] = low + high;
        square[j] = __fmaf_rn(low, low, high * high);
      }
      const float total = sum_of_lanes(sum), squares = sum_of_lanes(square);
      const float here = total * each, delta = here - mean[b];
      mean[b] = __fmaf_rn(delta, part, mean[b]);
      // Not below 0; NaN stays.
      const float own = __fmaf_rn(-total, here, squares);
      spread[b] += __fmaf_rn(delta * delta, both, own < 0 ? 0.0f : own);
    }
  }

  // Those of the whole block, in the order of its warps; `room`: floats [warps, 2, H] and [warps], which
  // nobody else uses by then.
  __device__ __forceinline__ void store(float* room, float* means, float* spreads, float* counts) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int channel = lane % 4 * 8 + lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2;
    float* const sizes = room + warps * 2 * H;
    __syncthreads();
#pragma unroll
    for (int b = 0; b < H / 32; b++) {
      room[warp * 2 * H + 32 * b + channel] = mean[b];
      room[(warp * 2 + 1) * H + 32 * b + channel] = spread[b];
    }
    if (lane == 0) sizes[warp] = static_cast<float>(count);
    __syncthreads();
    for (int i = threadIdx.x; i < H; i += blockDim.x) {
      float all = 0, total = 0, squares = 0;
      for (int w = 0; w < warps; w++) {
        if (sizes[w] == 0) break;
        const float part = sizes[w] / (all + sizes[w]), delta = room[w * 2 * H + i] - total;
        total = __fmaf_rn(delta, part, total);
        squares += room[(w * 2 + 1) * H + i] + delta * delta * (all * part);
        all += sizes[w];
      }
      means[int64_t{blockIdx.x} * H + i] = total;
      spreads[int64_t{blockIdx.x} * H + i] = squares;
      if (i == 0) counts[blockIdx.x] = all;
    }
  }
};

// y1 = x W1' + b1 after kDone units, perhaps with its statistics. Without a unit before, rows are built while
// the products of those before run.
template <int C, int H, int kDone, bool kStatistics, typename T>
__global__ void __launch_bounds__(kWarps * 32, 1)
    project_kernel(const __grid_constant__ HopperProject args, const Part part) {
  extern __shared__ __align__(1024) char room[];
  constexpr int kWeight = C * H * 2, kPairs = C / 64;
  char* const features = room + (1 + kDone) * kWeight;
  float* const bias = reinterpret_cast<float*>(features + kTeams * Feed<C>::kBytes);
  float* const frequency = bias + H;
  float* const scale = frequency + C / 6;          // of the unit that is done, and its shift
  float* const done_bias = scale + kDone * 2 * H;  // of the unit that is done
  Group* const groups = reinterpret_cast<Group*>(done_bias + kDone * C) + threadIdx.x / 32 * kGroups;
  load_next_weight<C, H>(args.weight, room);
  for (int i = threadIdx.x; i < H; i += blockDim.x) bias[i] = args.bias[hidden_channel(i)];
  load_frequency<C>(args.rows, frequency);
  if constexpr (kDone > 0) {
    load_done_weight<C, H>(args.done[0].weight, room + kWeight);
    load_out_bias<C>(args.done[0].bias, done_bias);
    load_scales<H>(args.done[0], scale);
  }
  const Walk walk = walk_of(args.rows, part, this_warp());
  const int64_t first = walk.first * args.rows.neighbors + walk.begin;
  load_groups(args.rows, part, walk, groups);
  publish();

  Feed<C> feed(args.rows, walk, groups, features);
  Rows rows = feed.next(0);
  Statistics<H> statistics;
  for (int tile = 0; tile < part.tiles; tile++) {
    float d[H / 2];
    if constexpr (kDone == 0) {
      set_bias<H>(bias, d);
      pin(d);
      feed.wait();
      const Rows current = rows;
      constexpr int kAhead = H < 192 ? 2 : 1;  // as many as there are registers for
      Channels x[kAhead];
#pragma unroll
      for (int p = 0; p < kPairs; p++) {
        feed.load(current, p, x[p % kAhead]);
        if (p == kLastNear<C>) rows = feed.next(tile + 1);
        add_encoding<C, T>(current, frequency, p, x[p % kAhead]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) {
          uint32_t a[4];
          operand(x[p % kAhead], k, a);
          wgmma<H, T>(d, a, descriptor(room + (2 * p + k / 2) * H * kBlockBytes + k % 2 * 32));
        }
        wgmma_commit();
        if (p + 1 < kPairs) wgmma_wait<kAhead - 1>();
      }
      wgmma_wait<0>();
    } else {
      const Before<H> before(args.done[0].before, walk, first, tile);
      Channels x[kPairs];
      feed.wait();
#pragma unroll
      for (int p = 0; p < kPairs; p++) feed.load(rows, p, x[p]);
      const Rows current = rows;
      rows = feed.next(tile + 1);
#pragma unroll
      for (int p = 0; p < kPairs; p++) add_encoding<C, T>(current, frequency, p, x[p]);
      uint32_t h[H / 16][4];
      hidden_operand<H, T>(before, scale, h);
      apply_unit<C, H, T>(h, room + kWeight, done_bias, x, [&](int p, const float (&z)[32]) {
#pragma unroll
        for (int b = 0; b < 2; b++) relu_channels<T>(z + 16 * b, x[p][b]);
      });
      set_bias<H>(bias, d);
      pin(d);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < C / 16; k++) {
        uint32_t a[4];
        operand(x[k / 4], k % 4, a);
        wgmma<H, T>(d, a, descriptor(room + k / 2 * H * kBlockBytes + k % 2 * 32));
      }
      wgmma_commit();
      wgmma_wait<0>();
    }
    pin(d);
    const int used = used_rows(walk, tile);
    store_before<H, T>(d, first + tile * kRows, used, args.before);
    if constexpr (kStatistics) {
      if (used == kRows) {
        statistics.template take<true>(d, used);
      } else {
        statistics.template take<false>(d, used);
      }
    }
  }
  if constexpr (kStatistics) {
    statistics.store(reinterpret_cast<float*>(room), args.mean, args.spread, args.count);
  }
}

template <int C, int H, int kDone, typename T>
int project(const HopperProject& args, const Part& part, int64_t blocks, cudaStream_t stream) {
  const size_t shared = (1 + kDone) * 2 * C * H + around<C>(H + kDone * (2 * H + C));
  const auto kernel =
      args.mean ? project_kernel<C, H, kDone, true, T> : project_kernel<C, H, kDone, false, T>;
  return launch(kernel, blocks, shared, stream, args, part);
}

template <typename T>
int project_of(const HopperProject& args, int64_t width, const Part& part, int64_t blocks,
               cudaStream_t stream) {
  switch (width) {
    case 192:
      return args.units == 0 ? project<192, 96, 0, T>(args, part, blocks, stream)
                             : project<192, 96, 1, T>(args, part, blocks, stream);
    case 384:
      return project<384, 192, 0, T>(args, part, blocks, stream);
    default:
      return project<768, 32, 0, T>(args, part, blocks, stream);
  }
}

}  // namespace

int64_t hopper_train_parts(int64_t groups, int64_t neighbors, int processors) {
  return Plan(groups, neighbors, processors).blocks;
}

int hopper_project(const HopperProject& args, int64_t width, int64_t, int processors, void* scratch,
                   void* stream_) {
  if (args.rows.groups == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Plan plan(args.rows.groups, args.rows.neighbors, processors);
  const Part part = part_of(args.rows, plan, static_cast<float4*>(scratch), stream);
  return args.rows.bfloat16 ? project_of<__nv_bfloat16>(args, width, part, plan.blocks, stream)
                            : project_of<__half>(args, width, part, plan.blocks, stream);
}

}  // namespace any2point
