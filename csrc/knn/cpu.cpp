// Neighbour search on the CPU.
#include "knn/kernel.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "common/distance.h"

namespace any2point {
namespace {

template <typename T>
bool finite(const T* point, int64_t dim) {
  for (int64_t d = 0; d < dim; d++) {
    if (!std::isfinite(point[d])) return false;
  }
  return true;
}

template <typename T>
using Candidates = std::vector<std::pair<T, int64_t>>;

// Neighbours of one query, found among all points of its cloud.
template <typename T>
void search(const Neighbours<T>& run, int64_t cloud, int64_t row, Candidates<T>& found) {
  const T* query = run.query + row * run.dim;
  const T* points = run.points + run.rows.begin(cloud) * run.dim;
  found.clear();
  if (finite(query, run.dim)) {
    for (int64_t i = 0; i < run.rows.count(cloud); i++) {
      if (!finite(points + i * run.dim, run.dim)) continue;
      const T d = squared_distance(points + i * run.dim, query, run.dim);
      if (d <= run.limit) found.push_back({d, i});
    }
  }
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

}  // namespace

template <typename T>
void neighbours_cpu(const Neighbours<T>& run, const ParallelFor& parallel_for) {
  const int64_t rows = run.query_rows.total;
  std::fill(run.index, run.index + rows * run.k, int64_t(-1));
  std::fill(run.distance, run.distance + rows * run.k, std::numeric_limits<T>::infinity());
  if (run.count) std::fill(run.count, run.count + rows, int64_t(0));
  for (int64_t cloud = 0; cloud < run.rows.clouds; cloud++) {
    const int64_t begin = run.query_rows.begin(cloud);
    parallel_for(run.query_rows.count(cloud), [&](int64_t first, int64_t last) {
      Candidates<T> found;
      for (int64_t i = first; i < last; i++) search(run, cloud, begin + i, found);
    });
  }
}

template <typename T>
T ball_limit(double radius) {
  const T squared = T(radius) * T(radius);
  return std::nextafter(squared, T(-1));
}

template void neighbours_cpu(const Neighbours<float>&, const ParallelFor&);
template void neighbours_cpu(const Neighbours<double>&, const ParallelFor&);
template float ball_limit(double);
template double ball_limit(double);

}  // namespace any2point
