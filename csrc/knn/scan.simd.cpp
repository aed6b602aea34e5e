// Brute-force neighbour search: for small clouds, and for any number of coordinates.
//
// One pass computes all distances, keeps them, and packs those within a guess of the radius: the k-th
// distance of the query before, a little enlarged. The guess is moved until it holds k to k + slack points,
// which are then sorted. Candidates stay in order of rows throughout, so ties need no care.
#include "knn/candidates.h"

namespace any2point {
namespace A2P_ISA {
namespace {

// Squared distances of kVectors vectors of points, in the order of roundings of common/distance.h.
template <int kVectors>
A2P_INLINE void distances_at(const Columns& points, int64_t i, const float* query, Float* d) {
  const float* column = points.data + i;
  for (int v = 0; v < kVectors; v++) {
    const Float dy = sub(load(column + points.stride + v * kLanes), splat(query[1]));
    const Float dx = sub(load(column + v * kLanes), splat(query[0]));
    const Float dz = sub(load(column + 2 * points.stride + v * kLanes), splat(query[2]));
    d[v] = fma(dz, dz, fma(dx, dx, mul(dy, dy)));
  }
  for (int64_t c = 3; c < points.dim; c++) {
    for (int v = 0; v < kVectors; v++) {
      const Float dc = sub(load(column + c * points.stride + v * kLanes), splat(query[c]));
      d[v] = fma(dc, dc, d[v]);
    }
  }
}

constexpr int kVectors = 4;

// All distances, and those up to t packed with their rows.
A2P_INLINE int64_t measure(const Columns points, const float* query, float t, const Scratch& scratch) {
  float *const distance = scratch.distance, *const near = scratch.near;
  int32_t* const place = scratch.place;
  const Float bound = splat(t);
  int64_t m = 0;
  for (int64_t i = 0; i < points.stride; i += kVectors * kLanes) {
    Float d[kVectors];
    distances_at<kVectors>(points, i, query, d);
    for (int v = 0; v < kVectors; v++) {
      store(distance + i + v * kLanes, d[v]);
      const Mask keep = less_equal(d[v], bound);
      compress_index(place + m, (int32_t)(i + v * kLanes), keep);
      m += compress(near + m, d[v], keep);
    }
  }
  terminate(near + m);
  return m;
}

// The k nearest within the limit, in the order that is wanted. `guess` is a radius for this query and becomes
// one for the next.
A2P_INLINE int64_t nearest_rows(const Columns& points, const float* query, const Wanted& wanted,
                                const Scratch& s, float* guess) {
  const int64_t k = wanted.k, slack = 8 + k / 8;
  const float start = k >= points.valid || *guess > wanted.limit ? wanted.limit : *guess;
  int64_t m = measure(points, query, start, s);
  float t = start;
  if (m < k && start < wanted.limit) {
    const Radius found = find_radius(s.distance, points.stride, k, slack, wanted.limit, t, m);
    t = found.t;
    m = found.tie ? pack_tie(s.distance, nullptr, points.stride, t, k, s.near, s.place)
                  : pack_within(s.distance, nullptr, points.stride, t, s.near, s.place);
    terminate(s.near + m);
  } else if (m > k + slack) {
    const Radius found = find_radius(s.near, m, k, slack, t, t, m);
    t = found.t;
    m = found.tie ? pack_tie(s.near, s.place, m, t, k, s.near, s.place)
                  : pack_within(s.near, s.place, m, t, s.near, s.place);
    terminate(s.near + m);
  }
  const int64_t found = smaller(m, k);
  if (wanted.choice == Choice::nearest) {
    sort(s.near, s.place, m, found, s.spare, s.spare_place);
    t = found > 0 ? s.near[found - 1] : t;
  } else if (m > k) {
    const Radius last = find_radius(s.near, m, k, 0, t, t, m);
    t = last.t;
    m = last.tie ? pack_tie(s.near, s.place, m, t, k, s.near, s.place)
                 : pack_within(s.near, s.place, m, t, s.near, s.place);
  }
  // A radius of infinity (or one beyond the largest float) leaves nothing to aim at.
  if (found == k)
    *guess = bits_float((int32_t)smaller((int64_t)float_bits(t) + radius_step(k, k + slack / 2),
                                         float_bits(__builtin_inff())));
  return found;
}

}  // namespace

int64_t first_rows(const Columns& points, const float* query, const Wanted& wanted, const Scratch& scratch,
                   int64_t end) {
  const Float bound = splat(wanted.limit);
  int64_t m = 0;
  for (int64_t i = 0; i < end && m < wanted.k; i += kVectors * kLanes) {
    Float d[kVectors];
    distances_at<kVectors>(points, i, query, d);
    for (int v = 0; v < kVectors; v++) {
      const Mask keep = less_equal(d[v], bound);
      compress_index(scratch.place + m, (int32_t)(i + v * kLanes), keep);
      m += compress(scratch.near + m, d[v], keep);
    }
  }
  return smaller(m, wanted.k);
}

void scan(const ScanTask& task, const Wanted& wanted, const Scratch& scratch) {
  float query[3];
  float guess = 1;
  for (int64_t i = task.first; i < task.last; i++) {
    const float* given = task.query + i * task.query_dim;
    bool finite = true;
    for (int64_t c = 0; c < task.query_dim; c++) finite &= is_finite(given[c]);
    if (!finite) {
      write(wanted, i, 0, nullptr, nullptr, nullptr);
      continue;
    }
    if (task.query_dim < 3) {
      for (int64_t c = 0; c < 3; c++) query[c] = c < task.query_dim ? given[c] : 0;
      given = query;
    }
    const int64_t found = wanted.choice == Choice::first
                              ? first_rows(task.points, given, wanted, scratch, task.points.stride)
                              : nearest_rows(task.points, given, wanted, scratch, &guess);
    write(wanted, i, found, scratch.near, scratch.place, nullptr);
  }
}

int64_t within(const double* points, int64_t stride, int64_t dim, const double* query, double t,
               double* distance, int64_t* row) {
  constexpr int64_t kRun = 64;
  int64_t found = 0;
  for (int64_t begin = 0; begin < stride; begin += kRun) {
    double sum[kRun];
    const double* column = points + (dim > 1 ? stride : 0) + begin;
    const double first = query[dim > 1 ? 1 : 0];
    for (int64_t i = 0; i < kRun; i++) {
      const double d = column[i] - first;
      sum[i] = d * d;
    }
    for (int64_t c = 0; c < dim; c++) {
      if (c == 1 || dim == 1) continue;
      column = points + c * stride + begin;
      for (int64_t i = 0; i < kRun; i++) {
        const double d = column[i] - query[c];
        sum[i] = __builtin_fma(d, d, sum[i]);
      }
    }
    for (int64_t i = 0; i < kRun; i++) {  // without a branch: what is not kept is overwritten
      distance[found] = sum[i];
      row[found] = begin + i;
      found += sum[i] <= t;
    }
  }
  return found;
}

}  // namespace A2P_ISA
}  // namespace any2point
