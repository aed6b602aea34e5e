// Neighbour search in large clouds of up to three coordinates: a tree of boxes over points in k-d order
// (order.simd.cpp).
//
// Search: with a guess of the radius (from the k-th distance of the query before, which is close by) the
// boxes within reach are listed level by level and the blocks of the last level are scanned. If that finds k
// points, they contain the k nearest. If not, the radius is enlarged; at last to the k-th distance among the
// points around the nearest block, which cannot be too small. For the lowest rows in a ball all its points
// are packed, unless there are so many that the rows from 0 on hold enough of them sooner.
//
// Exact: the distance to a box is computed with the same operations in the same order as that to a point,
// from differences that are not larger, and rounding is monotonic: it never exceeds the computed distance of
// a point inside.
//
// 16 of 100,000 for each of as many, in a cube: the results are 19 MB, the floor; a query tests 7.4 groups of
// boxes (1.1 times through the tree), computes 166 distances and sorts 27 candidates, which is what takes the
// time: for a million the search takes six times as long as bringing points and queries in order. Of two
// threads the busier one takes 1 / 1.96 of one thread's time for a million, 1 / 1.94 for 100,000 (CPU time).
#include "knn/candidates.h"

namespace any2point {
namespace A2P_ISA {
namespace {

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

// Lists the blocks within t in s.groups[0]; returns how many.
A2P_INLINE int64_t list_blocks(const Tree& tree, const Float query[3], float t, const Scratch& s) {
  const Float bound = splat(t);
  // The last of `levels` lists goes to groups[0].
  int32_t *list = s.groups[tree.levels & 1], *next = s.groups[~tree.levels & 1];
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
  return n;
}

// Packs all points within t of the n listed blocks; returns how many.
A2P_INLINE int64_t pack_blocks(const Tree& tree, const Float query[3], float t, int64_t n, const Scratch& s) {
  const Float bound = splat(t);
  const int32_t* const list = s.groups[0];
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

// Packs all points within t; returns how many.
A2P_INLINE int64_t collect(const Tree& tree, const float q[3], float t, const Scratch& s) {
  const Float query[3] = {splat(q[0]), splat(q[1]), splat(q[2])};
  return pack_blocks(tree, query, t, list_blocks(tree, query, t, s), s);
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
      m += pack_points(tree.axis, at, query, splat(__FLT_MAX__), s.near + m, s.place + m);
    }
    if (m < k) continue;
    sort(s.near, s.place, m, k, s.spare, s.spare_place);
    return s.near[k - 1] < limit ? s.near[k - 1] : limit;
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

// The m candidates by row, so far that the first `need` are final.
void sort_rows(const Tree& tree, int64_t m, int64_t need, const Scratch& s) {
  move(s.copy, s.copy_place, s.near, s.place, m);
  int32_t* order = s.place;
  for (int64_t i = 0; i < m; i++) order[i] = (int32_t)i;
  // Rows beyond 2^24 are no exact floats: two passes, low half first, each of them stable.
  const int step = tree.rows <= 1 << 24 ? 24 : 16;
  const int last = step == 24 ? 0 : 16;
  for (int shift = 0; shift <= last; shift += step) {
    const int32_t low = (1 << step) - 1;
    for (int64_t i = 0; i < m; i++) {
      s.near[i] = (float)(tree.row[s.copy_place[order[i]]] >> shift & low);
    }
    sort(s.near, order, m, shift == last ? need : m, s.spare, s.spare_place);
  }
  for (int64_t i = 0; i < need; i++) {
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
  if (by_rows) sort_rows(tree, found, found, s);
  if (found == k) {
    const int64_t bits = (int64_t)float_bits(t) + radius_step(k, k + k / 8 + 6);
    *guess = bits_float((int32_t)smaller(bits, float_bits(__builtin_inff())));
  } else {
    *guess = limit;
  }
  return found;
}

// The k lowest rows within the limit. A block within reach has about half of its points in the ball; to pack
// and sort them costs about as much as to scan 300 points. `rows`: where the query before found its last one
// by scanning, not positive if it did not; then a scan up to twice as far comes first, as listing all blocks
// of a large ball is dear.
A2P_INLINE int64_t first_places(const TreeTask& task, const float q[3], const Wanted& wanted,
                                const Scratch& s, int64_t* rows) {
  const Tree& tree = task.tree;
  int64_t found = 0;
  bool done = false;
  if (*rows > 0) {
    const int64_t end = smaller(2 * *rows + 256, task.points.stride);
    found = first_rows(task.points, q, wanted, s, end);
    done = found == wanted.k || end == task.points.stride;
  }
  if (!done) {
    const Float query[3] = {splat(q[0]), splat(q[1]), splat(q[2])};
    const int64_t n = list_blocks(tree, query, wanted.limit, s);
    const int64_t expected = smaller(tree.rows, tree.rows * wanted.k / (kFanout / 2 * n + 1));
    if (expected >= 300 * n) {
      const int64_t m = pack_blocks(tree, query, wanted.limit, n, s);
      *rows = 0;
      found = smaller(m, wanted.k);
      sort_rows(tree, m, found, s);
      return found;
    }
    found = first_rows(task.points, q, wanted, s, task.points.stride);
  }
  *rows = found == wanted.k ? s.place[found - 1] + 1 : -1;
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

void enclose(const Tree& tree, int level, int64_t first, int64_t last) {
  const int64_t items = level ? tree.groups[level - 1] : groups_of(tree.points);
  for (int64_t i = first * kFanout; i < last * kFanout; i++) {
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
}

void search(const TreeTask& task, const Wanted& wanted, const Scratch& scratch) {
  float guess = 0;
  int64_t scanned = 0;
  for (int64_t i = task.first; i < task.last; i++) {
    // Rows of results lie anywhere in memory.
    if (i + kAhead < task.last) fetch_row(wanted, task.row[i + kAhead]);
    const float q[3] = {task.axis[0][i], task.axis[1][i], task.axis[2][i]};
    const bool nearest = wanted.choice != Choice::first;
    const int64_t found = nearest ? nearest_places(task.tree, q, wanted, scratch, &guess)
                                  : first_places(task, q, wanted, scratch, &scanned);
    write(wanted, task.row[i], found, scratch.near, scratch.place, scanned != 0 ? nullptr : task.tree.row);
  }
}

}  // namespace A2P_ISA
}  // namespace any2point
