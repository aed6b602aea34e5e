// Builds the tree of tree.cuh: extents of the clouds, places on the curve, one radix sort for the points and
// the queries of all clouds, boxes. Clouds that fit are sorted by a block each (tree_sort.cu).
//
// Bytes: 12 read and 12 written a row for each digit of the sort (8 bits of the key), about 100 a row for the
// rest: 0.15 us a thousand rows at 4 TB/s for 5 digits, rows read out of order apart. H200, us: 65 for 20,000
// points, 81 for 100,000, 193 for 1 M (6 digits). Up to a few 100,000 rows that is the latency of 9 to 12
// launches one after the other: each pass of the radix sort takes 8 to 13.
#include "common/radix_sort.h"
#include "knn/curve.cuh"
#include "knn/tree_sort.cuh"

namespace any2point {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 2048;  // rows of a block that looks for extents

// A block per cloud for its usual extent, the others for all rows.
__global__ __launch_bounds__(kThreads) void extent_kernel(Rows rows, const float* points, int64_t dim,
                                                          Extent* extent) {
  if (blockIdx.x < rows.clouds) {
    const int64_t number = blockIdx.x, count = rows.count(number);
    if (count > 0) find_usual_extent(points + rows.begin(number) * dim, count, dim, extent + number);
    return;
  }
  const Tile tile = tile_of(rows, kChunk, blockIdx.x - rows.clouds);
  if (tile.first < 0 || tile.first >= tile.last) return;
  const float* cloud = points + rows.begin(tile.cloud) * dim;
  __shared__ Extent shared;
  clear(&shared);
  __syncthreads();
  extend(&shared, cloud, dim, tile.first + threadIdx.x, min(tile.last, tile.count), kThreads);
  __syncthreads();
  Extent* const all = extent + tile.cloud;
  if (threadIdx.x < 3) {
    atomicMin(&all->low[threadIdx.x], shared.low[threadIdx.x]);
    atomicMin(&all->high[threadIdx.x], shared.high[threadIdx.x]);
  }
  if (threadIdx.x == 0) atomicAdd(&all->count, uint32_t(shared.points()));
}

// Bits of a sort key, from the top: query or point, cloud, no point at all, place on the curve.
struct Keys {
  Rows rows, query_rows;
  const float *points, *query;  // query null: the points are the queries
  int64_t dim;
  const Extent* extent;
  int bits;        // of each coordinate
  int cloud_bits;  // of the number of a cloud

  A2P_HOST_DEVICE int total() const { return 3 * bits + 1 + cloud_bits + (query ? 1 : 0); }
};

__device__ int64_t cloud_of(const Rows& rows, int64_t row) {
  if (!rows.packed()) return uint32_t(row) / uint32_t(rows.padded);
  int64_t low = 0, high = rows.clouds;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (rows.begin(middle) <= row ? low : high) = middle;
  }
  return low;
}

__global__ __launch_bounds__(kThreads) void key_kernel(Keys keys, uint64_t* key, uint32_t* value) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x, points = keys.rows.total;
  const bool is_query = item >= points;
  if (item >= points + (keys.query ? keys.query_rows.total : 0)) return;
  const Rows& rows = is_query ? keys.query_rows : keys.rows;
  const int64_t row = is_query ? item - points : item, cloud = cloud_of(rows, row);
  uint64_t high = cloud << 1, place = 0;
  const float3 p = row_of(is_query ? keys.query : keys.points, keys.dim, row);
  if (row - rows.begin(cloud) < rows.count(cloud) && finite_point(p)) {
    place = place_on_curve<uint64_t>(Frame(keys.extent[cloud], keys.bits), p, keys.bits);
  } else {
    high |= 1;
  }
  if (is_query) high |= uint64_t(2) << keys.cloud_bits;
  key[item] = high << (3 * keys.bits) | place;
  value[item] = uint32_t(row);
}

__device__ __forceinline__ void unite(Box* box, const Box& other) {
  box->low.x = fminf(box->low.x, other.low.x);
  box->low.y = fminf(box->low.y, other.low.y);
  box->low.z = fminf(box->low.z, other.low.z);
  box->high.x = fmaxf(box->high.x, other.high.x);
  box->high.y = fmaxf(box->high.y, other.high.y);
  box->high.z = fmaxf(box->high.z, other.high.z);
  box->low.w = __uint_as_float(min(__float_as_uint(box->low.w), __float_as_uint(other.low.w)));
}

__device__ __forceinline__ Box empty_box() {
  const float most = infinite();
  return {{most, most, most, __uint_as_float(~0u)}, {-most, -most, -most, 0}};
}

// United with that of the lane whose number differs in bit `d`.
__device__ __forceinline__ void unite_lanes(Box* box, int d) {
  Box other = *box;
  other.low.x = __shfl_xor_sync(kAll, box->low.x, d);
  other.low.y = __shfl_xor_sync(kAll, box->low.y, d);
  other.low.z = __shfl_xor_sync(kAll, box->low.z, d);
  other.low.w = __uint_as_float(__shfl_xor_sync(kAll, __float_as_uint(box->low.w), d));
  other.high.x = __shfl_xor_sync(kAll, box->high.x, d);
  other.high.y = __shfl_xor_sync(kAll, box->high.y, d);
  other.high.z = __shfl_xor_sync(kAll, box->high.z, d);
  unite(box, other);
}

// Points in order, their leaves and the level above: a block has the points of a node of level 1.
__device__ void make_leaves(const PointTree& tree, const float* points, int64_t dim, const uint32_t* order,
                            int64_t number) {
  __shared__ Box of_warp[kThreads / 32];
  if (number == 0 && threadIdx.x < kLeaf) {
    tree.point[int64_t(tree.blank) * kLeaf + threadIdx.x] = {not_a_number(), 0, 0, 0};
  }
  const Tile tile = tile_of(tree.rows, kThreads, number);
  if (tile.first < 0 || tile.first >= tile.last) return;
  const int64_t begin = tree.rows.begin(tile.cloud), count = tree.extent[tile.cloud].points();
  const int64_t i = tile.first + threadIdx.x, leaf = tree.first_node(0, tile.cloud) + i / kLeaf;
  Box box = empty_box();
  if (i / kLeaf * kLeaf < tile.last) {
    float4 p{not_a_number(), 0, 0, 0};
    if (i < tile.last) {
      const int64_t row = order[begin + i];
      p.w = __uint_as_float(uint32_t(row - begin));
      if (i < count) {
        const float3 a = row_of(points, dim, row);
        p.x = a.x;
        p.y = a.y;
        p.z = a.z;
        box = {p, p};
      }
    }
    tree.point[leaf * kLeaf + i % kLeaf] = p;
  }
  for (int d = 1; d < kLeaf; d *= 2) unite_lanes(&box, d);
  if (i % kLeaf == 0 && i < count) tree.box[0][leaf] = box;
  if (tree.top == 0) return;
  for (int d = kLeaf; d < 32; d *= 2) unite_lanes(&box, d);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = box;
  __syncthreads();
  if (threadIdx.x != 0 || i >= count) return;
  for (int w = 1; w < kThreads / 32; w++) unite(&box, of_warp[w]);
  tree.box[1][tree.first_node(1, tile.cloud) + tile.first / kThreads] = box;
}

// Queries in order, and where each would stand among the points of its cloud.
__device__ void place_query(const Keys& keys, const uint64_t* key, const uint32_t* order, float4* query,
                            uint32_t* nearest, int64_t i) {
  const int64_t points = keys.rows.total;
  if (i >= keys.query_rows.total) return;
  const int64_t row = order[points + i], cloud = cloud_of(keys.query_rows, row);
  const uint64_t from_key = key[points + i], wanted = from_key & ~(uint64_t(1) << (keys.total() - 1));
  const float3 a = row_of(keys.query, keys.dim, row);
  float4 q{a.x, a.y, a.z, __uint_as_float(uint32_t(row - keys.query_rows.begin(cloud)))};
  if (from_key >> (3 * keys.bits) & 1) q.x = not_a_number();
  query[i] = q;
  const int64_t begin = keys.rows.begin(cloud);
  int64_t low = begin, high = begin + keys.extent[cloud].points();
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (key[middle] < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  nearest[i] = uint32_t(low - begin);
}

struct Ordered {
  Keys keys;
  const uint64_t* key;
  const uint32_t* order;
  float4* query;
  uint32_t* nearest;
  unsigned leaf_blocks;
};

// The first blocks make leaves, the others place queries.
__global__ __launch_bounds__(kThreads) void leaf_kernel(PointTree tree, Ordered sorted) {
  const Keys& keys = sorted.keys;
  if (blockIdx.x < sorted.leaf_blocks) {
    make_leaves(tree, keys.points, keys.dim, sorted.order, blockIdx.x);
  } else {
    const int64_t i = int64_t(blockIdx.x - sorted.leaf_blocks) * kThreads + threadIdx.x;
    place_query(keys, sorted.key, sorted.order, sorted.query, sorted.nearest, i);
  }
}

// A warp per node of a higher level.
__global__ __launch_bounds__(kThreads) void node_kernel(PointTree tree, int level) {
  const int64_t number = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (number >= PointTree::nodes(tree.rows, level)) return;
  const int64_t size = PointTree::size(level), below = PointTree::size(level - 1);
  const Tile tile = tile_of(tree.rows, size, number);
  if (tile.first < 0) return;
  const int lane = threadIdx.x % 32;
  const int64_t count = tree.extent[tile.cloud].points(), child = tile.first / below + lane;
  if (tile.first >= count) return;
  Box box = empty_box();
  if (child * below < count) box = tree.box[level - 1][tree.first_node(level - 1, tile.cloud) + child];
  for (int d = 1; d < 32; d *= 2) unite_lanes(&box, d);
  if (lane == 0) tree.box[level][tree.first_node(level, tile.cloud) + tile.first / size] = box;
}

// Takes pieces of a workspace, or, without one, counts the bytes.
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return piece;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

struct Plan {
  int64_t items;     // points and queries
  int each;          // rows of a thread if a block sorts each cloud; 0: one sort for all
  SortBuffers sort;  // values[0] alone if blocks sort
  char* scratch;
  int64_t scratch_bytes;
  Extent* extent;
  float4* query;
  uint32_t* nearest;
};

// Bytes that a block can have on the current device.
int64_t shared_memory() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

int64_t plan_for(const Neighbours<float>& run, void* workspace, Plan* plan, PointTree* tree) {
  Pieces pieces(workspace);
  const SearchSizes sizes = sizes_of(run);
  const bool same = sizes.same;
  const int64_t leaves = PointTree::nodes(run.rows, 0) + 1;
  plan->items = run.rows.total + (same ? 0 : run.query_rows.total);
  plan->each = sort_each(sizes, shared_memory());
  plan->extent = pieces.take<Extent>(run.rows.clouds);
  plan->sort.values[0] = pieces.take<uint32_t>(plan->items);
  if (plan->each == 0) {
    plan->sort.values[1] = pieces.take<uint32_t>(plan->items);
    for (int i = 0; i < 2; i++) plan->sort.keys[i] = pieces.take<uint64_t>(plan->items);
    plan->scratch_bytes = static_cast<int64_t>(radix_sort_scratch(plan->items));
    plan->scratch = pieces.take<char>(plan->scratch_bytes);
  }
  plan->query = pieces.take<float4>(same ? 0 : run.query_rows.total);
  plan->nearest = pieces.take<uint32_t>(same ? 0 : run.query_rows.total);
  tree->rows = run.rows;
  tree->extent = plan->extent;
  tree->point = pieces.take<float4>(leaves * kLeaf);
  tree->blank = uint32_t(leaves - 1);
  tree->top = 0;
  int64_t most = run.rows.packed() ? run.rows.total : run.rows.padded;
  for (int64_t nodes = (most + kLeaf - 1) / kLeaf;; nodes = (nodes + kFanout - 1) / kFanout, tree->top++) {
    tree->box[tree->top] = pieces.take<Box>(PointTree::nodes(run.rows, tree->top));
    if (nodes <= kFanout) break;
  }
  return pieces.bytes();
}

int bits_for(int64_t values) {
  int bits = 0;
  while (values - 1 >> bits > 0) bits++;
  return bits;
}

unsigned blocks_for(int64_t items, int64_t each) { return static_cast<unsigned>((items + each - 1) / each); }

}  // namespace

int64_t tree_workspace(const Neighbours<float>& run) {
  Plan plan{};
  PointTree tree;
  return plan_for(run, nullptr, &plan, &tree);
}

int build_tree(TreeSearch* search, void* workspace, cudaStream_t stream) {
  const Neighbours<float>& run = search->run;
  PointTree& tree = search->tree;
  Plan plan{};
  plan_for(run, workspace, &plan, &tree);
  const bool same = sizes_of(run).same;
  search->query = same ? nullptr : plan.query;
  search->nearest = plan.nearest;

  Keys keys{run.rows, run.query_rows, run.points, same ? nullptr : run.query, run.dim, plan.extent, 0, 0};
  keys.cloud_bits = bits_for(run.rows.clouds);
  // Enough to tell points apart that are several times closer than in a uniform cloud, and all of the bits of
  // the digits that are sorted by for it.
  const int64_t most = run.rows.packed() ? run.rows.total : run.rows.padded;
  const int other = keys.total(), finer = most <= 1 << 15 ? 11 : most <= 1 << 18 ? 18 : 25;
  const int digits = (other + bits_for(most) + finer + 7) / 8;
  keys.bits = (8 * (digits < 8 ? digits : 8) - other) / 3;
  if (keys.bits > 20) keys.bits = 20;

  unsigned query_blocks = 0;  // of the leaf kernel
  if (plan.each > 0) {
    const BlockSort sort{run.rows,    run.query_rows,      keys.points, keys.query,  run.dim,
                         plan.extent, plan.sort.values[0], plan.query,  plan.nearest};
    if (const int failed = block_sort(sort, plan.each, stream)) return failed;
  } else {
    cudaError_t error = cudaMemsetAsync(plan.extent, 0xff, run.rows.clouds * sizeof(Extent), stream);
    if (error != cudaSuccess) return error;
    const auto extent_blocks = static_cast<unsigned>(run.rows.clouds + tiles_of(run.rows, kChunk));
    extent_kernel<<<extent_blocks, kThreads, 0, stream>>>(run.rows, run.points, run.dim, plan.extent);
    key_kernel<<<blocks_for(plan.items, kThreads), kThreads, 0, stream>>>(keys, plan.sort.keys[0],
                                                                          plan.sort.values[0]);
    if (const int failed = radix_sort(&plan.sort, plan.items, 0, keys.total(), plan.scratch,
                                      static_cast<size_t>(plan.scratch_bytes), stream)) {
      return failed;
    }
    if (!same) query_blocks = blocks_for(run.query_rows.total, kThreads);
  }
  const Ordered sorted{keys,       plan.sort.keys[0], plan.sort.values[0],
                       plan.query, plan.nearest,      static_cast<unsigned>(tiles_of(run.rows, kThreads))};
  leaf_kernel<<<sorted.leaf_blocks + query_blocks, kThreads, 0, stream>>>(tree, sorted);
  for (int level = 2; level <= tree.top; level++) {
    node_kernel<<<blocks_for(PointTree::nodes(run.rows, level), kThreads / 32), kThreads, 0, stream>>>(tree,
                                                                                                       level);
  }
  return cudaGetLastError();
}

}  // namespace any2point
