// Neighbour search on the CPU: prepares the clouds, cuts the queries into tiles, chooses the search.
//
// float32: scan.simd.cpp for small clouds, tree.simd.cpp for large ones of up to three coordinates.
// general_tree.h for large ones of float64, or of more coordinates if its boxes keep enough points away.
// Small ones of float64: one plain search per query.
#include "knn/general_tree.h"

namespace any2point {

int64_t within(const double* points, int64_t stride, int64_t dim, const double* query, double t,
               double* distance, int64_t* row) {
  A2P_DISPATCH_ISA(within, points, stride, dim, query, t, distance, row)
}
void scan(const ScanTask& task, const Wanted& wanted, const Scratch& scratch) {
  A2P_DISPATCH_ISA(scan, task, wanted, scratch)
}
void enclose(const Tree& tree, int level, int64_t first, int64_t last) {
  A2P_DISPATCH_ISA(enclose, tree, level, first, last)
}
void search(const TreeTask& task, const Wanted& wanted, const Scratch& scratch) {
  A2P_DISPATCH_ISA(search, task, wanted, scratch)
}

namespace {

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

enum class Method { scan, tree, general };

struct Cloud {
  Method method = Method::scan;
  std::unique_ptr<Storage> storage, query_storage, column_storage;
  Axes points, query;  // of a tree, in k-d order once that is made
  int64_t point_count, query_count;
  Columns columns{};
  TreeTask search{};
  std::unique_ptr<GeneralSearch<float>> general;
};

// About how many rows a scan reads for the lowest ones in a ball, by eight of the queries.
double rows_of_first(const Neighbours<float>& run, int64_t cloud) {
  const float *query = run.query + run.query_rows.begin(cloud) * run.dim,
              *points = run.points + run.rows.begin(cloud) * run.dim;
  const int64_t queries = run.query_rows.count(cloud), n = run.rows.count(cloud), tried = 8;
  const int64_t rows = std::min<int64_t>(n, 4096), most = std::min(run.k, rows);
  std::vector<float> near(most);
  std::vector<int32_t> row(most);
  const GeneralScratch<float> scratch{near.data(), row.data(), nullptr, nullptr, {nullptr, nullptr}};
  double sum = 0;
  for (int64_t i = 0; i < tried; i++) {
    const int64_t found = kernels_of<float>().first_within(
        points, rows, run.dim, query + i * queries / tried * run.dim, run.limit, most, scratch);
    const double read = found == most && found > 0 ? double(row[found - 1] + 1) : double(rows);
    sum += std::min(double(n), read * double(run.k) / std::max(0.5, double(found)));
  }
  return sum / tried;
}

// A scan costs a query about 0.14 ns a point; a tree costs it about 25 + 0.7 k ns more than the rest of a
// scan, and 15 ns a point and query to build (AVX-512, AVX2 alike).
bool wants_tree(const Neighbours<float>& run, int64_t cloud) {
  const int64_t n = run.rows.count(cloud), queries = run.query_rows.count(cloud);
  if (run.dim > 3 || run.k > n / 5) return false;
  const auto pays = [&](double rows) {
    return double(queries) * (rows - 300 - 5 * double(run.k)) > 100.0 * double(n);
  };
  return pays(double(n)) && (run.choice != Choice::first || pays(rows_of_first(run, cloud)));
}

void prepare_scan(const Neighbours<float>& run, int64_t cloud, Cloud& prepared) {
  const int64_t n = run.rows.count(cloud), stride = rounded_up(n, kSlack),
                dim = std::max<int64_t>(run.dim, 3);
  const float* points = run.points + run.rows.begin(cloud) * run.dim;
  prepared.column_storage = std::make_unique<Storage>(dim * stride, 1);
  float* data = prepared.column_storage->floats(dim * stride);
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
  prepared.columns = {data, stride, dim, valid};
}

// The finite ones of `n` rows; returns how many.
int64_t fill_axes(const float* rows, int64_t n, int64_t dim, const Axes& axes) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i++) {
    if (!finite(rows + i * dim, dim)) continue;
    for (int64_t d = 0; d < 3; d++) axes.axis[d][count] = d < dim ? rows[i * dim + d] : 0.0f;
    axes.row[count++] = int32_t(i);
  }
  return count;
}

bool queries_are_points(const Neighbours<float>& run, int64_t cloud) {
  return run.query + run.query_rows.begin(cloud) * run.dim == run.points + run.rows.begin(cloud) * run.dim &&
         run.query_rows.count(cloud) == run.rows.count(cloud);
}

void fill_tree(const Neighbours<float>& run, int64_t cloud, Cloud& prepared) {
  const int64_t n = run.rows.count(cloud), queries = run.query_rows.count(cloud);
  // Boxes take 6 / kFanout floats a point, a little more for the upper levels and the last groups.
  const int64_t box_words = n / 2 + 2 * 6 * kFanout * kMaxLevels;
  prepared.storage = std::make_unique<Storage>(4 * (n + kSlack) + box_words + 2 * run.k, 5 + kMaxLevels);
  prepared.points = axes_in(*prepared.storage, n, 3);
  prepared.point_count = fill_axes(run.points + run.rows.begin(cloud) * run.dim, n, run.dim, prepared.points);
  if (queries_are_points(run, cloud)) return;
  prepared.query_storage = std::make_unique<Storage>(4 * (queries + kSlack), 4);
  prepared.query = axes_in(*prepared.query_storage, queries, 3);
  prepared.query_count =
      fill_axes(run.query + run.query_rows.begin(cloud) * run.dim, queries, run.dim, prepared.query);
}

// Of coincident points in a row only the k of lowest rows are anybody's neighbours.
void drop_coincident(const Axes& points, int64_t n, int64_t k) {
  float* const* axis = points.axis;
  int64_t first = 0;  // of those that coincide
  for (int64_t i = 1; i < n; i++) {
    if (axis[0][i] != axis[0][first] || axis[1][i] != axis[1][first] || axis[2][i] != axis[2][first]) {
      first = i;
    } else if (i - first >= k) {
      axis[0][i] = std::numeric_limits<float>::quiet_NaN();
    }
  }
}

// 2 k of them hold k that are not among fewer than k found otherwise.
void find_lowest(const Neighbours<float>& run, int64_t cloud, Tree& tree, Storage& storage) {
  const float* points = run.points + run.rows.begin(cloud) * run.dim;
  tree.lowest_count = std::min(2 * run.k, tree.points);
  tree.lowest = storage.ints(tree.lowest_count);
  int64_t end = 0;  // of the rows that hold them
  for (int64_t found = 0; found < tree.lowest_count; end++) found += finite(points + end * run.dim, run.dim);
  std::vector<std::pair<int32_t, int32_t>> lowest;
  lowest.reserve(tree.lowest_count);
  for (int64_t i = 0; i < tree.points; i++) {
    if (tree.row[i] < end) lowest.push_back({tree.row[i], int32_t(i)});
  }
  std::sort(lowest.begin(), lowest.end());
  for (int64_t i = 0; i < tree.lowest_count; i++) tree.lowest[i] = lowest[i].second;
}

// Everything but the boxes, of points and queries in order.
void finish_tree(const Neighbours<float>& run, int64_t cloud, Cloud& prepared) {
  const int64_t n = prepared.point_count, begin = run.query_rows.begin(cloud),
                queries = run.query_rows.count(cloud);
  TreeTask& task = prepared.search;
  if (queries_are_points(run, cloud)) {
    prepared.query_storage = std::make_unique<Storage>(n + kSlack, 1);
    prepared.query = prepared.points;
    prepared.query.axis[0] = prepared.query_storage->floats(n + kSlack);
    std::copy(prepared.points.axis[0], prepared.points.axis[0] + n, prepared.query.axis[0]);
    prepared.query_count = n;
  }
  drop_coincident(prepared.points, n, run.k);
  for (int c = 0; c < 3; c++) {
    float* const axis = prepared.points.axis[c];
    std::fill(axis + n, axis + rounded_up(n, kFanout), std::numeric_limits<float>::quiet_NaN());
    task.tree.axis[c] = axis;
    task.axis[c] = prepared.query.axis[c];
  }
  task.tree.rows = run.rows.count(cloud);
  task.tree.points = n;
  task.tree.row = prepared.points.row;
  task.tree.levels = count_groups(n, task.tree.groups);
  for (int level = 0; level < task.tree.levels; level++) {
    task.tree.box[level] = prepared.storage->floats(task.tree.groups[level] * 6 * kFanout);
  }
  if (run.choice == Choice::first) {
    prepare_scan(run, cloud, prepared);
    task.points = prepared.columns;
  } else {
    find_lowest(run, cloud, task.tree, *prepared.storage);
  }
  task.row = prepared.query.row;
  if (prepared.query_count == queries) return;
  for (int64_t i = begin; i < begin + queries; i++) {
    if (!finite(run.query + i * run.dim, run.dim)) write_missing(run, i, i + 1);
  }
}

void make_trees(const Neighbours<float>& run, std::vector<Cloud>& clouds, const ParallelFor& parallel_for) {
  std::vector<int64_t> with_tree;
  for (int64_t cloud = 0; cloud < run.rows.clouds; cloud++) {
    if (clouds[cloud].method == Method::tree) with_tree.push_back(cloud);
  }
  const auto for_each = [&](const auto& prepare) {
    parallel_for(with_tree.size(), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) prepare(run, with_tree[i], clouds[with_tree[i]]);
    });
  };
  for_each(fill_tree);
  std::vector<Branch> branches;
  std::vector<std::unique_ptr<Storage>> scratch;
  const auto add = [&](const Axes& axes, int64_t count) {
    scratch.push_back(std::make_unique<Storage>(4 * (count + kSlack), 4));
    branches.push_back({axes, axes_in(*scratch.back(), count, 3), 0, count});
  };
  for (const int64_t cloud : with_tree) {
    add(clouds[cloud].points, clouds[cloud].point_count);
    if (clouds[cloud].query.count) add(clouds[cloud].query, clouds[cloud].query_count);
  }
  order_branches(branches, parallel_for);
  for_each(finish_tree);
  // The lowest boxes of all trees, which are nearly all of them, then the others.
  constexpr int64_t kPart = 64;
  std::vector<std::pair<int64_t, int64_t>> parts;
  for (const int64_t cloud : with_tree) {
    const int64_t groups = clouds[cloud].search.tree.groups[0];
    for (int64_t group = 0; group < groups; group += kPart) parts.push_back({cloud, group});
  }
  parallel_for(parts.size(), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const Tree& tree = clouds[parts[i].first].search.tree;
      enclose(tree, 0, parts[i].second, std::min(parts[i].second + kPart, tree.groups[0]));
    }
  });
  for_each([](const Neighbours<float>&, int64_t, Cloud& cloud) {
    const Tree& tree = cloud.search.tree;
    for (int level = 1; level < tree.levels; level++) enclose(tree, level, 0, tree.groups[level]);
  });
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
    const Cloud& cloud = clouds[tile.cloud];
    if (cloud.method == Method::general) {
      cloud.general->search(tile.first, tile.last);
    } else if (cloud.method == Method::tree) {
      TreeTask task = cloud.search;
      task.first = tile.first;
      task.last = tile.last;
      search(task, wanted, scratch);
    } else {
      const float* query = run.query + run.query_rows.begin(tile.cloud) * run.dim;
      scan({cloud.columns, query, run.dim, tile.first, tile.last}, wanted, scratch);
    }
  }
}

void search_clouds(const Neighbours<float>& run, const ParallelFor& parallel_for) {
  std::vector<Cloud> clouds(run.rows.clouds);
  for (int64_t i = 0; i < run.rows.clouds; i++) {
    Cloud& cloud = clouds[i];
    if (wants_tree(run, i)) {
      cloud.method = Method::tree;
    } else if (run.dim > 3 && wants_general_tree(run, i)) {
      cloud.general = std::make_unique<GeneralSearch<float>>(run, i, parallel_for);
      if (cloud.general->pays()) {
        cloud.method = Method::general;
      } else {
        cloud.general.reset();
      }
    }
  }
  parallel_for(run.rows.clouds, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      if (clouds[i].method == Method::scan) prepare_scan(run, i, clouds[i]);
    }
  });
  make_trees(run, clouds, parallel_for);
  std::vector<Tile> tiles;
  int64_t largest = 0;
  for (int64_t i = 0; i < run.rows.clouds; i++) {
    const Cloud& cloud = clouds[i];
    const bool is_scan = cloud.method == Method::scan;
    const int64_t queries = is_scan                        ? run.query_rows.count(i)
                            : cloud.method == Method::tree ? cloud.query_count
                                                           : cloud.general->queries();
    const int64_t step = is_scan ? 64 : 512;
    if (cloud.method != Method::general) largest = std::max(largest, run.rows.count(i));
    for (int64_t first = 0; first < queries; first += step) {
      tiles.push_back({i, first, std::min(first + step, queries)});
    }
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
    if (run.k > 0 && run.limit >= 0 && wants_general_tree(run, cloud)) {
      const GeneralSearch<double> general(run, cloud, parallel_for);
      if (general.pays()) {
        parallel_for(rounded_up(general.queries(), 512) / 512, [&](int64_t first, int64_t last) {
          general.search(first * 512, std::min(last * 512, general.queries()));
        });
        continue;
      }
    }
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
