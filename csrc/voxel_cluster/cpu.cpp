#include "voxel_cluster/kernel.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

namespace any2point {
namespace {

// Below this many rows comparisons beat a radix sort's passes over its histogram.
constexpr int64_t kRadixRows = 1024;
constexpr int kDigit = 11;

template <typename T>
bool finite(const T* point, int dim) {
  bool all = true;
  for (int d = 0; d < dim; d++) all &= std::isfinite(point[d]);
  return all;
}

struct Voxel {
  int32_t at[kVoxelDims];  // x, y, z; 0 for those that the points lack
};

// A row's key, and its place among the finite rows of the cloud.
struct Wide {
  uint64_t key, place;
  bool operator<(const Wide& other) const { return key != other.key ? key < other.key : place < other.place; }
};
// Both in one word, where they fit.
struct Narrow {
  uint64_t key_and_place;
  bool operator<(const Narrow& other) const { return key_and_place < other.key_and_place; }
};
uint64_t key_of(const Wide& item) { return item.key; }
uint64_t key_of(const Narrow& item) { return item.key_and_place >> 32; }
uint64_t place_of(const Wide& item) { return item.place; }
uint64_t place_of(const Narrow& item) { return item.key_and_place & 0xffffffff; }
void set(Wide* item, uint64_t key, uint64_t place) { *item = {key, place}; }
void set(Narrow* item, uint64_t key, uint64_t place) { *item = {key << 32 | place}; }

template <typename Item>
void radix_sort(std::vector<Item>& items, int bits) {
  std::vector<Item> other(items.size());
  std::vector<size_t> begin(size_t(1) << kDigit);
  for (int shift = 0; shift < bits; shift += kDigit) {
    std::fill(begin.begin(), begin.end(), 0);
    const auto digit = [&](const Item& item) { return key_of(item) >> shift & ((1 << kDigit) - 1); };
    for (const Item& item : items) begin[digit(item)]++;
    size_t sum = 0;
    for (size_t& b : begin) sum += std::exchange(b, sum);
    for (const Item& item : items) other[begin[digit(item)]++] = item;
    items.swap(other);
  }
}

// Calls next(place, head) for the voxels' places in the order of (z, y, x, place); head: a new voxel begins.
template <typename Item, typename F>
void visit_by_key(const std::vector<Voxel>& voxels, const int64_t* low, const int* bits, const F& next) {
  std::vector<Item> items(voxels.size());
  for (size_t i = 0; i < voxels.size(); i++) {
    uint64_t key = 0;
    for (int d = kVoxelDims - 1; d >= 0; d--) key = key << bits[d] | uint64_t(voxels[i].at[d] - low[d]);
    set(&items[i], key, i);
  }
  if (int64_t(items.size()) >= kRadixRows) {
    radix_sort(items, bits[0] + bits[1] + bits[2]);
  } else {
    std::sort(items.begin(), items.end());
  }
  uint64_t last = 0;
  for (size_t i = 0; i < items.size(); i++) {
    const uint64_t key = key_of(items[i]);
    next(place_of(items[i]), i == 0 || key != last);
    last = key;
  }
}

// The same where three coordinates do not fit into 64 bits.
template <typename F>
void visit_by_comparison(const std::vector<Voxel>& voxels, const F& next) {
  std::vector<int64_t> places(voxels.size());
  std::iota(places.begin(), places.end(), 0);
  const auto compare = [&](int64_t i, int64_t j) {
    for (int d = kVoxelDims - 1; d >= 0; d--) {
      const int32_t a = voxels[i].at[d], b = voxels[j].at[d];
      if (a != b) return a < b ? -1 : 1;
    }
    return 0;
  };
  std::stable_sort(places.begin(), places.end(), [&](int64_t i, int64_t j) { return compare(i, j) < 0; });
  for (size_t i = 0; i < places.size(); i++)
    next(places[i], i == 0 || compare(places[i - 1], places[i]) != 0);
}

template <typename F>
void visit_sorted(const std::vector<Voxel>& voxels, const F& next) {
  int64_t low[kVoxelDims];
  int bits[kVoxelDims];
  for (int d = 0; d < kVoxelDims; d++) {
    int64_t high = low[d] = voxels[0].at[d];
    for (const Voxel& v : voxels) {
      low[d] = std::min<int64_t>(low[d], v.at[d]);
      high = std::max<int64_t>(high, v.at[d]);
    }
    bits[d] = 0;
    while ((high - low[d]) >> bits[d]) bits[d]++;
  }
  const int total = bits[0] + bits[1] + bits[2];
  if (total <= 32 && voxels.size() >> 32 == 0) {
    visit_by_key<Narrow>(voxels, low, bits, next);
  } else if (total <= 64) {
    visit_by_key<Wide>(voxels, low, bits, next);
  } else {
    visit_by_comparison(voxels, next);
  }
}

template <typename T>
int64_t sort_cloud(const VoxelPoints& points, int64_t cloud, int64_t count, int64_t* order,
                   int64_t* cluster) {
  if (count == 0) return 0;
  const int dim = points.dim;
  const int64_t begin = points.rows.begin(cloud), end = begin + points.rows.count(cloud);
  const T* data = static_cast<const T*>(points.points);
  T origin[kVoxelDims], size[kVoxelDims];
  for (int d = 0; d < dim; d++) {
    size[d] = static_cast<T>(points.size[d]);
    origin[d] = points.origin ? static_cast<const T*>(points.origin)[cloud * dim + d]
                              : std::numeric_limits<T>::infinity();
  }
  const bool all = count == end - begin;  // are finite
  if (!points.origin) {
    for (int64_t row = begin; row < end; row++) {
      if (!all && !finite(data + row * dim, dim)) continue;
      for (int d = 0; d < dim; d++) origin[d] = std::min(origin[d], data[row * dim + d]);
    }
  }
  std::vector<Voxel> voxels(count);
  std::vector<int64_t> rows(all ? 0 : count);
  int64_t place = 0;
  for (int64_t row = begin; row < end; row++) {
    if (!all && !finite(data + row * dim, dim)) continue;
    for (int d = 0; d < dim; d++) {
      const T at = (data[row * dim + d] - origin[d]) / size[d];
      // Between the ends: truncation towards zero, as the conversion does it.
      if (!(at > T(-2147483649.0) && at < T(2147483648.0)) && at != T(-2147483648.0)) return -1 - row;
      voxels[place].at[d] = static_cast<int32_t>(at);
    }
    if (!all) rows[place] = row;
    place++;
  }
  int64_t last = -1, i = 0;
  visit_sorted(voxels, [&](int64_t at, bool head) {
    const int64_t row = all ? begin + at : rows[at];
    last += head;
    order[i++] = row;
    cluster[row] = last;
  });
  return last + 1;
}

template <typename T>
int64_t count_cloud(const VoxelPoints& points, int64_t cloud) {
  const T* data = static_cast<const T*>(points.points) + points.rows.begin(cloud) * points.dim;
  int64_t count = 0;
  for (int64_t i = 0; i < points.rows.count(cloud); i++) count += finite(data + i * points.dim, points.dim);
  return count;
}

}  // namespace

int64_t voxel_count_cpu(const VoxelPoints& points, int64_t cloud) {
  return points.wide ? count_cloud<double>(points, cloud) : count_cloud<float>(points, cloud);
}

int64_t voxel_sort_cpu(const VoxelPoints& points, int64_t cloud, int64_t count, int64_t* order,
                       int64_t* cluster) {
  return points.wide ? sort_cloud<double>(points, cloud, count, order, cluster)
                     : sort_cloud<float>(points, cloud, count, order, cluster);
}

}  // namespace any2point
