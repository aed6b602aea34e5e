#include "voxel_cluster/kernel.h"

#include <algorithm>
#include <cmath>
#include <limits>
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
  int64_t row;
};

struct Item {
  uint64_t key;
  int64_t row;
};

void radix_sort(std::vector<Item>& items, int bits) {
  std::vector<Item> other(items.size());
  std::vector<size_t> begin(size_t(1) << kDigit);
  for (int shift = 0; shift < bits; shift += kDigit) {
    std::fill(begin.begin(), begin.end(), 0);
    const auto digit = [&](const Item& item) { return item.key >> shift & ((1 << kDigit) - 1); };
    for (const Item& item : items) begin[digit(item)]++;
    size_t sum = 0;
    for (size_t& b : begin) sum += std::exchange(b, sum);
    for (const Item& item : items) other[begin[digit(item)]++] = item;
    items.swap(other);
  }
}

// Into the order of (z, y, x, row), given in ascending order of rows.
void sort(std::vector<Voxel>& voxels) {
  int64_t low[kVoxelDims], bits[kVoxelDims];
  for (int d = 0; d < kVoxelDims; d++) {
    int64_t high = low[d] = voxels[0].at[d];
    for (const Voxel& v : voxels) {
      low[d] = std::min<int64_t>(low[d], v.at[d]);
      high = std::max<int64_t>(high, v.at[d]);
    }
    bits[d] = 0;
    while ((high - low[d]) >> bits[d]) bits[d]++;
  }
  if (bits[0] + bits[1] + bits[2] > 64) {
    std::sort(voxels.begin(), voxels.end(), [](const Voxel& a, const Voxel& b) {
      for (int d = kVoxelDims - 1; d >= 0; d--) {
        if (a.at[d] != b.at[d]) return a.at[d] < b.at[d];
      }
      return a.row < b.row;
    });
    return;
  }
  std::vector<Item> items(voxels.size());
  for (size_t i = 0; i < voxels.size(); i++) {
    uint64_t key = 0;
    for (int d = kVoxelDims - 1; d >= 0; d--) key = key << bits[d] | uint64_t(voxels[i].at[d] - low[d]);
    items[i] = {key, int64_t(i)};
  }
  if (int64_t(items.size()) >= kRadixRows) {
    radix_sort(items, int(bits[0] + bits[1] + bits[2]));
  } else {
    std::sort(items.begin(), items.end(),
              [](const Item& a, const Item& b) { return a.key != b.key ? a.key < b.key : a.row < b.row; });
  }
  std::vector<Voxel> sorted(voxels.size());
  for (size_t i = 0; i < items.size(); i++) sorted[i] = voxels[items[i].row];
  voxels.swap(sorted);
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
  if (!points.origin) {
    for (int64_t row = begin; row < end; row++) {
      if (!finite(data + row * dim, dim)) continue;
      for (int d = 0; d < dim; d++) origin[d] = std::min(origin[d], data[row * dim + d]);
    }
  }
  std::vector<Voxel> voxels;
  voxels.reserve(count);
  for (int64_t row = begin; row < end; row++) {
    if (!finite(data + row * dim, dim)) continue;
    Voxel voxel{{0, 0, 0}, row};
    for (int d = 0; d < dim; d++) {
      const T at = std::trunc((data[row * dim + d] - origin[d]) / size[d]);
      if (!(at >= T(-2147483648.0) && at < T(2147483648.0))) return -1 - row;
      voxel.at[d] = static_cast<int32_t>(at);
    }
    voxels.push_back(voxel);
  }
  sort(voxels);
  int64_t last = -1;
  for (size_t i = 0; i < voxels.size(); i++) {
    const int32_t *a = voxels[i].at, *b = voxels[i ? i - 1 : 0].at;
    last += i == 0 || a[0] != b[0] || a[1] != b[1] || a[2] != b[2];
    order[i] = voxels[i].row;
    cluster[voxels[i].row] = last;
  }
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
