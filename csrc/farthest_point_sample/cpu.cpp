// Farthest point sampling on the CPU.
//
// One rule everywhere: level[i] is the smallest squared distance of point i to the picks so far, +inf at
// first, and -1 for points that are taken or not finite. The next pick is the lowest index of the largest
// level; if that level is negative, no point is left. Squared distances are never negative, so -1 survives
// every min.
#include "farthest_point_sample/kernel.h"

#include <cmath>
#include <limits>
#include <memory>

#include "common/distance.h"
#include "common/isa.h"
#include "farthest_point_sample/cpu.h"

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

uint32_t reversed_bits(uint32_t value, int bits) {
  uint32_t result = 0;
  for (int b = 0; b < bits; b++) result |= (value >> b & 1) << (bits - 1 - b);
  return result;
}

// What pointnet2_ops computes, thread tree included: levels start at 1e10; points with |p|^2 <= 1e-3 never
// take part; a tie goes to the smallest bit-reversed thread number, then to the smallest index; picked points
// stay in the race (duplicates once all levels are 0); and if no point takes part, the pick is index 0.
template <typename T>
void sample_as_pointnet2(const FarthestPointCloud<T>& cloud) {
  T* level = reinterpret_cast<T*>(cloud.scratch);
  int bits = 0;  // its block has 2^bits threads, thread t visits t, t + 2^bits, ...
  while (bits < 9 && (int64_t(2) << bits) <= cloud.count) bits++;
  const int64_t threads = int64_t(1) << bits;
  for (int64_t i = 0; i < cloud.count; i++) {
    const T* p = cloud.points + i * 3;
    const bool far = double(squared_distance3(p[0], p[1], p[2])) > 1e-3;
    level[i] = far && finite(p, 3) ? T(1e10) : T(-1);
  }
  const int64_t fallback = first_pick(cloud.points, cloud.count, 3, 0);
  int64_t pick = cloud.pick;
  T reached = std::numeric_limits<T>::infinity();
  for (int64_t j = 0; j < cloud.samples; j++) {
    cloud.index[j] = pick;
    cloud.distance[j] = reached;
    const T* taken = cloud.points + pick * 3;
    T best = -1;
    pick = fallback;
    for (int64_t rank = 0; rank < threads; rank++) {
      for (int64_t i = reversed_bits(uint32_t(rank), bits); i < cloud.count; i += threads) {
        const T d = squared_distance(cloud.points + i * 3, taken, 3);
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

// Several given picks first; one that is not a finite point of the cloud, or is taken, gives way to the
// farthest point.
template <typename T>
void sample_after(const FarthestPointCloud<T>& cloud, const int64_t* given, int64_t starts) {
  T* level = reinterpret_cast<T*>(cloud.scratch);
  for (int64_t i = 0; i < cloud.count; i++) {
    level[i] = finite(cloud.points + i * cloud.dim, cloud.dim) ? std::numeric_limits<T>::infinity() : T(-1);
  }
  int64_t pick = cloud.pick;
  for (int64_t j = 0; j < cloud.samples && level[pick] >= 0; j++) {
    cloud.index[j] = pick;
    cloud.distance[j] = level[pick];
    const T* taken = cloud.points + pick * cloud.dim;
    level[pick] = -1;
    int64_t farthest = pick;
    for (int64_t i = 0; i < cloud.count; i++) {
      const T d = squared_distance(cloud.points + i * cloud.dim, taken, cloud.dim);
      level[i] = d < level[i] ? d : level[i];
      if (level[i] > level[farthest]) farthest = i;
    }
    const int64_t next = j + 1 < starts ? given[j + 1] : -1;
    pick = next >= 0 && next < cloud.count && level[next] >= 0 ? next : farthest;
  }
}

class Scratch {
 public:
  char* at_least(int64_t size) {
    if (size > size_) {
      bytes_.reset(new char[size]);  // not zeroed
      size_ = size;
    }
    return bytes_.get();
  }

 private:
  std::unique_ptr<char[]> bytes_;
  int64_t size_ = 0;
};

bool batched_pays(const FarthestPointCloud<float>& cloud){
    A2P_DISPATCH_ISA(farthest_point_batched_pays, cloud.count, cloud.dim, cloud.samples)} int64_t
    batched_scratch(int64_t count, int64_t dim) {
  A2P_DISPATCH_ISA(farthest_point_batched_scratch, count, dim)
}
void sample_batched(const FarthestPointCloud<float>& cloud){
    A2P_DISPATCH_ISA(farthest_point_batched, cloud)} int64_t sequential_scratch(int64_t count, int64_t dim) {
  A2P_DISPATCH_ISA(farthest_point_sequential_scratch, count, dim)
}
void sample_sequential(const FarthestPointCloud<float>& cloud) {
  A2P_DISPATCH_ISA(farthest_point_sequential, cloud)
}
void sample_sequential(const FarthestPointCloud<double>& cloud) {
  A2P_DISPATCH_ISA(farthest_point_sequential_double, cloud)
}

void sample(FarthestPointCloud<float> cloud, Scratch& scratch) {
  if (batched_pays(cloud)) {
    cloud.scratch = scratch.at_least(batched_scratch(cloud.count, cloud.dim));
    return sample_batched(cloud);
  }
  cloud.scratch = scratch.at_least(sequential_scratch(cloud.count, cloud.dim));
  sample_sequential(cloud);
}
void sample(FarthestPointCloud<double> cloud, Scratch& scratch) {
  cloud.scratch = scratch.at_least(sequential_scratch(cloud.count, cloud.dim));
  sample_sequential(cloud);
}

}  // namespace

template <typename T>
void farthest_point_sample_cpu(const FarthestPointSample<T>& run, int64_t first, int64_t last) {
  Scratch scratch;
  for (int64_t b = first; b < last; b++) {
    FarthestPointCloud<T> cloud{};
    cloud.points = run.points + run.rows.begin(b) * run.dim;
    cloud.count = run.rows.count(b);
    cloud.dim = run.dim;
    cloud.samples = run.samples;
    cloud.index = run.index + b * run.samples;
    cloud.distance = run.distance + b * run.samples;
    for (int64_t j = 0; j < run.samples; j++) {
      cloud.index[j] = -1;
      cloud.distance[j] = 0;
    }
    cloud.pick = first_pick(cloud.points, cloud.count, cloud.dim, run.start ? run.start[b * run.starts] : 0);
    if (cloud.pick < 0 || run.samples == 0) continue;
    if (run.pointnet2) {
      cloud.scratch = scratch.at_least(cloud.count * int64_t(sizeof(T)));
      sample_as_pointnet2(cloud);
    } else if (run.starts > 1) {
      cloud.scratch = scratch.at_least(cloud.count * int64_t(sizeof(T)));
      sample_after(cloud, run.start + b * run.starts, run.starts);
    } else {
      sample(cloud, scratch);
    }
    const int64_t base = run.rows.index_base(b);
    for (int64_t j = 0; base && j < run.samples && cloud.index[j] >= 0; j++) cloud.index[j] += base;
  }
}

template void farthest_point_sample_cpu(const FarthestPointSample<float>&, int64_t, int64_t);
template void farthest_point_sample_cpu(const FarthestPointSample<double>&, int64_t, int64_t);

}  // namespace any2point
