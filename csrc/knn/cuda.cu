// Neighbour search on CUDA for float32, up to three coordinates and k <= 192, by scans; general.cu has other
// cases, tree_search.cu large clouds.
//
// Clouds of up to 2,048 points: a block of 8 warps stages one cloud in shared memory (12 bytes a point) and a
// warp answers one query at a time. Each lane holds the distances to N / 32 points in registers (8 to 64 of
// them). The warp searches for a radius that holds k to 32 * kKeys points (secant on the count, REDUX; start:
// the radius of the query before), packs those, sorts them in a bitonic network of 32-bit keys and writes k
// results. Instructions per warp and query for N = 1,024 and k = 81 (sm_90): 223 for the distances, 70 a
// count (1 to 2 counts), 220 to pack, 440 to sort, 120 for the rest, about 1,100. So 16,384 queries are 18 M
// warp instructions, 17 us at one a clock on each of 528 schedulers at 1.98 GHz; sorting keys of 64 bits
// would add 10. Bytes are no limit: 12 k out a query (16 MB, 4 us), 12 a point and block in, from L2.
//
// Larger clouds: tiles of 1,024 points pass through shared memory, and each warp holds 4 queries against
// them. A point costs a query 6 operations and a comparison with a bound. The few that pass go to a buffer in
// shared memory, in the order of their rows; a full buffer is shortened to about k by the same search for a
// radius, which lowers the bound. 100,000 queries of 100,000 points: 7.5e10 lane operations, 2.3 ms at 128 a
// clock on each of 132 SMs; the tiles are 3.75 GB from L2, 0.7 ms.
//
// "first" (the k lowest rows within the limit) keeps the first k of the lanes in order, without a search for
// a radius and without a sort: 27 us for 32 x 512 of 1,024 in place of 87 by general.cu.
//
// H200, 32 x 512 of 1,024, k = 81: 35 us a call as a graph, 545 for the best of pytorch3d, pointops,
// torch.compile of distances + topk. Counters: 21 M warp instructions (20 us at one a clock), issue slots
// 64 %, L1 with shared memory 74 % of its peak, L2 14 %, DRAM 8 %. Of the 7.3 cycles that a warp spends on an
// instruction it waits 1.8 for shared memory and 1.3 for the one before; 1.1 for its turn.
// Where a tree pays clouds go there, plan.h says which.
//
// No host synchronisation. CUDA, not Triton: what a warp does next depends on its data.
#include "knn/plan.h"
#include "knn/warp.cuh"

namespace any2point {
namespace {

constexpr int kWarps = 8;

// Coordinates of point i of a cloud, 0 for those there are not; NaN if it is no finite point.
__device__ __forceinline__ float3 point_of(const Neighbours<float>& run, const float* points, int64_t i) {
  const float* p = points + i * run.dim;
  float3 a{p[0], run.dim > 1 ? p[1] : 0.0f, run.dim > 2 ? p[2] : 0.0f};
  if (!finite(a.x) || !finite(a.y) || !finite(a.z)) a.x = not_a_number();
  return a;
}

// Squared distances to four points.
__device__ __forceinline__ void distances(const float* x, const float* y, const float* z, float3 query,
                                          float* d) {
  const float4 a = *reinterpret_cast<const float4*>(x), b = *reinterpret_cast<const float4*>(y),
               c = *reinterpret_cast<const float4*>(z);
  d[0] = squared_distance3(a.x - query.x, b.x - query.y, c.x - query.z);
  d[1] = squared_distance3(a.y - query.x, b.y - query.y, c.y - query.z);
  d[2] = squared_distance3(a.z - query.x, b.z - query.y, c.z - query.z);
  d[3] = squared_distance3(a.w - query.x, b.w - query.y, c.w - query.z);
}

// Small clouds.

// Queries of a block: as many as its warps if that leaves few blocks.
constexpr int kSmallTile = 32, kFewBlocks = 256;

// Clouds with above < N <= 32 * kPoints.
template <int kPoints, int kKeys>
__global__ __launch_bounds__(32 * kWarps,
                             kPoints > 32 ? 2 : 3) void nearest_small_kernel(Neighbours<float> run,
                                                                             int64_t above, int size) {
  constexpr int kCloud = 32 * kPoints, kMost = 32 * kKeys;
  __shared__ alignas(16) float axis[3][kCloud];
  __shared__ Candidate list_of[kWarps][kMost];
  __shared__ int valid;

  const Tile tile = tile_of(run.query_rows, size, blockIdx.x);
  const int64_t count = run.rows.count(tile.cloud);
  if (tile.first < 0 || tile.first >= tile.last || count <= above || count > kCloud) return;

  // Lane l of every warp is to hold points l * kPoints + i: four of them in a row are one load.
  const float* points = run.points + run.rows.begin(tile.cloud) * run.dim;
  if (threadIdx.x == 0) valid = 0;
  __syncthreads();
  int usable = 0;
  for (int i = threadIdx.x; i < kCloud; i += 32 * kWarps) {
    const int of = i / kPoints, at = i % kPoints, slot = at / 4 * 128 + of * 4 + at % 4;
    const float3 p = i < count ? point_of(run, points, i) : float3{not_a_number(), 0, 0};
    axis[0][slot] = p.x;
    axis[1][slot] = p.y;
    axis[2][slot] = p.z;
    usable += p.x == p.x;
  }
  atomicAdd(&valid, usable);
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, k = int(run.k);
  Candidate* list = list_of[warp];
  float guess = -1;
  const int64_t base = run.rows.index_base(tile.cloud), begin = run.query_rows.begin(tile.cloud);
  for (int64_t i = tile.first + warp; i < tile.last; i += kWarps) {
    float3 query{not_a_number(), 0, 0};
    if (i < tile.count) query = point_of(run, run.query + begin * run.dim, i);
    if (query.x != query.x || run.limit < 0) {
      write_missing(run, begin + i, 0, lane);
      continue;
    }
    float d[kPoints];
#pragma unroll
    for (int c = 0; c < kPoints; c += 4) {
      const int slot = c * 32 + lane * 4;
      distances(axis[0] + slot, axis[1] + slot, axis[2] + slot, query, d + c);
    }
    int mine;  // of this lane, by the last count
    const auto count_within = [&](float t) {
      mine = 0;
#pragma unroll
      for (int c = 0; c < kPoints; c++) count_up_to(t, d[c], &mine);
      return warp_sum(mine);
    };
    float t = run.limit;
    if (valid > k && run.choice != Choice::first) {
      if (guess < 0) {
        // Every lane has a point within the largest of the lanes' smallest distances.
        float least = infinite();
#pragma unroll
        for (int c = 0; c < kPoints; c++) least = fminf(least, d[c]);
        guess = warp_max(least < infinite() ? least : 0.0f);
      }
      t = fminf(guess, run.limit);
    }
    const int within = count_within(t);
    Radius radius{t, within, false};
    if (run.choice == Choice::first) {
      // Those of the lowest rows: of this lane the first `quota`.
      int quota = max(0, min(mine, k - sum_of_lanes_below(mine, lane)));
      radius.count = min(within, k);
      mine = quota;
#pragma unroll
      for (int c = 0; c < kPoints; c++) {
        if (d[c] <= t && quota-- <= 0) d[c] = not_a_number();
      }
    } else if (within > kMost || (within < k && t < run.limit)) {
      radius = find_radius(k, kMost, run.limit, t, within, count_within);
    }
    if (!radius.tie && radius.count >= k) {
      guess = __int_as_float(max(0, radius_toward(__float_as_int(radius.t), radius.count, (k + kMost) / 2)));
    }
    int row = lane * kPoints;
    asm volatile("" : "+r"(row));  // or the compiler keeps all rows in registers over the loop
    const int m = pack(d, mine, [&](int c) { return row + c; }, radius, k, list, lane);
    finish<kKeys>(run, base, begin + i, list, m, lane);
  }
}

// Large clouds.

constexpr int kTilePoints = 1024, kHeld = 4;  // points in shared memory, queries of a warp

// Shortens a buffer of m candidates to k or a few more and returns how many; `bound` becomes the largest
// distance that can still matter: rows that follow are higher, so they must be nearer.
template <int kKeys>
__device__ __forceinline__ int shorten(Candidate* buffer, int m, int k, float limit, float* bound, int lane) {
  const float top = *bound == limit ? limit : above(*bound);  // no candidate is farther
  __syncwarp();
  float d[kKeys];
  int row[kKeys], mine;
#pragma unroll
  for (int r = 0; r < kKeys; r++) {
    const int at = lane * kKeys + r;
    const Candidate next = at < m ? buffer[at] : Candidate{not_a_number(), 0};
    d[r] = next.distance;
    row[r] = next.row;
  }
  const auto count_within = [&](float t) {
    mine = 0;
#pragma unroll
    for (int r = 0; r < kKeys; r++) count_up_to(t, d[r], &mine);
    return warp_sum(mine);
  };
  const Radius radius = find_radius(k, k + (32 * kKeys - 32 - k) / 4, top, top, m, count_within);
  __syncwarp();
  m = pack(d, mine, [&](int r) { return row[r]; }, radius, k, buffer, lane);
  *bound = below(radius.t);
  __syncwarp();
  return m;
}

// Clouds with above < N, of any size that int can number.
template <int kKeys, int kBlockWarps>
__global__ __launch_bounds__(32 * kBlockWarps) void nearest_large_kernel(Neighbours<float> run,
                                                                         int64_t above) {
  constexpr int kMost = 32 * kKeys;
  __shared__ alignas(16) float axis[3][kTilePoints];
  __shared__ Candidate buffer_of[kBlockWarps][kHeld][kMost];  // in the order of rows
  __shared__ float4 query_of[kBlockWarps][kHeld];             // and in w the bound: no candidate is farther
  __shared__ int count_of[kBlockWarps][kHeld];

  __shared__ Tile tile;  // not in registers, which the loop needs

  if (threadIdx.x == 0) tile = tile_of(run.query_rows, kBlockWarps * kHeld, blockIdx.x);
  __syncthreads();
  const int64_t count = run.rows.count(tile.cloud);
  if (tile.first < 0 || tile.first >= tile.last || count <= above) return;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, k = int(run.k);
  if (lane < kHeld) {
    const int64_t row = tile.first + warp * kHeld + lane;
    float3 q{not_a_number(), 0, 0};
    if (row < min(tile.last, tile.count)) {
      q = point_of(run, run.query + run.query_rows.begin(tile.cloud) * run.dim, row);
    }
    query_of[warp][lane] = {q.x, q.y, q.z, q.x == q.x ? run.limit : -1.0f};
    count_of[warp][lane] = 0;
  }

  const float* points = run.points + run.rows.begin(tile.cloud) * run.dim;
  for (int64_t start = 0; start < count; start += kTilePoints) {
    __syncthreads();
    // Of 128 points, lane l is to hold l, l + 32, l + 64, l + 96 in one load: ballots are in order of rows.
    for (int i = threadIdx.x; i < kTilePoints; i += 32 * kBlockWarps) {
      const int slot = i / 128 * 128 + i % 32 * 4 + i % 128 / 32;
      const float3 p = start + i < count ? point_of(run, points, start + i) : float3{not_a_number(), 0, 0};
      axis[0][slot] = p.x;
      axis[1][slot] = p.y;
      axis[2][slot] = p.z;
    }
    __syncthreads();
    for (int c = 0; c < kTilePoints && start + c < count; c += 128) {
      const int slot = c + lane * 4;
      unsigned hits = 0;  // bit w: query w has a candidate among these points
#pragma unroll
      for (int w = 0; w < kHeld; w++) {
        const float4 q = query_of[warp][w];
        float d[4];
        distances(axis[0] + slot, axis[1] + slot, axis[2] + slot, {q.x, q.y, q.z}, d);
        const bool any = d[0] <= q.w || d[1] <= q.w || d[2] <= q.w || d[3] <= q.w;
        hits |= __any_sync(kAll, any) ? 1u << w : 0u;
      }
      while (hits) {
        const int w = __ffs(hits) - 1;
        hits &= hits - 1;
        Candidate* buffer = buffer_of[warp][w];
        int m = count_of[warp][w];
        const float4 q = query_of[warp][w];
        float nearer = q.w, d[4];
        distances(axis[0] + slot, axis[1] + slot, axis[2] + slot, {q.x, q.y, q.z}, d);
#pragma unroll 1  // one copy of `shorten`
        for (int j = 0; j < 4; j++) {
          const float distance = j < 2 ? (j < 1 ? d[0] : d[1]) : (j < 3 ? d[2] : d[3]);
          const bool candidate = distance <= nearer;
          const unsigned lanes = __ballot_sync(kAll, candidate);
          if (candidate) {
            const int at = m + __popc(lanes & ((1u << lane) - 1));
            buffer[at] = {distance, int(start) + c + j * 32 + lane};
          }
          m += __popc(lanes);
          if (run.choice == Choice::first && m >= k) {
            m = k;
            nearer = -1;  // what follows has higher rows
          }
          if (m > kMost - 32) m = shorten<kKeys>(buffer, m, k, run.limit, &nearer, lane);
        }
        __syncwarp();
        if (lane == 0) {
          count_of[warp][w] = m;
          query_of[warp][w].w = nearer;
        }
        __syncwarp();
      }
    }
  }
  __syncthreads();
  const int64_t base = run.rows.index_base(tile.cloud), begin = run.query_rows.begin(tile.cloud);
  for (int w = 0; w < kHeld; w++) {
    const int64_t row = tile.first + warp * kHeld + w;
    if (row >= tile.last) return;
    finish<kKeys>(run, base, begin + row, buffer_of[warp][w], count_of[warp][w], lane);
  }
}

// Launches.

constexpr int64_t kSmallest = 1024;  // points that a warp holds in half as many registers

template <int kPoints, int kKeys>
cudaError_t launch_small(const Neighbours<float>& run, int64_t above, cudaStream_t stream) {
  const int size = tiles_of(run.query_rows, kSmallTile) < kFewBlocks ? kWarps : kSmallTile;
  const auto blocks = static_cast<unsigned>(tiles_of(run.query_rows, size));
  nearest_small_kernel<kPoints, kKeys><<<blocks, 32 * kWarps, 0, stream>>>(run, above, size);
  return cudaGetLastError();
}

// kKeys: room for k and as many again as make the search for a radius short.
template <int kPoints>
cudaError_t launch_small(const Neighbours<float>& run, int64_t above, cudaStream_t stream) {
  if (run.k <= 24) return launch_small<kPoints, 1>(run, above, stream);
  if (run.k <= 52) return launch_small<kPoints, 2>(run, above, stream);
  if (run.k <= 112) return launch_small<kPoints, 4>(run, above, stream);
  return launch_small<kPoints, 8>(run, above, stream);
}

template <int kKeys, int kBlockWarps>
cudaError_t launch_large(const Neighbours<float>& run, int64_t above, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(tiles_of(run.query_rows, kBlockWarps * kHeld));
  nearest_large_kernel<kKeys, kBlockWarps><<<blocks, 32 * kBlockWarps, 0, stream>>>(run, above);
  return cudaGetLastError();
}

cudaError_t launch_nearest(const Neighbours<float>& run, cudaStream_t stream) {
  // How many points a cloud can have, as far as the host knows.
  const int64_t most = run.rows.packed() ? run.rows.total : run.rows.padded;
  if (most <= 256) return launch_small<8>(run, -1, stream);
  if (most <= 512) return launch_small<16>(run, -1, stream);
  if (most <= kSmallest) return launch_small<32>(run, -1, stream);
  if (most <= kSmallCloud && !run.rows.packed()) return launch_small<64>(run, -1, stream);
  int64_t above = -1;
  if (run.rows.packed()) {
    // Each launch takes the clouds of its range of sizes, the blocks of the others leave at once.
    cudaError_t error = launch_small<32>(run, above, stream);
    if (error != cudaSuccess) return error;
    error = launch_small<64>(run, kSmallest, stream);
    if (error != cudaSuccess || most <= kSmallCloud) return error;
    above = kSmallCloud;
  }
  if (run.k <= 64) return launch_large<4, 8>(run, above, stream);
  return launch_large<8, 4>(run, above, stream);
}

}  // namespace

template <>
int64_t neighbours_workspace(const Neighbours<double>&) {
  return 0;
}
template <>
int64_t neighbours_workspace(const Neighbours<float>& run) {
  return wants_tree(sizes_of(run)) ? tree_workspace(run) : 0;
}

template <>
int neighbours_cuda(const Neighbours<double>& run, void*, void* stream) {
  return neighbours_general_cuda(run, stream);
}

template <>
int neighbours_cuda(const Neighbours<float>& run, void* workspace, void* stream) {
  if (run.query_rows.total == 0) return cudaSuccess;
  switch (plan_search(sizes_of(run), 0).kernel) {
    case SearchPlan::tree:
      return neighbours_tree_cuda(run, workspace, stream);
    case SearchPlan::scan:
      return launch_nearest(run, static_cast<cudaStream_t>(stream));
    default:
      return neighbours_general_cuda(run, stream);
  }
}

}  // namespace any2point
