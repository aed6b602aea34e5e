// What the searches on the CPU share: storage, k-d order, rows without a neighbour. Included by cpu.cpp
// alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "knn/search.h"

namespace any2point {
namespace {

int64_t split(const Axes& points, const Axes& scratch, int64_t begin, int64_t count) {
  A2P_DISPATCH_ISA(split, points, scratch, begin, count)
}
void order(const Axes& points, const Axes& scratch, int64_t begin, int64_t count) {
  A2P_DISPATCH_ISA(order, points, scratch, begin, count)
}

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
  template <typename T>
  T* values(int64_t n) {
    return reinterpret_cast<T*>(floats(n * int64_t(sizeof(T) / sizeof(float))));
  }

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

// Lists for the coordinates and rows of up to `room` points.
Axes axes_in(Storage& storage, int64_t room, int count) {
  Axes axes{};
  axes.count = count;
  for (int c = 0; c < count; c++) axes.axis[c] = storage.floats(room + kSlack);
  axes.row = storage.ints(room + kSlack);
  return axes;
}

struct Branch {
  Axes points;
  Axes scratch;  // lists like those of the points
  int64_t begin, count;
};

// Brings all branches into k-d order. Large ones are split level by level, all of a level at a time, until
// there are enough for every thread.
void order_branches(const std::vector<Branch>& branches, const ParallelFor& parallel_for) {
  constexpr int64_t kLarge = 1 << 15;
  std::vector<Branch> large, small;
  const auto add = [&](const Branch& branch) { (branch.count > kLarge ? large : small).push_back(branch); };
  for (const Branch& branch : branches) add(branch);
  while (!large.empty()) {
    std::vector<int64_t> front(large.size());
    parallel_for(large.size(), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) {
        const Branch& b = large[i];
        front[i] = split(b.points, b.scratch, b.begin, b.count);
      }
    });
    std::vector<Branch> level;
    level.swap(large);
    for (size_t i = 0; i < level.size(); i++) {
      const Branch& b = level[i];
      if (front[i] == 0) continue;
      add({b.points, b.scratch, b.begin, front[i]});
      add({b.points, b.scratch, b.begin + front[i], b.count - front[i]});
    }
  }
  parallel_for(small.size(), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      order(small[i].points, small[i].scratch, small[i].begin, small[i].count);
    }
  });
}

// A tree over `points` of them has this many levels, with groups[l] groups on level l.
int count_groups(int64_t points, int64_t* groups) {
  int64_t items = rounded_up(points, kFanout) / kFanout;
  int levels = 0;
  do {
    items = std::max<int64_t>(1, rounded_up(items, kFanout) / kFanout);
    groups[levels++] = items;
  } while (items > 1);
  return levels;
}

}  // namespace
}  // namespace any2point
