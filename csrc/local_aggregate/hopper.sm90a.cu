// Local aggregation in evaluation on sm_90a, by warpgroup products with the rows in registers.
//
// A team of four warps has 64 rows at a time, 16 a warp: a thread builds its part of the rows x (gather,
// sine, cosine) where products take their first operand, hidden channels stay there, too, and sums of a
// product in float32 become the operand of the next without leaving registers. Weights stay in shared memory.
// Teams wait for nobody, so one builds while another multiplies. A warp goes through a range of rows (group
// by group, all K neighbours after each other; only the end of everything is padded) and keeps the maximum of
// its group; groups that end in the next warp's range are joined by a kernel of their own. Units whose two
// weights do not fit into shared memory together (or whose rows do not fit into registers) take two kernels,
// with the hidden channels in memory between them, at most about 160 MB at a time.
//
// H200, 32 clouds, float16, us, with the floor of products (790 TFLOP/s) and of the sine unit for one
// building of the rows:
//   points, centres, channels, hidden, units   K = 81   K = 64   products   sines
//     1024      512       192      96     2       482      378        248      61
//      512      256       384     192     1       575      448        248      61
//      256      128       768      32     1       366      258         41      61
// Triton takes 1601, 974 and 557 us at K = 81. Limit: instructions. The second kernel of a split unit has
// 6,100 of them in its loop for 768 channels and 16 rows of a warp (385 are sines), for the maximum over rows
// and the residual more than for x, and three warps a scheduler do not hide what one waits for.
#include <algorithm>

#include "local_aggregate/hopper_rows.cuh"

namespace any2point {
namespace {

// Where a group goes on in the next warps, the maxima of its parts; a block per warp.
template <int C, typename T>
__global__ void join_kernel(const HopperAggregate args, const Part part, int64_t warps) {
  Walk walk = walk_of(args, part, blockIdx.x);
  const int64_t group = walk.first;
  if (walk.groups == 0 || walk.begin == 0) return;
  if (walk.begin > part.tiles * kRows && blockIdx.x > 0) return;  // the warp before goes on with it, too
  uint32_t* to = static_cast<uint32_t*>(args.out) + group * (C / 2) + threadIdx.x;
  uint32_t largest = *to;
  for (int64_t warp = blockIdx.x; warp < warps; warp++) {
    walk = walk_of(args, part, warp);
    if (walk.groups == 0 || walk.first != group) break;
    largest = Two<T>::max(largest, part.heads[warp * (C / 2) + threadIdx.x]);
  }
  *to = largest;
}

// All units at once, for weights that fit into shared memory together.
template <int C, int H, int kUnits, int kTeams, typename T>
__global__ void __launch_bounds__(kTeams * 128, 1)
    whole_kernel(const __grid_constant__ HopperAggregate args, const Part part) {
  extern __shared__ __align__(1024) char room[];
  constexpr int kWeight = C * H * 2, kPairs = C / 64;
  char* const features = room + 2 * kUnits * kWeight;
  float* const in_bias = reinterpret_cast<float*>(features + kTeams * Feed<C>::kBytes);
  float* const out_bias = in_bias + kUnits * H;
  float* const frequency = out_bias + kUnits * C;
  Group* const groups = reinterpret_cast<Group*>(frequency + C / 6) + threadIdx.x / 32 * kGroups;
  for (int u = 0; u < kUnits; u++) {
    load_in_weight<C, H>(args.units[u].in_weight, room + 2 * u * kWeight);
    load_out_weight<C, H>(args.units[u].out_weight, room + (2 * u + 1) * kWeight);
    for (int i = threadIdx.x; i < H; i += blockDim.x) in_bias[u * H + i] = args.units[u].in_bias[i];
    load_out_bias<C>(args.units[u].out_bias, out_bias + u * C);
  }
  load_frequency<C>(args, frequency);
  const Walk walk = walk_of(args, part, this_warp());
  load_groups(args, part, walk, groups);
  publish();

  Feed<C> feed(args, walk, groups, features);
  Rows rows = feed.next(0);
  uint32_t largest[kPairs] = {};
  int segment = 0;
  for (int tile = 0; tile < part.tiles; tile++) {
    Channels x[kPairs];
    feed.wait();
#pragma unroll
    for (int p = 0; p < kPairs; p++) feed.load(rows, p, x[p]);
    const Rows current = rows;
    rows = feed.next(tile + 1);
#pragma unroll
    for (int p = 0; p < kPairs; p++) add_encoding<C, T>(current, frequency, p, x[p]);
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
          const char* weight = room + 2 * u * kWeight + k / 2 * H * kBlockBytes;
          wgmma<H, T>(d, a, descriptor(weight + k % 2 * 32));
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(d);
        relu_hidden<T, H>(d, h);
      }
      constexpr int kSome = kTeams > 2 ? 64 : 96, kBlocks = kSome / 32;  // channels at a time: registers
#pragma unroll
      for (int first = 0; first < C; first += kSome) {
        float d[kSome / 2];
#pragma unroll
        for (int b = 0; b < kBlocks; b++) {
          const int block = first / 32 + b;
          set_residual<T>(x[block / 2][block % 2], out_bias + u * C + 32 * block, d + 16 * b);
        }
        out_product<C, H, kSome, T>(d, h, room + (2 * u + 1) * kWeight, first);
        wgmma_wait<0>();
        pin(d);
#pragma unroll
        for (int b = 0; b < kBlocks; b++) {
          const int block = first / 32 + b;
          relu_channels<T>(d + 16 * b, x[block / 2][block % 2]);
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kPairs; p++)
      take_largest<C, T>(args, part, walk, tile, segment, p, x[p], &largest[p]);
    segment = segment_after(args, walk, tile, segment);
  }
}

// The first layer of a unit, and its hidden channels to memory as operands of the second.
template <int C, int H, int kTeams, typename T>
__global__ void __launch_bounds__(kTeams * 128, 1)
    project_kernel(const __grid_constant__ HopperAggregate args, const Part part) {
  extern __shared__ __align__(1024) char room[];
  constexpr int kPairs = C / 64;
  char* const features = room + C * H * 2;
  float* const bias = reinterpret_cast<float*>(features + kTeams * Feed<C>::kBytes);
  float* const frequency = bias + H;
  Group* const groups = reinterpret_cast<Group*>(frequency + C / 6) + threadIdx.x / 32 * kGroups;
  load_in_weight<C, H>(args.units[0].in_weight, room);
  for (int i = threadIdx.x; i < H; i += blockDim.x) bias[i] = args.units[0].in_bias[i];
  load_frequency<C>(args, frequency);
  const Walk walk = walk_of(args, part, this_warp());
  load_groups(args, part, walk, groups);
  publish();

  Feed<C> feed(args, walk, groups, features);
  Rows rows = feed.next(0);
  const int64_t team = static_cast<int64_t>(blockIdx.x) * kTeams + threadIdx.x / 128;
  uint4* to = part.hidden + team * part.tiles * (H / 16) * 128 + threadIdx.x % 128;
  for (int tile = 0; tile < part.tiles; tile++, to += H / 16 * 128) {
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
      if (p == kLastNear<C>) rows = feed.next(tile + 1);
      add_encoding<C, T>(current, frequency, p, x[p % kBuffers]);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; k++) {
        uint32_t a[4];
        operand(x[p % kBuffers], k, a);
        wgmma<H, T>(d, a, descriptor(room + (2 * p + k / 2) * H * kBlockBytes + k % 2 * 32));
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
    finish_kernel(const __grid_constant__ HopperAggregate args, const Part part) {
  extern __shared__ __align__(1024) char room[];
  constexpr int kPairs = C / 64;
  char* const features = room + C * H * 2;
  float* const bias = reinterpret_cast<float*>(features + kTeams * Feed<C>::kBytes);
  float* const frequency = bias + C;
  Group* const groups = reinterpret_cast<Group*>(frequency + C / 6) + threadIdx.x / 32 * kGroups;
  load_out_weight<C, H>(args.units[0].out_weight, room);
  load_out_bias<C>(args.units[0].out_bias, bias);
  load_frequency<C>(args, frequency);
  const Walk walk = walk_of(args, part, this_warp());
  load_groups(args, part, walk, groups);
  publish();

  Feed<C> feed(args, walk, groups, features);
  Rows rows = feed.next(0);
  const int64_t team = static_cast<int64_t>(blockIdx.x) * kTeams + threadIdx.x / 128;
  const uint4* from = part.hidden + team * part.tiles * (H / 16) * 128 + threadIdx.x % 128;
  uint32_t largest[kPairs] = {};
  int segment = 0;
  for (int tile = 0; tile < part.tiles; tile++, from += H / 16 * 128) {
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
        Channels z;
#pragma unroll
        for (int b = 0; b < 2; b++) relu_channels<T>(d[(p + 1) % 2] + 16 * b, z[b]);
        take_largest<C, T>(args, part, walk, tile, segment, p - 1, z, &largest[p - 1]);
      }
    }
    segment = segment_after(args, walk, tile, segment);
  }
}

// Launches.

constexpr int64_t kHidden = 160 << 20;  // bytes of hidden channels at a time, about

// How the tiles of all groups are cut into parts, and what they need.
struct Plan {
  int64_t tiles;  // of all rows
  int64_t warps;  // of a part
  int each;       // tiles of a warp
  int64_t parts;

  Plan(int64_t groups, int64_t neighbors, int64_t hidden, int teams, int processors)
      : tiles(divided(groups * neighbors, kRows)) {
    const int64_t most = std::max<int64_t>(1, (int64_t{kGroups - 1} * neighbors + 1) / kRows);
    warps = int64_t{4} * teams * processors;
    parts = std::max<int64_t>(1, divided(tiles * kRows * hidden * 2, kHidden));
    each = static_cast<int>(std::min(most, divided(divided(tiles, parts), warps)));
    if (hidden == 0) warps = divided(divided(tiles, each), 4 * teams) * 4 * teams;
    parts = divided(tiles, warps * each);
  }
  int64_t hidden_bytes(int64_t hidden) const { return warps * each * kRows * hidden * 2; }
  int64_t head_bytes(int64_t width) const { return warps * width * 2; }
};

template <typename Kernel>
int launch(Kernel kernel, const HopperAggregate& args, const Part& part, int teams, size_t shared,
           cudaStream_t stream) {
  const int bytes = static_cast<int>(shared + sizeof(Group) * kGroups * 4 * teams);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int64_t blocks = divided(part.end - part.first, int64_t{4} * teams * part.tiles * kRows);
  kernel<<<static_cast<unsigned>(blocks), 128 * teams, bytes, stream>>>(args, part);
  return cudaGetLastError();
}

template <int C, typename T>
int join(const HopperAggregate& args, const Part& part, cudaStream_t stream) {
  const int64_t warps = divided(part.end - part.first, int64_t{part.tiles} * kRows);
  join_kernel<C, T><<<static_cast<unsigned>(warps), C / 2, 0, stream>>>(args, part, warps);
  return cudaGetLastError();
}

template <int C, int H, int kUnits, int kTeams, typename T>
int whole(const HopperAggregate& args, Part part, cudaStream_t stream) {
  const size_t shared = kUnits * (4 * C * H + 4 * (H + C)) + kTeams * Feed<C>::kBytes + 4 * (C / 6);
  const int error = launch(whole_kernel<C, H, kUnits, kTeams, T>, args, part, kTeams, shared, stream);
  return error ? error : join<C, T>(args, part, stream);
}

template <int C, int H, int kTeams, typename T>
int split(const HopperAggregate& args, Part part, cudaStream_t stream) {
  const size_t shared = 2 * C * H + kTeams * Feed<C>::kBytes + 4 * (C / 6);
  int error = launch(project_kernel<C, H, kTeams, T>, args, part, kTeams, shared + 4 * H, stream);
  if (!error) error = launch(finish_kernel<C, H, kTeams, T>, args, part, kTeams, shared + 4 * C, stream);
  return error ? error : join<C, T>(args, part, stream);
}

constexpr int kTeams = 3;

template <typename T>
int run(const HopperAggregate& args, int64_t width, const Part& part, cudaStream_t stream) {
  switch (width) {
    case 192:
      return whole<192, 96, 2, kTeams, T>(args, part, stream);
    case 384:
      return split<384, 192, kTeams, T>(args, part, stream);
    default:
      return split<768, 32, kTeams, T>(args, part, stream);
  }
}

Plan plan_of(int64_t width, int64_t hidden, int64_t groups, int64_t neighbors, int processors) {
  return Plan(groups, neighbors, width == 192 ? 0 : hidden, kTeams, processors);
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
  const int64_t scales = groups * static_cast<int64_t>(sizeof(float4));
  return scales + plan.head_bytes(width) + (width == 192 ? 0 : plan.hidden_bytes(hidden));
}

int hopper_aggregate(const HopperAggregate& args, int64_t width, int64_t hidden, int processors,
                     void* scratch, void* stream_) {
  if (args.groups == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Plan plan = plan_of(width, hidden, args.groups, args.neighbors, processors);
  float4* const scales = static_cast<float4*>(scratch);
  uint32_t* const heads = reinterpret_cast<uint32_t*>(scales + args.groups);
  Part part{0, 0, plan.each, scales, reinterpret_cast<uint4*>(heads + plan.head_bytes(width) / 4), heads};
  scale_kernel<<<static_cast<unsigned>(divided(args.groups, 4)), 128, 0, stream>>>(args, scales);
  int error = cudaGetLastError();
  const int64_t rows = args.groups * args.neighbors;
  for (; part.first < rows && !error; part.first = part.end) {
    part.end = std::min(rows, part.first + plan.warps * plan.each * kRows);
    error = args.bfloat16 ? run<__nv_bfloat16>(args, width, part, stream)
                          : run<__half>(args, width, part, stream);
  }
  return error;
}

}  // namespace any2point
