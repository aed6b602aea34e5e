// What one warp does with candidates (squared distance, row): find a radius, pack, sort, write out.
// Included by csrc/knn/*.cu.
//
// As on the CPU, radii are searched for in the bits of the float, which rise with its value, and candidates
// are kept in the order of their rows, so that ties are settled by position.
#pragma once

#include "knn/kernel.h"

#include "common/distance.h"

namespace any2point {
namespace {

constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ int warp_sum(int value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kAll, value);
#else
  for (int d = 16; d; d >>= 1) value += __shfl_xor_sync(kAll, value, d);
  return value;
#endif
}

// Of floats that are not negative.
__device__ __forceinline__ float warp_max(float value) {
  unsigned bits = __float_as_uint(value);
#if __CUDA_ARCH__ >= 800
  bits = __reduce_max_sync(kAll, bits);
#else
  for (int d = 16; d; d >>= 1) bits = max(bits, __shfl_xor_sync(kAll, bits, d));
#endif
  return __uint_as_float(bits);
}

__device__ __forceinline__ int sum_of_lanes_below(int value, int lane) {
  int sum = value;
  for (int d = 1; d < 32; d <<= 1) {
    const int other = __shfl_up_sync(kAll, sum, d);
    sum += lane >= d ? other : 0;
  }
  return sum - value;
}

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }
__device__ __forceinline__ float infinite() { return __int_as_float(0x7f800000); }
// The float below t, for t >= 0: every distance is above the one below 0.
__device__ __forceinline__ float below(float t) {
  return t > 0 ? __int_as_float(__float_as_int(t) - 1) : -1.0f;
}

// The one above t, for t >= 0 or what `below` gave.
__device__ __forceinline__ float above(float t) {
  return t < 0 ? 0.0f : __int_as_float(__float_as_int(t) + 1);
}

template <typename T>
__device__ __forceinline__ bool finite(T a) {
  return a - a == 0;
}

// Query rows first .. last - 1 of a cloud are one block's; those from `count` on are not queries.
struct Tile {
  int64_t cloud, first, last, count;
};

// Tiles of `size` rows: of a packed tensor, cloud c owns the numbers from begin / size + c on.
__device__ inline Tile tile_of(const Rows& queries, int64_t size, int64_t number) {
  if (!queries.packed()) {
    const int64_t tiles = (queries.padded + size - 1) / size;
    const int64_t cloud = number / tiles, first = (number - cloud * tiles) * size;
    return {cloud, first, min(first + size, queries.padded), queries.count(cloud)};
  }
  int64_t low = 0, high = queries.clouds;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (queries.begin(middle) / size + middle <= number ? low : high) = middle;
  }
  const int64_t first = (number - queries.begin(low) / size - low) * size, count = queries.count(low);
  return {low, first, first < 0 ? first : min(first + size, count), count};
}

inline int64_t tiles_of(const Rows& queries, int64_t size) {
  return queries.packed() ? queries.total / size + queries.clouds
                          : queries.clouds * ((queries.padded + size - 1) / size);
}

struct Radius {
  float t;
  int count;
  bool tie;  // fewer than k are below t, more than `most` at most t: the k-th distance is t itself
};

__device__ __forceinline__ int log_bits(int count) { return __float_as_int(count > 0 ? float(count) : 0.5f); }
// The bits of a radius that holds about `goal`, from those of one that holds `count`.
__device__ __forceinline__ int radius_toward(int bits, int count, int goal) {
  const int step = (log_bits(goal) - log_bits(count)) / 16 * 13;
  return min(bits, 0x7f800000 - max(step, 0)) + step;  // at most infinity
}

// Moves t, which holds `count`, until it holds k to `most`, or fewer than k at the limit. The same in all
// lanes; `count_within(t)` is a warp-wide count. Secant steps, every third one a bisection.
template <typename Count>
__device__ __forceinline__ Radius find_radius(int k, int most, float limit, float t, int count,
                                              Count count_within) {
  const int limit_bits = __float_as_int(limit), goal = (k + most) / 2;
  int low = -1, high = limit_bits + 1;  // low holds fewer than k, high too many or is no radius
  int low_log = 0, high_log = 0;
  for (int step = 0;; step++) {
    const int bits = __float_as_int(t);
    if (count >= k && count <= most) return {t, count, false};
    if (count < k) {
      if (bits == limit_bits) return {t, count, false};
      low = bits;
      low_log = log_bits(count);
    } else {
      high = bits;
      high_log = log_bits(count);
    }
    if (high - low <= 1) return {__int_as_float(high), count, true};
    int next;
    if (step % 3 == 2) {
      next = low + (high - low) / 2;
    } else if (low_log > 0 && high_log > low_log) {
      next = low + int(float(high - low) * (float(log_bits(goal) - low_log) / float(high_log - low_log)));
    } else {
      next = radius_toward(bits, count, goal);
    }
    next = max(low + 1, min(high - 1, next));
    t = __int_as_float(next);
    count = count_within(t);
  }
}

struct alignas(8) Candidate {
  float distance;
  int row;
};

// count + 1 if d <= t. As PTX, because the compiler makes three instructions of it.
__device__ __forceinline__ void count_up_to(float t, float d, int* count) {
  asm("{ .reg .pred p; setp.le.f32 p, %1, %2; @p add.s32 %0, %0, 1; }" : "+r"(*count) : "f"(d), "f"(t));
}

// Appends {d, row} to a list in shared memory if d <= t. As PTX, because the compiler makes a branch of it;
// in two stores, because one would hold each distance in a pair of registers.
__device__ __forceinline__ void append_up_to(float t, float d, int row, unsigned* address) {
  asm volatile(
      "{ .reg .pred p; setp.le.f32 p, %1, %2; @p st.shared.f32 [%0], %1; @p st.shared.s32 [%0 + 4], %3; "
      "@p add.u32 %0, %0, 8; }"
      : "+r"(*address)
      : "f"(d), "f"(t), "r"(row)
      : "memory");
}

// Packs a warp's candidates with d <= t (or, in a tie, the k first by distance and row) to shared memory.
// Lane l holds kPoints candidates in the order of their rows, behind those of lane l - 1: `mine` up to t;
// `row(i)` is the row of its i-th one. Spoils d. Returns how many.
template <int kPoints, typename Row>
__device__ __forceinline__ int pack(float (&d)[kPoints], int mine, Row row, const Radius& radius, int k,
                                    Candidate* list, int lane) {
  int m = radius.count;
  if (radius.tie) {
    int less = 0, ties = 0;
#pragma unroll
    for (int i = 0; i < kPoints; i++) {
      less += d[i] < radius.t;
      ties += d[i] == radius.t;
    }
    int quota = k - warp_sum(less) - sum_of_lanes_below(ties, lane);  // how many of its ties this lane takes
    quota = max(0, min(quota, ties));
    mine = less + quota;
    m = k;
#pragma unroll
    for (int i = 0; i < kPoints; i++) {
      if (d[i] == radius.t && quota-- <= 0) d[i] = not_a_number();
    }
  }
  const int at = sum_of_lanes_below(mine, lane);
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(list + at));
#pragma unroll
  for (int i = 0; i < kPoints; i++) append_up_to(radius.t, d[i], row(i), &address);
  return m;
}

__device__ __forceinline__ void write_missing(const Neighbours<float>& run, int64_t row, int64_t from,
                                              int lane) {
  for (int64_t j = from + lane; j < run.k; j += 32) {
    run.index[row * run.k + j] = -1;
    run.distance[row * run.k + j] = infinite();
  }
  if (run.count && lane == 0) run.count[row] = from;
}

// Position by position, the candidate that comes there: key[r] in lane l is the position of rank r * 32 + l.
// A bitonic network over 32 bits: the distance in 2^b steps of the largest one, then the position. That may
// confuse distances closer than a step (floats have finer ones near 0), so the result is checked, and in that
// rare case ranks are counted.
template <int kKeys>
__device__ __forceinline__ void sort(Candidate* list, int m, int (&key)[kKeys], int lane) {
  constexpr int kPositions = 32 * kKeys;
  float d[kKeys], most = 0;
#pragma unroll
  for (int r = 0; r < kKeys; r++) {
    d[r] = r * 32 + lane < m ? list[r * 32 + lane].distance : 0.0f;
    most = fmaxf(most, d[r]);
  }
  constexpr unsigned kSteps = 0xffffffffu / kPositions;
  const float scale = float(kSteps) / fminf(warp_max(most), 3.4028235e38f);
  unsigned sorted[kKeys];
#pragma unroll
  for (int r = 0; r < kKeys; r++) {
    const int position = r * 32 + lane;
    const unsigned step = min(__float2uint_rz(d[r] * scale), kSteps);
    sorted[r] = position < m ? step * kPositions + position : 0xffffffffu;
  }
#pragma unroll
  for (int size = 2; size <= kPositions; size *= 2) {
#pragma unroll
    for (int stride = size / 2; stride > 0; stride /= 2) {
#pragma unroll
      for (int r = 0; r < kKeys; r++) {
        if (stride >= 32) {
          const int other = r ^ (stride / 32);
          if (other < r) continue;
          const unsigned low = min(sorted[r], sorted[other]), high = max(sorted[r], sorted[other]);
          const bool rising = (r * 32 & size) == 0;
          sorted[r] = rising ? low : high;
          sorted[other] = rising ? high : low;
        } else {
          const unsigned other = __shfl_xor_sync(kAll, sorted[r], stride);
          const bool rising = ((r * 32 + lane) & size) == 0, lower = (lane & stride) == 0;
          sorted[r] = rising == lower ? min(sorted[r], other) : max(sorted[r], other);
        }
      }
    }
  }
  bool wrong = false;
#pragma unroll
  for (int r = 0; r < kKeys; r++) {
    key[r] = int(sorted[r] % kPositions);
    d[r] = list[key[r]].distance;
  }
#pragma unroll
  for (int r = 0; r < kKeys; r++) {
    float next = __shfl_down_sync(kAll, d[r], 1);
    const float wrapped = __shfl_sync(kAll, d[r + 1 < kKeys ? r + 1 : r], 0);
    if (lane == 31) next = wrapped;
    wrong |= r * 32 + lane + 1 < m && d[r] > next;
  }
  if (!__any_sync(kAll, wrong)) return;

  int rank[kKeys];
#pragma unroll
  for (int r = 0; r < kKeys; r++) {
    rank[r] = 0;
    d[r] = list[r * 32 + lane].distance;
  }
  for (int q = 0; q < m; q++) {
    const float other = list[q].distance;
#pragma unroll
    for (int r = 0; r < kKeys; r++) rank[r] += other < d[r] || (other == d[r] && q < r * 32 + lane);
  }
  __syncwarp();
  // The places of the distances, which wait in registers, take the positions by rank.
#pragma unroll
  for (int r = 0; r < kKeys; r++) {
    if (r * 32 + lane < m) list[rank[r]].distance = __int_as_float(r * 32 + lane);
  }
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kKeys; r++) {
    key[r] = r * 32 + lane < m ? __float_as_int(list[r * 32 + lane].distance) : 0;
  }
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kKeys; r++) list[r * 32 + lane].distance = d[r];
  __syncwarp();
}

// Writes the result of one query from m <= 32 * kKeys candidates that lie in the order of their rows.
template <int kKeys>
__device__ __forceinline__ void finish(const Neighbours<float>& run, int64_t base, int64_t query,
                                       Candidate* list, int m, int lane) {
  __syncwarp();
  const int found = min(m, int(run.k));
  int64_t* index = run.index + query * run.k;
  float* distance = run.distance + query * run.k;
  if (run.choice != Choice::nearest && m <= run.k) {
    for (int j = lane; j < m; j += 32) {
      const Candidate next = list[j];
      index[j] = base + next.row;
      distance[j] = next.distance;
    }
    write_missing(run, query, found, lane);
    __syncwarp();
    return;
  }
  int key[kKeys];
  sort<kKeys>(list, m, key, lane);
  if (run.choice == Choice::nearest) {
#pragma unroll
    for (int r = 0; r < kKeys; r++) {
      const int rank = r * 32 + lane;
      if (rank >= found) break;
      const Candidate next = list[key[r]];
      index[rank] = base + next.row;
      distance[rank] = next.distance;
    }
  } else {
    // The chosen ones are marked by their sign, then written in the order in which they lie.
#pragma unroll
    for (int r = 0; r < kKeys; r++) {
      if (r * 32 + lane < found) list[key[r]].row |= int(0x80000000u);
    }
    __syncwarp();
    int written = 0;
#pragma unroll
    for (int r = 0; r < kKeys; r++) {
      const int position = r * 32 + lane;
      const Candidate next = list[position];
      const bool chosen = position < m && next.row < 0;
      const unsigned lanes = __ballot_sync(kAll, chosen);
      if (chosen) {
        const int at = written + __popc(lanes & ((1u << lane) - 1));
        index[at] = base + (next.row & 0x7fffffff);
        distance[at] = next.distance;
      }
      written += __popc(lanes);
    }
  }
  write_missing(run, query, found, lane);
  __syncwarp();
}

}  // namespace
}  // namespace any2point
