// Neighbour search through a GeneralTree: float64, or four to kMostAxes coordinates. Included by cpu.cpp
// alone.
//
// The k-d order is that of float32 coordinates, whose roundings cost time only: boxes and distances are of T.
// Coordinates of float64 are taken from the middle of their cloud, in units of its size; where many fall on
// one place then, those are ordered again by themselves.
#pragma once

#include <tuple>
#include <utility>

#include "knn/prepare.h"

namespace any2point {
namespace {

template <typename T>
const GeneralKernels<T>& kernels_of() {
  A2P_DISPATCH_ISA(general_kernels, T())
}

// Brings `rows` (ascending) of points [dim] into k-d order.
template <typename T>
void order_rows(const T* points, int64_t dim, int32_t* rows, int64_t n, const ParallelFor& parallel_for) {
  const int axes = int(std::max<int64_t>(dim, 3));
  T middle[kMostAxes] = {}, unit = 1;
  if (sizeof(T) == 8) {
    T reach = 0;
    for (int64_t d = 0; d < dim; d++) {
      T low = std::numeric_limits<T>::infinity(), high = -low;
      for (int64_t i = 0; i < n; i++) {
        low = std::min(low, points[rows[i] * dim + d]);
        high = std::max(high, points[rows[i] * dim + d]);
      }
      middle[d] = low / 2 + high / 2;
      reach = std::max(reach, high - middle[d]);
    }
    if (!(reach > 0)) return;
    unit = std::ldexp(T(1), std::min(1000, -std::ilogb(reach)));
  }
  const int64_t words = (axes + 1) * rounded_up(n + kSlack, kSlack);
  Storage storage(2 * words, 2 * (axes + 1));
  const Axes ordered = axes_in(storage, n, axes), scratch = axes_in(storage, n, axes);
  parallel_for(rounded_up(n, 4096) / 4096, [&](int64_t first, int64_t last) {
    for (int64_t i = first * 4096; i < std::min(last * 4096, n); i++) {
      for (int d = 0; d < axes; d++) {
        ordered.axis[d][i] = d < dim ? float((points[rows[i] * dim + d] - middle[d]) * unit) : 0.0f;
      }
      ordered.row[i] = rows[i];
    }
  });
  order_branches({{ordered, scratch, 0, n}}, parallel_for);
  std::copy(ordered.row, ordered.row + n, rows);
  if (sizeof(T) == 4) return;
  const auto same = [&](int64_t i, int64_t j) {
    for (int d = 0; d < axes; d++) {
      if (ordered.axis[d][i] != ordered.axis[d][j]) return false;
    }
    return true;
  };
  for (int64_t begin = 0, end; begin < n; begin = end) {
    for (end = begin + 1; end < n && same(begin, end);) end++;
    if (end - begin > kFanout) {
      order_rows(points, dim, rows + begin, end - begin, [](int64_t m, const Range& body) { body(0, m); });
    }
  }
}

// What a query without a tree costs, in ns a point.
template <typename T>
double scan_cost(int64_t dim) {
  return sizeof(T) == 4 ? 0.13 + 0.022 * double(dim) : 0.6 + 0.08 * double(dim);
}

// Whether a tree may pay, should its boxes keep nearly all points away: building it takes 50 ns a point and
// query and coordinate.
template <typename T>
bool wants_general_tree(const Neighbours<T>& run, int64_t cloud) {
  const int64_t n = run.rows.count(cloud), queries = run.query_rows.count(cloud), most = INT32_MAX - kSlack;
  if (run.dim > kMostAxes || run.k > n / 5 || n > most || queries > most) return false;
  return double(queries) * (scan_cost<T>(run.dim) * double(n) - 800) >
         50.0 * double(run.dim) * double(n + queries);
}

// One cloud and its queries.
template <typename T>
class GeneralSearch {
 public:
  GeneralSearch(const Neighbours<T>& run, int64_t cloud, const ParallelFor& parallel_for)
      : run_(run),
        cloud_(cloud),
        points_(run.points + run.rows.begin(cloud) * run.dim),
        query_(run.query + run.query_rows.begin(cloud) * run.dim) {
    order_points(parallel_for);
    order_queries(parallel_for);
  }

  // Whether the boxes keep enough points away, by 16 of the queries: a query costs about 800 ns and 1.3 ns a
  // point that it looks at. For the first in a ball a scan of float32 stops at the k-th hit, one of float64
  // does not.
  bool pays() const {
    const bool first = run_.choice == Choice::first;
    if (first && sizeof(T) == 8) return true;
    const int64_t queries = int64_t(order_.size()), tried = std::min<int64_t>(16, queries);
    const Lists lists(tree_);
    double looked = 0, scanned = 0;
    for (int64_t i = 0; i < tried; i++) {
      T query[kMostAxes];
      load(order_[i * queries / tried], query);
      T t = run_.limit;
      if (!first) t = std::min(t, sure_radius(query, lists.scratch));
      const double points = double(kernels_.list_blocks(tree_, query, t, lists.scratch) * kFanout);
      const double all = double(run_.rows.count(cloud_));
      looked += points;
      // About half of the points of a block within reach are in the ball.
      scanned += first ? std::min(all, all * double(run_.k) / (points / 2 + 1)) : all;
    }
    return 800 * double(tried) + 1.3 * looked <= scan_cost<T>(run_.dim) * scanned;
  }

  int64_t queries() const { return int64_t(order_.size()); }

  // Queries first .. last - 1, counted in an order that keeps neighbours together.
  void search(int64_t first, int64_t last) const {
    const Lists lists(tree_);
    Guess guess;
    int64_t rows = 0;
    for (int64_t i = first; i < last; i++) {
      T query[kMostAxes];
      load(order_[i], query);
      const int64_t found = run_.choice == Choice::first ? lowest(query, lists.scratch, &rows)
                                                         : nearest(query, lists.scratch, &guess);
      write(order_[i], found, lists.scratch);
    }
  }

 private:
  struct Lists {
    explicit Lists(const GeneralTree<T>& tree) : Lists(rounded_up(tree.points, kFanout) + kFanout) {}
    explicit Lists(int64_t room) : storage(room * int64_t(2 * sizeof(T) / sizeof(float) + 4), 6) {
      scratch = {storage.values<T>(room),
                 storage.ints(room),
                 storage.values<T>(room),
                 storage.ints(room),
                 {storage.ints(room), storage.ints(room)}};
    }
    Storage storage;
    GeneralScratch<T> scratch;
  };

  int64_t blocks() const { return rounded_up(tree_.points, kFanout) / kFanout; }

  static std::vector<int32_t> finite_rows(const T* points, int64_t n, int64_t dim) {
    std::vector<int32_t> rows;
    rows.reserve(n);
    for (int64_t i = 0; i < n; i++) {
      if (finite(points + i * dim, dim)) rows.push_back(int32_t(i));
    }
    return rows;
  }

  void order_points(const ParallelFor& parallel_for) {
    const int64_t dim = run_.dim;
    std::vector<int32_t> rows = finite_rows(points_, run_.rows.count(cloud_), dim);
    order_rows(points_, dim, rows.data(), int64_t(rows.size()), parallel_for);
    tree_.points = int64_t(rows.size());
    tree_.dim = std::max<int64_t>(dim, 2);
    tree_.levels = count_groups(tree_.points, tree_.groups);
    int64_t boxes = 0;
    for (int level = 0; level < tree_.levels; level++) boxes += tree_.groups[level] * 2 * kFanout;
    const int64_t values = (blocks() * kFanout + boxes) * tree_.dim, words = sizeof(T) / sizeof(float);
    storage_ = std::make_unique<Storage>(values * words + blocks() * kFanout, tree_.levels + 2);
    tree_.block = storage_->template values<T>(blocks() * kFanout * tree_.dim);
    tree_.row = storage_->ints(blocks() * kFanout);
    for (int level = 0; level < tree_.levels; level++) {
      tree_.box[level] = storage_->template values<T>(tree_.groups[level] * tree_.dim * 2 * kFanout);
    }
    parallel_for(tree_.groups[0], [&](int64_t first, int64_t last) {
      for (int64_t i = first * kFanout * kFanout; i < last * kFanout * kFanout; i++) {
        if (i >= blocks() * kFanout) break;
        const bool point = i < tree_.points;
        tree_.row[i] = point ? rows[i] : -1;
        for (int64_t d = 0; d < tree_.dim; d++) {
          T* value = tree_.block + (i / kFanout * tree_.dim + d) * kFanout + i % kFanout;
          *value = !point ? std::numeric_limits<T>::quiet_NaN() : d < dim ? points_[rows[i] * dim + d] : T(0);
        }
      }
    });
    drop_coincident(rows);
    for (int level = 0; level < tree_.levels; level++) {
      parallel_for(tree_.groups[level],
                   [&](int64_t first, int64_t last) { kernels_.enclose(tree_, level, first, last); });
    }
    if (query_ == points_ && run_.query_rows.count(cloud_) == run_.rows.count(cloud_)) order_.swap(rows);
  }

  // Of coincident points in a row only the k lowest are anybody's neighbours.
  void drop_coincident(const std::vector<int32_t>& rows) {
    int64_t same = 1;
    for (size_t i = 1; i < rows.size(); i++) {
      const T *a = points_ + rows[i - 1] * run_.dim, *b = points_ + rows[i] * run_.dim;
      same = std::equal(a, a + run_.dim, b) && rows[i - 1] < rows[i] ? same + 1 : 1;
      if (same <= run_.k) continue;
      tree_.block[int64_t(i) / kFanout * tree_.dim * kFanout + int64_t(i) % kFanout] =
          std::numeric_limits<T>::quiet_NaN();
    }
  }

  void order_queries(const ParallelFor& parallel_for) {
    const int64_t n = run_.query_rows.count(cloud_), begin = run_.query_rows.begin(cloud_);
    if (order_.empty()) {
      order_ = finite_rows(query_, n, run_.dim);
      order_rows(query_, run_.dim, order_.data(), int64_t(order_.size()), parallel_for);
    }
    if (int64_t(order_.size()) == n) return;
    for (int64_t i = 0; i < n; i++) {
      if (!finite(query_ + i * run_.dim, run_.dim)) write_missing(run_, begin + i, begin + i + 1);
    }
  }

  void load(int32_t row, T* query) const {
    query[1] = 0;
    std::copy(query_ + row * run_.dim, query_ + (row + 1) * run_.dim, query);
  }

  // A radius that surely holds k points: the k-th distance among the points of a branch near the query.
  T sure_radius(const T* query, const GeneralScratch<T>& scratch) const {
    const T infinity = std::numeric_limits<T>::infinity();
    int64_t path[kMaxLevels + 1] = {}, group = 0;  // the nearest box of each level, from the root down
    for (int level = tree_.levels - 1; level >= 0; level--) {
      const T* box = tree_.box[level] + group * (tree_.dim * 2 * kFanout);
      T best = infinity;
      int64_t chosen = 0;
      for (int64_t b = 0; b < kFanout; b++) {
        T distance = 0;
        for (int64_t c = 0; c < tree_.dim; c++) {
          const T below = box[2 * c * kFanout + b] - query[c],
                  above = query[c] - box[(2 * c + 1) * kFanout + b];
          const T gap = std::max(below, above);
          distance += gap < 0 ? 0 : gap * gap;
        }
        if (distance < best) {
          best = distance;
          chosen = b;
        }
      }
      group = group * kFanout + chosen;
      path[level] = group;
    }
    int64_t size = 1;  // in blocks
    for (int level = 0; level <= tree_.levels; level++, size *= kFanout) {
      const int64_t begin = path[level] * size, end = std::min(begin + size, blocks());
      if ((end - begin) * kFanout < run_.k) continue;
      for (int64_t i = begin; i < end; i++) scratch.blocks[0][i - begin] = int32_t(i);
      const int64_t m = kernels_.pack_blocks(tree_, query, infinity, end - begin, scratch);
      if (m < run_.k) continue;
      std::nth_element(scratch.near, scratch.near + run_.k - 1, scratch.near + m);
      return scratch.near[run_.k - 1];
    }
    return infinity;
  }

  // Sorts the m candidates by distance and row so far that the first `need` are final.
  void sort(int64_t m, int64_t need, const GeneralScratch<T>& scratch) const {
    if (m <= kFew) {
      kernels_.sort_few(m, scratch);
      for (int64_t i = 1; i < m; i++) {  // those of equal distance, as a rule none, by row
        for (int64_t j = i;
             j > 0 && scratch.near[j - 1] == scratch.near[j] && scratch.row[j - 1] > scratch.row[j]; j--) {
          std::swap(scratch.row[j - 1], scratch.row[j]);
        }
      }
      return;
    }
    std::vector<std::pair<T, int32_t>> all(m);
    for (int64_t i = 0; i < m; i++) all[i] = {scratch.near[i], scratch.row[i]};
    if (need < m) std::nth_element(all.begin(), all.begin() + need, all.end());
    std::sort(all.begin(), all.begin() + need);
    for (int64_t i = 0; i < need; i++) std::tie(scratch.near[i], scratch.row[i]) = all[i];
  }

  static void sort_by_row(int64_t m, int64_t need, const GeneralScratch<T>& scratch) {
    std::vector<std::pair<int32_t, T>> all(m);
    for (int64_t i = 0; i < m; i++) all[i] = {scratch.row[i], scratch.near[i]};
    if (need < m) std::nth_element(all.begin(), all.begin() + need, all.end());
    std::sort(all.begin(), all.begin() + need);
    for (int64_t i = 0; i < need; i++) std::tie(scratch.row[i], scratch.near[i]) = all[i];
  }

  // A radius for the next query, which is close by.
  struct Guess {
    T distance = 0;     // of the k-th neighbour of the query before
    T growth = T(1.3);  // to be a little more than the next query needs: falls with every list that is too
                        // long, rises with every one that is too short
  };

  // The k nearest within the limit; returns how many.
  int64_t nearest(const T* query, const GeneralScratch<T>& scratch, Guess* guess) const {
    const int64_t k = std::min(run_.k, tree_.points);
    if (k == 0) return 0;
    T t = std::min(guess->growth * guess->distance, run_.limit);
    const auto collect = [&] {
      return kernels_.pack_blocks(tree_, query, t, kernels_.list_blocks(tree_, query, t, scratch), scratch);
    };
    int64_t m = collect();
    if (m < k && t < run_.limit) {
      guess->growth = std::min(T(4), guess->growth * T(1.1));
      if (2 * m >= k) {
        t = std::min(t * T(1.5), run_.limit);
        m = collect();
      }
      if (m < k && t < run_.limit) {
        t = std::min(sure_radius(query, scratch), run_.limit);
        m = collect();
      }
    } else if (m > k + k / 2 + 4) {
      guess->growth = std::max(T(1.02), guess->growth * T(0.99));
    }
    const int64_t found = std::min(m, k);
    sort(m, found, scratch);
    guess->distance = found < k ? run_.limit : scratch.near[found - 1];
    if (run_.choice == Choice::set) sort_by_row(found, found, scratch);
    return found;
  }

  // The k lowest rows within the limit. Of a large ball the rows from 0 on hold enough sooner: as far as
  // `rows` they are tried first, by the query before.
  int64_t lowest(const T* query, const GeneralScratch<T>& scratch, int64_t* rows) const {
    const int64_t all = run_.rows.count(cloud_), k = run_.k;
    if (*rows > 0) {
      const int64_t found =
          kernels_.first_within(points_, std::min(*rows, all), run_.dim, query, run_.limit, k, scratch);
      if (found == k) {
        *rows = 4 * (scratch.row[k - 1] + int64_t(64));
        return found;
      }
    }
    const int64_t n = kernels_.list_blocks(tree_, query, run_.limit, scratch);
    const int64_t m = kernels_.pack_blocks(tree_, query, run_.limit, n, scratch), found = std::min(m, k);
    sort_by_row(m, found, scratch);
    // To read a row takes about 4 ns, to look at a block 20 ns, to sort a candidate 10 ns.
    const double read = double(all) * double(k) / double(m + 1);
    *rows = m > k && 4 * read < 20 * double(n) + 10 * double(m) ? int64_t(4 * read) + 256 : 0;
    return found;
  }

  void write(int64_t row, int64_t found, const GeneralScratch<T>& scratch) const {
    const int64_t query = run_.query_rows.begin(cloud_) + row, base = run_.rows.index_base(cloud_);
    for (int64_t j = 0; j < run_.k; j++) {
      run_.index[query * run_.k + j] = j < found ? scratch.row[j] + base : -1;
      run_.distance[query * run_.k + j] = j < found ? scratch.near[j] : std::numeric_limits<T>::infinity();
    }
    if (run_.count) run_.count[query] = found;
  }

  const Neighbours<T>& run_;
  const GeneralKernels<T>& kernels_ = kernels_of<T>();
  const int64_t cloud_;
  const T *points_, *query_;
  std::unique_ptr<Storage> storage_;
  GeneralTree<T> tree_{};
  std::vector<int32_t> order_;  // finite queries
};

}  // namespace
}  // namespace any2point
