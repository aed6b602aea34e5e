// Brings the points and queries of clouds of some thousand rows into the order of their curves: a block of
// 1,024 threads per cloud finds the extent, computes places of 24 bits and sorts them in shared memory by
// three stable passes of 8 bits. A pass counts digits per warp (lanes with equal digits by eight ballots),
// scans the 256 x 32 counts and scatters words of (place, row): 16 bits of the place are left after the
// first pass, so row numbers of 14 bits ride along. Points and queries are sorted together, so that a query
// finds its place among the points by counting.
//
// H200, 32 x (8,192 points and 2,048 queries): 49 us, where one sort for all clouds, with extents and places,
// takes 83. Floor: 1.5 us for the bytes. A block is alone on its processor; by its clock in an earlier form,
// in us: extent 2.9, usual extent 5.1, places 16.0, three passes 6.2 each, exchanges 0.7 each, output 4.1.
// Places are instructions, passes the latency of ballots and counters with 8 warps on a scheduler. Counters:
// issue slots 53 % of their peak on the 32 processors, L1 with shared memory 27 %, L2 4 %, DRAM 2 %; of
// the 14.9 cycles that a warp spends on an instruction it waits 4.3 for its turn, 3.8 for the integer
// pipe, 1.7 for the one before, 1.2 at barriers. Next: digits counted by atomics in shared memory, as in
// inverse_list/cluster.cu.
#include "knn/curve.cuh"
#include "knn/tree_sort.cuh"

namespace any2point {
namespace {

constexpr int kSortWarps = kSortThreads / 32;
constexpr int kPlaceBits = 8;            // of each coordinate
constexpr uint32_t kNowhere = 0xffffff;  // behind every place

// Lanes with the same 8 bits.
__device__ __forceinline__ unsigned equal_lanes(uint32_t digit) {
  unsigned same = kAll;
#pragma unroll
  for (int bit = 0; bit < 8; bit++) {
    const bool one = digit >> bit & 1;
    const unsigned lanes = __ballot_sync(kAll, one);
    same &= one ? lanes : ~lanes;
  }
  return same;
}

// Sum of `value` over the threads before this one. `sums` [kSortWarps]: shared memory.
__device__ __forceinline__ int sum_before(int value, int* sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int inside = sum_of_lanes_below(value, lane);
  if (lane == 31) sums[warp] = inside + value;
  __syncthreads();
  const int of_warp = sums[lane];
  return inside + warp_sum(lane < warp ? of_warp : 0);
}

// One pass: where the words of this thread go by bits shift .. shift + 7. Word e of lane l of warp w stands
// at (w * kEach + e) * 32 + l.
template <int kEach>
__device__ __forceinline__ void places_by_digit(const uint32_t (&word)[kEach], int shift,
                                                uint16_t (&place)[kEach], uint16_t* counters, int* sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t* pairs = reinterpret_cast<uint32_t*>(counters);
  for (int i = threadIdx.x; i < kSortDigits * kSortCounters / 2; i += kSortThreads) pairs[i] = 0;
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    const uint32_t digit = word[e] >> shift & (kSortDigits - 1);
    uint16_t* counter = counters + digit * kSortCounters + warp;
    const unsigned same = equal_lanes(digit), before = same & ((1u << lane) - 1);
    const int counted = *counter;
    __syncwarp();
    if (before == 0) *counter = uint16_t(counted + __popc(same));
    __syncwarp();
    place[e] = uint16_t(counted + __popc(before));
  }
  __syncthreads();
  // Each thread has 8 of the counters in the order (digit, warp).
  uint16_t* mine = counters + threadIdx.x / 4 * kSortCounters + threadIdx.x % 4 * 8;
  int count[8], total = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) total += count[i] = mine[i];
  int sum = sum_before(total, sums);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    mine[i] = uint16_t(sum);
    sum += count[i];
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    const uint32_t digit = word[e] >> shift & (kSortDigits - 1);
    place[e] += counters[digit * kSortCounters + warp];
  }
}

// Words to their places and back to the threads.
template <int kEach>
__device__ __forceinline__ void exchange(uint32_t (&word)[kEach], const uint16_t (&place)[kEach],
                                         uint32_t* words, int first) {
#pragma unroll
  for (int e = 0; e < kEach; e++) words[place[e]] = word[e];
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kEach; e++) word[e] = words[first + e * 32];
}

template <int kEach>
__global__ __launch_bounds__(kSortThreads, 1) void block_sort_kernel(BlockSort args) {
  extern __shared__ uint32_t words[];  // [kEach * kSortThreads], then counters
  uint16_t* counters = reinterpret_cast<uint16_t*>(words + kEach * kSortThreads);
  __shared__ Extent extent;
  __shared__ Frame frame;
  __shared__ int sums[kSortWarps];

  const int64_t cloud = blockIdx.x, begin = args.rows.begin(cloud), count = args.rows.count(cloud);
  const int64_t query_begin = args.query_rows.begin(cloud), query_count = args.query_rows.count(cloud);
  const float* points = args.points + begin * args.dim;
  const float* queries = args.query ? args.query + query_begin * args.dim : nullptr;
  // Rows that do not belong to the cloud are sorted too: they have a place in the output.
  const int rows = int(args.rows.packed() ? count : args.rows.padded);
  const int query_rows = !queries ? 0 : int(args.rows.packed() ? query_count : args.query_rows.padded);

  clear(&extent);
  __syncthreads();
  extend(&extent, points, args.dim, threadIdx.x, count, kSortThreads);
  if (count > 0) find_usual_extent(points, count, args.dim, &extent);
  __syncthreads();
  if (threadIdx.x == 0) {
    frame = Frame(extent, kPlaceBits);
    args.extent[cloud] = extent;
  }
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = warp * kEach * 32 + lane;
  uint32_t word[kEach];
  uint16_t place[kEach];
  constexpr int kAtOnce = kEach / 2;  // loads in flight
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float3 p[kAtOnce];
#pragma unroll
    for (int e = 0; e < kAtOnce; e++) {
      const int item = first + (half * kAtOnce + e) * 32, query = item - rows;
      const bool is_query = query >= 0;
      p[e] = {not_a_number(), 0, 0};
      if (is_query ? query < query_rows && query < query_count : item < count) {
        p[e] = row_of(is_query ? queries : points, args.dim, is_query ? query : item);
      }
    }
#pragma unroll
    for (int e = 0; e < kAtOnce; e++) {
      word[half * kAtOnce + e] = finite_point(p[e])
                                     ? min(place_on_curve<uint32_t>(frame, p[e], kPlaceBits), kNowhere - 1)
                                     : kNowhere;
    }
  }
  places_by_digit(word, 0, place, counters, sums);
#pragma unroll
  for (int e = 0; e < kEach; e++) word[e] = word[e] >> 8 << 16 | uint32_t(first + e * 32);
  exchange(word, place, words, first);
  places_by_digit(word, 16, place, counters, sums);
  exchange(word, place, words, first);
  places_by_digit(word, 24, place, counters, sums);
  exchange(word, place, words, first);

  // Item by item in order, `queries_before` of them queries.
  int queries_of_warp = 0;
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    word[e] &= 0xffff;
    const bool is_query = int(word[e]) >= rows && first + e * 32 < rows + query_rows;
    queries_of_warp += __popc(__ballot_sync(kAll, is_query));
  }
  __syncthreads();
  if (lane == 0) sums[warp] = queries_of_warp;
  __syncthreads();
  const int of_lane = sums[lane], usable = int(extent.points());
  int queries_before = warp_sum(lane < warp ? of_lane : 0);
#pragma unroll
  for (int e = 0; e < kEach; e++) {
    const int at = first + e * 32, item = int(word[e]);
    const bool there = at < rows + query_rows, is_query = there && item >= rows;
    const unsigned lanes = __ballot_sync(kAll, is_query);
    const int before = queries_before + __popc(lanes & ((1u << lane) - 1));
    queries_before += __popc(lanes);
    if (!there) continue;
    if (!is_query) {
      args.order[begin + at - before] = uint32_t(begin + item);
      continue;
    }
    const int query = item - rows;
    const float3 a = row_of(queries, args.dim, query);
    float4 q{a.x, a.y, a.z, __uint_as_float(uint32_t(query))};
    if (query >= query_count || !finite_point(a)) q.x = not_a_number();
    args.in_order[query_begin + before] = q;
    args.nearest[query_begin + before] = uint32_t(min(at - before, usable));
  }
}

template <int kEach>
cudaError_t launch(const BlockSort& sort, cudaStream_t stream) {
  const auto shared = static_cast<int>(sort_dynamic(kEach));
  const cudaError_t error =
      cudaFuncSetAttribute(block_sort_kernel<kEach>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  block_sort_kernel<kEach><<<static_cast<unsigned>(sort.rows.clouds), kSortThreads, shared, stream>>>(sort);
  return cudaGetLastError();
}

}  // namespace

int block_sort(const BlockSort& sort, int each, cudaStream_t stream) {
  switch (each) {
    case 4:
      return launch<4>(sort, stream);
    case 6:
      return launch<6>(sort, stream);
    case 8:
      return launch<8>(sort, stream);
    case 10:
      return launch<10>(sort, stream);
    case 12:
      return launch<12>(sort, stream);
    case 16:
      return launch<16>(sort, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace any2point
