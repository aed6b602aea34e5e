// Neighbour search on the CPU: prepares the clouds, cuts the queries into tiles, chooses the search.
//
// float32: scan.simd.cpp for small clouds and more than three coordinates, tree.simd.cpp for large ones.
// float64: one plain search per query.
#include "knn/search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace any2point {

int64_t within(const double* points, int64_t stride, int64_t dim, const double* query, double t,
               double* distance, int64_t* row) {
  A2P_DISPATCH_ISA(within, points, stride, dim, query, t, distance, row)
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

// ---- float64

// All points of one cloud, each query by itself. The guess of a radius only saves work: if it holds fewer
// than k, a larger one is tried, at last the limit.
class PlainSearch {
 public:
  PlainSearch(const Neighbours<double>& run, int64_t cloud)
      : run_(run),
        cloud_(cloud),
        stride_(rounded_up(run.rows.count(cloud), kSlack)),
        columns_(stride_ * run.dim, std::numeric_limits<double>::quiet_NaN()) {
    const double* points = run.points + run.rows.begin(cloud) * run.dim;
    for (int64_t i = 0; i < run.rows.count(cloud); i++) {
      if (!finite(points + i * run.dim, run.dim)) continue;
      for (int64_t d = 0; d < run.dim; d++) columns_[d * stride_ + i] = points[i * run.dim + d];
      valid_++;
    }
  }

  // Queries first .. last - 1 of the cloud.
  void search(int64_t first, int64_t last) const {
    std::vector<double> distance(stride_ + 1);
    std::vector<int64_t> row(stride_ + 1);
    std::vector<std::pair<double, int64_t>> found;
    double guess = run_.limit;
    for (int64_t i = run_.query_rows.begin(cloud_) + first; i < run_.query_rows.begin(cloud_) + last; i++) {
      const double* query = run_.query + i * run_.dim;
      int64_t n = 0;
      if (run_.k > 0 && finite(query, run_.dim)) {
        const bool all = run_.choice == Choice::first || valid_ <= run_.k;
        double t = all ? run_.limit : std::min(guess, run_.limit);
        for (double factor = 4;; factor *= factor) {
          n = within(columns_.data(), stride_, run_.dim, query, t, distance.data(), row.data());
          if (n >= run_.k || t == run_.limit) break;
          t = t > 0 ? std::min(factor * t, run_.limit) : run_.limit;
        }
      }
      found.resize(n);
      for (int64_t j = 0; j < n; j++) found[j] = {distance[j], row[j]};
      const double farthest = choose(i, found);
      if (n >= run_.k) guess = 1.5 * farthest;
    }
  }

 private:
  // Writes the result of one query and returns its largest distance.
  double choose(int64_t query, std::vector<std::pair<double, int64_t>>& found) const {
    const int64_t k = std::min<int64_t>(run_.k, found.size());
    double farthest = 0;
    if (run_.choice != Choice::first) {
      if (k < int64_t(found.size())) std::nth_element(found.begin(), found.begin() + k, found.end());
      found.resize(k);
      std::sort(found.begin(), found.end());
      farthest = k > 0 ? found.back().first : 0;
    }
    if (run_.choice == Choice::set) {
      std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
    }
    const int64_t base = run_.rows.index_base(cloud_);
    for (int64_t j = 0; j < run_.k; j++) {
      run_.index[query * run_.k + j] = j < k ? found[j].second + base : -1;
      run_.distance[query * run_.k + j] = j < k ? found[j].first : std::numeric_limits<double>::infinity();
    }
    if (run_.count) run_.count[query] = k;
    return farthest;
  }

  const Neighbours<double>& run_;
  int64_t cloud_, stride_, valid_ = 0;
  std::vector<double> columns_;
};

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
  for (int64_t cloud = 0; cloud < run.rows.clouds; cloud++) {
    const PlainSearch plain(run, cloud);
    parallel_for(run.query_rows.count(cloud),
                 [&](int64_t first, int64_t last) { plain.search(first, last); });
  }
}

template <typename T>
T ball_limit(double radius) {
  const T squared = T(radius) * T(radius);
  return std::nextafter(squared, T(-1));
}
template float ball_limit(double);
template double ball_limit(double);

}  // namespace any2point
