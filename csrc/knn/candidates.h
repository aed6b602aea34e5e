// Lists of candidates (squared distance, place) for *.simd.cpp: counting, packing, sorting.
//
// Everything here is stable: candidates of equal distance keep their order in the list. The bits of floats
// that are not negative rise with their value, so radii are searched for in the bits, where a step of 2^23 is
// about a factor of two: that works at any scale, infinity included.
#pragma once

#include "common/simd.h"
#include "knn/search.h"

namespace any2point {
namespace A2P_ISA {

A2P_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
A2P_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
A2P_INLINE int64_t groups_of(int64_t n) { return (n + kFanout - 1) / kFanout; }
A2P_INLINE Mask first_lanes(int64_t n) { return n >= kLanes ? (1u << kLanes) - 1 : (1u << n) - 1; }

// Ends a list for readers of whole vectors: NaN fails every comparison.
A2P_INLINE void terminate(float* end) { store(end, splat(__builtin_nanf(""))); }

// rank[p] = how many of the m candidates come before p, for p = first .. first + kVectors * kLanes - 1.
template <int kVectors>
A2P_INLINE void rank_vectors(const float* d, int m, int first, int32_t* rank) {
  Float mine[kVectors];
  Int count[kVectors];
  for (int v = 0; v < kVectors; v++) {
    mine[v] = load(d + first + v * kLanes);
    count[v] = splat_int(0);
  }
  for (int q = 0; q < first; q++) {
    const Float other = splat(d[q]);
    for (int v = 0; v < kVectors; v++) count[v] = count_less_equal(count[v], other, mine[v]);
  }
  for (int w = 0; w < kVectors; w++) {
    const int begin = first + w * kLanes, lanes = (int)smaller(kLanes, m - begin);
    for (int lane = 0; lane < lanes; lane++) {
      const Float other = splat(d[begin + lane]);
      for (int v = 0; v < kVectors; v++) {
        count[v] = v < w   ? count_less(count[v], other, mine[v])
                   : v > w ? count_less_equal(count[v], other, mine[v])
                           : count_before(count[v], other, mine[v], lane);
      }
    }
  }
  for (int q = first + kVectors * kLanes; q < m; q++) {
    const Float other = splat(d[q]);
    for (int v = 0; v < kVectors; v++) count[v] = count_less(count[v], other, mine[v]);
  }
  for (int v = 0; v < kVectors; v++) store(rank + first + v * kLanes, count[v]);
}

// Longest list that is sorted by counting, m^2 comparisons; longer ones are split first.
constexpr int kRankLimit = 96;

static inline void rank_all(const float* d, int m, int32_t* rank) {
  int first = 0;
  for (; first + 3 * kLanes < m; first += 4 * kLanes) rank_vectors<4>(d, m, first, rank);
  const int vectors = (m - first + kLanes - 1) / kLanes;
  if (vectors == 1) rank_vectors<1>(d, m, first, rank);
  if (vectors == 2) rank_vectors<2>(d, m, first, rank);
  if (vectors == 3) rank_vectors<3>(d, m, first, rank);
}

A2P_INLINE void move(float* d, int32_t* place, const float* from, const int32_t* from_place, int64_t m) {
  __builtin_memcpy(d, from, (size_t)m * sizeof(float));
  __builtin_memcpy(place, from_place, (size_t)m * sizeof(int32_t));
}

// Brings the candidates below the pivot (or up to it) to the front, the others behind them; returns how many
// are in front. Whole vectors in place, as packing never overtakes reading; the rest one by one.
template <bool kUpTo>
static inline int64_t partition(float* d, int32_t* place, int64_t m, float pivot, float* spare,
                                int32_t* spare_place) {
  const Float p = splat(pivot);
  int64_t left = 0, right = 0, i = 0;
  for (; i + kLanes <= m; i += kLanes) {
    const Float a = load(d + i);
    const Int b = load(place + i);
    const Mask front = kUpTo ? less_equal(a, p) : less(a, p);
    const Mask back = ~front & first_lanes(kLanes);
    compress(d + left, a, front);
    left += compress(place + left, b, front);
    compress(spare + right, a, back);
    right += compress(spare_place + right, b, back);
  }
  for (; i < m; i++) {
    const float a = d[i];
    const int32_t b = place[i];
    if (kUpTo ? a <= pivot : a < pivot) {
      d[left] = a;
      place[left++] = b;
    } else {
      spare[right] = a;
      spare_place[right++] = b;
    }
  }
  move(d + left, place + left, spare, spare_place, right);
  return left;
}

// The value of about rank `want` among m.
static inline float pivot_of(const float* d, int64_t m, int64_t want) {
  constexpr int kSamples = 16;
  float sample[kSamples + kLanes];
  int32_t rank[kSamples + kLanes];
  for (int s = 0; s < kSamples; s++) sample[s] = d[(2 * s + 1) * m / (2 * kSamples)];
  for (int s = kSamples; s < kSamples + kLanes; s++) sample[s] = 0;
  rank_all(sample, kSamples, rank);
  const int wanted = (int)smaller(kSamples / 2, want * kSamples / m + 1);
  for (int s = 0; s < kSamples; s++) {
    if (rank[s] == wanted) return sample[s];
  }
  return sample[0];
}

// Sorts by distance so far that the first `need` of the m candidates are final.
static inline void sort(float* d, int32_t* place, int64_t m, int64_t need, float* spare,
                        int32_t* spare_place) {
  while (need > 0 && m > 1) {
    if (m <= kRankLimit) {
      int32_t rank[kRankLimit + 4 * kLanes];
      rank_all(d, (int)m, rank);
      for (int64_t i = 0; i < m; i++) {
        spare[rank[i]] = d[i];
        spare_place[rank[i]] = place[i];
      }
      move(d, place, spare, spare_place, m);
      return;
    }
    const float pivot = pivot_of(d, m, need);
    int64_t left = partition<false>(d, place, m, pivot, spare, spare_place);
    if (left == 0) {
      left = partition<true>(d, place, m, pivot, spare, spare_place);  // all equal: in order
    } else if (need <= left) {
      m = left;
      continue;
    } else if (left <= m - left) {
      // The shorter part in a call, the longer in the loop: the depth stays logarithmic.
      sort(d, place, left, left, spare, spare_place);
    } else {
      sort(d + left, place + left, m - left, need - left, spare, spare_place);
      m = need = left;
      continue;
    }
    d += left;
    place += left;
    m -= left;
    need -= left;
  }
}

// How many of n distances (a terminated list) are at most t.
A2P_INLINE int64_t count_within(const float* d, int64_t n, float t) {
  const Float bound = splat(t);
  Int count[2] = {splat_int(0), splat_int(0)};
  int64_t i = 0;
  for (; i + kLanes < n; i += 2 * kLanes) {
    count[0] = count_less_equal(count[0], load(d + i), bound);
    count[1] = count_less_equal(count[1], load(d + i + kLanes), bound);
  }
  if (i < n) count[0] = count_less_equal(count[0], load(d + i), bound);
  return (int64_t)reduce_add(count[0]) + reduce_add(count[1]);
}

// About log2(count) * 2^23.
A2P_INLINE int32_t log_bits(int64_t count) { return float_bits(count > 0 ? (float)count : 0.5f); }

// How far to move a radius (in bits) that holds `count`, to hold `goal`: in three dimensions the squared
// radius goes with count^(2/3), on a surface with count.
A2P_INLINE int32_t radius_step(int64_t count, int64_t goal) {
  return (int32_t)(((int64_t)log_bits(goal) - log_bits(count)) * 13 / 16);
}

struct Radius {
  float t;
  int64_t count;
  bool tie;  // fewer than k are below t, more than k + slack at most t: the k-th distance is t itself
};

// Moves t, which holds `count` of the n distances, until it holds k to k + slack of them, or fewer than k at
// the limit. Secant steps, every third one a bisection: at most about 90 steps, one or two as a rule.
static inline Radius find_radius(const float* d, int64_t n, int64_t k, int64_t slack, float limit, float t,
                                 int64_t count) {
  const int32_t limit_bits = float_bits(limit);
  int64_t low = -1, high = (int64_t)limit_bits + 1;  // low holds fewer than k, high too many or is no radius
  int32_t low_log = 0, high_log = 0;
  for (int step = 0;; step++) {
    const int32_t bits = float_bits(t);
    if (count >= k && count <= k + slack) return {t, count, false};
    if (count < k) {
      if (bits == limit_bits) return {t, count, false};
      low = bits;
      low_log = log_bits(count);
    } else {
      high = bits;
      high_log = log_bits(count);
    }
    if (high - low <= 1) return {bits_float((int32_t)high), 0, true};
    const int64_t goal = k + slack / 2;
    int64_t next;
    if (step % 3 == 2) {
      next = low + (high - low) / 2;
    } else if (low_log > 0 && high_log > low_log) {
      next = low + (high - low) * ((int64_t)log_bits(goal) - low_log) / (high_log - low_log);
    } else {
      next = (int64_t)bits + radius_step(count, goal);
    }
    next = larger(low + 1, smaller(high - 1, next));
    t = bits_float((int32_t)next);
    count = count_within(d, n, t);
  }
}

// Packs the distances up to t, with their positions; returns how many. In place if `places` are given.
A2P_INLINE int64_t pack_within(const float* d, const int32_t* places, int64_t n, float t, float* near,
                               int32_t* place) {
  const Float bound = splat(t);
  int64_t m = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Float a = load(d + i);
    const Mask keep = less_equal(a, bound);
    if (places) {
      compress(place + m, load(places + i), keep);
    } else {
      compress_index(place + m, (int32_t)i, keep);
    }
    m += compress(near + m, a, keep);
  }
  return m;
}

// The same for the k first of the order (distance, position), where t is the k-th distance.
static inline int64_t pack_tie(const float* d, const int32_t* places, int64_t n, float t, int64_t k,
                               float* near, int32_t* place) {
  const Float bound = splat(t);
  const int64_t below = t > 0 ? count_within(d, n, bits_float(float_bits(t) - 1)) : 0;
  int64_t m = 0, quota = k - below;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Float a = load(d + i);
    Mask ties = equal(a, bound);
    while (__builtin_popcount(ties) > quota) ties &= ~(1u << (31 - __builtin_clz(ties)));
    quota -= __builtin_popcount(ties);
    const Mask keep = less(a, bound) | ties;
    if (places) {
      compress(place + m, load(places + i), keep);
    } else {
      compress_index(place + m, (int32_t)i, keep);
    }
    m += compress(near + m, a, keep);
  }
  return m;
}

// Candidates in their final order go out; `rows` maps places to rows (null: they are rows).
A2P_INLINE void write(const Wanted& wanted, int64_t query, int64_t found, const float* near,
                      const int32_t* place, const int32_t* rows) {
  int64_t* index = wanted.index + query * wanted.k;
  float* distance = wanted.distance + query * wanted.k;
  for (int64_t j = 0; j < found; j++) index[j] = wanted.index_base + (rows ? rows[place[j]] : place[j]);
  for (int64_t j = 0; j < found; j++) distance[j] = near[j];
  for (int64_t j = found; j < wanted.k; j++) {
    index[j] = -1;
    distance[j] = __builtin_inff();
  }
  if (wanted.count) wanted.count[query] = found;
}

A2P_INLINE bool is_finite(float a) { return a - a == 0; }

}  // namespace A2P_ISA
}  // namespace any2point
