// Local aggregation in evaluation on sm_90a, by warpgroup products with the rows in registers.
//
// A team of four warps has 64 rows at a time, 16 a warp: a thread builds its part of the rows x (gather,
// sine, cosine) where products take their first operand, hidden channels stay there, too, and sums of a
// product in float32 become the operand of the next without leaving registers. Weights stay in shared memory.
// Teams wait for nobody, so one builds while another multiplies. A warp goes through a range of tiles, each
// of two neighbours of eight groups (a bundle): a thread has two rows of one group, and keeps the maximum of
// it, partly in shared memory, until the bundle ends, without a word to other lanes; bundles that end in
// another warp's range are joined by a kernel of their own. The bias of the last layer is added to the
// maximum. What a row needs besides its features (offset and where they are) is found once, by a kernel
// before, which also writes the weights as they stand in shared memory, so that blocks bring them by a few
// bulk copies while they build their first rows. Units whose two weights do not fit into shared memory
// together take two kernels, with the hidden channels in memory between them, at most about 256 MB at a time;
// units whose rows do not fit into a team's registers share them out to three teams.
//
// A kernel that ptxas serialises for want of registers (C7512 in its messages) is to be avoided, and not for
// its speed alone: one in bfloat16 gave NaN under compute-sanitizer's memcheck and synccheck. whole_kernel is
// close to it: more of it at once in flight, or other conversions, bring the message back.
//
// H200, 32 clouds, us, all kernels, with the floor of products (790 TFLOP/s) and of the sine unit for one
// building of the rows at K = 81:
//                                              K = 81              K = 64
//   points, centres, channels, hidden, units   float16  bfloat16   float16  products   sines
//     1024      512       192      96     2        342       333       280       248      61
//      512      256       384     192     1        400       392       323       248      61
//      256      128       768      32     1        194       201       166        41      61
// All three by the op, with 297 MB at most: 948 us, for K = 64 762 us, of one cloud 83 us. Kernels that went
// through one group after the other took 386, 473 and 266 us in the first column, Triton 1601, 974 and 557.
// The search for rows takes 17, 10 and 6 us, and whole_kernel, project_kernel, finish_kernel and axes_kernel
// 333, 198, 203 and 189, with tensor cores at work in 68, 58, 57 and 19 % of the cycles and schedulers in 35,
// 23, 33 and 39 %. Limit: what a warp waits for. Not faster: four teams of fewer registers, the residual by
// products with an identity, half a pair of blocks built while the products of the other half run, points in
// shared memory with one group a warp (+2 %), two buffers of rows in project_kernel alone. Next: axis by
// axis, three warps of a scheduler wait for each other in every tile of axes_kernel.
#include <algorithm>

#include "local_aggregate/hopper_locate.cuh"

namespace any2point {
namespace {

// Where a bundle goes on in the next warps, the maxima of its parts, finished; a block per bundle.
template <int C, typename T>
__global__ void __launch_bounds__(C)
    join_kernel(const HopperAggregate args, const Share share, const float* bias) {
  wait_for_kernels();
  const int length = length_of(args), tiles = static_cast<int>(share.end - share.first);
  const int64_t bundle = share.first / length + blockIdx.x;
  const int begin = static_cast<int>(bundle * length - share.first), end = begin + length;
  // Warps that had its tiles; the first of them has written to `out`, unless the launch before did.
  const int first = begin < 0 ? 0 : begin / share.tiles + 1, last = (min(end, tiles) - 1) / share.tiles;
  if (first > last || bundle * kTogether + threadIdx.x / (C / 8) >= args.groups) return;
  uint4* const to = static_cast<uint4*>(args.out) + bundle * C + threadIdx.x;
  uint4 largest = *to;
  for (int warp = first; warp <= last; warp += 4) {
    uint4 other[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      other[i] = share.heads[static_cast<int64_t>(min(warp + i, last)) * C + threadIdx.x];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      largest = {Two<T>::max(largest.x, other[i].x), Two<T>::max(largest.y, other[i].y),
                 Two<T>::max(largest.z, other[i].z), Two<T>::max(largest.w, other[i].w)};
    }
  }
  if (end <= tiles) largest = finished<T>(largest, bias + threadIdx.x % (C / 8) * 8);  // else the next launch
  *to = largest;
}

// All units at once, for weights that fit into shared memory together.
template <int C, int H, int kUnits, int kTeams, typename T>
__global__ void __launch_bounds__(kTeams * 128, 1)
    whole_kernel(const __grid_constant__ HopperAggregate args, const Share share) {
  extern __shared__ __align__(1024) char room[];
  constexpr int kWeight = C * H * 2, kPairs = C / 64;
  char* const features = room + 2 * kUnits * kWeight;
  float* const in_bias = reinterpret_cast<float*>(features + kTeams * Stream<C, 2>::kBytes);
  float* const out_bias = in_bias + kUnits * H;
  float* const frequency = out_bias + (kUnits - 1) * C;
  for (int u = 0; u < kUnits; u++) {
    for (int i = threadIdx.x; i < H; i += blockDim.x) in_bias[u * H + i] = args.units[u].in_bias[i];
    if (u + 1 < kUnits) load_out_bias<C>(args.units[u].out_bias, out_bias + u * C);
  }
  load_frequency<C>(args, frequency);
  const Delivery delivery(reinterpret_cast<char*>(frequency + C / 6) + Largest<kPairs, kPairs, T>::kBytes);
  const int64_t warp = this_warp();
  Course course = course_of(args, share, warp);
  wait_for_kernels();
  let_next_begin();
  __syncthreads();
  delivery.begin<2 * kUnits * kWeight>(room, share.located.image);
  const uint64_t weights = descriptor(room);
  Stream<C, 2> feed(args, share, course, features);
  feed.next(0);
  Largest<kPairs, kPairs, T> largest(reinterpret_cast<char*>(frequency + C / 6));
  int middle = middle_of<C>(share, course.bundle);
  delivery.wait();
  for (int tile = 0; tile < share.tiles; tile++) {
    Channels x[kPairs];
    wait_for_copies();
    const Rows rows = feed.rows(tile, middle);
#pragma unroll
    for (int p = 0; p < kPairs; p++) {
      feed.load(rows, p, x[p]);
      if (p == kLastNear<C>) feed.next(tile + 1);
      add_encoding<C, T>(rows, frequency, p, x[p]);
    }
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
        positive_hidden<T, H>(d, h);
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
        if (u + 1 < kUnits) {
#pragma unroll
          for (int b = 0; b < 2; b++) positive_channels<T>(d + 16 * b, x[p][b]);
        } else {
          largest.take(p, d);
        }
      }
    }
    largest.template write<C>(args, share, warp, course, tile, 0, args.units[kUnits - 1].out_bias);
    if (course.go_on(args, tile)) middle = middle_of<C>(share, course.bundle);
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
  float* const frequency = bias + 2 * H;
  load_biases<H>(args.units[0].in_bias, bias);
  load_frequency<C>(args, frequency);
  const Delivery delivery(reinterpret_cast<char*>(frequency + C / 6));
  const int64_t warp = this_warp();
  Course course = course_of(args, share, warp);
  wait_for_kernels();
  let_next_begin();
  __syncthreads();
  delivery.begin<2 * C * H>(room, share.located.image);
  const uint64_t weights = descriptor(room);
  Stream<C, 2> feed(args, share, course, features);
  feed.next(0);
  Rows rows = feed.rows(0, middle_of<C>(share, course.bundle));
  uint4* to = share.hidden + warp / 4 * share.tiles * (H / 16) * 128 + threadIdx.x % 128;
  for (int tile = 0; tile < share.tiles; tile++, to += H / 16 * 128) {
    float d[H / 2];
    set_biases<H>(bias, d);
    pin(d);
    wait_for_copies();
    const Rows current = rows;
    Channels x[2];  // products may still read one while another is built
#pragma unroll
    for (int p = 0; p < kPairs; p++) {
      feed.load(current, p, x[p % 2]);
      if (p == kLastNear<C>) {
        feed.next(tile + 1);
        int middle = current.middle[0];
        if (course.go_on(args, tile)) middle = middle_of<C>(share, course.bundle);
        rows = feed.rows(tile + 1, middle);
      }
      add_encoding<C, T>(current, frequency, p, x[p % 2]);
      if (p == 0 && tile == 0) delivery.wait();
      in_product<H, T>(d, x[p % 2], weights + 2 * p * H * kBlockBytes / 16);
      if (p + 1 < kPairs) wgmma_wait<1>();
    }
    wgmma_wait<0>();
    pin(d);
    uint32_t h[H / 16][4];
    positive_hidden<T, H>(d, h);
#pragma unroll
    for (int k = 0; k < H / 16; k++) __stcg(to + k * 128, make_uint4(h[k][0], h[k][1], h[k][2], h[k][3]));
  }
}

constexpr int kFinishRoom = 4;  // pairs

// The second layer, the residual and the maximum. While the products of 64 channels run, the next 64 are
// built.
template <int C, int H, int kTeams, typename T>
__global__ void __launch_bounds__(kTeams * 128, 1)
    finish_kernel(const __grid_constant__ HopperAggregate args, const Share share) {
  extern __shared__ __align__(1024) char room[];
  constexpr int kPairs = C / 64, kRoom = kFinishRoom;
  char* const features = room + C * H * 2;
  float* const frequency = reinterpret_cast<float*>(features + PairStream<C>::kBytes);
  load_frequency<C>(args, frequency);
  const Delivery delivery(reinterpret_cast<char*>(frequency + C / 6) + Largest<kPairs, kRoom, T>::kBytes);
  const int64_t warp = this_warp();
  Course course = course_of(args, share, warp);
  wait_for_kernels();
  let_next_begin();
  __syncthreads();
  delivery.begin<2 * C * H>(room, share.located.image + 2 * C * H);
  const uint64_t weights = descriptor(room);
  PairStream<C> feed(args, share, course, features);
  const uint4* from = share.hidden + warp / 4 * share.tiles * (H / 16) * 128 + threadIdx.x % 128;
  Largest<kPairs, kRoom, T> largest(reinterpret_cast<char*>(frequency + C / 6));
  Course next;
  int middle = middle_of<C>(share, course.bundle);
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
    if (threadIdx.x % 128 == 0 && tile + 1 < share.tiles) to_cache(from + H / 16 * 128, H * 128);
    const Rows rows = feed.rows(tile);
    float d[2][32];
    Channels x;
#pragma unroll
    for (int p = 0; p <= kPairs; p++) {
      if (p < kPairs) {
        feed.take(p, x);
        if (p + 1 == kPairs) {
          next = course;
          if (next.go_on(args, tile)) middle = middle_of<C>(share, next.bundle);
          feed.find(tile + 1, middle);
        }
        feed.bring((p + 1) % kPairs);
        add_encoding<C, T>(rows, frequency, p, x);
        if (p == 0 && tile == 0) delivery.wait();
      }
      if (p < kPairs) {
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
        largest.take(p - 1, d[(p + 1) % 2]);
      }
    }
    largest.template write<C>(args, share, warp, course, tile, 0, args.units[0].out_bias);
    course = next;
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
  float* const frequency = in_bias + 3 * H;
  char* const maxima = reinterpret_cast<char*>(frequency + C / 6);
  for (int i = threadIdx.x; i < 3 * H; i += blockDim.x) in_bias[i] = i < H ? args.units[0].in_bias[i] : 0;
  load_frequency<C>(args, frequency);
  const Delivery delivery(maxima + Largest<kParts, kParts, T>::kBytes + AxisStream<C>::kBytes);
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x % 128 / 32;
  Course course = course_of(args, share, warp);
  wait_for_kernels();
  let_next_begin();
  __syncthreads();
  delivery.begin<2 * kWeight>(room, share.located.image);
  const uint64_t in_weight = descriptor(room + axis * 2 * kParts * H * kBlockBytes);
  const uint64_t out_weight = descriptor(room + kWeight + axis * 64 * kParts * kBlockBytes);
  AxisStream<C> feed(args, share, course, axis, maxima + Largest<kParts, kParts, T>::kBytes);
  Course ahead = course;
  int middle = middle_of<C>(share, course.bundle);
  Channels x[kParts];
  uint32_t h[H / 16][4];
  float hidden[H / 2];
  const auto build = [&](int tile, int p) {  // and begin the first layer of it
    feed.take(x[p]);
    const float offset[2] = {feed.offset[0], feed.offset[1]};
    if (p + 1 == kParts) {
      if (ahead.go_on(args, tile)) middle = middle_of<C>(share, ahead.bundle);
      feed.find(tile + 1, middle);
    }
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
    positive_hidden<T, H>(d, h);
    set_bias<H>(in_bias + axis * H, hidden);
    pin(hidden);
  };
  set_bias<H>(in_bias + axis * H, hidden);
  pin(hidden);
  delivery.wait();
#pragma unroll
  for (int p = 0; p < kParts; p++) build(0, p);
  add_up(0);

  Largest<kParts, kParts, T> largest(maxima);
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
      largest.take(p, d);
    }
    add_up(tile + 1);
    largest.template write<C>(args, share, warp, course, tile, axis * kParts, args.units[0].out_bias);
    course.go_on(args, tile);
  }
}

// Launches.

constexpr int64_t kHidden = 256 << 20;  // bytes of hidden channels at a time, about

// How the tiles of all rows are cut into launches, and what they need.
struct Plan {
  int64_t bundles;
  int64_t tiles;
  int64_t parts;
  int64_t warps;  // of a part, with rows of their own, at most

  Plan(int64_t groups, int64_t neighbors, int64_t hidden, int teams, int processors)
      : bundles(divided(groups, kTogether)),
        tiles(bundles * ((neighbors + 1) / 2)),
        parts(std::max<int64_t>(1, divided(tiles * kRows * hidden * 2, kHidden))),
        warps(int64_t{4} * teams * processors) {}

  // Tiles of a warp if so many are left for so many parts.
  int each(int64_t left, int64_t part) const {
    return static_cast<int>(divided(divided(left, parts - part), warps));
  }
  int64_t row_bytes() const { return tiles * kRows * static_cast<int64_t>(sizeof(float4)); }
  int64_t middle_bytes() const { return bundles * kTogether * static_cast<int64_t>(sizeof(int)); }
  int64_t head_bytes(int64_t width) const { return warps * kTogether * width * 2; }
  int64_t hidden_bytes(int64_t hidden) const { return warps * each(tiles, 0) * kRows * hidden * 2; }
};

// A launch that may begin before the end of the kernel before it in the stream (programmatic dependent
// launch). Every thread of every kernel launched so passes wait_for_kernels(), which is the end of that
// kernel with all that it wrote, before it writes anything but shared memory, and before it reads what the
// call has written; before, it reads nothing but biases and wavelengths. None lets the next one begin, and no
// thread ends, without having passed it, so that a kernel's end, or only the beginning of the one after it,
// implies the end of all those two before: neither results nor scratch memory are written while an earlier
// kernel reads them. locate_kernel, the first of a call, is launched in the ordinary way, after the end of
// all that is in the stream, so biases are there, and memory that the caching allocator hands on in the order
// of the stream is free. What follows in the stream in the ordinary way waits for the end of join_kernel, and
// thereby of all.
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
  const int64_t blocks = divided(share.end - share.first, int64_t{4} * teams * share.tiles);
  return start(kernel, blocks, 384, shared, stream, args, share);
}

template <int C, typename T>
int join(const HopperAggregate& args, const Share& share, const float* bias, cudaStream_t stream) {
  const int64_t length = length_of(args), bundles = (share.end - 1) / length - share.first / length + 1;
  return start(join_kernel<C, T>, bundles, C, 0, stream, args, share, bias);
}

constexpr int kTeams = 3;  // of a block, with rows of their own unless they share them

template <int C, int H, int kUnits, typename T>
int whole(const HopperAggregate& args, const Share& share, cudaStream_t stream) {
  const size_t shared = kUnits * (4 * C * H + 4 * H) + 4 * (kUnits - 1) * C + kTeams * Stream<C, 2>::kBytes +
                        4 * (C / 6) + Largest<C / 64, C / 64, T>::kBytes + Delivery::kBytes;
  const int error = launch(whole_kernel<C, H, kUnits, kTeams, T>, args, share, kTeams, shared, stream);
  return error ? error : join<C, T>(args, share, args.units[kUnits - 1].out_bias, stream);
}

template <int C, int H, typename T>
int split(const HopperAggregate& args, const Share& share, cudaStream_t stream) {
  const size_t shared = 2 * C * H + 4 * (C / 6) + Delivery::kBytes;
  int error = launch(project_kernel<C, H, kTeams, T>, args, share, kTeams,
                     shared + kTeams * Stream<C, 2>::kBytes + 8 * H, stream);
  if (!error) {
    error = launch(finish_kernel<C, H, kTeams, T>, args, share, kTeams,
                   shared + PairStream<C>::kBytes + Largest<C / 64, kFinishRoom, T>::kBytes, stream);
  }
  return error ? error : join<C, T>(args, share, args.units[0].out_bias, stream);
}

template <int C, int H, typename T>
int axes(const HopperAggregate& args, const Share& share, cudaStream_t stream) {
  const size_t shared = 4 * C * H + 2 * 3 * 128 * 2 * H + 4 * (3 * H + C / 6) +
                        Largest<Order<C>::kParts, Order<C>::kParts, T>::kBytes + AxisStream<C>::kBytes +
                        Delivery::kBytes;
  const int error = launch(axes_kernel<C, H, T>, args, share, 1, shared, stream);
  return error ? error : join<C, T>(args, share, args.units[0].out_bias, stream);
}

template <int C, int H, int kUnits>
int locate(const HopperAggregate& args, const Located& located, int64_t bundles, cudaStream_t stream) {
  int each = 4;  // bundles of a block, if they are many and of one cloud
  while (each > 1 && bundles < 512 * each) each /= 2;
  const int64_t bytes = args.rows * static_cast<int64_t>(sizeof(float4));
  const bool cached = args.centers % (each * kTogether) == 0 && bytes <= 48 << 10;
  if (!cached) each = 1;
  const unsigned blocks = static_cast<unsigned>(kImageBlocks<C, H, kUnits> + bundles / each);
  if (cached) {
    locate_kernel<C, H, kUnits, true>
        <<<blocks, kLocateThreads, static_cast<size_t>(bytes), stream>>>(args, located, each);
  } else {
    locate_kernel<C, H, kUnits, false><<<blocks, kLocateThreads, 0, stream>>>(args, located, each);
  }
  return cudaGetLastError();
}

int locate(const HopperAggregate& args, int64_t width, const Located& located, int64_t bundles,
           cudaStream_t stream) {
  switch (width) {
    case 192:
      return locate<192, 96, 2>(args, located, bundles, stream);
    case 384:
      return locate<384, 192, 1>(args, located, bundles, stream);
    default:
      return locate<768, 32, 1>(args, located, bundles, stream);
  }
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

int64_t image_bytes(int64_t width, int64_t hidden) { return (width == 192 ? 2 : 1) * 4 * width * hidden; }

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
  return image_bytes(width, hidden) + plan.row_bytes() + plan.middle_bytes() + plan.head_bytes(width) +
         (width == 384 ? plan.hidden_bytes(hidden) : 0);
}

int hopper_aggregate(const HopperAggregate& args, int64_t width, int64_t hidden, int processors,
                     void* scratch, void* stream_) {
  if (args.groups == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const Plan plan = plan_of(width, hidden, args.groups, args.neighbors, processors);
  char* room = static_cast<char*>(scratch);
  Share share{};
  share.located.image = room;
  share.located.rows = reinterpret_cast<float4*>(room += image_bytes(width, hidden));
  share.located.middles = reinterpret_cast<int*>(room += plan.row_bytes());
  share.heads = reinterpret_cast<uint4*>(room += plan.middle_bytes());
  share.hidden = reinterpret_cast<uint4*>(room + plan.head_bytes(width));
  int error = locate(args, width, share.located, plan.bundles, stream);
  for (int64_t part = 0; share.first < plan.tiles && !error; part++, share.first = share.end) {
    share.tiles = plan.each(plan.tiles - share.first, part);
    share.end = std::min(plan.tiles, share.first + plan.warps * share.tiles);
    error = args.bfloat16 ? run<__nv_bfloat16>(args, width, share, stream)
                          : run<__half>(args, width, share, stream);
  }
  return error;
}

}  // namespace any2point
