// Local aggregation in evaluation on sm_90a, by warpgroup products with the rows in registers.
//
// A team of four warps has 64 rows at a time, 16 a warp: a thread builds its part of the rows x (gather,
// sine, cosine) where products take their first operand, hidden channels stay there, too, and sums of a
// product in float32 become the operand of the next without leaving registers. Weights stay in shared memory.
// Teams wait for nobody, so one builds while another multiplies. A warp goes through a range of rows (group
// by group, all K neighbours after each other; only the end of everything is padded) and keeps the maximum of
// its group; groups that end in the next warp's range are joined by a kernel of their own. The bias of the
// last layer is added to the maximum. What a row needs besides its features (offset and where they are) is
// found once, by a kernel before. Units whose two weights do not fit into shared memory together take two
// kernels, with the hidden channels in memory between them, at most about 160 MB at a time; units whose rows
// do not fit into a team's registers share them out to three teams.
//
// A kernel that ptxas serialises for want of registers (C7512 in its messages) is to be avoided, and not for
// its speed alone: one in bfloat16 gave NaN under compute-sanitizer's memcheck and synccheck.
//
// H200, 32 clouds, us, all kernels, with the floor of products (790 TFLOP/s) and of the sine unit for one
// building of the rows at K = 81:
//                                              K = 81              K = 64
//   points, centres, channels, hidden, units   float16  bfloat16   float16  bfloat16   products   sines
//     1024      512       192      96     2        391       396       302       315        248      61
//      512      256       384     192     1        481       475       358       358        248      61
//      256      128       768      32     1        269       273       192       194         41      61
// Triton takes 1601, 974 and 557 us (float16, K = 81). Limit: what a warp waits for. By the counters of
// kernels close to these, schedulers of three warps issued in 25 to 37 % of the cycles, and tensor cores of
// the first two sizes worked in 36 to 48 %. Not faster: four teams of fewer registers, the residual by
// products with an identity, and half a pair of blocks built while the products of the other half run.
#include <algorithm>

#include "local_aggregate/hopper_eval.cuh"

namespace any2point {
namespace {

// Where a group goes on in the next warps, the maximum of its parts, finished; a block per warp.
template <int C, typename T>
__global__ void join_kernel(const HopperAggregate args, const Share share, int64_t warps, const float* bias) {
  wait_for_kernels();
  Walk walk = walk_of(args, share, blockIdx.x);
  const int64_t group = walk.first;
  if (walk.groups == 0 || walk.begin == 0) return;
  if (walk.begin > share.tiles * kRows && blockIdx.x > 0) return;  // the warp before goes on with it, too
  uint32_t* to = static_cast<uint32_t*>(args.out) + group * (C / 2) + threadIdx.x;
  uint32_t largest = *to;
  int64_t end = 0;  // of the rows seen
  for (int64_t warp = blockIdx.x; warp < warps; warp++) {
    walk = walk_of(args, share, warp);
    if (walk.groups == 0 || walk.first != group) break;
    end = walk.begin + walk.rows;
    largest = Two<T>::max(largest, share.heads[warp * (C / 2) + threadIdx.x]);
  }
  if (end >= args.neighbors) {  // else the next part goes on
    largest = finished<T>(largest, {bias[2 * threadIdx.x], bias[2 * threadIdx.x + 1]});
  }
  *to = largest;
}

// All units at once, for weights that fit into shared memory together.
template <int C, int H, int kUnits, int kTeams, typename T>
__global__ void __launch_bounds__(kTeams * 128, 1)
    whole_kernel(const __grid_constant__ HopperAggregate args, const Share share) {
  extern __shared__ __align__(1024) char room[];
  constexpr int kWeight = C * H * 2, kPairs = C / 64;
  char* const features = room + 2 * kUnits * kWeight;
  float* const in_bias = reinterpret_cast<float*>(features + kTeams * Stream<C, 3>::kBytes);
  float* const out_bias = in_bias + kUnits * H;
  float* const frequency = out_bias + kUnits * C;
  for (int u = 0; u < kUnits; u++) {
    load_in_weight<C, H>(args.units[u].in_weight, room + 2 * u * kWeight);
    load_out_weight<C, H>(args.units[u].out_weight, room + (2 * u + 1) * kWeight);
    for (int i = threadIdx.x; i < H; i += blockDim.x) in_bias[u * H + i] = args.units[u].in_bias[i];
    load_out_bias<C>(args.units[u].out_bias, out_bias + u * C);
  }
  load_frequency<C>(args, frequency);
  const int64_t warp = this_warp();
  const Walk walk = walk_of(args, share, warp);
  wait_for_kernels();
  let_next_begin();
  publish();

  const uint64_t weights = descriptor(room);
  Stream<C, 3> feed(args, share, walk, features);
  feed.next(0);
  uint32_t largest[kPairs];
#pragma unroll
  for (uint32_t& each : largest) each = kLowest<T>;
  int segment = 0;
  for (int tile = 0; tile < share.tiles; tile++) {
    Channels x[kPairs];
    feed.wait();
    const Rows rows = feed.rows(tile);
#pragma unroll
    for (int p = 0; p < kPairs; p++) feed.load(rows, p, x[p]);
    feed.next(tile + 1);
#pragma unroll
    for (int p = 0; p < kPairs; p++) add_encoding<C, T>(rows, frequency, p, x[p]);
#pragma unroll
    for (int u = 0; u < kUnits; u++) {
      uint32_t h[H / 16][4];
      {
        float d[H / 2];
        set_bias<H>(in_bias + u * H, d);
        pin(d);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < C / 16; k++) {
          uint32_t a[4];
          operand(x[k / 4], k % 4, a);
          const int at = 2 * u * kWeight + k / 2 * H * kBlockBytes + k % 2 * 32;
          wgmma<H, T>(d, a, weights + at / 16);
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(d);
        relu_hidden<T, H>(d, h);
      }
#pragma unroll
      for (int p = 0; p < kPairs; p++) {
        float d[32];
#pragma unroll
        for (int b = 0; b < 2; b++) {
          if (u + 1 < kUnits) {
            set_residual<T>(x[p][b], out_bias + u * C + 64 * p + 32 * b, d + 16 * b);
          } else {  // the last bias is added to the maximum
            set_rows<T>(x[p][b], d + 16 * b);
          }
        }
        pair_product<C, H, T>(d, h, weights + ((2 * u + 1) * kWeight + 64 * p * kBlockBytes) / 16);
        wgmma_wait<0>();
        pin(d);
#pragma unroll
        for (int b = 0; b < 2; b++) {
          if (u + 1 < kUnits) {
            relu_channels<T>(d + 16 * b, x[p][b]);
          } else {
            round_channels<T>(d + 16 * b, x[p][b]);
          }
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kPairs; p++)
      take_largest<C, T>(args, share, walk, warp, tile, segment, p, x[p], out_bias + (kUnits - 1) * C,
                         &largest[p]);
    segment = segment_after(args, walk, tile, segment);
  }
}

// The first layer of a unit, and its hidden channels to memory as operands of the second.
template <int C, int H, int kTeams, typename T>
__global__ void __launch_bounds__(kTeams * 128, 1)
    project_kernel(const __grid_constant__ HopperAggregate args, const Share share) {
  extern __shared__ __align__(1024) char room[];
  constexpr int kPairs = C / 64;
  char* const features = room + C * H * 2;
  float* const bias = reinterpret_cast<float*>(features + kTeams * Stream<C, 2>::kBytes);
  float* const frequency = bias + H;
  load_in_weight<C, H>(args.units[0].in_weight, room);
  for (int i = threadIdx.x; i < H; i += blockDim.x) bias[i] = args.units[0].in_bias[i];
  load_frequency<C>(args, frequency);
  const int64_t warp = this_warp();
  const Walk walk = walk_of(args, share, warp);
  wait_for_kernels();
  let_next_begin();
  publish();

  const uint64_t weights = descriptor(room);
  Stream<C, 2> feed(args, share, walk, features);
  feed.next(0);
  Rows rows = feed.rows(0);
  uint4* to = share.hidden + warp / 4 * share.tiles * (H / 16) * 128 + threadIdx.x % 128;
  for (int tile = 0; tile < share.tiles; tile++, to += H / 16 * 128) {
    float d[H / 2];
    set_bias<H>(bias, d);
    pin(d);
    feed.wait();
    Rows current = rows;
    constexpr int kBuffers = kTeams > 2 ? 1 : 2;  // the products may still read one while another is built
    Channels x[kBuffers];
#pragma unroll
    for (int p = 0; p < kPairs; p++) {
      feed.load(current, p, x[p % kBuffers]);
      if (p == kLastNear<C>) {
        feed.next(tile + 1);
        rows = feed.rows(tile + 1);
      }
      add_encoding<C, T>(current, frequency, p, x[p % kBuffers]);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; k++) {
        uint32_t a[4];
        operand(x[p % kBuffers], k, a);
        wgmma<H, T>(d, a, weights + ((2 * p + k / 2) * H * kBlockBytes + k % 2 * 32) / 16);
      }
      wgmma_commit();
      if (p + 1 < kPairs) wgmma_wait<kBuffers - 1>();
    }
    wgmma_wait<0>();
    pin(d);
    uint32_t h[H / 16][4];
    relu_hidden<T, H>(d, h);
#pragma unroll
    for (int k = 0; k < H / 16; k++) __stcg(to + k * 128, make_uint4(h[k][0], h[k][1], h[k][2], h[k][3]));
  }
}

// The second layer, the residual and the maximum. While the products of 64 channels run, the next 64 are
// built.
template <int C, int H, int kTeams, typename T>
__global__ void __launch_bounds__(kTeams * 128, 1)
    finish_kernel(const __grid_constant__ HopperAggregate args, const Share share) {
  extern __shared__ __align__(1024) char room[];
  constexpr int kPairs = C / 64;
  char* const features = room + C * H * 2;
  float* const bias = reinterpret_cast<float*>(features + kTeams * Stream<C, 2>::kBytes);
  float* const frequency = bias + C;
  load_out_weight<C, H>(args.units[0].out_weight, room);
  load_out_bias<C>(args.units[0].out_bias, bias);
  load_frequency<C>(args, frequency);
  const int64_t warp = this_warp();
  const Walk walk = walk_of(args, share, warp);
  wait_for_kernels();
  let_next_begin();
  publish();

  const uint64_t weights = descriptor(room);
  Stream<C, 2> feed(args, share, walk, features);
  feed.next(0);
  Rows rows = feed.rows(0);
  const uint4* from = share.hidden + warp / 4 * share.tiles * (H / 16) * 128 + threadIdx.x % 128;
  uint32_t largest[kPairs];
#pragma unroll
  for (uint32_t& each : largest) each = kLowest<T>;
  int segment = 0;
  for (int tile = 0; tile < share.tiles; tile++, from += H / 16 * 128) {
    uint32_t h[H / 16][4];
#pragma unroll
    for (int k = 0; k < H / 16; k++) {
      const uint4 v = __ldcs(from + k * 128);
      h[k][0] = v.x;
      h[k][1] = v.y;
      h[k][2] = v.z;
      h[k][3] = v.w;
    }
    feed.wait();
    Rows current = rows;
    float d[2][32];
#pragma unroll
    for (int p = 0; p <= kPairs; p++) {
      if (p < kPairs) {
        Channels x;
        feed.load(current, p, x);
        if (p == kLastNear<C>) {
          feed.next(tile + 1);
          rows = feed.rows(tile + 1);
        }
        add_encoding<C, T>(current, frequency, p, x);
#pragma unroll
        for (int b = 0; b < 2; b++) set_rows<T>(x[b], d[p % 2] + 16 * b);
        pair_product<C, H, T>(d[p % 2], h, weights + 64 * p * kBlockBytes / 16);
      }
      if (p > 0) {
        if (p < kPairs) {
          wgmma_wait<1>();
        } else {
          wgmma_wait<0>();
        }
        pin(d[(p + 1) % 2]);
        Channels z;
#pragma unroll
        for (int b = 0; b < 2; b++) round_channels<T>(d[(p + 1) % 2] + 16 * b, z[b]);
        take_largest<C, T>(args, share, walk, warp, tile, segment, p - 1, z, bias, &largest[p - 1]);
      }
    }
    segment = segment_after(args, walk, tile, segment);
  }
}

// One unit whose two weights fit into shared memory together, but whose rows are too wide for the registers
// of a team: three teams share them, an axis each, and add up their parts of the hidden channels in shared
// memory. While the second layer's products of 64 channels run, those of the next tile are built in their
// place and go through the first layer.
template <int C, int H, typename T>
__global__ void __launch_bounds__(384, 1)
    axes_kernel(const __grid_constant__ HopperAggregate args, const Share share) {
  extern __shared__ __align__(1024) char room[];
  constexpr int kParts = Order<C>::kParts, kWeight = C * H * 2;
  constexpr int kSums = 3 * 128 * H / 2;                       // floats of a tile's parts
  const int axis = __shfl_sync(kLanes, threadIdx.x / 128, 0);  // so that it is known to be a warp's
  float* const sums = reinterpret_cast<float*>(room + 2 * kWeight);
  float* const in_bias = sums + 2 * kSums;  // for the first axis, then zeros
  float* const out_bias = in_bias + 3 * H;
  float* const frequency = out_bias + C;
  load_in_weight<C, H>(args.units[0].in_weight, room);
  load_out_weight<C, H>(args.units[0].out_weight, room + kWeight);
  for (int i = threadIdx.x; i < 3 * H; i += blockDim.x) in_bias[i] = i < H ? args.units[0].in_bias[i] : 0;
  load_out_bias<C>(args.units[0].out_bias, out_bias);
  load_frequency<C>(args, frequency);
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x % 128 / 32;
  const Walk walk = walk_of(args, share, warp);
  wait_for_kernels();
  let_next_begin();
  publish();

  const uint64_t in_weight = descriptor(room + axis * 2 * kParts * H * kBlockBytes);
  const uint64_t out_weight = descriptor(room + kWeight + axis * 64 * kParts * kBlockBytes);
  AxisStream<C> feed(args, share, walk, axis, reinterpret_cast<char*>(frequency + C / 6));
  Channels x[kParts];
  uint32_t h[H / 16][4];
  float hidden[H / 2];
  const auto build = [&](int tile, int p) {  // and begin the first layer of it
    feed.take(x[p]);
    const float offset[2] = {feed.offset[0], feed.offset[1]};
    if (p + 1 == kParts) feed.find(tile + 1);
    feed.bring((p + 1) % kParts);
    add_sines<T>(offset, frequency + 32 * p + threadIdx.x % 4 * 8, x[p]);
    in_product<H, T>(hidden, x[p], in_weight + 2 * p * H * kBlockBytes / 16);
  };
  const auto add_up = [&](int tile) {
    wgmma_wait<0>();
    pin(hidden);
    float4* const all = reinterpret_cast<float4*>(sums + tile % 2 * kSums) + threadIdx.x % 128;
#pragma unroll
    for (int k = 0; k < H / 8; k++) {
      all[(axis * (H / 8) + k) * 128] = {hidden[4 * k], hidden[4 * k + 1], hidden[4 * k + 2],
                                         hidden[4 * k + 3]};
    }
    asm volatile("bar.sync %0, 96;" ::"r"(1 + threadIdx.x % 128 / 32) : "memory");  // warps of the same rows
    float d[H / 2];
#pragma unroll
    for (int k = 0; k < H / 8; k++) {
      const float4 a = all[k * 128], b = all[(H / 8 + k) * 128], c = all[(2 * (H / 8) + k) * 128];
      d[4 * k] = a.x + b.x + c.x;
      d[4 * k + 1] = a.y + b.y + c.y;
      d[4 * k + 2] = a.z + b.z + c.z;
      d[4 * k + 3] = a.w + b.w + c.w;
    }
    relu_hidden<T, H>(d, h);
    set_bias<H>(in_bias + axis * H, hidden);
    pin(hidden);
  };
  set_bias<H>(in_bias + axis * H, hidden);
  pin(hidden);
#pragma unroll
  for (int p = 0; p < kParts; p++) build(0, p);
  add_up(0);

  uint32_t largest[kParts];
#pragma unroll
  for (uint32_t& each : largest) each = kLowest<T>;
  int segment = 0;
  for (int tile = 0; tile < share.tiles; tile++) {
#pragma unroll
    for (int p = 0; p < kParts; p++) {
      float d[32];
#pragma unroll
      for (int b = 0; b < 2; b++) set_rows<T>(x[p][b], d + 16 * b);
      pair_product<C, H, T>(d, h, out_weight + 64 * p * kBlockBytes / 16);
      build(tile + 1, p);
      wgmma_wait<1>();
      pin(d);
      Channels z;
#pragma unroll
      for (int b = 0; b < 2; b++) round_channels<T>(d + 16 * b, z[b]);
      take_largest<C, T>(args, share, walk, warp, tile, segment, axis * kParts + p, z, out_bias, &largest[p]);
    }
    add_up(tile + 1);
    segment = segment_after(args, walk, tile, segment);
  }
}

// Launches.

constexpr int64_t kHidden = 160 << 20;  // bytes of hidden channels at a time, about

// How the tiles of all rows are cut into launches, and what they need.
struct Plan {
  int64_t tiles;
  int64_t parts;
  int64_t warps;  // of a part, with rows of their own, at most

  Plan(int64_t groups, int64_t neighbors, int64_t hidden, int teams, int processors)
      : tiles(divided(groups * neighbors, kRows)),
        parts(std::max<int64_t>(1, divided(tiles * kRows * hidden * 2, kHidden))),
        warps(int64_t{4} * teams * processors) {}

  // Tiles of a warp if so many are left for so many parts.
  int each(int64_t left, int64_t part) const {
    return static_cast<int>(divided(divided(left, parts - part), warps));
  }
  int64_t row_bytes() const { return tiles * kRows * static_cast<int64_t>(sizeof(float4) + sizeof(int)); }
  int64_t head_bytes(int64_t width) const { return warps * width * 2; }
  int64_t hidden_bytes(int64_t hidden) const { return warps * each(tiles, 0) * kRows * hidden * 2; }
};

template <typename Kernel, typename... Args>
int start(Kernel kernel, int64_t blocks, int threads, size_t bytes, cudaStream_t stream, Args... args) {
  cudaLaunchAttribute early;  // before the end of the kernel that is in the stream before
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// teams: of a block, with rows of their own.
template <typename Kernel>
int launch(Kernel kernel, const HopperAggregate& args, const Share& share, int teams, size_t shared,
           cudaStream_t stream) {
  const int bytes = static_cast<int>(shared);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int64_t blocks = divided(share.end - share.first, int64_t{4} * teams * share.tiles * kRows);
  return start(kernel, blocks, 384, shared, stream, args, share);
}

template <int C, typename T>
int join(const HopperAggregate& args, const Share& share, const float* bias, cudaStream_t stream) {
  const int64_t warps = divided(share.end - share.first, int64_t{share.tiles} * kRows);
  return start(join_kernel<C, T>, warps, C / 2, 0, stream, args, share, warps, bias);
}

constexpr int kTeams = 3;  // of a block, with rows of their own unless they share them

template <int C, int H, int kUnits, typename T>
int whole(const HopperAggregate& args, const Share& share, cudaStream_t stream) {
  const size_t shared = kUnits * (4 * C * H + 4 * (H + C)) + kTeams * Stream<C, 3>::kBytes + 4 * (C / 6);
  const int error = launch(whole_kernel<C, H, kUnits, kTeams, T>, args, share, kTeams, shared, stream);
  return error ? error : join<C, T>(args, share, args.units[kUnits - 1].out_bias, stream);
}

template <int C, int H, typename T>
int split(const HopperAggregate& args, const Share& share, cudaStream_t stream) {
  const size_t shared = 2 * C * H + kTeams * Stream<C, 2>::kBytes + 4 * (C / 6);
  int error = launch(project_kernel<C, H, kTeams, T>, args, share, kTeams, shared + 4 * H, stream);
  if (!error) {
    error = launch(finish_kernel<C, H, kTeams, T>, args, share, kTeams, shared + 4 * C, stream);
  }
  return error ? error : join<C, T>(args, share, args.units[0].out_bias, stream);
}

template <int C, int H, typename T>
int axes(const HopperAggregate& args, const Share& share, cudaStream_t stream) {
  const size_t shared = 4 * C * H + 2 * 3 * 128 * 2 * H + 4 * (3 * H + C + C / 6) + AxisStream<C>::kBytes;
  const int error = launch(axes_kernel<C, H, T>, args, share, 1, shared, stream);
  return error ? error : join<C, T>(args, share, args.units[0].out_bias, stream);
}

template <typename T>
int run(const HopperAggregate& args, int64_t width, const Share& share, cudaStream_t stream) {
  switch (width) {
    case 192:
      return whole<192, 96, 2, T>(args, share, stream);
    case 384:
      return split<384, 192, T>(args, share, stream);
    default:
      return axes<768, 32, T>(args, share, stream);
  }
}

Plan plan_of(int64_t width, int64_t hidden, int64_t groups, int64_t neighbors, int processors) {
  return Plan(groups, neighbors, width == 384 ? hidden : 0, width == 768 ? 1 : kTeams, processors);
}

}  // namespace

bool hopper_has(int64_t width, int64_t hidden, int64_t units) {
  return (width == 192 && hidden == 96 && units == 2) || (width == 384 && hidden == 192 && units == 1) ||
         (width == 768 && hidden == 32 && units == 1);
}

int hopper_processors() {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  return processors;
}

int64_t hopper_scratch(int64_t width, int64_t hidden, int64_t groups, int64_t neighbors, int processors) {
  if (groups == 0) return 0;
  const Plan plan = plan_of(width, hidden, groups, neighbors, processors);
  return plan.row_bytes() + plan.head_bytes(width) + (width == 384 ? plan.hidden_bytes(hidden) : 0);
}

int hopper_aggregate(const HopperAggregate& args, int64_t width, int64_t hidden, int processors,
                     void* scratch, void* stream_) {
  if (args.groups == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Plan plan = plan_of(width, hidden, args.groups, args.neighbors, processors);
  char* room = static_cast<char*>(scratch);
  Share share{};
  share.located.rows = reinterpret_cast<float4*>(room);
  share.located.middles = reinterpret_cast<int*>(share.located.rows + plan.tiles * kRows);
  share.heads = reinterpret_cast<uint32_t*>(room + plan.row_bytes());
  share.hidden = reinterpret_cast<uint4*>(room + plan.row_bytes() + plan.head_bytes(width));
  locate_kernel<<<static_cast<unsigned>(divided(args.groups, 4)), 128, 0, stream>>>(args, share.located);
  int error = cudaGetLastError();
  const int64_t rows = args.groups * args.neighbors;
  for (int64_t part = 0; share.first < rows && !error; part++, share.first = share.end) {
    share.tiles = plan.each(plan.tiles - share.first / kRows, part);
    share.end = std::min(rows, share.first + plan.warps * share.tiles * kRows);
    error = args.bfloat16 ? run<__nv_bfloat16>(args, width, share, stream)
                          : run<__half>(args, width, share, stream);
  }
  return error;
}

}  // namespace any2point
