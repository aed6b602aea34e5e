// Farthest point sampling on the CPU.
//
// One rule everywhere: level[i] is the smallest squared distance of point i to the picks so far, +inf at
// first, and -1 for points that are taken or not finite. The next pick is the lowest index of the largest
// level; if that level is negative, no point is left. Squared distances are never negative, so -1 survives
// every min.
#include "farthest_point_sample/kernel.h"

#include <cmath>
#include <limits>
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

// The wanted start if it is a finite point of the cloud, else the lowest finite point, else -1.
template <typename T>
int64_t first_pick(const T* points, int64_t count, int64_t dim, int64_t wanted) {
  if (wanted >= 0 && wanted < count && finite(points + wanted * dim, dim)) return wanted;
  for (int64_t i = 0; i < count; i++) {
    if (finite(points + i * dim, dim)) return i;
  }
  return -1;
}

template <typename T>
void sample_sequentially(const T* points, int64_t count, int64_t dim, int64_t samples, int64_t pick, T* level,
                         int64_t* index, T* distance) {
  for (int64_t i = 0; i < count; i++) {
    level[i] = finite(points + i * dim, dim) ? std::numeric_limits<T>::infinity() : T(-1);
  }
  for (int64_t j = 0; j < samples && pick >= 0; j++) {
    index[j] = pick;
    distance[j] = level[pick];
    level[pick] = -1;
    const T* taken = points + pick * dim;
    T best = -1;
    pick = -1;
    for (int64_t i = 0; i < count; i++) {
      const T d = squared_distance(points + i * dim, taken, dim);
      level[i] = d < level[i] ? d : level[i];
      if (level[i] > best) {
        best = level[i];
        pick = i;
      }
    }
  }
}

uint32_t reversed_bits(uint32_t value, int bits) {
  uint32_t result = 0;
  for (int b = 0; b < bits; b++) result |= (value >> b & 1) << (bits - 1 - b);
  return result;
}

// What pointnet2_ops computes, thread tree included: levels start at 1e10; points with |p|^2 <= 1e-3 never
// take part; a tie goes to the smallest bit-reversed thread number, then to the smallest index; picked points
// stay in the race (duplicates once all levels are 0); and if no point takes part, the pick is index 0.
template <typename T>
void sample_as_pointnet2(const T* points, int64_t count, int64_t samples, int64_t pick, T* level,
                         int64_t* index, T* distance) {
  int bits = 0;  // its block has 2^bits threads, thread t visits t, t + 2^bits, ...
  while (bits < 9 && (int64_t(2) << bits) <= count) bits++;
  const int64_t threads = int64_t(1) << bits;
  for (int64_t i = 0; i < count; i++) {
    const T* p = points + i * 3;
    const bool far = double(squared_distance3(p[0], p[1], p[2])) > 1e-3;
    level[i] = far && finite(p, 3) ? T(1e10) : T(-1);
  }
  const int64_t fallback = first_pick(points, count, 3, 0);
  T reached = std::numeric_limits<T>::infinity();
  for (int64_t j = 0; j < samples && pick >= 0; j++) {
    index[j] = pick;
    distance[j] = reached;
    const T* taken = points + pick * 3;
    T best = -1;
    pick = fallback;
    for (int64_t rank = 0; rank < threads; rank++) {
      for (int64_t i = reversed_bits(uint32_t(rank), bits); i < count; i += threads) {
        const T d = squared_distance(points + i * 3, taken, 3);
        level[i] = d < level[i] ? d : level[i];
        if (level[i] > best) {
          best = level[i];
          pick = i;
        }
      }
    }
    reached = best < 0 ? T(0) : best;
  }
}

}  // namespace

template <typename T>
void farthest_point_sample_cpu(const FarthestPointSample<T>& run, int64_t first, int64_t last) {
  std::vector<T> level;
  for (int64_t cloud = first; cloud < last; cloud++) {
    const int64_t count = run.rows.count(cloud), base = run.rows.index_base(cloud);
    const T* points = run.points + run.rows.begin(cloud) * run.dim;
    int64_t* index = run.index + cloud * run.samples;
    T* distance = run.distance + cloud * run.samples;
    for (int64_t j = 0; j < run.samples; j++) {
      index[j] = -1;
      distance[j] = 0;
    }
    level.resize(count);
    const int64_t pick = first_pick(points, count, run.dim, run.start ? run.start[cloud] : 0);
    if (run.pointnet2) {
      sample_as_pointnet2(points, count, run.samples, pick, level.data(), index, distance);
    } else {
      sample_sequentially(points, count, run.dim, run.samples, pick, level.data(), index, distance);
    }
    if (base == 0) continue;
    for (int64_t j = 0; j < run.samples; j++) index[j] += index[j] < 0 ? 0 : base;
  }
}

template void farthest_point_sample_cpu(const FarthestPointSample<float>&, int64_t, int64_t);
template void farthest_point_sample_cpu(const FarthestPointSample<double>&, int64_t, int64_t);

}  // namespace any2point
