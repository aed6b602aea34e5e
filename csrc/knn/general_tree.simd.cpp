// Neighbour search in large clouds of float64, or of more than three coordinates: a tree of boxes as in
// tree.simd.cpp. Plain loops over kFanout lanes, vectorised by the compiler; general_tree.h does the rest.
//
// A query takes about 1.2 us (16 of 100,000 in a cube, float64, one thread with AVX-512), five times as long
// as one of tree.simd.cpp.
//
// Exact: distances to boxes are computed like those to points (common/distance.h), and never exceed them.
#include "knn/candidates.h"

namespace any2point {
namespace A2P_ISA {
namespace {

template <typename T>
A2P_INLINE T fused(T a, T b, T c) {
  return sizeof(T) == 4 ? (T)__builtin_fmaf((float)a, (float)b, (float)c) : (T)__builtin_fma(a, b, c);
}

// Sums the squares of difference(coordinate, lane) in the order of common/distance.h.
template <typename T, typename F>
A2P_INLINE void sum_squares(int64_t dim, T* sum, const F& difference) {
  for (int b = 0; b < kFanout; b++) {
    const T d = difference(1, b);
    sum[b] = d * d;
  }
  for (int64_t c = 0; c < dim; c++) {
    if (c == 1) continue;
    for (int b = 0; b < kFanout; b++) {
      const T d = difference(c, b);
      sum[b] = fused(d, d, sum[b]);
    }
  }
}

template <typename T>
A2P_INLINE uint32_t lanes_within(const T* distance, T t) {
  uint32_t lanes = 0;
  for (int b = 0; b < kFanout; b++) lanes |= (uint32_t)(distance[b] <= t) << b;
  return lanes;
}

template <typename T>
void enclose(const GeneralTree<T>& tree, int level, int64_t first, int64_t last) {
  const int64_t dim = tree.dim, items = level ? tree.groups[level - 1] : groups_of(tree.points);
  for (int64_t i = first * kFanout; i < last * kFanout; i++) {
    T* box = tree.box[level] + i / kFanout * (dim * 2 * kFanout) + i % kFanout;
    for (int64_t c = 0; c < dim; c++) {
      T low = (T)__builtin_inf(), high = -low;
      for (int b = 0; b < kFanout && i < items; b++) {
        const T* lows =
            level ? tree.box[level - 1] + (i * dim + c) * 2 * kFanout : tree.block + (i * dim + c) * kFanout;
        const T* highs = level ? lows + kFanout : lows;
        low = lows[b] < low ? lows[b] : low;
        high = highs[b] > high ? highs[b] : high;
      }
      box[2 * c * kFanout] = i < items ? low : (T)__builtin_nan("");
      box[(2 * c + 1) * kFanout] = i < items ? high : (T)__builtin_nan("");
    }
  }
}

template <typename T>
int64_t list_blocks(const GeneralTree<T>& tree, const T* query, T t, const GeneralScratch<T>& scratch) {
  // The last of `levels` lists goes to blocks[0].
  int32_t *list = scratch.blocks[tree.levels & 1], *next = scratch.blocks[~tree.levels & 1];
  int64_t n = 1;
  list[0] = 0;
  for (int level = tree.levels - 1; level >= 0; level--) {
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) {
      const T* box = tree.box[level] + list[i] * (tree.dim * 2 * kFanout);
      T distance[kFanout];
      sum_squares(tree.dim, distance, [&](int64_t c, int b) {
        const T below = box[2 * c * kFanout + b] - query[c],
                above = query[c] - box[(2 * c + 1) * kFanout + b];
        const T gap = below > above ? below : above;
        return gap < 0 ? 0 : gap;  // NaN, where there is no box, stays
      });
      for (uint32_t lanes = lanes_within(distance, t); lanes; lanes &= lanes - 1) {
        next[found++] = list[i] * (int32_t)kFanout + __builtin_ctz(lanes);
      }
    }
    n = found;
    int32_t* other = list;
    list = next;
    next = other;
  }
  return n;
}

template <typename T>
int64_t pack_blocks(const GeneralTree<T>& tree, const T* query, T t, int64_t n,
                    const GeneralScratch<T>& scratch) {
  int64_t m = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t at = scratch.blocks[0][i];
    const T* block = tree.block + at * (tree.dim * kFanout);
    T distance[kFanout];
    sum_squares(tree.dim, distance, [&](int64_t c, int b) { return block[c * kFanout + b] - query[c]; });
    for (uint32_t lanes = lanes_within(distance, t); lanes; lanes &= lanes - 1) {
      const int b = __builtin_ctz(lanes);
      scratch.near[m] = distance[b];
      scratch.row[m++] = tree.row[at * kFanout + b];
    }
  }
  return m;
}

template <typename T>
void sort_few(int64_t m, const GeneralScratch<T>& scratch) {
  T rank[kFew];  // a count, in the type of the distances: one width of lanes
  const T* d = scratch.near;
  for (int64_t i = 0; i < m; i++) rank[i] = 0;
  for (int64_t other = 0; other < m; other++) {
    const T a = d[other];
    for (int64_t i = 0; i < other; i++) rank[i] += a < d[i] ? 1 : 0;
    for (int64_t i = other + 1; i < m; i++) rank[i] += a <= d[i] ? 1 : 0;
  }
  for (int64_t i = 0; i < m; i++) {
    scratch.spare[(int64_t)rank[i]] = d[i];
    scratch.spare_row[(int64_t)rank[i]] = scratch.row[i];
  }
  __builtin_memcpy(scratch.near, scratch.spare, (size_t)m * sizeof(T));
  __builtin_memcpy(scratch.row, scratch.spare_row, (size_t)m * sizeof(int32_t));
}

template <typename T>
int64_t first_within(const T* points, int64_t count, int64_t dim, const T* query, T t, int64_t k,
                     const GeneralScratch<T>& scratch) {
  int64_t m = 0;
  for (int64_t i = 0; i < count && m < k; i++) {
    const T* point = points + i * dim;
    const T d0 = point[0] - query[0], d1 = dim > 1 ? point[1] - query[1] : 0;
    T sum = fused(d0, d0, d1 * d1);
    for (int64_t c = 2; c < dim; c++) sum = fused(point[c] - query[c], point[c] - query[c], sum);
    bool finite = sum <= t;
    for (int64_t c = 0; finite && c < dim; c++) finite = point[c] - point[c] == 0;
    if (!finite) continue;
    scratch.near[m] = sum;
    scratch.row[m++] = (int32_t)i;
  }
  return m;
}

template <typename T>
constexpr GeneralKernels<T> kernels{enclose<T>, list_blocks<T>, pack_blocks<T>, sort_few<T>, first_within<T>};

}  // namespace

const GeneralKernels<float>& general_kernels(float) { return kernels<float>; }
const GeneralKernels<double>& general_kernels(double) { return kernels<double>; }

}  // namespace A2P_ISA
}  // namespace any2point
