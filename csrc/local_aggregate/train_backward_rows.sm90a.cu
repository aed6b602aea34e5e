// From the gradient of the hidden layer of the first unit to that of its first weight: train_rows_grad of
// train.h without its sums over neighbours. Times are in train_backward.h.
//
// weight_grad = x' dy1 is a product over rows: both operands lie in shared memory as they are built, channels
// in a row, and are read across; sums stay in registers over all tiles of a block. dz and y1 come by bulk
// copies, some tiles ahead.
#include "local_aggregate/train_backward_rows.cuh"

namespace any2point {
namespace {

// Up to here blocks of a cluster, or threads of the block if it is alone, have written and read.
template <int kBlocks>
__device__ __forceinline__ void cluster_publish() {
  if constexpr (kBlocks == 1) {
    publish();
  } else {
    asm volatile("fence.proxy.async;" ::: "memory");
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
  }
}

// To the same place of every block's shared memory.
template <int kBlocks>
__device__ __forceinline__ void cluster_put(char* to, const uint4& v) {
  if constexpr (kBlocks == 1) {
    *reinterpret_cast<uint4*>(to) = v;
  } else {
#pragma unroll
    for (int i = 0; i < kBlocks; i++) {
      asm volatile(
          "{\n.reg .u32 at;\nmapa.shared::cluster.u32 at, %0, %1;\n"
          "st.shared::cluster.v4.u32 [at], {%2, %3, %4, %5};\n}" ::"r"(shared_address(to)),
          "r"(i), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
          : "memory");
    }
  }
}

// Launches so many clusters as run at the same time, `most` at most.
template <typename Kernel, typename Args>
int launch_clusters(Kernel kernel, const Args& args, int blocks, int* most, int threads, size_t shared,
                    cudaStream_t stream) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(*most * blocks);
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (blocks > 1) {
    int found = 0;
    error = cudaOccupancyMaxActiveClusters(&found, kernel, &config);
    if (error != cudaSuccess) return error;
    *most = std::max(1, std::min(*most, found));
    config.gridDim = static_cast<unsigned>(*most * blocks);
  }
  return cudaLaunchKernelEx(&config, kernel, args);
}

struct Bottom {
  const Place* places;    // [M]
  const int* middles;     // [groups]
  const uint4* features;  // [B N, C / 2]
  const uint4* zeros;     // [C / 2]
  const float* wavelength;
  const uint4* before;  // [M, H]
  uint4* dz;            // [M, H], in whose place dy1 is left
  InnerNorm norm;
  float* parts;  // [workers, slices, 192, H]
  int rows;
  int neighbors;
};

template <int H>
constexpr int kBottomBlocks = H == 32 ? 2 : 1;  // of a multiprocessor
// Tiles of dz and y1 that are on their way.
template <int H>
constexpr int kStages = H == 192 ? 2 : 3;
// Bytes of the rows of dy1 that a block makes of a tile.
template <int C, int H>
constexpr int kMadeBytes = kOuterRows / (C / kSlice) * H * 2;
template <int C, int H>
constexpr int kBottomBytes = 2 * kOuterRows * (kSlice + H) * 2 + kStages<H> * 2 * kMadeBytes<C, H> + 12 * H +
                             4 * (C / 6) + 8 * kStages<H>;

// The blocks of a cluster share a tile: each has 192 channels of x, makes its part of the rows of dy1, and
// writes them to the others' shared memory. A warp brings 8 rows of x, a thread 8 channels of every 32 of a
// row, while the products of the tile before run. Of dy1 a thread has the same 8 channels in all its rows.
template <int C, int H, typename T>
__global__ void __launch_bounds__(kTeams * 128, kBottomBlocks<H>)
    bottom_kernel(const __grid_constant__ Bottom args) {
  constexpr int kSlices = C / kSlice, kX = kOuterRows * kSlice * 2, kY = kOuterRows * H * 2;
  constexpr int kThreads = kTeams * 128, kMade = kOuterRows / kSlices, kItems = kMade * H / 8;
  constexpr int kEach = kThreads / (H / 8), kTimes = (kItems + kThreads - 1) / kThreads;
  constexpr int kBytes = kMadeBytes<C, H>;
  extern __shared__ __align__(1024) char room[];
  char* const y = room + 2 * kX;
  char* const slots = y + 2 * kY;  // [kStages][dz, y1]
  float* const norm = reinterpret_cast<float*>(slots + kStages<H> * 2 * kBytes);
  float* frequency = norm + 3 * H;
  uint64_t* const ready = reinterpret_cast<uint64_t*>(frequency + C / 6);  // [kStages]
  load_norm<H>(args.norm, norm);
  for (int i = threadIdx.x; i < C / 6; i += blockDim.x) frequency[i] = 1 / args.wavelength[i];
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages<H>; i++) barrier_init(ready + i, 1);
  }
  cluster_publish<kSlices>();

  const int slice = blockIdx.x % kSlices, worker = blockIdx.x / kSlices, workers = gridDim.x / kSlices;
  const int all = (args.rows + kOuterRows - 1) / kOuterRows;
  const int tiles = all > worker ? (all - worker - 1) / workers + 1 : 0;  // of this worker: every workers-th
  const int in_tile = threadIdx.x / 4, chunk = threadIdx.x % (H / 8);
  const uint32_t x_at = chunk_at<kOuterRows>(threadIdx.x % 4, in_tile);
  const uint32_t y_at = chunk_at<kOuterRows>(chunk, slice * kMade + threadIdx.x / (H / 8));
  frequency += slice * 32 + threadIdx.x % 4 * 8;
  // The rows that this block makes of a tile, from where on and how many.
  const auto row_of = [&](int tile) { return (worker + tile * workers) * kOuterRows; };
  const auto made_at = [&](int tile) { return row_of(tile) + slice * kMade; };
  const auto made = [&](int tile) { return max(min(args.rows - made_at(tile), kMade), 0); };
  const auto fetch = [&](int tile) {  // by one thread
    if (tile >= tiles) return;
    char* const to = slots + tile % kStages<H> * 2 * kBytes;
    uint64_t* const barrier = ready + tile % kStages<H>;
    const uint32_t bytes = made(tile) * H * 2;
    const int64_t from = int64_t{made_at(tile)} * (H / 8);
    barrier_expect(barrier, 2 * bytes);
    if (bytes > 0) {
      bulk_copy(to, args.dz + from, bytes, barrier);
      bulk_copy(to + kBytes, args.before + from, bytes, barrier);
    }
  };
  Place place;  // of the next tile's row
  int middle;
  const auto find = [&](int tile) {
    const int row = min(row_of(min(tile, tiles - 1)) + in_tile, args.rows - 1);
    place = load_place(args.places + row);
    middle = __ldg(args.middles + static_cast<uint32_t>(row) / static_cast<uint32_t>(args.neighbors));
  };
  const auto build = [&](int tile) {
    char* const to_x = room + tile % 2 * kX;
    char* const to_y = y + tile % 2 * kY;
    const uint4* const near = features_of<C>(args.features, args.zeros, place.near);
    const uint4* const center = features_of<C>(args.features, args.zeros, middle);
    const float offset[3] = {place.offset[0], place.offset[1], place.offset[2]};
    uint4 ahead[2][2];
    const auto gather = [&](int p) {
#pragma unroll
      for (int i = 0; i < 2; i++) ahead[p % 2][i] = feature<C>(near, center, slice, 2 * p + i);
    };
    gather(0);
    find(tile + 1);
    barrier_wait(ready + tile % kStages<H>, tile / kStages<H> % 2);
    const char* const slot = slots + tile % kStages<H> * 2 * kBytes + threadIdx.x * 16;
    const int left = made(tile) * (H / 8);
    uint4* const dy1 = args.dz + int64_t{made_at(tile)} * (H / 8) + threadIdx.x;
    const Line line = line_of<H>(norm, 8 * chunk);
#pragma unroll
    for (int i = 0; i < kTimes; i++) {
      const int item = threadIdx.x + i * kThreads;
      if (kItems % kThreads == 0 || item < kItems) {
        const uint4* from = reinterpret_cast<const uint4*>(slot) + i * kThreads;
        uint4 v = normed_grad<T>(from[0], from[kBytes / 16], line);
        if (item >= left) v = {0, 0, 0, 0};
        cluster_put<kSlices>(to_y + y_at + i * kEach * kBlockBytes, v);
        if (item < left) __stcs(dy1 + i * kThreads, v);
      }
    }
    const Eight frequencies = eight(frequency);
#pragma unroll
    for (int p = 0; p < 3; p++) {
      if (p < 2) gather(p + 1);
      encode<T>(offset[p], frequencies, ahead[p % 2][0], ahead[p % 2][1]);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        char* const to = to_x + x_at + (2 * p + i) * kOuterRows * kBlockBytes;
        *reinterpret_cast<uint4*>(to) = ahead[p % 2][i];
      }
    }
  };

  float sums[H / 2] = {};
  if (threadIdx.x == 0) {
    for (int tile = 0; tile < kStages<H>; tile++) fetch(tile);
  }
  if (tiles > 0) {
    find(0);
    build(0);
  }
  for (int tile = 0; tile < tiles; tile++) {
    cluster_publish<kSlices>();
    if (threadIdx.x == 0) fetch(tile + kStages<H>);
    const char* const now = y + tile % 2 * kY;
    pin(sums);
    outer_product<kOuterRows, H, T>(sums, room + tile % 2 * kX, now);
    if (tile + 1 < tiles) build(tile + 1);
    wgmma_wait<0>();
    pin(sums);
  }
  store_sums<H>(sums, args.parts + static_cast<int64_t>(blockIdx.x) * kSlice * H, threadIdx.x / 32);
}

template <int C, int H, typename T>
int bottom(const BackwardSize& size, const BackwardRows& from, void* scratch, cudaStream_t stream,
           int64_t* bytes = nullptr) {
  constexpr int kSlices = C / kSlice;
  const int most = kBottomBlocks<H> * size.processors / kSlices;
  Pieces pieces(scratch);
  Place* const places = pieces.take<Place>(size.groups * size.neighbors);
  int* const middles = pieces.take<int>(size.groups);
  uint4* const zeros = pieces.take<uint4>(C / 16);
  float* const parts = pieces.take<float>(int64_t{most} * C * H);
  if (bytes) {
    *bytes = pieces.bytes();
    return 0;
  }
  place_kernel<<<static_cast<unsigned>(divided(size.groups, 4)), 128, 0, stream>>>(from.from, C, places,
                                                                                   middles, zeros);
  int error = cudaGetLastError();
  if (error) return error;
  const Bottom args{places,
                    middles,
                    static_cast<const uint4*>(from.from.features),
                    zeros,
                    from.from.wavelength,
                    static_cast<const uint4*>(from.before),
                    static_cast<uint4*>(from.dz),
                    InnerNorm{from.mean, from.deviation, from.factor, from.m1, from.m2},
                    parts,
                    static_cast<int>(size.groups * size.neighbors),
                    size.neighbors};
  int workers = most;
  error = launch_clusters(bottom_kernel<C, H, T>, args, kSlices, &workers, kTeams * 128, kBottomBytes<C, H>,
                          stream);
  if (error) return error;
  weight_grad_kernel<C><<<C, H, 0, stream>>>(parts, workers, from.weight_grad);
  return cudaGetLastError();
}

template <typename T>
int bottom_of(const BackwardSize& size, const BackwardRows& args, void* scratch, cudaStream_t stream,
              int64_t* bytes = nullptr) {
  switch (size.width) {
    case 192:
      return bottom<192, 96, T>(size, args, scratch, stream, bytes);
    case 384:
      return bottom<384, 192, T>(size, args, scratch, stream, bytes);
    default:
      return bottom<768, 32, T>(size, args, scratch, stream, bytes);
  }
}

}  // namespace

int64_t backward_rows_scratch(const BackwardSize& size, bool below) {
  if (below) return backward_upper_scratch(size);
  int64_t bytes = 0;
  bottom_of<__half>(size, {}, nullptr, nullptr, &bytes);
  return bytes;
}

int backward_rows(const BackwardSize& size, const BackwardRows& args, void* scratch, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (args.near) return backward_upper(size, args, scratch, stream);
  return (size.bfloat16 ? bottom_of<__nv_bfloat16> : bottom_of<__half>)(size, args, scratch, stream, nullptr);
}

}  // namespace any2point
