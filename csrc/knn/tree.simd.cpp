// Neighbour search in large clouds of up to three coordinates: a tree of boxes over points in k-d order.
//
// Order: the points are split at a multiple of kFanout of them along the longest side of their box, again and
// again, so that every kFanout points in a row (a block), every kFanout blocks in a row, and so on, fill a
// compact box. The splits follow ranks, not lengths: density may vary by any factor.
//
// Search: with a guess of the radius (from the k-th distance of the query before, which is close by) the
// boxes within reach are listed level by level and the blocks of the last level are scanned. If that finds k
// points, they contain the k nearest. If not, the radius is enlarged; at last to the k-th distance among the
// points around the nearest block, which cannot be too small.
//
// Exact: the distance to a box is computed with the same operations in the same order as that to a point,
// from differences that are not larger, and rounding is monotonic: it never exceeds the computed distance of
// a point inside.
#include "knn/candidates.h"

namespace any2point {
namespace A2P_ISA {
namespace {

A2P_INLINE int64_t groups_of(int64_t n) { return (n + kFanout - 1) / kFanout; }

// ---- order

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
void split(float* const axis[3], int32_t* row, int64_t n, int chosen, float value, int64_t front,
           const OrderScratch& scratch) {
  const Float v = splat(value);
  int64_t below = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    below += __builtin_popcount(less(load(axis[chosen] + i), v) & first_lanes(n - i));
  }
  int64_t quota = front - below, left = 0, right = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Float a[3] = {load(axis[0] + i), load(axis[1] + i), load(axis[2] + i)};
    const Int r = load(row + i);
    const Mask valid = first_lanes(n - i);
    Mask ties = equal(a[chosen], v) & valid;
    while (__builtin_popcount(ties) > quota) ties &= ~(1u << (31 - __builtin_clz(ties)));
    quota -= __builtin_popcount(ties);
    const Mask first = (less(a[chosen], v) & valid) | ties, second = valid & ~first;
    for (int c = 0; c < 3; c++) {
      compress(axis[c] + left, a[c], first);
      compress(scratch.axis[c] + right, a[c], second);
    }
    left += compress(row + left, r, first);
    right += compress(scratch.row + right, r, second);
  }
  for (int c = 0; c < 3; c++) {
    __builtin_memcpy(axis[c] + left, scratch.axis[c], (size_t)right * sizeof(float));
  }
  __builtin_memcpy(row + left, scratch.row, (size_t)right * sizeof(int32_t));
}

// n is a multiple of kFanout unless these are the last points, so whole vectors may be written.
void order_branch(float* const axis[3], int32_t* row, int64_t n, int64_t keep, const OrderScratch& scratch) {
  if (n <= kFanout && n <= keep) return;
  float longest = -1;
  int chosen = 0;
  // Packing has written past the end of the last branch: no part of its box.
  for (int c = 0; c < 3 && n % kFanout; c++) terminate(axis[c] + n);
  for (int c = 0; c < 3; c++) {
    Float low = splat(__builtin_inff()), high = splat(-__builtin_inff());
    for (int64_t i = 0; i < n; i += kLanes) {
      const Float a = load(axis[c] + i);
      low = min(a, low);
      high = max(a, high);
    }
    const float side = reduce_max(high) - reduce_min(low);
    if (side > longest) {
      longest = side;
      chosen = c;
    }
  }
  if (longest == 0) {
    // Coincident points are everybody's neighbours in the order of their rows: those behind the first `keep`
    // are nobody's.
    for (int64_t i = keep; i < n; i++) axis[0][i] = __builtin_nanf("");
    return;
  }
  if (n <= kFanout) return;
  int64_t front = kFanout;
  while (2 * front < n) front *= 2;
  const float value = value_of_rank(axis[chosen], n, front - 1, scratch.axis[0], scratch.axis[1]);
  split(axis, row, n, chosen, value, front, scratch);
  float* const rest[3] = {axis[0] + front, axis[1] + front, axis[2] + front};
  order_branch(axis, row, front, keep, scratch);
  order_branch(rest, row + front, n - front, keep, scratch);
}

// ---- search

// Which of a group's boxes are within reach: bit b for box b. NaN (no box) stays out, as max and less_equal
// pass it on.
A2P_INLINE Mask reach(const float* box, const Float query[3], Float bound) {
  Mask mask = 0;
  for (int half = 0; half < kFanout; half += kLanes) {
    Float gap[3];
    for (int c = 0; c < 3; c++) {
      const Float below = sub(load(box + (2 * c) * kFanout + half), query[c]);
      const Float above = sub(query[c], load(box + (2 * c + 1) * kFanout + half));
      gap[c] = max(splat(0.0f), max(below, above));
    }
    const Float d = fma(gap[2], gap[2], fma(gap[0], gap[0], mul(gap[1], gap[1])));
    mask |= less_equal(d, bound) << half;
  }
  return mask;
}

A2P_INLINE int append(int32_t* list, int32_t first, Mask mask) {
  int n = 0;
  for (int half = 0; half < kFanout; half += kLanes) {
    n += compress_index(list + n, first + half, mask >> half & first_lanes(kLanes));
  }
  return n;
}

// Packs those of kLanes points that are within the bound, with their positions, behind m others.
A2P_INLINE int pack_points(float* const axis[3], int64_t at, const Float query[3], Float bound, float* near,
                           int32_t* place) {
  const Float dx = sub(load(axis[0] + at), query[0]);
  const Float dy = sub(load(axis[1] + at), query[1]);
  const Float dz = sub(load(axis[2] + at), query[2]);
  const Float d = fma(dz, dz, fma(dx, dx, mul(dy, dy)));
  const Mask keep = less_equal(d, bound);
  compress_index(place, (int32_t)at, keep);
  return compress(near, d, keep);
}

// Packs all points within t; returns how many.
A2P_INLINE int64_t collect(const Tree& tree, const float q[3], float t, const Scratch& s) {
  const Float query[3] = {splat(q[0]), splat(q[1]), splat(q[2])};
  const Float bound = splat(t);
  int32_t *list = s.groups[0], *next = s.groups[1];
  int64_t n = 1;
  list[0] = 0;
  for (int level = tree.levels - 1; level >= 0; level--) {
    const float* const boxes = tree.box[level];
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) {
      const float* box = boxes + (int64_t)list[i] * (6 * kFanout);
      found += append(next + found, list[i] * (int32_t)kFanout, reach(box, query, bound));
    }
    n = found;
    int32_t* other = list;
    list = next;
    next = other;
  }
  float* const axis[3] = {tree.axis[0], tree.axis[1], tree.axis[2]};
  float* const near = s.near;
  int32_t* const place = s.place;
  int64_t m = 0;
  for (int64_t i = 0; i < n; i++) {
    for (int half = 0; half < kFanout; half += kLanes) {
      m += pack_points(axis, (int64_t)list[i] * kFanout + half, query, bound, near + m, place + m);
    }
  }
  terminate(s.near + m);
  return m;
}

// A radius that surely holds k points: the k-th distance among the points of a branch near the query.
float sure_radius(const Tree& tree, const float q[3], int64_t k, float limit, const Scratch& s) {
  const Float query[3] = {splat(q[0]), splat(q[1]), splat(q[2])};
  int64_t path[kMaxLevels + 1];  // the nearest box of each level, from the root down
  int64_t group = 0;
  path[tree.levels] = 0;
  for (int level = tree.levels - 1; level >= 0; level--) {
    const float* box = tree.box[level] + group * (6 * kFanout);
    float best = __builtin_inff();
    int64_t nearest = 0;
    for (int64_t b = 0; b < kFanout; b++) {
      float gap[3];
      for (int c = 0; c < 3; c++) {
        const float below = box[2 * c * kFanout + b] - q[c], above = q[c] - box[(2 * c + 1) * kFanout + b];
        gap[c] = below > 0 ? below : above > 0 ? above : below == below ? 0 : below;
      }
      const float d = gap[0] * gap[0] + gap[1] * gap[1] + gap[2] * gap[2];
      if (d < best) {
        best = d;
        nearest = b;
      }
    }
    group = group * kFanout + nearest;
    path[level] = group;
  }
  int64_t size = kFanout;
  for (int level = 0; level <= tree.levels; level++, size *= kFanout) {
    const int64_t begin = path[level] * size;
    const int64_t end = smaller(begin + size, groups_of(tree.points) * kFanout);
    if (end - begin < k) continue;
    int64_t m = 0;
    for (int64_t at = begin; at < end; at += kLanes) {
      m += pack_points(tree.axis, at, query, splat(limit), s.near + m, s.place + m);
    }
    if (m < k) continue;
    sort(s.near, s.place, m, k, s.spare, s.spare_place);
    return s.near[k - 1];
  }
  return limit;
}

// Candidates by (distance, row) although they lie in the order of the tree: first by row, then by distance.
void sort_ties(const Tree& tree, int64_t m, int64_t need, const Scratch& s) {
  float* d = s.copy;
  int32_t* place = s.copy_place;
  move(d, place, s.near, s.place, m);
  // Rows beyond 2^24 are no exact floats: two passes, low half first, each of them stable.
  int32_t* order = s.place;
  for (int64_t i = 0; i < m; i++) order[i] = (int32_t)i;
  for (int shift = 0; shift <= 16; shift += 16) {
    for (int64_t i = 0; i < m; i++) s.near[i] = (float)(tree.row[place[order[i]]] >> shift & 0xffff);
    sort(s.near, order, m, m, s.spare, s.spare_place);
  }
  for (int64_t i = 0; i < m; i++) s.near[i] = d[order[i]];
  sort(s.near, order, m, need, s.spare, s.spare_place);
  for (int64_t i = 0; i < need; i++) order[i] = place[order[i]];
}

A2P_INLINE bool has_ties(const float* d, int64_t n) {
  Mask ties = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    ties |= equal(load(d + i), load(d + i + 1)) & first_lanes(n - i);
  }
  return ties != 0;
}

// The m candidates by row.
void sort_rows(const Tree& tree, int64_t m, const Scratch& s) {
  move(s.copy, s.copy_place, s.near, s.place, m);
  int32_t* order = s.place;
  for (int64_t i = 0; i < m; i++) order[i] = (int32_t)i;
  const int step = tree.points < 1 << 24 ? 24 : 16;
  for (int shift = 0; shift < 31; shift += step) {
    const int32_t low = (1 << step) - 1;
    for (int64_t i = 0; i < m; i++) {
      s.near[i] = (float)(tree.row[s.copy_place[order[i]]] >> shift & low);
    }
    sort(s.near, order, m, m, s.spare, s.spare_place);
    if (step == 24) break;
  }
  for (int64_t i = 0; i < m; i++) {
    s.near[i] = s.copy[order[i]];
    order[i] = s.copy_place[order[i]];
  }
}

// Fewer than k distances are finite: all other points are equally far, at infinity, so the lowest rows of
// them come next. Those need not be searched for.
int64_t add_overflowed(const Tree& tree, int64_t m, int64_t k, const Scratch& s) {
  const int64_t finite = m;
  for (int64_t i = 0; i < tree.lowest_count && m < k; i++) {
    bool known = false;
    for (int64_t j = 0; j < finite; j++) known |= s.place[j] == tree.lowest[i];
    if (known) continue;
    s.near[m] = __builtin_inff();
    s.place[m++] = tree.lowest[i];
  }
  terminate(s.near + m);
  return m;
}

A2P_INLINE int64_t nearest_places(const Tree& tree, const float q[3], const Wanted& wanted, const Scratch& s,
                                  float* guess) {
  const int64_t k = smaller(wanted.k, tree.points);
  const float limit = wanted.limit < __FLT_MAX__ ? wanted.limit : __FLT_MAX__;
  float t = *guess < limit ? *guess : limit;
  int64_t m = collect(tree, q, t, s);
  if (m < k && t < limit) {
    if (2 * m >= k) {
      const int64_t bits = (int64_t)float_bits(t) + radius_step(m, k + k / 4 + 4);
      t = bits_float((int32_t)smaller(bits, float_bits(limit)));
      m = collect(tree, q, t, s);
    }
    if (m < k && t < limit) {
      t = sure_radius(tree, q, k, limit, s);
      m = collect(tree, q, t, s);
    }
  }
  if (m < k && wanted.limit > limit) m = add_overflowed(tree, m, k, s);
  const int64_t found = smaller(m, k);
  if (found == 0) return 0;
  if (m > 2 * k + 64) {
    const Radius better = find_radius(s.near, m, k, k / 4 + 8, t, t, m);
    t = better.t;
    m = pack_within(s.near, s.place, m, t, s.near, s.place);
    terminate(s.near + m);
  }
  const bool by_rows = wanted.choice == Choice::set;
  if (by_rows && m > larger(k, 64)) {  // longer lists are sorted more slowly than searched
    const Radius last = find_radius(s.near, m, k, 0, t, t, m);
    t = last.t;
    if (!last.tie) {
      m = pack_within(s.near, s.place, m, t, s.near, s.place);
      terminate(s.near + m);
    }
  }
  if (!by_rows || m > k) {
    sort(s.near, s.place, m, smaller(m, found + 1), s.spare, s.spare_place);
    if (has_ties(s.near, smaller(m - 1, found))) sort_ties(tree, m, found, s);
    t = s.near[found - 1];
  }
  if (by_rows) sort_rows(tree, found, s);
  if (found == k) {
    const int64_t bits = (int64_t)float_bits(t) + radius_step(k, k + k / 8 + 6);
    *guess = bits_float((int32_t)smaller(bits, float_bits(__builtin_inff())));
  }
  return found;
}

constexpr int64_t kAhead = 4;

A2P_INLINE void fetch_row(const Wanted& wanted, int64_t query) {
  const char* index = (const char*)(wanted.index + query * wanted.k);
  const char* distance = (const char*)(wanted.distance + query * wanted.k);
  for (int64_t byte = 0; byte < smaller(wanted.k, 64) * 8; byte += 64) __builtin_prefetch(index + byte, 1);
  for (int64_t byte = 0; byte < smaller(wanted.k, 64) * 4; byte += 64) __builtin_prefetch(distance + byte, 1);
}

}  // namespace

void order(float* const axis[3], int32_t* row, int64_t count, int64_t keep, const OrderScratch& scratch) {
  order_branch(axis, row, count, keep, scratch);
  for (int c = 0; c < 3; c++) {
    for (int64_t i = count; i < groups_of(count) * kFanout; i++) axis[c][i] = __builtin_nanf("");
  }
}

void enclose(const Tree& tree) {
  int64_t items = groups_of(tree.points);
  for (int level = 0; level < tree.levels; level++) {
    for (int64_t i = 0; i < tree.groups[level] * kFanout; i++) {
      float* box = tree.box[level] + i / kFanout * (6 * kFanout) + i % kFanout;
      for (int c = 0; c < 3; c++) {
        const float* lows =
            level ? tree.box[level - 1] + i * (6 * kFanout) + 2 * c * kFanout : tree.axis[c] + i * kFanout;
        const float* highs = level ? lows + kFanout : lows;
        Float low = splat(__builtin_inff()), high = splat(-__builtin_inff());
        for (int half = 0; half < kFanout && i < items; half += kLanes) {
          low = min(load(lows + half), low);
          high = max(load(highs + half), high);
        }
        const bool none = i >= items;
        box[2 * c * kFanout] = none ? __builtin_nanf("") : reduce_min(low);
        box[(2 * c + 1) * kFanout] = none ? __builtin_nanf("") : reduce_max(high);
      }
    }
    items = groups_of(items);
  }
}

void search(const TreeTask& task, const Wanted& wanted, const Scratch& scratch) {
  float guess = 0;
  for (int64_t i = task.first; i < task.last; i++) {
    // Rows of results lie anywhere in memory.
    if (i + kAhead < task.last) fetch_row(wanted, task.row[i + kAhead]);
    const float q[3] = {task.axis[0][i], task.axis[1][i], task.axis[2][i]};
    const int64_t found = nearest_places(task.tree, q, wanted, scratch, &guess);
    write(wanted, task.row[i], found, scratch.near, scratch.place, task.tree.row);
  }
}

}  // namespace A2P_ISA
}  // namespace any2point
