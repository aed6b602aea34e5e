// Exact farthest point sampling by batches: the picks of the sequential algorithm, in its order, in rounds.
//
// level[i] is the squared distance of point i to the picks so far; it only falls. Take as candidates all
// points with level > floor, and run the sequential algorithm among them alone while the best of them is
// above floor: every point outside is at or below floor, so each of these picks is the true next one. Then
// lower the levels of all points by this batch, and start the next round with a lower floor.
//
// Lowering is pruned: points lie in blocks along a Morton curve (kLanes blocks make a group), and a pick
// whose squared distance to a block's box is not below the block's largest level (its top) changes nothing in
// it. That test needs no margin. Rounding is monotonic: for a point inside of the box each coordinate's
// difference to the pick is at least the box's, in exact and so in rounded arithmetic, and the sum of their
// squares, rounded in the same order, keeps that.
//
// Ties: if so many points share the largest level that no floor below it gives a batch of fitting size, the
// candidates are the ones of lowest index among them: those before `tie_end`, which then moves on.
#include "common/simd.h"
#include "farthest_point_sample/cpu.h"

namespace any2point {
namespace A2P_ISA {
namespace {

constexpr int kMaxWanted = 256;     // blocks that a floor aims at, at most
constexpr int kMaxVectors = 4;      // vectors in a block, at most
constexpr int kMaxCells = 1 << 12;  // cells of one sorting pass
constexpr int kSortDepth = 8;

int32_t round_up(int32_t value, int32_t multiple) { return (value + multiple - 1) / multiple * multiple; }

uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}
float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Hands out pieces of the scratch memory; with a null start it only measures.
struct Arena {
  uintptr_t at;
  template <typename T>
  T* take(int64_t count) {
    const uintptr_t piece = (at + 63) & ~(uintptr_t)63;
    at = piece + count * sizeof(T);
    return reinterpret_cast<T*>(piece);
  }
};

template <int kDim>
A2P_INLINE Float sum_of_squares(const Float (&d)[kDim]) {
  Float sum = fma(d[0], d[0], mul(d[1], d[1]));
  for (int k = 2; k < kDim; k++) sum = fma(d[k], d[k], sum);
  return sum;
}

// The bits of a value below 2^6 (kDim = 2) or 2^4 (kDim = 3), with kDim - 1 zeros between them.
template <int kDim>
A2P_INLINE uint32_t spread(uint32_t value) {
  if (kDim == 2) {
    value = (value | value << 4) & 0x30f;
    value = (value | value << 2) & 0x333;
    return (value | value << 1) & 0x555;
  }
  value = (value | value << 4) & 0x0c3;
  return (value | value << 2) & 0x249;
}

template <int kDim, int kVectors>
class Sampler {
 public:
  static int64_t scratch(int64_t count) {
    Sampler sampler;
    Arena arena{0};
    sampler.carve(arena, (int32_t)count);
    return (int64_t)arena.at + 64;
  }

  void run(const FarthestPointCloud<float>& cloud) {
    Arena arena{reinterpret_cast<uintptr_t>(cloud.scratch)};
    carve(arena, (int32_t)cloud.count);
    cloud_ = cloud;
    samples_ = cloud.samples;
    build();
    start();
    while (done_ < samples_) {
      apply();
      const float most = largest_level();
      if (most < 0) return;
      if (most == 0) return take_rest();
      accept(choose(most));
    }
  }

 private:
  static constexpr int kBlock = kVectors * kLanes;
  static constexpr int kMaxCandidates = kMaxWanted / 2 * kMaxVectors * kLanes + kBlock;

  void carve(Arena& arena, int32_t count) {
    max_blocks_ = round_up((count + kBlock - 1) / kBlock, kLanes);
    const int32_t rows = max_blocks_ * kBlock, groups = round_up(max_blocks_ / kLanes, kLanes);
    const int32_t candidates = (rows < kMaxCandidates ? rows : kMaxCandidates) + kLanes;
    for (int d = 0; d < kDim; d++) {
      x_[d] = arena.take<float>(rows);
      low_[d] = arena.take<float>(max_blocks_);
      high_[d] = arena.take<float>(max_blocks_);
      group_low_[d] = arena.take<float>(groups);
      group_high_[d] = arena.take<float>(groups);
      candidate_[d] = arena.take<float>(candidates);
      pick_[d] = arena.take<float>(candidates);
      near_[d] = arena.take<float>(candidates);
    }
    level_ = arena.take<float>(rows);
    index_ = arena.take<int32_t>(rows);
    top_ = arena.take<float>(max_blocks_);
    group_top_ = arena.take<float>(groups);
    candidate_level_ = arena.take<float>(candidates);
    candidate_index_ = arena.take<int32_t>(candidates);
    candidate_row_ = arena.take<int32_t>(candidates);
    order_ = arena.take<uint32_t>(count);
    spare_ = arena.take<uint32_t>(count);
    cell_ = arena.take<uint16_t>(count);
  }

  // Orders a range of order_ along a Morton curve through its own bounding box. Cells that hold more than a
  // few blocks are ordered again by themselves, so that clusters and far outliers do not spoil the blocks.
  void sort(int32_t first, int32_t last, int depth) {
    const float inf = __builtin_inff();
    float low[kDim], high[kDim], extent = 0;
    for (int d = 0; d < kDim; d++) {
      low[d] = inf;
      high[d] = -inf;
    }
    for (int32_t i = first; i < last; i++) {
      const float* point = cloud_.points + (int64_t)order_[i] * kDim;
      for (int d = 0; d < kDim; d++) {
        low[d] = point[d] < low[d] ? point[d] : low[d];
        high[d] = point[d] > high[d] ? point[d] : high[d];
      }
    }
    for (int d = 0; d < kDim; d++) {
      low[d] *= 0.5f;  // halves: the difference of two finite floats may be infinite
      const float size = high[d] * 0.5f - low[d];
      extent = size > extent ? size : extent;
    }
    int bits = 1;  // a coordinate
    while ((bits + 1) * kDim <= 12 && (8 << bits * kDim) < last - first) bits++;
    const int32_t side = 1 << bits;
    const uint32_t cells = 1u << bits * kDim;
    const float scale = (float)side / extent;
    if (!(scale < 1e38f)) return;  // all points coincide, or nearly so
    uint32_t begin[kMaxCells + 1];
    for (uint32_t c = 0; c <= cells; c++) begin[c] = 0;
    for (int32_t i = first; i < last; i++) {
      const float* point = cloud_.points + (int64_t)order_[i] * kDim;
      uint32_t cell = 0;
      for (int d = 0; d < kDim; d++) {
        const int32_t step = (int32_t)((point[d] * 0.5f - low[d]) * scale);
        cell |= spread<kDim>((uint32_t)(step < side ? step : side - 1)) << d;
      }
      cell_[i] = (uint16_t)cell;
      begin[cell + 1]++;
    }
    for (uint32_t c = 0; c < cells; c++) begin[c + 1] += begin[c];
    for (int32_t i = first; i < last; i++) spare_[first + begin[cell_[i]]++] = order_[i];
    for (int32_t i = first; i < last; i++) order_[i] = spare_[i];
    if (depth == kSortDepth) return;
    for (uint32_t c = 0, from = 0; c < cells; from = begin[c++]) {  // begin[c] is the cell's end by now
      if (begin[c] - from > 4 * kBlock) sort(first + from, first + begin[c], depth + 1);
    }
  }

  void build() {
    const float inf = __builtin_inff();
    count_ = 0;
    for (int32_t i = 0; i < (int32_t)cloud_.count; i++) {
      const float* point = cloud_.points + (int64_t)i * kDim;
      float zero = 0;
      for (int d = 0; d < kDim; d++) zero += point[d] - point[d];
      order_[count_] = (uint32_t)i;
      count_ += zero == 0;  // NaN if a coordinate is not finite
    }
    sort(0, count_, 0);
    blocks_ = round_up((count_ + kBlock - 1) / kBlock, kLanes);
    groups_ = blocks_ / kLanes;
    const int32_t rows = blocks_ * kBlock;
    for (int32_t i = 0; i < rows; i++) {
      // Padding repeats the last point, so that it widens no box.
      const uint32_t index = order_[i < count_ ? i : count_ - 1];
      const float* point = cloud_.points + (int64_t)index * kDim;
      for (int d = 0; d < kDim; d++) x_[d][i] = point[d];
      level_[i] = i < count_ ? inf : -1.0f;
      index_[i] = (int32_t)index;
    }
    for (int32_t b = 0; b < blocks_; b++) {
      for (int d = 0; d < kDim; d++) {
        const float* x = x_[d] + b * kBlock;
        Float lowest = load(x), highest = lowest;
        for (int v = 1; v < kVectors; v++) {
          lowest = min(lowest, load(x + v * kLanes));
          highest = max(highest, load(x + v * kLanes));
        }
        low_[d][b] = reduce_min(lowest);
        high_[d][b] = reduce_max(highest);
      }
      top_[b] = b * kBlock < count_ ? inf : -1.0f;
    }
    for (int32_t g = 0; g < groups_; g++) {
      for (int d = 0; d < kDim; d++) {
        group_low_[d][g] = reduce_min(load(low_[d] + g * kLanes));
        group_high_[d][g] = reduce_max(load(high_[d] + g * kLanes));
      }
      group_top_[g] = inf;
    }
    for (int32_t g = groups_; g < round_up(groups_, kLanes); g++) group_top_[g] = -1;
    const int32_t blocks = (count_ + kBlock - 1) / kBlock;
    wanted_ = blocks * 3 / 8 < 48 + blocks / 20 ? blocks * 3 / 8 : 48 + blocks / 20;
    wanted_ = wanted_ < 1 ? 1 : wanted_ > kMaxWanted ? kMaxWanted : wanted_;
  }

  void start() {
    int32_t row = 0;
    while (index_[row] != cloud_.pick) row++;
    done_ = 0;
    take(cloud_.pick, __builtin_inff(), row);
    for (int d = 0; d < kDim; d++) pick_[d][0] = x_[d][row];
    picks_ = 1;
  }

  void take(int64_t index, float level, int32_t row) {
    cloud_.index[done_] = index;
    cloud_.distance[done_] = level;
    level_[row] = -1;
    done_++;
  }

  // Lowers all levels by the picks of the round, group by group.
  void apply() {
    const int32_t end = round_up(picks_, kLanes);
    for (int32_t i = picks_; i < end; i++) {
      for (int d = 0; d < kDim; d++) pick_[d][i] = 0;
    }
    const Float zero = splat(0);
    for (int32_t g = 0; g < groups_; g++) {
      int32_t near = 0;
      Float low[kDim], high[kDim];
      for (int d = 0; d < kDim; d++) {
        low[d] = splat(group_low_[d][g]);
        high[d] = splat(group_high_[d][g]);
      }
      const Float top = splat(group_top_[g]);
      for (int32_t i = 0; i < end; i += kLanes) {
        Float away[kDim];
        for (int d = 0; d < kDim; d++) {
          const Float p = load(pick_[d] + i);
          away[d] = max(max(sub(low[d], p), sub(p, high[d])), zero);
        }
        Mask reached = less(sum_of_squares<kDim>(away), top);
        if (picks_ - i < kLanes) reached &= (1u << (picks_ - i)) - 1;
        if (!reached) continue;
        for (int d = 0; d < kDim; d++) compress(near_[d] + near, load(pick_[d] + i), reached);
        near += __builtin_popcount(reached);
      }
      for (int32_t first = 0; first < near; first += 32) {
        apply_to_group(g, first, near - first < 32 ? near - first : 32);
      }
      if (near) group_top_[g] = reduce_max(load(top_ + g * kLanes));
    }
  }

  // Up to 32 picks: their box tests become one word of bits a block.
  void apply_to_group(int32_t group, int32_t first, int32_t picks) {
    const int32_t block = group * kLanes;
    const Float zero = splat(0), top = load(top_ + block);
    Float low[kDim], high[kDim];
    for (int d = 0; d < kDim; d++) {
      low[d] = load(low_[d] + block);
      high[d] = load(high_[d] + block);
    }
    Words reached = no_words();
    for (int32_t p = 0; p < picks; p++) {
      Float away[kDim];
      for (int d = 0; d < kDim; d++) {
        const Float x = splat(near_[d][first + p]);
        away[d] = max(max(sub(low[d], x), sub(x, high[d])), zero);
      }
      reached = add_where_less(reached, 1u << p, sum_of_squares<kDim>(away), top);
    }
    uint32_t words[kLanes];
    store(words, reached);
    for (Mask todo = nonzero(reached); todo; todo &= todo - 1) {
      const int b = __builtin_ctz(todo);
      const int32_t row = (block + b) * kBlock;
      Float x[kVectors][kDim], level[kVectors];
      for (int v = 0; v < kVectors; v++) {
        for (int d = 0; d < kDim; d++) x[v][d] = load(x_[d] + row + v * kLanes);
        level[v] = load(level_ + row + v * kLanes);
      }
      for (uint32_t word = words[b]; word; word &= word - 1) {
        const int32_t p = first + __builtin_ctz(word);
        Float to[kDim];
        for (int d = 0; d < kDim; d++) to[d] = splat(near_[d][p]);
        for (int v = 0; v < kVectors; v++) {
          Float difference[kDim];
          for (int d = 0; d < kDim; d++) difference[d] = sub(x[v][d], to[d]);
          level[v] = min(sum_of_squares<kDim>(difference), level[v]);
        }
      }
      Float most = level[0];
      for (int v = 0; v < kVectors; v++) {
        store(level_ + row + v * kLanes, level[v]);
        most = max(most, level[v]);
      }
      top_[block + b] = reduce_max(most);
    }
  }

  float largest_level() const {
    Float most = splat(-1);
    for (int32_t g = 0; g < groups_; g += kLanes) most = max(most, load(group_top_ + g));
    return reduce_max(most);
  }

  // Fills the candidates and returns their floor. Aims at wanted_ blocks with a top above the floor; searches
  // on the bits of the float, which are ordered like non-negative floats.
  float choose(float most) {
    uint32_t too_many = 0, too_few = bits_of(most), guess = bits_of(most * ratio_);
    while (too_few - too_many > 1) {
      if (guess <= too_many || guess >= too_few) guess = too_many + (too_few - too_many) / 2;
      const float floor = float_of(guess);
      int32_t blocks = 0;
      for (int32_t b = 0; b < blocks_; b += kLanes) {
        blocks += __builtin_popcount(less(splat(floor), load(top_ + b)));
      }
      if (blocks > 2 * wanted_) {
        too_many = guess;
      } else if (2 * blocks < wanted_) {
        too_few = guess;
      } else if (collect(floor, 8 * wanted_ + 64)) {
        ratio_ = floor / most;
        return floor;
      } else {
        too_many = guess;
      }
    }
    if (float_of(too_few) < most) {
      // Fewer than wanted_ / 2 blocks, all of which the candidate arrays can hold.
      collect(float_of(too_few), kMaxCandidates - kBlock);
      return float_of(too_few);
    }
    collect_ties(most);
    return float_of(bits_of(most) - 1);
  }

  // All points above the floor; false if there are more than `limit`.
  bool collect(float floor, int32_t limit) {
    const Float above = splat(floor);
    int32_t n = 0;
    for (int32_t b = 0; b < blocks_; b += kLanes) {
      for (Mask todo = less(above, load(top_ + b)); todo; todo &= todo - 1) {
        if (n > limit) return false;
        const int32_t row = (b + __builtin_ctz(todo)) * kBlock;
        for (int32_t i = row; i < row + kBlock; i += kLanes) {
          const Float level = load(level_ + i);
          const Mask chosen = less(above, level);
          for (int d = 0; d < kDim; d++) compress(candidate_[d] + n, load(x_[d] + i), chosen);
          compress(candidate_level_ + n, level, chosen);
          n += compress_index(candidate_row_ + n, i, chosen);
        }
      }
    }
    candidates_ = n;
    for (int32_t i = 0; i < n; i++) candidate_index_[i] = index_[candidate_row_[i]];
    return true;
  }

  // Points whose level is exactly `most`, the lowest indices first: those in [tie_end_, tie_end_ +
  // tie_window_). None is left below tie_end_: levels only fall, and points at the largest level are picked
  // by index.
  void collect_ties(float most) {
    if (tie_level_ != most) {
      tie_level_ = most;
      tie_end_ = 0;
    }
    const int32_t limit = kMaxCandidates - kBlock < 256 ? kMaxCandidates - kBlock : 256;
    for (;;) {
      const int32_t left = (int32_t)cloud_.count - tie_end_;
      const int32_t end = tie_end_ + (left < tie_window_ ? left : tie_window_);
      const int32_t n = collect_ties_below(most, end, limit);
      if (n > limit) {
        tie_window_ = tie_window_ / 2 > 1 ? tie_window_ / 2 : 1;
        continue;
      }
      tie_end_ = end;
      if (n < limit / 8 && tie_window_ < 1 << 29) tie_window_ *= 2;
      candidates_ = n;
      if (n) return;
    }
  }

  int32_t collect_ties_below(float most, int32_t end, int32_t limit) {
    const Float level = splat(most);
    int32_t n = 0;
    for (int32_t b = 0; b < blocks_; b += kLanes) {
      for (Mask todo = equal(level, load(top_ + b)); todo; todo &= todo - 1) {
        const int32_t row = (b + __builtin_ctz(todo)) * kBlock;
        for (int32_t i = row; i < row + kBlock; i += kLanes) {
          for (Mask ties = equal(level, load(level_ + i)); ties; ties &= ties - 1) {
            const int32_t at = i + __builtin_ctz(ties);
            if (index_[at] >= end) continue;
            for (int d = 0; d < kDim; d++) candidate_[d][n] = x_[d][at];
            candidate_level_[n] = most;
            candidate_index_[n] = index_[at];
            candidate_row_[n] = at;
            n++;
          }
        }
        if (n > limit) return n;
      }
    }
    return n;
  }

  // The sequential algorithm among the candidates, while the best is above the floor.
  void accept(float floor) {
    const int32_t end = round_up(candidates_, kLanes);
    for (int32_t i = candidates_; i < end; i++) {
      for (int d = 0; d < kDim; d++) candidate_[d][i] = 0;
      candidate_level_[i] = -1;
    }
    const Float above = splat(floor);
    Float best = splat(-1);
    for (int32_t i = 0; i < end; i += kLanes) best = max(best, load(candidate_level_ + i));
    picks_ = 0;
    while (done_ < samples_) {
      best = splat_max(best);
      if (!less(above, best)) break;
      int32_t at = -1, lowest = INT32_MAX;
      for (int32_t i = 0; i < end; i += kLanes) {
        for (Mask ties = equal(best, load(candidate_level_ + i)); ties; ties &= ties - 1) {
          const int32_t c = i + __builtin_ctz(ties);
          if (candidate_index_[c] < lowest) {
            lowest = candidate_index_[c];
            at = c;
          }
        }
      }
      take(lowest, candidate_level_[at], candidate_row_[at]);
      candidate_level_[at] = -1;
      Float to[kDim];
      for (int d = 0; d < kDim; d++) {
        pick_[d][picks_] = candidate_[d][at];
        to[d] = splat(candidate_[d][at]);
      }
      picks_++;
      best = splat(-1);
      for (int32_t i = 0; i < end; i += kLanes) {
        Float difference[kDim];
        for (int d = 0; d < kDim; d++) difference[d] = sub(load(candidate_[d] + i), to[d]);
        const Float level = min(sum_of_squares<kDim>(difference), load(candidate_level_ + i));
        store(candidate_level_ + i, level);
        best = max(best, level);
      }
    }
  }

  // All points left coincide with picks: the rest goes by index.
  void take_rest() {
    for (int32_t i = 0; i < (int32_t)cloud_.count; i++) spare_[i] = 0;
    for (int32_t i = 0; i < count_; i++) spare_[index_[i]] = level_[i] == 0;
    for (int32_t i = 0; i < (int32_t)cloud_.count && done_ < samples_; i++) {
      if (!spare_[i]) continue;
      cloud_.index[done_] = i;
      cloud_.distance[done_] = 0;
      done_++;
    }
  }

  FarthestPointCloud<float> cloud_;
  int64_t samples_, done_;
  // Finite points in Morton order, padded with level -1.
  int32_t count_, blocks_, max_blocks_, groups_;
  float *x_[kDim], *level_;
  int32_t* index_;  // in the cloud
  // Boxes and largest levels of blocks and of groups of kLanes blocks.
  float *low_[kDim], *high_[kDim], *top_;
  float *group_low_[kDim], *group_high_[kDim], *group_top_;
  // The round: candidates, its picks, and those picks that reach a group.
  int32_t candidates_, picks_, wanted_;
  float *candidate_[kDim], *candidate_level_;
  int32_t *candidate_index_, *candidate_row_;
  float *pick_[kDim], *near_[kDim];
  float ratio_ = 0.5f;  // floor / largest level of the last round: the next guess
  float tie_level_ = -1;
  int32_t tie_end_ = 0, tie_window_ = 256;
  // Sorting.
  uint32_t *order_, *spare_;
  uint16_t* cell_;
};

// Short blocks prune better, long ones need fewer tests. Measured crossover, within a factor of two.
bool use_long_blocks(int64_t count) { return count > 768 * 2 * kLanes; }

}  // namespace

// Nanoseconds fitted on a 4 GHz core with AVX-512 and with AVX2: sequential 1.2 * samples * count / kLanes,
// batched 1000 + 11 * count + 43 * samples.
bool farthest_point_batched_pays(int64_t count, int64_t dim, int64_t samples) {
  if (dim < 2 || dim > 3 || count > 1 << 30) return false;
  const double wanted = (double)(samples < count ? samples : count);
  return wanted * (1.2 / kLanes * (double)count - 43) > 1000 + 11 * (double)count;
}

int64_t farthest_point_batched_scratch(int64_t count, int64_t dim) {
  if (dim == 2) return use_long_blocks(count) ? Sampler<2, 4>::scratch(count) : Sampler<2, 2>::scratch(count);
  return use_long_blocks(count) ? Sampler<3, 4>::scratch(count) : Sampler<3, 2>::scratch(count);
}

void farthest_point_batched(const FarthestPointCloud<float>& cloud) {
  if (cloud.dim == 2) {
    if (use_long_blocks(cloud.count)) return Sampler<2, 4>().run(cloud);
    return Sampler<2, 2>().run(cloud);
  }
  if (use_long_blocks(cloud.count)) return Sampler<3, 4>().run(cloud);
  return Sampler<3, 2>().run(cloud);
}

}  // namespace A2P_ISA
}  // namespace any2point
