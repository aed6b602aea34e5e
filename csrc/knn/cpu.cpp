// Neighbour search on the CPU: prepares the clouds, cuts the queries into tiles, chooses the search.
//
// float32: scan.simd.cpp for small clouds and more than three coordinates, tree.simd.cpp for large ones.
// float64 (and clouds that int32 cannot number): one plain search per query.
#include "knn/search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "common/distance.h"

namespace any2point {

void distances(const double* points, int64_t stride, int64_t dim, const double* query, double* distance) {
  A2P_DISPATCH_ISA(distances, points, stride, dim, query, distance)
}
void scan(const ScanTask& task, const Wanted& wanted, const Scratch& scratch) {
  A2P_DISPATCH_ISA(scan, task, wanted, scratch)
}
void order(float* const axis[3], int32_t* row, int64_t count, int64_t keep, const OrderScratch& scratch) {
  A2P_DISPATCH_ISA(order, axis, row, count, keep, scratch)
}
void enclose(const Tree& tree) { A2P_DISPATCH_ISA(enclose, tree) }
void search(const TreeTask& task, const Wanted& wanted, const Scratch& scratch) {
  A2P_DISPATCH_ISA(search, task, wanted, scratch)
}

namespace {

template <typename T>
bool finite(const T* point, int64_t dim) {
  for (int64_t d = 0; d < dim; d++) {
    if (!std::isfinite(point[d])) return false;
  }
  return true;
}

int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Memory without a first value, cut into lists that begin at cache lines.
class Storage {
 public:
  explicit Storage(int64_t words, int64_t lists)
      : words_(static_cast<float*>(::operator new((words + lists * kLine) * sizeof(float), kAlignment))) {}
  float* floats(int64_t n) {
    float* list = words_.get() + used_;
    used_ += rounded_up(n, kLine);
    return list;
  }
  int32_t* ints(int64_t n) { return reinterpret_cast<int32_t*>(floats(n)); }

 private:
  static constexpr int64_t kLine = 16;
  static constexpr std::align_val_t kAlignment{kLine * sizeof(float)};
  struct Free {
    void operator()(float* words) const { ::operator delete(words, kAlignment); }
  };
  std::unique_ptr<float, Free> words_;
  int64_t used_ = 0;
};

template <typename T>
void write_missing(const Neighbours<T>& run, int64_t first, int64_t last) {
  std::fill(run.index + first * run.k, run.index + last * run.k, int64_t(-1));
  std::fill(run.distance + first * run.k, run.distance + last * run.k, std::numeric_limits<T>::infinity());
  if (run.count) std::fill(run.count + first, run.count + last, int64_t(0));
}

// ---- any type, any size

// Squared distances to the points of one cloud, NaN for those that are not finite.
class PlainDistances {
 public:
  PlainDistances(const Neighbours<double>& run, int64_t cloud)
      : dim_(run.dim), stride_(rounded_up(run.rows.count(cloud), kSlack)), columns_(stride_ * run.dim) {
    const double* points = run.points + run.rows.begin(cloud) * dim_;
    for (int64_t i = 0; i < run.rows.count(cloud); i++) {
      const bool usable = finite(points + i * dim_, dim_);
      for (int64_t d = 0; d < dim_; d++) {
        columns_[d * stride_ + i] = usable ? points[i * dim_ + d] : std::numeric_limits<double>::quiet_NaN();
      }
    }
  }
  void measure(const double* query, std::vector<double>& distance) const {
    distance.resize(stride_);
    distances(columns_.data(), stride_, dim_, query, distance.data());
  }

 private:
  int64_t dim_, stride_;
  std::vector<double> columns_;
};

template <typename T>
using Candidates = std::vector<std::pair<T, int64_t>>;

template <typename T>
void choose(const Neighbours<T>& run, int64_t cloud, int64_t row, Candidates<T>& found) {
  const int64_t k = std::min<int64_t>(run.k, found.size());
  if (run.choice != Choice::first) {
    std::partial_sort(found.begin(), found.begin() + k, found.end());
  }
  if (run.choice == Choice::set) {
    std::sort(found.begin(), found.begin() + k,
              [](const auto& a, const auto& b) { return a.second < b.second; });
  }
  const int64_t base = run.rows.index_base(cloud);
  for (int64_t j = 0; j < run.k; j++) {
    run.index[row * run.k + j] = j < k ? found[j].second + base : -1;
    run.distance[row * run.k + j] = j < k ? found[j].first : std::numeric_limits<T>::infinity();
  }
  if (run.count) run.count[row] = k;
}

void search_plainly(const Neighbours<double>& run, int64_t cloud, const ParallelFor& parallel_for) {
  const PlainDistances distances(run, cloud);
  const int64_t begin = run.query_rows.begin(cloud), count = run.rows.count(cloud);
  parallel_for(run.query_rows.count(cloud), [&](int64_t first, int64_t last) {
    Candidates<double> found;
    std::vector<double> distance;
    for (int64_t row = begin + first; row < begin + last; row++) {
      found.clear();
      if (finite(run.query + row * run.dim, run.dim)) {
        distances.measure(run.query + row * run.dim, distance);
        for (int64_t i = 0; i < count; i++) {
          if (distance[i] <= run.limit) found.push_back({distance[i], i});
        }
      }
      choose(run, cloud, row, found);
    }
  });
}

// ---- float32

struct Cloud {
  bool tree = false;
  std::unique_ptr<Storage> storage, query_storage;
  ScanTask scan{};
  TreeTask search{};
};

// A scan costs a query about 0.14 ns a point; a tree costs it about 25 + 0.7 k ns more than the rest of a
// scan, and 15 ns a point and query to build (AVX-512, AVX2 alike).
bool wants_tree(const Neighbours<float>& run, int64_t cloud) {
  const int64_t n = run.rows.count(cloud), queries = run.query_rows.count(cloud);
  if (run.dim > 3 || run.choice == Choice::first || run.k > n / 5) return false;
  return double(queries) * double(n - 300 - 5 * run.k) > 100.0 * double(n);
}

void prepare_scan(const Neighbours<float>& run, int64_t cloud, Cloud& prepared) {
  const int64_t n = run.rows.count(cloud), stride = rounded_up(n, kSlack),
                dim = std::max<int64_t>(run.dim, 3);
  const float* points = run.points + run.rows.begin(cloud) * run.dim;
  prepared.storage = std::make_unique<Storage>(dim * stride, 1);
  float* data = prepared.storage->floats(dim * stride);
  int64_t valid = 0;
  for (int64_t d = 0; d < dim; d++) {
    float* column = data + d * stride;
    for (int64_t i = 0; i < n; i++) column[i] = d < run.dim ? points[i * run.dim + d] : 0.0f;
    std::fill(column + n, column + stride, 0.0f);
  }
  for (int64_t i = 0; i < n; i++) {
    const bool usable = finite(points + i * run.dim, run.dim);
    if (!usable) data[i] = std::numeric_limits<float>::quiet_NaN();
    valid += usable;
  }
  std::fill(data + n, data + stride, std::numeric_limits<float>::quiet_NaN());
  prepared.scan.points = {data, stride, dim, valid};
  prepared.scan.query = run.query + run.query_rows.begin(cloud) * run.dim;
  prepared.scan.query_dim = run.dim;
}

struct Ordered {
  float* axis[3];
  int32_t* row;
  int64_t count;
};

// The finite ones of `n` rows, in k-d order.
Ordered ordered(const float* rows, int64_t n, int64_t dim, int64_t keep, Storage& storage) {
  const int64_t room = n + kSlack;
  Ordered result{{storage.floats(room), storage.floats(room), storage.floats(room)}, storage.ints(room), 0};
  for (int64_t i = 0; i < n; i++) {
    if (!finite(rows + i * dim, dim)) continue;
    for (int64_t d = 0; d < 3; d++) result.axis[d][result.count] = d < dim ? rows[i * dim + d] : 0.0f;
    result.row[result.count++] = int32_t(i);
  }
  Storage temporary(4 * room, 4);
  order(result.axis, result.row, result.count, keep,
        {{temporary.floats(room), temporary.floats(room), temporary.floats(room)}, temporary.ints(room)});
  return result;
}

// 2 k of them hold k that are not among fewer than k found otherwise.
void find_lowest(Tree& tree, int64_t wanted, Storage& storage) {
  tree.lowest_count = std::min(wanted, tree.points);
  tree.lowest = storage.ints(tree.lowest_count);
  std::vector<std::pair<int32_t, int32_t>> lowest(tree.points);
  for (int64_t i = 0; i < tree.points; i++) lowest[i] = {tree.row[i], int32_t(i)};
  std::partial_sort(lowest.begin(), lowest.begin() + tree.lowest_count, lowest.end());
  for (int64_t i = 0; i < tree.lowest_count; i++) tree.lowest[i] = lowest[i].second;
}

void prepare_tree(const Neighbours<float>& run, int64_t cloud, Cloud& prepared) {
  const int64_t n = run.rows.count(cloud), queries = run.query_rows.count(cloud);
  // Boxes take 6 / kFanout floats a point, a little more for the upper levels and the last groups.
  const int64_t box_words = n / 2 + 2 * 6 * kFanout * kMaxLevels;
  prepared.storage = std::make_unique<Storage>(4 * (n + kSlack) + box_words + 2 * run.k, 5);
  const Ordered points =
      ordered(run.points + run.rows.begin(cloud) * run.dim, n, run.dim, run.k, *prepared.storage);
  Tree& tree = prepared.search.tree;
  tree.points = points.count;
  tree.row = points.row;
  std::copy(points.axis, points.axis + 3, tree.axis);
  int64_t items = rounded_up(points.count, kFanout) / kFanout;
  do {
    items = std::max<int64_t>(1, rounded_up(items, kFanout) / kFanout);
    tree.groups[tree.levels] = items;
    tree.box[tree.levels++] = prepared.storage->floats(items * 6 * kFanout);
  } while (items > 1);
  enclose(tree);
  find_lowest(tree, 2 * run.k, *prepared.storage);

  const int64_t begin = run.query_rows.begin(cloud);
  prepared.query_storage = std::make_unique<Storage>(4 * (queries + kSlack), 4);
  const Ordered order = ordered(run.query + begin * run.dim, queries, run.dim,
                                std::numeric_limits<int64_t>::max(), *prepared.query_storage);
  std::copy(order.axis, order.axis + 3, prepared.search.axis);
  prepared.search.row = order.row;
  prepared.search.last = order.count;
  if (order.count == queries) return;
  for (int64_t i = begin; i < begin + queries; i++) {
    if (!finite(run.query + i * run.dim, run.dim)) write_missing(run, i, i + 1);
  }
}

struct Tile {
  int64_t cloud, first, last;
};

void search_tiles(const Neighbours<float>& run, const std::vector<Cloud>& clouds,
                  const std::vector<Tile>& tiles, int64_t largest, int64_t first, int64_t last) {
  const int64_t room = largest + 4 * kSlack;
  Storage storage(9 * room, 9);
  Scratch scratch{storage.floats(room), storage.floats(room),
                  storage.ints(room),   storage.floats(room),
                  storage.ints(room),   storage.floats(room),
                  storage.ints(room),   {storage.ints(room), storage.ints(room)}};
  for (int64_t i = first; i < last; i++) {
    const Tile& tile = tiles[i];
    const int64_t begin = run.query_rows.begin(tile.cloud) * run.k;
    const Wanted wanted{run.k,
                        run.limit,
                        run.choice,
                        run.rows.index_base(tile.cloud),
                        run.index + begin,
                        run.distance + begin,
                        run.count ? run.count + run.query_rows.begin(tile.cloud) : nullptr};
    if (clouds[tile.cloud].tree) {
      TreeTask task = clouds[tile.cloud].search;
      task.first = tile.first;
      task.last = tile.last;
      search(task, wanted, scratch);
    } else {
      ScanTask task = clouds[tile.cloud].scan;
      task.first = tile.first;
      task.last = tile.last;
      scan(task, wanted, scratch);
    }
  }
}

void search_clouds(const Neighbours<float>& run, const ParallelFor& parallel_for) {
  std::vector<Cloud> clouds(run.rows.clouds);
  parallel_for(run.rows.clouds, [&](int64_t first, int64_t last) {
    for (int64_t cloud = first; cloud < last; cloud++) {
      clouds[cloud].tree = wants_tree(run, cloud);
      (clouds[cloud].tree ? prepare_tree : prepare_scan)(run, cloud, clouds[cloud]);
    }
  });
  std::vector<Tile> tiles;
  int64_t largest = 0;
  for (int64_t cloud = 0; cloud < run.rows.clouds; cloud++) {
    const bool tree = clouds[cloud].tree;
    const int64_t queries = tree ? clouds[cloud].search.last : run.query_rows.count(cloud);
    const int64_t step = tree ? 512 : 64;
    largest = std::max(largest, run.rows.count(cloud));
    for (int64_t i = 0; i < queries; i += step) tiles.push_back({cloud, i, std::min(i + step, queries)});
  }
  parallel_for(tiles.size(),
               [&](int64_t first, int64_t last) { search_tiles(run, clouds, tiles, largest, first, last); });
}

// Rows of queries that no cloud covers: behind lengths, or outside of offsets.
template <typename T>
void write_uncovered(const Neighbours<T>& run) {
  const Rows& rows = run.query_rows;
  int64_t covered = 0;
  for (int64_t cloud = 0; cloud < rows.clouds; cloud++) {
    if (rows.begin(cloud) > covered) write_missing(run, covered, rows.begin(cloud));
    covered = std::max(covered, rows.begin(cloud) + rows.count(cloud));
  }
  write_missing(run, covered, rows.total);
}

}  // namespace

template <>
void neighbours_cpu(const Neighbours<float>& run, const ParallelFor& parallel_for) {
  write_uncovered(run);
  if (run.k == 0 || !(run.limit >= 0)) {
    write_missing(run, 0, run.query_rows.total);
  } else {
    search_clouds(run, parallel_for);
  }
}

template <>
void neighbours_cpu(const Neighbours<double>& run, const ParallelFor& parallel_for) {
  write_uncovered(run);
  for (int64_t cloud = 0; cloud < run.rows.clouds; cloud++) search_plainly(run, cloud, parallel_for);
}

template <typename T>
T ball_limit(double radius) {
  const T squared = T(radius) * T(radius);
  return std::nextafter(squared, T(-1));
}
template float ball_limit(double);
template double ball_limit(double);

}  // namespace any2point
