// k-d order: points are split at a multiple of kFanout of them along the longest side of their box, again and
// again, so that every kFanout points in a row (a block), every kFanout blocks in a row, and so on, fill a
// compact box. The splits follow ranks, not lengths: density may vary by any factor. Coincident points stay
// in the order of their rows.
#include "knn/candidates.h"

namespace any2point {
namespace A2P_ISA {
namespace {

// The value of rank r among n; spoils nothing, `work` and `spare` have room for n.
float value_of_rank(const float* d, int64_t n, int64_t r, float* work, float* spare) {
  while (n > kRankLimit) {
    constexpr int kSamples = 32;
    float sample[kSamples + 4 * kLanes];
    int32_t rank[kSamples + 4 * kLanes];
    for (int s = 0; s < kSamples; s++) sample[s] = d[(2 * s + 1) * n / (2 * kSamples)];
    for (int s = kSamples; s < kSamples + 4 * kLanes; s++) sample[s] = 0;
    rank_all(sample, kSamples, rank);
    const int wanted = (int)smaller(kSamples - 1, r * kSamples / n);
    int chosen = 0;
    for (int s = 0; s < kSamples; s++) chosen = rank[s] == wanted ? s : chosen;
    const Float pivot = splat(sample[chosen]);
    int64_t left = 0, right = 0, same = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
      const Float a = load(d + i);
      const Mask valid = first_lanes(n - i), front = less(a, pivot) & valid, ties = equal(a, pivot) & valid;
      left += compress(work + left, a, front);
      right += compress(spare + right, a, valid & ~front & ~ties);
      same += __builtin_popcount(ties);
    }
    if (r >= left && r < left + same) return sample[chosen];
    if (r < left) {
      d = work;
      n = left;
    } else {
      d = spare;
      r -= left + same;
      n = right;
      float* other = work;
      work = spare;
      spare = other;
    }
  }
  int32_t rank[kRankLimit + 4 * kLanes];
  rank_all(d, (int)n, rank);
  for (int64_t i = 0; i < n; i++) {
    if (rank[i] == r) return d[i];
  }
  return d[0];
}

// Brings the `front` first points by (coordinate, row) to the front; `value` is the last one's coordinate.
template <int kAxes>
void divide(const Axes& points, const Axes& scratch, int64_t begin, int64_t n, int chosen, float value,
            int64_t front) {
  const int axes = kAxes ? kAxes : points.count;
  const float* const key = points.axis[chosen] + begin;
  int32_t *const row = points.row + begin, *const spare_row = scratch.row + begin;
  const Float v = splat(value);
  int64_t below = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    below += __builtin_popcount(less(load(key + i), v) & first_lanes(n - i));
  }
  int64_t quota = front - below, left = 0, right = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Float a = load(key + i);
    const Mask valid = first_lanes(n - i);
    Mask ties = equal(a, v) & valid;
    while (__builtin_popcount(ties) > quota) ties &= ~(1u << (31 - __builtin_clz(ties)));
    quota -= __builtin_popcount(ties);
    const Mask first = (less(a, v) & valid) | ties, second = valid & ~first;
    for (int c = 0; c < axes; c++) {  // in place, as packing never overtakes reading
      const Float moved = load(points.axis[c] + begin + i);
      compress(points.axis[c] + begin + left, moved, first);
      compress(scratch.axis[c] + begin + right, moved, second);
    }
    const Int r = load(row + i);
    left += compress(row + left, r, first);
    right += compress(spare_row + right, r, second);
  }
  for (int c = 0; c < axes; c++) {
    __builtin_memcpy(points.axis[c] + begin + left, scratch.axis[c] + begin, (size_t)right * sizeof(float));
  }
  __builtin_memcpy(row + left, spare_row, (size_t)right * sizeof(int32_t));
}

}  // namespace

// n is a multiple of kFanout unless these are the last points, so whole vectors may be written.
int64_t split(const Axes& points, const Axes& scratch, int64_t begin, int64_t n) {
  if (n <= kFanout) return 0;
  float longest = 0;
  int chosen = 0;
  for (int c = 0; c < points.count; c++) {
    float* const axis = points.axis[c] + begin;
    // Packing has written past the end of the last branch: no part of its box.
    if (n % kFanout) terminate(axis + n);
    Float low = splat(__builtin_inff()), high = splat(-__builtin_inff());
    for (int64_t i = 0; i < n; i += kLanes) {
      const Float a = load(axis + i);
      low = min(a, low);
      high = max(a, high);
    }
    const float side = reduce_max(high) - reduce_min(low);
    if (side > longest) {
      longest = side;
      chosen = c;
    }
  }
  if (longest == 0) return 0;
  int64_t front = kFanout;
  while (2 * front < n) front *= 2;
  const float value = value_of_rank(points.axis[chosen] + begin, n, front - 1, scratch.axis[0] + begin,
                                    scratch.axis[1] + begin);
  if (points.count == 3) {
    divide<3>(points, scratch, begin, n, chosen, value, front);
  } else {
    divide<0>(points, scratch, begin, n, chosen, value, front);
  }
  return front;
}

void order(const Axes& points, const Axes& scratch, int64_t begin, int64_t n) {
  const int64_t front = split(points, scratch, begin, n);
  if (front == 0) return;
  order(points, scratch, begin, front);
  order(points, scratch, begin + front, n - front);
}

}  // namespace A2P_ISA
}  // namespace any2point
