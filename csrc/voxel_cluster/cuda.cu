// voxel_cluster on CUDA. Small padded clouds (the tokens of a model): one block per cloud finds each point's
// place by comparing it with all others, and a second kernel joins the clouds. Everything else: a stable
// radix sort by (y, x), then one by (cloud, z), which together are exact for every int32 coordinate; then
// heads of voxels are counted, summed and numbered. Nothing is read back.
#include "common/grid.cuh"
#include "common/radix_sort.h"
#include "voxel_cluster/kernel.h"

namespace any2point {
namespace {

constexpr int kSmallPoints = 1024;      // of one cloud: a thread for each
constexpr int64_t kSmallClouds = 4096;  // each cloud sums the counts of all
constexpr int kTileRounds = 4;          // of kThreads rows, numbered by one block
constexpr int64_t kTile = kTileRounds * kThreads;

// Unsigned integers in the order of the numbers, for atomicMin.
__device__ uint32_t encode(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ unsigned long long encode(double value) {
  const unsigned long long bits = __double_as_longlong(value);
  return bits >> 63 ? ~bits : bits | 0x8000000000000000ull;
}
__device__ float decode(uint32_t code) { return __uint_as_float(code >> 31 ? code ^ 0x80000000u : ~code); }
__device__ double decode(unsigned long long code) {
  return __longlong_as_double(code >> 63 ? code ^ 0x8000000000000000ull : ~code);
}

template <typename T>
struct CodeOf {
  using type = uint32_t;
};
template <>
struct CodeOf<double> {
  using type = unsigned long long;
};
template <typename T>
using Code = typename CodeOf<T>::type;

template <typename T>
__device__ bool finite(const T* point, int dim) {
  bool all = true;
  for (int d = 0; d < dim; d++) all &= isfinite(point[d]);
  return all;
}

// The cloud of a row that counts, or -1.
__device__ int64_t cloud_of(const Rows& rows, int64_t row) {
  int64_t cloud;
  if (!rows.packed()) {
    cloud = row / rows.padded;
  } else {
    int64_t lo = 0, hi = rows.clouds;  // the last cloud that begins at or before the row
    while (hi - lo > 1) {
      const int64_t middle = (lo + hi) / 2;
      if (rows.begin(middle) <= row) {
        lo = middle;
      } else {
        hi = middle;
      }
    }
    cloud = lo;
  }
  if (cloud >= rows.clouds) return -1;
  const int64_t place = row - rows.begin(cloud);
  return place >= 0 && place < rows.count(cloud) ? cloud : -1;
}

// The voxel of a finite point as unsigned numbers in the order of the coordinates. False outside of int32.
template <typename T>
__device__ bool voxel_of(const VoxelPoints& points, const T* point, const T* origin, uint32_t* voxel) {
  bool inside = true;
  for (int d = 0; d < kVoxelDims; d++) {
    voxel[d] = 0;
    if (d >= points.dim) continue;
    const T at = trunc((point[d] - origin[d]) / T(points.size[d]));
    const bool fits = at >= T(-2147483648.0) && at < T(2147483648.0);
    if (fits) voxel[d] = uint32_t(int32_t(at)) ^ 0x80000000u;
    inside &= fits;
  }
  return inside;
}

// ---- small clouds

// What the first kernel leaves in place of a point's cluster: its place and its cluster within the cloud.
struct Local {
  uint32_t rank, cluster;
  bool head, valid;
  __device__ int64_t packed() const {
    return int64_t(rank) | int64_t(cluster) << 20 | int64_t(head) << 40 | int64_t(valid) << 41;
  }
  __device__ static Local of(int64_t bits) {
    const uint32_t mask = (1u << 20) - 1;
    return {uint32_t(bits) & mask, uint32_t(bits >> 20) & mask, (bits >> 40 & 1) != 0, (bits >> 41 & 1) != 0};
  }
};

// Threads of a block that compare one point with all others: as many as there is room for, of one warp.
int lanes_per_point(int64_t padded) {
  int lanes = kWarp;
  while (lanes > 1 && lanes * padded > kSmallPoints) lanes /= 2;
  return lanes;
}

template <typename T>
__global__ void __launch_bounds__(kSmallPoints)
    small_kernel(VoxelPoints points, VoxelOut out, uint32_t* counts, int lanes) {
  __shared__ uint64_t high[kSmallPoints], low[kSmallPoints];
  __shared__ bool heads[kSmallPoints];
  __shared__ Code<T> lowest[kVoxelDims];
  const int64_t cloud = blockIdx.x;
  const int n = static_cast<int>(points.rows.padded), i = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const int64_t row = cloud * n + i;
  const T* point = static_cast<const T*>(points.points) + row * points.dim;
  bool valid = i < points.rows.count(cloud) && finite(point, points.dim);

  T origin[kVoxelDims] = {};
  if (points.origin) {
    for (int d = 0; d < points.dim; d++)
      origin[d] = static_cast<const T*>(points.origin)[cloud * points.dim + d];
  } else {
    if (threadIdx.x < kVoxelDims) lowest[threadIdx.x] = ~Code<T>(0);
    __syncthreads();
    for (int d = 0; d < points.dim; d++) {
      Code<T> code = valid ? encode(point[d]) : ~Code<T>(0);
      for (int s = kWarp / 2; s > 0; s /= 2) code = min(code, __shfl_xor_sync(kAll, code, s));
      if (threadIdx.x % kWarp == 0) atomicMin(lowest + d, code);
    }
    __syncthreads();
    for (int d = 0; d < points.dim; d++) origin[d] = decode(lowest[d]);
  }
  uint32_t voxel[kVoxelDims];
  valid = valid && voxel_of(points, point, origin, voxel);
  // Points without a voxel come last.
  const uint64_t my_high = valid ? voxel[2] : ~0ull;
  const uint64_t my_low = valid ? uint64_t(voxel[1]) << 32 | voxel[0] : ~0ull;
  const bool first = lane == 0 && i < n;
  if (first) high[i] = my_high, low[i] = my_low;
  __syncthreads();
  const auto less = [&](int j) { return (high[j] < my_high) | ((high[j] == my_high) & (low[j] < my_low)); };
  Local local{0, 0, valid, valid};
  uint32_t earlier = 0;
#pragma unroll 4
  for (int j = lane; j < n; j += lanes) {
    const bool before = (j < i) & (high[j] == my_high) & (low[j] == my_low);
    local.rank += less(j) | before;
    earlier |= before;
  }
  for (int s = lanes / 2; s > 0; s /= 2) {
    local.rank += __shfl_xor_sync(kAll, local.rank, s);
    earlier |= __shfl_xor_sync(kAll, earlier, s);
  }
  local.head = valid && !earlier;
  if (first) heads[i] = local.head;
  const int kept = __syncthreads_count(first && valid);
  const int clusters = __syncthreads_count(first && local.head);
#pragma unroll 4
  for (int j = lane; j < n; j += lanes) local.cluster += heads[j] & less(j);
  for (int s = lanes / 2; s > 0; s /= 2) local.cluster += __shfl_xor_sync(kAll, local.cluster, s);
  if (first) out.cluster[row] = local.packed();
  if (threadIdx.x == 0) {
    counts[2 * cloud] = kept;
    counts[2 * cloud + 1] = clusters;
  }
}

__global__ void small_join_kernel(VoxelPoints points, VoxelOut out, const uint32_t* counts) {
  const int64_t cloud = blockIdx.x, clouds = points.rows.clouds, n = points.rows.padded;
  uint32_t part[4] = {0, 0, 0, 0}, sum[4];  // rows and clusters before this cloud; of all clouds
  for (int64_t b = threadIdx.x; b < clouds; b += kThreads) {
    for (int what = 0; what < 2; what++) {
      const uint32_t count = counts[2 * b + what];
      part[what] += b < cloud ? count : 0;
      part[2 + what] += count;
    }
  }
  for (int what = 0; what < 4; what++) exclusive_sum(part[what], sum + what);
  const int64_t all = sum[2], clusters = sum[3], kept = counts[2 * cloud];
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const int64_t row = cloud * n + i;
    const Local local = Local::of(out.cluster[row]);
    const int64_t id = sum[1] + int64_t(local.cluster);
    const int64_t place =
        local.valid ? sum[0] + int64_t(local.rank) : all + cloud * n - sum[0] + int64_t(local.rank) - kept;
    out.cluster[row] = local.valid ? id : -1;
    out.order[place] = row;
    if (local.head) out.start[id] = place;
    if (row >= clusters) out.start[row] = all;
  }
  if (cloud == clouds - 1 && threadIdx.x == 0) {
    out.start[clouds * n] = all;
    *out.count = clusters;
  }
}

int small(const VoxelPoints& points, const VoxelOut& out, void* workspace, cudaStream_t stream) {
  uint32_t* counts = static_cast<uint32_t*>(workspace);
  const int blocks = static_cast<int>(points.rows.clouds);
  const int lanes = lanes_per_point(points.rows.padded);
  const int threads = static_cast<int>((points.rows.padded * lanes + kWarp - 1) / kWarp * kWarp);
  if (points.wide) {
    small_kernel<double><<<blocks, threads, 0, stream>>>(points, out, counts, lanes);
  } else {
    small_kernel<float><<<blocks, threads, 0, stream>>>(points, out, counts, lanes);
  }
  small_join_kernel<<<blocks, kThreads, 0, stream>>>(points, out, counts);
  return cudaGetLastError();
}

// ---- all others

// Workspace, one after the other.
struct Large {
  uint64_t *high, *low;        // [R] keys of each row
  SortBuffers sort;            // [R] each
  unsigned long long* lowest;  // [B, D]
  uint32_t* tiles;             // [tiles] heads in each, then before each
  uint32_t* totals;            // clusters, rows with a voxel
  void* scratch;
  int64_t scratch_bytes, bytes;

  Large(const VoxelPoints& points, void* workspace) {
    const int64_t rows = points.rows.total;
    char* at = static_cast<char*>(workspace);
    const auto take = [&](auto** pointer, int64_t n) {
      using E = std::remove_reference_t<decltype(**pointer)>;
      *pointer = reinterpret_cast<E*>(at);
      at += (n * sizeof(E) + 255) / 256 * 256;
    };
    take(&high, rows);
    take(&low, rows);
    for (int i = 0; i < 2; i++) take(sort.keys + i, rows);
    for (int i = 0; i < 2; i++) take(sort.values + i, rows);
    take(&lowest, points.rows.clouds * points.dim);
    take(&tiles, (rows + kTile - 1) / kTile);
    take(&totals, 2);
    scratch = at;
    scratch_bytes = static_cast<int64_t>(radix_sort_scratch(rows));
    bytes = at - static_cast<char*>(workspace) + scratch_bytes;
  }
};

template <typename T>
__global__ void lowest_kernel(VoxelPoints points, Code<T>* lowest) {
  const T* data = static_cast<const T*>(points.points);
  const int64_t stride = int64_t(gridDim.x) * kThreads, rows = points.rows.total;
  const int lane = threadIdx.x % kWarp;
  for (int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x - lane; first < rows; first += stride) {
    const int64_t row = first + lane;
    int64_t cloud = row < rows ? cloud_of(points.rows, row) : -1;
    if (cloud >= 0 && !finite(data + row * points.dim, points.dim)) cloud = -1;
    // One atomic for all lanes where they agree, and none where the value in memory is low enough already.
    const int64_t leader = __shfl_sync(kAll, cloud, 0);
    const bool agree = __all_sync(kAll, cloud == leader || cloud < 0);
    for (int d = 0; d < points.dim; d++) {
      Code<T> code = cloud >= 0 ? encode(data[row * points.dim + d]) : ~Code<T>(0);
      if (agree) {
        for (int s = kWarp / 2; s > 0; s /= 2) code = min(code, __shfl_xor_sync(kAll, code, s));
      }
      if (cloud >= 0 && (lane == 0 || !agree)) {
        Code<T>* at = lowest + cloud * points.dim + d;
        if (code < __ldcg(at)) atomicMin(at, code);
      }
    }
  }
}

template <typename T>
__global__ void key_kernel(VoxelPoints points, Large work, const Code<T>* lowest) {
  const T* data = static_cast<const T*>(points.points);
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < points.rows.total; row += stride) {
    const T* point = data + row * points.dim;
    int64_t cloud = cloud_of(points.rows, row);
    uint32_t voxel[kVoxelDims];
    if (cloud >= 0 && finite(point, points.dim)) {
      T origin[kVoxelDims];
      for (int d = 0; d < points.dim; d++) {
        const int64_t at = cloud * points.dim + d;
        origin[d] = points.origin ? static_cast<const T*>(points.origin)[at] : decode(lowest[at]);
      }
      if (!voxel_of(points, point, origin, voxel)) cloud = -1;
    } else {
      cloud = -1;
    }
    // Rows without a voxel belong to a cloud after the last.
    work.high[row] = cloud >= 0 ? uint64_t(cloud) << 32 | voxel[2] : uint64_t(points.rows.clouds) << 32;
    work.low[row] = work.sort.keys[0][row] = cloud >= 0 ? uint64_t(voxel[1]) << 32 | voxel[0] : ~0ull;
    work.sort.values[0][row] = uint32_t(row);
  }
}

__global__ void next_key_kernel(int64_t rows, const uint64_t* high, const uint32_t* values, uint64_t* keys) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < rows; i += stride) {
    keys[i] = high[values[i]];
  }
}

// The sorted rows.
struct Sorted {
  int64_t rows, clouds;
  const uint64_t *high, *low;  // by row
  const uint32_t* order;

  __device__ bool valid(int64_t i) const { return i < rows && high[order[i]] >> 32 < uint64_t(clouds); }
  __device__ bool head(int64_t i) const {
    if (!valid(i)) return false;
    if (i == 0) return true;
    const uint32_t a = order[i - 1], b = order[i];
    return high[a] != high[b] || low[a] != low[b];
  }
};

__global__ void count_kernel(Sorted sorted, uint32_t* tiles, uint32_t* totals) {
  const int64_t first = blockIdx.x * kTile + threadIdx.x;
  uint32_t heads = 0, valid = 0;
  for (int u = 0; u < kTileRounds; u++) {
    heads += __syncthreads_count(sorted.head(first + u * kThreads));
    valid += __syncthreads_count(sorted.valid(first + u * kThreads));
  }
  if (threadIdx.x == 0) {
    tiles[blockIdx.x] = heads;
    if (valid) atomicAdd(totals + 1, valid);  // of integers: the same in every order
  }
}

// One block.
__global__ void sum_kernel(int64_t tiles_number, uint32_t* tiles, uint32_t* totals) {
  uint32_t before = 0;
  for (int64_t first = 0; first < tiles_number; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    uint32_t total;
    const uint32_t sum = exclusive_sum(i < tiles_number ? tiles[i] : 0, &total);
    if (i < tiles_number) tiles[i] = before + sum;
    before += total;
  }
  if (threadIdx.x == 0) totals[0] = before;
}

__global__ void number_kernel(Sorted sorted, VoxelOut out, const uint32_t* tiles, const uint32_t* totals) {
  uint32_t before = tiles[blockIdx.x];
  const int64_t clusters = totals[0], all = totals[1];
  for (int u = 0; u < kTileRounds; u++) {
    const int64_t i = blockIdx.x * kTile + u * kThreads + threadIdx.x;
    const bool head = sorted.head(i), valid = sorted.valid(i);
    uint32_t total;
    const int64_t id = int64_t(before) + exclusive_sum(head, &total) + head - 1;
    before += total;
    if (i < sorted.rows) {
      out.order[i] = sorted.order[i];
      out.cluster[sorted.order[i]] = valid ? id : -1;
      if (head) out.start[id] = i;
      if (i >= clusters) out.start[i] = all;
      if (i == sorted.rows - 1) {
        out.start[sorted.rows] = all;
        *out.count = clusters;
      }
    }
  }
}

template <typename T>
int large(const VoxelPoints& points, const VoxelOut& out, void* workspace, cudaStream_t stream) {
  Large work(points, workspace);
  const int64_t rows = points.rows.total, tiles = (rows + kTile - 1) / kTile;
  const int blocks = grid_for(rows);
  Code<T>* lowest = reinterpret_cast<Code<T>*>(work.lowest);
  if (!points.origin && points.rows.clouds > 0) {
    cudaMemsetAsync(lowest, 0xff, sizeof(Code<T>) * points.rows.clouds * points.dim, stream);
    lowest_kernel<T><<<blocks, kThreads, 0, stream>>>(points, lowest);
  }
  key_kernel<T><<<blocks, kThreads, 0, stream>>>(points, work, lowest);
  const int low_bits = points.dim == 1 ? 32 : 64;
  if (const int error = radix_sort(&work.sort, rows, 0, low_bits, work.scratch, work.scratch_bytes, stream)) {
    return error;
  }
  next_key_kernel<<<blocks, kThreads, 0, stream>>>(rows, work.high, work.sort.values[0], work.sort.keys[0]);
  int cloud_bits = 0;
  while (points.rows.clouds >> cloud_bits) cloud_bits++;
  if (const int error = radix_sort(&work.sort, rows, points.dim == 3 ? 0 : 32, 32 + cloud_bits, work.scratch,
                                   work.scratch_bytes, stream)) {
    return error;
  }
  const Sorted sorted{rows, points.rows.clouds, work.high, work.low, work.sort.values[0]};
  cudaMemsetAsync(work.totals, 0, 2 * sizeof(uint32_t), stream);
  count_kernel<<<static_cast<int>(tiles), kThreads, 0, stream>>>(sorted, work.tiles, work.totals);
  sum_kernel<<<1, kThreads, 0, stream>>>(tiles, work.tiles, work.totals);
  number_kernel<<<static_cast<int>(tiles), kThreads, 0, stream>>>(sorted, out, work.tiles, work.totals);
  return cudaGetLastError();
}

bool is_small(const VoxelPoints& points) {
  const Rows& rows = points.rows;
  return rows.offsets == nullptr && rows.padded <= kSmallPoints && rows.clouds <= kSmallClouds;
}

}  // namespace

int64_t voxel_cluster_workspace(const VoxelPoints& points) {
  if (points.rows.total == 0) return 0;
  return is_small(points) ? 8 * points.rows.clouds : Large(points, nullptr).bytes;
}

int voxel_cluster_cuda(const VoxelPoints& points, const VoxelOut& out, void* workspace, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (points.rows.total == 0) {
    cudaMemsetAsync(out.start, 0, sizeof(int64_t), stream);
    return cudaMemsetAsync(out.count, 0, sizeof(int64_t), stream);
  }
  if (is_small(points)) return small(points, out, workspace, stream);
  return points.wide ? large<double>(points, out, workspace, stream)
                     : large<float>(points, out, workspace, stream);
}

}  // namespace any2point
