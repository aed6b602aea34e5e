// Neighbour search on CUDA for every k, any number of coordinates and float64: a block of 256 threads per
// query.
//
// The k-th distance is found digit by digit (8 bits a pass, from the top, by histograms in shared memory);
// then the points up to it are written in the order of their rows and sorted in place, in shared memory if k
// fits, else in the output itself. Distances are kept in shared memory (up to 40 KB) or computed anew in each
// pass. N D operations and N D numbers from L2 a query, (k / 512) log2(k)^2 steps to sort.
//
// "first" (the k lowest rows within the limit): a warp per query reads points in order and stops at the k-th.
// float32 of up to three coordinates comes here for k > 192 (280 in large clouds) alone.
#include "knn/warp.cuh"

namespace any2point {
namespace {

constexpr int kBlock = 256, kBlockWarps = kBlock / 32;
constexpr int kShared = 40960;  // bytes for distances, then for sorting

template <typename T>
struct Bits;
template <>
struct Bits<float> {
  using Type = uint32_t;
  static __device__ Type of(float a) { return __float_as_uint(a); }
};
template <>
struct Bits<double> {
  using Type = unsigned long long;
  static __device__ Type of(double a) { return static_cast<Type>(__double_as_longlong(a)); }
};

template <typename T>
__device__ bool finite_row(const T* row, int64_t dim) {
  bool all = true;
  for (int64_t d = 0; d < dim; d++) all &= finite(row[d]);
  return all;
}

// The squared distance to a point; NaN if it is not finite.
template <typename T>
__device__ T distance_to(const T* point, const T* query, int64_t dim) {
  return finite_row(point, dim) ? squared_distance(point, query, dim) : T(not_a_number());
}

template <typename T>
__device__ void fill_missing(const Neighbours<T>& run, int64_t row, int64_t from, int thread, int threads) {
  for (int64_t j = from + thread; j < run.k; j += threads) {
    run.index[row * run.k + j] = -1;
    run.distance[row * run.k + j] = T(infinite());
  }
  if (run.count && thread == 0) run.count[row] = from;
}

// Sum of `value` over the threads of lower number; `total` over all. Two barriers.
__device__ int64_t sum_below(int value, int64_t* total) {
  __shared__ int sums[kBlockWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int inside = sum_of_lanes_below(value, lane);
  __syncthreads();
  if (lane == 31) sums[warp] = inside + value;
  __syncthreads();
  int64_t sum = inside;
  *total = 0;
  for (int w = 0; w < kBlockWarps; w++) {
    sum += w < warp ? sums[w] : 0;
    *total += sums[w];
  }
  return sum;
}

// Sorts k pairs by (distance, index) with a bitonic network whose comparisons all point the same way, so that
// nothing is needed behind the end.
template <typename T>
__device__ void sort_pairs(T* distance, int64_t* index, int64_t k) {
  const auto order = [&](int64_t low, int64_t high) {
    const T a = distance[low], b = distance[high];
    const int64_t i = index[low], j = index[high];
    if (b < a || (a == b && j < i)) {
      distance[low] = b;
      distance[high] = a;
      index[low] = j;
      index[high] = i;
    }
  };
  for (int64_t size = 2; size < 2 * k; size *= 2) {
    for (int64_t stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int64_t pair = threadIdx.x;; pair += kBlock) {
        const int64_t low = 2 * pair - (pair & (stride - 1));
        if (low >= k) break;
        // The first step of a size compares with the mirrored place, the others with the one `stride` on.
        const int64_t high = stride == size / 2 ? low ^ (size - 1) : low + stride;
        if (high < k) order(low, high);
      }
    }
  }
  __syncthreads();
}

template <typename T>
__global__ __launch_bounds__(kBlock) void nearest_general_kernel(Neighbours<T> run) {
  using Key = typename Bits<T>::Type;
  constexpr int kDigits = sizeof(T);
  __shared__ alignas(16) char memory[kShared];
  __shared__ int histogram[256];
  __shared__ int64_t rank_left;  // how many of the k are among the points with the digits so far
  __shared__ Key prefix;         // those digits
  __shared__ int64_t within;     // points within the limit

  const Tile tile = tile_of(run.query_rows, 1, blockIdx.x);
  if (tile.first < 0 || tile.first >= tile.last) return;
  const int64_t row = run.query_rows.begin(tile.cloud) + tile.first;
  const T* query = run.query + row * run.dim;
  if (tile.first >= tile.count || !finite_row(query, run.dim)) {
    fill_missing(run, row, 0, threadIdx.x, kBlock);
    return;
  }
  const int64_t count = run.rows.count(tile.cloud), base = run.rows.index_base(tile.cloud);
  const T* points = run.points + run.rows.begin(tile.cloud) * run.dim;
  T* kept = reinterpret_cast<T*>(memory);
  const bool keep = count <= static_cast<int64_t>(kShared / sizeof(T));
  const auto distance = [&](int64_t i) {
    return keep ? kept[i] : distance_to(points + i * run.dim, query, run.dim);
  };

  if (threadIdx.x == 0) {
    within = 0;
    prefix = 0;
  }
  __syncthreads();
  unsigned long long mine = 0;
  for (int64_t i = threadIdx.x; i < count; i += kBlock) {
    const T d = distance_to(points + i * run.dim, query, run.dim);
    if (keep) kept[i] = d;
    mine += d <= run.limit;
  }
  atomicAdd(reinterpret_cast<unsigned long long*>(&within), mine);
  __syncthreads();
  const int64_t k = min(run.k, within);

  // Points below `last` are in, and the `ties` lowest rows of those that equal it.
  T last = run.limit;
  int64_t ties = count;
  if (within > run.k) {
    if (threadIdx.x == 0) rank_left = k;
    for (int digit = kDigits - 1; digit >= 0; digit--) {
      histogram[threadIdx.x] = 0;
      __syncthreads();
      const Key known = prefix;
      for (int64_t i = threadIdx.x; i < count; i += kBlock) {
        const T d = distance(i);
        const Key key = Bits<T>::of(d);
        const bool same = digit == kDigits - 1 || (key >> 8 >> (8 * digit)) == (known >> 8 >> (8 * digit));
        if (d <= run.limit && same) atomicAdd(&histogram[(key >> (8 * digit)) & 255], 1);
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        int64_t left = rank_left;
        int value = 0;
        while (left > histogram[value]) left -= histogram[value++];
        rank_left = left;
        prefix = known | static_cast<Key>(value) << (8 * digit);
      }
      __syncthreads();
    }
    ties = rank_left;
  }
  const Key last_key = within > run.k ? prefix : Bits<T>::of(last);
  __syncthreads();

  int64_t* index = run.index + row * run.k;
  T* nearest = run.distance + row * run.k;
  int64_t written = 0, seen = 0;
  for (int64_t start = 0; start < count && written < k; start += kBlock) {
    const int64_t i = start + threadIdx.x;
    const T d = i < count ? distance(i) : T(not_a_number());
    const Key key = Bits<T>::of(d);
    const bool candidate = d <= run.limit, tie = candidate && key == last_key;
    int64_t all_ties, all;
    const int64_t rank = seen + sum_below(tie, &all_ties);
    const bool in = (candidate && key < last_key) || (tie && rank < ties);
    const int64_t at = written + sum_below(in, &all);
    if (in) {
      index[at] = base + i;
      nearest[at] = d;
    }
    seen += all_ties;
    written += all;
  }
  fill_missing(run, row, k, threadIdx.x, kBlock);
  if (run.choice == Choice::set) return;

  __syncthreads();
  constexpr int64_t kSorted = kShared / (sizeof(T) + sizeof(int64_t));
  if (k > kSorted) {
    sort_pairs(nearest, index, k);
    return;
  }
  int64_t* sorted_index = reinterpret_cast<int64_t*>(memory);
  T* sorted = reinterpret_cast<T*>(sorted_index + kSorted);
  for (int64_t j = threadIdx.x; j < k; j += kBlock) {
    sorted[j] = nearest[j];
    sorted_index[j] = index[j];
  }
  sort_pairs(sorted, sorted_index, k);
  for (int64_t j = threadIdx.x; j < k; j += kBlock) {
    nearest[j] = sorted[j];
    index[j] = sorted_index[j];
  }
}

template <typename T>
__global__ __launch_bounds__(kBlock) void first_general_kernel(Neighbours<T> run) {
  const Tile tile = tile_of(run.query_rows, kBlockWarps, blockIdx.x);
  const int lane = threadIdx.x % 32;
  const int64_t i = tile.first + threadIdx.x / 32;
  if (tile.first < 0 || i >= tile.last) return;
  const int64_t row = run.query_rows.begin(tile.cloud) + i;
  const T* query = run.query + row * run.dim;
  int64_t found = 0;
  if (i < tile.count && finite_row(query, run.dim)) {
    const int64_t count = run.rows.count(tile.cloud), base = run.rows.index_base(tile.cloud);
    const T* points = run.points + run.rows.begin(tile.cloud) * run.dim;
    for (int64_t start = 0; start < count && found < run.k; start += 32) {
      const int64_t p = start + lane;
      const T d = p < count ? distance_to(points + p * run.dim, query, run.dim) : T(not_a_number());
      const unsigned lanes = __ballot_sync(kAll, d <= run.limit);
      const int64_t at = found + __popc(lanes & ((1u << lane) - 1));
      if (d <= run.limit && at < run.k) {
        run.index[row * run.k + at] = base + p;
        run.distance[row * run.k + at] = d;
      }
      found += __popc(lanes);
    }
  }
  fill_missing(run, row, min(found, run.k), lane, 32);
}

}  // namespace

template <typename T>
int neighbours_general_cuda(const Neighbours<T>& run, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (run.query_rows.total == 0 || run.query_rows.clouds == 0) return cudaSuccess;
  if (run.choice == Choice::first) {
    const auto blocks = static_cast<unsigned>(tiles_of(run.query_rows, kBlockWarps));
    first_general_kernel<<<blocks, kBlock, 0, on>>>(run);
  } else {
    const auto blocks = static_cast<unsigned>(tiles_of(run.query_rows, 1));
    nearest_general_kernel<<<blocks, kBlock, 0, on>>>(run);
  }
  return cudaGetLastError();
}

template int neighbours_general_cuda(const Neighbours<float>&, void*);
template int neighbours_general_cuda(const Neighbours<double>&, void*);

}  // namespace any2point
