// Neighbour search on CUDA in large clouds of float32, up to three coordinates: a walk through the tree of
// tree.cuh.
//
// A warp answers 32 / kLanes queries that follow each other on the curve, with kLanes lanes each. Together
// they look into the leaves around them, which gives each a bound on its k-th distance, then walk down the
// tree: lanes test the boxes of 32 children against the box and the largest bound of all queries of the warp,
// later the leaves against each query. In a leaf each lane computes the distance from its query to one of
// kLanes points and appends it to its own list in shared memory if it is within the bound. When a list is
// full, all are shortened: a search for a radius that holds k points or a few more, which becomes the bound.
// At the end the lists are sorted in registers, in a bitonic network over the lanes of each query.
//
// Exact: a bound is a pair (distance, row), as ties are settled by the row. The distance to a box is computed
// with the same operations in the same order as that to a point, from differences that are not larger, and
// rounding is monotonic: it never exceeds the computed distance of a point inside. A box carries its lowest
// row, so that points that coincide are found, not walked through.
//
// H200, us a call as a graph, building included; before: the scans of cuda.cu; peer: the best of pytorch3d,
// pointops, torch.compile of distances + topk:
//                                       build  search   total   before    peer
//   32 x   512 of  4,096, k = 32                           98      171
//   32 x 2,048 of  8,192, k = 32           58     185     243    1,021   2,026
//    1 x   25k of   100k, k = 32                          194    2,146  13,302
//    1 x  100k of   100k, k = 16                  184     257    7,315  14,840
//    1 x    1M of     1M, k = 16                        1,708
//    1 x 1,000 of     1M, k = 16          200     213     413    3,867
// 100k of 100k: k = 1 188, k = 81 701, k = 190 1,366. With k = 16, other kinds of clouds: surface 275, plane
// 178, line 173, lattice 386, 50 places 299, one place 345, clusters of six scales 527, coordinates 2^-40u
// (finer than the curve tells apart) 4,449, where a scan takes 7,679. 32 x 2,048 of 8,192, k = 32: surface
// 223, plane 201, line 171, lattice 538, 50 places 579, one place 430, clusters of six scales 664. A query
// far off all points looks at most of them in a warp of its own, 0.7 us for 100 points.
//
// Floor by bytes: 12 k written a query and 16 read a point, 5 us for 100k of 100k; in practice instructions.
// For eight queries of 100k, k = 16, a warp executes 8,700 (counted, before the last 20 %): 21 % in leaves,
// 17 % on boxes of nodes, 9 % on boxes of leaves, 16 % to shorten lists (2.1 times), 13 % to sort, 8 %
// between nodes. It issues 0.65 a clock and scheduler, with 5 warps on each; 40 % take the integer pipe,
// which has half the rate. Counters (32 x 2,048 of 8,192; 100k of 100k): issue slots 57, 65 %, L1 56, 55 % of
// its peak with 82, 86 % hits, L2 7, 8 %, DRAM 2, 0.4 %. Of the 8.8 (7.7) cycles that a warp spends on an
// instruction it waits 2.1 (2.2) for the one before, 1.2 (1.1) for L1 or L2, 0.8 (0.6) for shared memory, and
// 0.9 (1.0) for its turn. Tried: 96, 72, 64 instead of 80 registers (2, 2, 8 % slower), 4 lanes a query for
// k = 32 (9 to 24 % slower, as lists fill up sooner), 8 for k = 16 (27 % slower), a sort of 64-bit keys (10
// to 20 % slower).
#include "knn/sort_lanes.cuh"
#include "knn/tree.cuh"

namespace any2point {
namespace {

constexpr int kWarps = 4;  // of a block; they do not work together
constexpr int kEach = 16;  // places in the list of a lane
constexpr int kSteps = 4;  // points that a lane has in flight
constexpr int kQueue = 64;
constexpr int kReach = 256;  // places on the curve up to which queries are answered together

using Key = unsigned long long;

__device__ __forceinline__ Key key_of(uint32_t first, uint32_t second) { return Key(first) << 32 | second; }
__device__ __forceinline__ uint32_t first_of(Key key) { return uint32_t(key >> 32); }
__device__ __forceinline__ uint32_t second_of(Key key) { return uint32_t(key); }

__device__ __forceinline__ uint32_t most_of_warp(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kAll, value);
#else
  for (int d = 16; d; d >>= 1) value = max(value, __shfl_xor_sync(kAll, value, d));
  return value;
#endif
}

__device__ __forceinline__ float least_float(float value) {
  for (int d = 16; d; d >>= 1) value = fminf(value, __shfl_xor_sync(kAll, value, d));
  return value;
}

// Lists and queues of a warp.
struct WarpMemory {
  uint2 list[kEach][32];               // candidates of each lane: what they are ordered by, and the other one
  uint32_t near[kQueue];               // leaves that the walk has found
  uint32_t open[kQueue + 4 * kSteps];  // and those that are to be searched
  float box[6];                        // of the queries: low, high
  const Box* boxes[kMaxLevels];        // of the cloud, by level
  int nodes[kMaxLevels];
};

// Sum, largest value over the lanes of a query.
template <int kLanes>
__device__ __forceinline__ int sum_of_query(int value) {
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) value += __shfl_xor_sync(kAll, value, d);
  return value;
}

// What a lane knows. kFirst: candidates are ordered by their row, else by distance, then row.
template <int kLanes, bool kFirst>
struct Lane {
  WarpMemory& memory;
  int lane, k, most;  // most: candidates that a bound is to leave at most
  float3 query;
  uint32_t limit;  // bits of the largest distance of a neighbour
  Key bound;       // candidates are below it; 0: none is wanted any more
  Key all_bounds;  // the largest one of the warp
  int count;       // candidates of this lane

  __device__ __forceinline__ void append(float4 point) {
    const float d = squared_distance3(point.x - query.x, point.y - query.y, point.z - query.z);
    const uint32_t bits = __float_as_uint(d), row = __float_as_uint(point.w);
    const bool wanted = kFirst ? bits <= limit && key_of(row, 0) < bound : key_of(bits, row) < bound;
    if (!wanted) return;
    memory.list[count][lane] = kFirst ? uint2{row, bits} : uint2{bits, row};
    count++;
  }

  __device__ __forceinline__ bool wants(float below_x, float below_y, float below_z, float above_x,
                                        float above_y, float above_z, uint32_t row, Key against) const {
    const float x = fmaxf(0.0f, fmaxf(below_x, above_x)), y = fmaxf(0.0f, fmaxf(below_y, above_y)),
                z = fmaxf(0.0f, fmaxf(below_z, above_z));
    const uint32_t bits = __float_as_uint(squared_distance3(x, y, z));
    return kFirst ? bits <= limit && key_of(row, 0) < against : key_of(bits, row) < against;
  }
  // Whether a point in the box may be a candidate.
  __device__ __forceinline__ bool wants(const Box& box) const {
    return wants(box.low.x - query.x, box.low.y - query.y, box.low.z - query.z, query.x - box.high.x,
                 query.y - box.high.y, query.z - box.high.z, __float_as_uint(box.low.w), bound);
  }

  __device__ __forceinline__ void find_all_bounds() {
    const uint32_t first = most_of_warp(first_of(bound));
    all_bounds = key_of(first, most_of_warp(first_of(bound) == first ? second_of(bound) : 0));
  }

  // Shortens the lists of every query that has more than `most` candidates, to k or a few more, and lowers
  // its bound. Spreads candidates evenly over the lanes of their query.
  __device__ __forceinline__ void shorten() {
    Key key[kEach];
    __syncwarp();
    uint32_t top = 0;
#pragma unroll
    for (int r = 0; r < kEach; r++) {
      const uint2 next = memory.list[r][lane];
      key[r] = r < count ? key_of(next.x, next.y) : ~Key(0);
      top = max(top, r < count ? next.x : 0);
    }
    const int total = sum_of_query<kLanes>(count);
    for (int d = 1; d < kLanes; d *= 2) top = max(top, __shfl_xor_sync(kAll, top, d));

    // As in find_radius, for all queries at once: `low` holds fewer than k, `high` too many.
    const bool lower = total > most && bound != 0;
    bool search = lower, tie = false;
    int low = -1, high = int(top), low_log = 0, high_log = log_bits(total), found = 0;
    for (int step = 0; __any_sync(kAll, search); step++) {
      int next = high;
      if (high - low > 1) {
        if (step % 3 == 2) {
          next = low + (high - low) / 2;
        } else if (low_log > 0 && high_log > low_log) {
          next = low + int(float(high - low) *
                           (float(log_bits((k + most) / 2) - low_log) / float(high_log - low_log)));
        } else {
          next = high + (log_bits((k + most) / 2) - high_log) / 16 * 13;
        }
        next = max(low + 1, min(high - 1, next));
      }
      int mine = 0;
#pragma unroll
      for (int r = 0; r < kEach; r++) mine += first_of(key[r]) <= uint32_t(next);
      const int within = sum_of_query<kLanes>(mine);
      if (!search) continue;
      if (high - low <= 1) {
        tie = true;
        search = false;
      } else if (within < k) {
        low = next;
        low_log = log_bits(within);
      } else if (within > most) {
        high = next;
        high_log = log_bits(within);
      } else {
        found = next;
        search = false;
      }
    }
    if (lower) bound = key_of(uint32_t(tie ? high : found) + 1, 0);
    if (__any_sync(kAll, tie)) {
      // Too many at the same distance: those of the lowest rows. The bound holds just k.
      int below = -1, last = 0x7ffffffd;
      while (__any_sync(kAll, tie && last - below > 1)) {
        const int middle = below + (last - below + 1) / 2;  // leaves those alone that are through
        int mine = 0;
#pragma unroll
        for (int r = 0; r < kEach; r++) mine += key[r] <= key_of(uint32_t(high), uint32_t(middle));
        (sum_of_query<kLanes>(mine) < k ? below : last) = middle;
      }
      if (tie) bound = key_of(uint32_t(high), uint32_t(last) + 1);
    }

    const Key end = bound != 0 ? bound : ~Key(0);
    int kept = 0;
#pragma unroll
    for (int r = 0; r < kEach; r++) kept += key[r] < end;
    const int within = lane % kLanes;
    int at = kept;
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) {
      const int other = __shfl_up_sync(kAll, at, d);
      at += within >= d ? other : 0;
    }
    const int left = __shfl_sync(kAll, at, lane | (kLanes - 1));
    at -= kept;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kEach; r++) {
      if (key[r] < end) {
        memory.list[at / kLanes][lane - within + at % kLanes] = {first_of(key[r]), second_of(key[r])};
        at++;
      }
    }
    count = (left - within + kLanes - 1) / kLanes;
    __syncwarp();
    find_all_bounds();
  }
};

// Sorts the candidates of each query, `total` of them, by (distance, row): into `key`, as `sort_lanes` does.
//
// A network over 32 bits: the distance in 2^b steps of the largest one, then the place in the list. That does
// not tell rows, and may confuse distances closer than a step (floats have finer ones near 0), so the result
// is checked and, in that rare case, sorted by all bits.
template <int kLanes>
__device__ __forceinline__ void sort_by_distance(const WarpMemory& memory, int count, int total, int lane,
                                                 Key (&key)[kEach]) {
  constexpr unsigned kPlaces = kEach * kLanes, kStepsOfLargest = 0xffffffffu / kPlaces;
  const int within = lane % kLanes;
  float d[kEach], largest = 0;
#pragma unroll
  for (int r = 0; r < kEach; r++) {
    d[r] = r < count ? __uint_as_float(memory.list[r][lane].x) : 0.0f;
    largest = fmaxf(largest, d[r]);
  }
#pragma unroll
  for (int s = 1; s < kLanes; s *= 2) largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, s));
  const float scale = float(kStepsOfLargest) / fminf(largest, 3.4028235e38f);
  unsigned sorted[kEach];
#pragma unroll
  for (int r = 0; r < kEach; r++) {
    const unsigned step = min(__float2uint_rz(d[r] * scale), kStepsOfLargest);
    sorted[r] = r < count ? step * kPlaces + (r * kLanes + within) : 0xffffffffu;
  }
  sort_lanes<kLanes>(sorted, lane);
#pragma unroll
  for (int r = 0; r < kEach; r++) {
    const int place = int(sorted[r] % kPlaces);
    const uint2 next = memory.list[place / kLanes][lane - within + place % kLanes];
    key[r] = within * kEach + r < total ? key_of(next.x, next.y) : ~Key(0);
  }
  const Key of_next_lane = __shfl_down_sync(kAll, key[0], 1);
  bool wrong = within + 1 < kLanes && key[kEach - 1] > of_next_lane;
#pragma unroll
  for (int r = 1; r < kEach; r++) wrong |= key[r - 1] > key[r];
  if (__any_sync(kAll, wrong)) sort_lanes<kLanes>(key, lane);
}

template <int kLanes, bool kFirst>
__device__ __forceinline__ void write(const Neighbours<float>& run, WarpMemory& memory, int count, int lane,
                                      int64_t base, int64_t row, bool has_row) {
  Key key[kEach];
  __syncwarp();
  const int total = sum_of_query<kLanes>(count), found = min(int(run.k), total), within = lane % kLanes;
  if (kFirst) {
#pragma unroll
    for (int r = 0; r < kEach; r++) {
      const uint2 next = memory.list[r][lane];
      key[r] = r < count ? key_of(next.x, next.y) : ~Key(0);
    }
    sort_lanes<kLanes>(key, lane);
  } else {
    sort_by_distance<kLanes>(memory, count, total, lane, key);
  }
  bool by_distance = !kFirst;
  if (run.choice == Choice::set) {
#pragma unroll
    for (int r = 0; r < kEach; r++) {
      key[r] = within * kEach + r < found ? key_of(second_of(key[r]), first_of(key[r])) : ~Key(0);
    }
    sort_lanes<kLanes>(key, lane);
    by_distance = false;
  }
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kEach; r++) {
    const int rank = within * kEach + r;
    memory.list[rank / kLanes][lane - within + rank % kLanes] = {first_of(key[r]), second_of(key[r])};
  }
  __syncwarp();
  if (has_row) {
    for (int r = 0; r < kEach; r++) {
      const int rank = r * kLanes + within;
      if (rank >= run.k) break;
      const uint2 next = memory.list[r][lane];
      const bool there = rank < found;
      run.index[row * run.k + rank] = there ? base + (by_distance ? next.y : next.x) : -1;
      run.distance[row * run.k + rank] = there ? __uint_as_float(by_distance ? next.x : next.y) : infinite();
    }
    if (run.count && within == 0) run.count[row] = found;
  }
  __syncwarp();
}

template <int kLanes, bool kFirst>
__global__ __launch_bounds__(32 * kWarps, 6) void tree_search_kernel(TreeSearch args, int most) {
  constexpr int kHeld = 32 / kLanes;               // queries of a warp
  constexpr int kBatch = kSteps * kLanes / kLeaf;  // leaves that are searched at once
  __shared__ WarpMemory memory_of[kWarps];
  const Neighbours<float>& run = args.run;
  const PointTree& tree = args.tree;
  const int lane = threadIdx.x % 32, within = lane % kLanes;
  const int64_t number = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (number >= (run.query_rows.packed()
                     ? run.query_rows.total / kHeld + run.query_rows.clouds
                     : run.query_rows.clouds * ((run.query_rows.padded + kHeld - 1) / kHeld))) {
    return;
  }
  const Tile tile = tile_of(run.query_rows, kHeld, number);
  if (tile.first < 0 || tile.first >= tile.last) return;

  const int64_t first_leaf = tree.first_node(0, tile.cloud), i = tile.first + lane / kLanes;
  const int points = int(tree.extent[tile.cloud].points()), leaves = (points + kLeaf - 1) / kLeaf;
  const int64_t query_begin = run.query_rows.begin(tile.cloud);
  const bool has_row = i < tile.last;
  float4 given{not_a_number(), 0, 0, 0};
  int place = 0;
  if (has_row) {
    given = args.query ? args.query[query_begin + i] : tree.point[first_leaf * kLeaf + i];
    place = args.query ? int(args.nearest[query_begin + i]) : int(i);
  }
  const uint32_t limit = run.limit < 0 ? 0 : __float_as_uint(run.limit);
  bool pending = given.x == given.x && run.limit >= 0;
  WarpMemory& memory = memory_of[threadIdx.x / 32];
  Lane<kLanes, kFirst> self{memory, lane, int(run.k), most, {given.x, given.y, given.z}, limit, 0, 0, 0};

  if (lane <= tree.top) {
    memory.boxes[lane] = tree.box[lane] + tree.first_node(lane, tile.cloud);
    memory.nodes[lane] = int((points + PointTree::size(lane) - 1) / PointTree::size(lane));
  }

  while (true) {
    // Queries that are far from each other on the curve are answered one after the other.
    const unsigned waiting = __ballot_sync(kAll, pending);
    if (waiting == 0) break;
    const int leader = __shfl_sync(kAll, place, __ffs(waiting) - 1);
    bool walking = pending && abs(place - leader) < kReach;
    pending = pending && !walking;
    const int last_place = int(most_of_warp(walking ? place : 0));
    self.bound = !walking ? 0 : kFirst ? key_of(0x80000000u, 0) : key_of(limit + 1, 0);

    // The leaves around them.
    const int around = min(min(kQueue, int(run.k) * 3 / 8 + 2), leaves);
    const int window = max(0, min(leaves - around, (leader + last_place) / (2 * kLeaf) - around / 2));
    int open = around;
    __syncwarp();
    for (int j = lane; j < around; j += 32) memory.open[j] = uint32_t(first_leaf) + window + j;

    int level = tree.top + 1, first = 0, kept_first = 0;
    unsigned mask = 0, kept_mask = 0;  // of boxes of a level to walk to; lane l keeps those of level l
    bool begun = false;
    Key bound_so_far = 0;
    while (true) {
      // Search the leaves in memory.open.
      if (lane < kBatch) memory.open[open + lane] = tree.blank;
      __syncwarp();
      for (int j = 0;; j += kBatch) {
        if (j < open) {
          float4 point[kSteps];
#pragma unroll
          for (int s = 0; s < kSteps; s++) {
            const int at = s * kLanes + within;
            point[s] = tree.point[memory.open[j + at / kLeaf] * kLeaf + at % kLeaf];
          }
#pragma unroll
          for (int s = 0; s < kSteps; s++) self.append(point[s]);
        }
        const bool last = j + kBatch >= open;
        if ((last && !begun) || __any_sync(kAll, self.bound != 0 && self.count > kEach - kSteps)) {
          self.shorten();
        }
        if (last) break;
      }
      if (!begun) bound_so_far = self.bound;
      begun = true;

      // Walk on until there are leaves enough.
      int near = 0;
      bool done = false;
      while (true) {
        if (level == 0) {
          const int leaf = first + lane;
          const bool wanted = (mask >> lane & 1) && (leaf < window || leaf >= window + around);
          const unsigned lanes = __ballot_sync(kAll, wanted);
          if (wanted) memory.near[near + __popc(lanes & ((1u << lane) - 1))] = uint32_t(first_leaf) + leaf;
          near += __popc(lanes);
          mask = 0;
          if (near > kQueue - 32) break;
        }
        int node = 0;
        if (mask != 0) {
          node = first + __ffs(mask) - 1;
          mask &= mask - 1;
          if (lane == level) {
            kept_mask = mask;
            kept_first = first;
          }
          level--;
        } else if (level < tree.top) {
          level++;
          mask = __shfl_sync(kAll, kept_mask, level);
          first = __shfl_sync(kAll, kept_first, level);
          continue;
        } else {
          // From the top, for queries that are near to each other for the size of their balls.
          if (near > 0) break;
          const unsigned left = __ballot_sync(kAll, walking);
          done = left == 0;
          if (done) break;
          const int from = __ffs(left) - 1;
          const uint32_t ball = kFirst ? limit : first_of(__shfl_sync(kAll, bound_so_far, from));
          const float reach = 4 * sqrtf(__uint_as_float(min(ball, 0x7f800000u)));
          const float apart_x = fabsf(given.x - __shfl_sync(kAll, given.x, from));
          const float apart_y = fabsf(given.y - __shfl_sync(kAll, given.y, from));
          const float apart_z = fabsf(given.z - __shfl_sync(kAll, given.z, from));
          const bool together = walking && fmaxf(apart_x, fmaxf(apart_y, apart_z)) <= reach;
          walking = walking && !together;
          self.bound = together ? bound_so_far : 0;
          self.find_all_bounds();
          float box[6] = {given.x, given.y, given.z, -given.x, -given.y, -given.z};
#pragma unroll
          for (int c = 0; c < 6; c++) box[c] = least_float(together ? box[c] : infinite());
          __syncwarp();
#pragma unroll
          for (int c = 0; c < 6; c++) {
            if (lane == c) memory.box[c] = c < 3 ? box[c] : -box[c];
          }
          __syncwarp();
          level = tree.top;
        }
        first = node * kFanout;
        const int child = first + lane;
        bool wanted = false;
        if (child < memory.nodes[level]) {
          const Box box = memory.boxes[level][child];
          wanted = self.wants(box.low.x - memory.box[3], box.low.y - memory.box[4], box.low.z - memory.box[5],
                              memory.box[0] - box.high.x, memory.box[1] - box.high.y,
                              memory.box[2] - box.high.z, __float_as_uint(box.low.w), self.all_bounds);
        }
        mask = __ballot_sync(kAll, wanted);
      }
      if (done) break;
      __syncwarp();
      // Of those the ones that a query wants.
      open = 0;
      for (int j = 0; j < near; j += kLanes) {
        const uint32_t leaf = memory.near[min(j + within, near - 1)];
        const bool wanted = j + within < near && self.wants(tree.box[0][leaf]);
        unsigned lanes = __ballot_sync(kAll, wanted);
#pragma unroll
        for (int d = 16; d >= kLanes; d /= 2) lanes |= lanes >> d;
        if (kLanes < 32) lanes &= (1u << kLanes % 32) - 1;
        if (lane < kLanes && (lanes >> lane & 1)) {
          memory.open[open + __popc(lanes & ((1u << lane) - 1))] = leaf;
        }
        open += __popc(lanes);
      }
    }
    self.bound = 0;
  }
  const int64_t row = query_begin + __float_as_uint(given.w);
  write<kLanes, kFirst>(run, memory, self.count, lane, run.rows.index_base(tile.cloud), row, has_row);
}

template <int kLanes>
cudaError_t launch(const TreeSearch& search, int most, cudaStream_t stream) {
  const int64_t warps = tiles_of(search.run.query_rows, 32 / kLanes);
  const auto blocks = static_cast<unsigned>((warps + kWarps - 1) / kWarps);
  if (search.run.choice == Choice::first) {
    tree_search_kernel<kLanes, true><<<blocks, 32 * kWarps, 0, stream>>>(search, most);
  } else {
    tree_search_kernel<kLanes, false><<<blocks, 32 * kWarps, 0, stream>>>(search, most);
  }
  return cudaGetLastError();
}

}  // namespace

int neighbours_tree_cuda(const Neighbours<float>& run, void* workspace, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  TreeSearch search{};
  search.run = run;
  if (const int error = build_tree(&search, workspace, stream)) return error;
  const int k = static_cast<int>(run.k), slack = k + k / 6 + 1;
  if (k <= 20) return launch<4>(search, slack, stream);
  if (k <= 68) return launch<8>(search, slack < 80 ? slack : 80, stream);
  if (k <= 140) return launch<16>(search, slack < 160 ? slack : 160, stream);
  return launch<32>(search, slack < 320 ? slack : 320, stream);
}

}  // namespace any2point
