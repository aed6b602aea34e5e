// The parts that both batched kernels are made of; the algorithm is in batched.cu, its proof in docs/fps.md.
#pragma once

#include "common/distance.h"
#include "farthest_point_sample/batched.h"
#include "farthest_point_sample/device.cuh"
#include "farthest_point_sample/exchange.cuh"

namespace any2point {

constexpr unsigned kAccepted = 0x80000000u;  // in a candidate's state, beside the bits of its level
constexpr float kFewWanted = 40;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ unsigned index_of(float4 point) { return __float_as_uint(point.w); }
__device__ __forceinline__ float squared_distance(float4 a, float4 b) {
  return squared_distance3(a.x - b.x, a.y - b.y, a.z - b.z);
}

// Whether a's key is larger than b's. No branches, as it stands in innermost loops.
__device__ __forceinline__ bool larger_key(float a_level, unsigned a_index, float b_level, unsigned b_index) {
  return (a_level > b_level) | ((a_level == b_level) & (a_index < b_index));
}

// A float's order as an unsigned's, and back.
__device__ __forceinline__ unsigned ordered(float value) {
  const unsigned bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(unsigned bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

__device__ __forceinline__ unsigned spread3(unsigned v) {  // the bits of v (10 at most) to every third place
  v = (v | (v << 16)) & 0x030000ffu;
  v = (v | (v << 8)) & 0x0300f00fu;
  v = (v | (v << 4)) & 0x030c30c3u;
  return (v | (v << 2)) & 0x09249249u;
}

// Where a cell (2^bits a side) lies along a Hilbert curve, by Skilling's transform. Unlike along a Morton
// curve, neighbours along it are neighbours in space, so that boxes around stretches of it are small.
__device__ __forceinline__ unsigned hilbert(unsigned x, unsigned y, unsigned z, int bits) {
  for (unsigned bit = 1u << (bits - 1); bit > 1; bit >>= 1) {
    const unsigned low = bit - 1;
    if (x & bit) x ^= low;
    unsigned swap = y & bit ? 0 : (x ^ y) & low;
    x ^= y & bit ? low : swap;
    y ^= swap;
    swap = z & bit ? 0 : (x ^ z) & low;
    x ^= z & bit ? low : swap;
    z ^= swap;
  }
  y ^= x;
  z ^= y;
  unsigned flip = 0;
  for (unsigned bit = 1u << (bits - 1); bit > 1; bit >>= 1) flip ^= z & bit ? bit - 1 : 0;
  return spread3(x ^ flip) << 2 | spread3(y ^ flip) << 1 | spread3(z ^ flip);
}

// Sums of `value` over the threads before this one; `total` over all. Whole block; `sums`: one a warp.
__device__ __forceinline__ unsigned sum_before(unsigned value, unsigned* sums, unsigned* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned sum = value;
  for (int d = 1; d < 32; d *= 2) {
    const unsigned other = __shfl_up_sync(kAll, sum, d);
    if (lane >= d) sum += other;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  unsigned before = sum - value;
  *total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x / 32); w++) {
    before += w < warp ? sums[w] : 0;
    *total += sums[w];
  }
  __syncthreads();
  return before;
}

// What the blocks of one cloud count together; zero at the start.
struct BatchedHeader {
  unsigned arrived;   // at barriers
  unsigned limit[7];  // largest ~low and high coordinate, largest ~index, of the finite points
  unsigned finite;    // how many
  unsigned pad[7];
};

// The blocks of one cloud, all resident.
struct Team {
  int part, parts;
  BatchedHeader* header;
  unsigned arrivals = 0;

  __device__ void sync() {
    __syncthreads();
    arrivals += parts;
    if (threadIdx.x == 0) {
      add_release(&header->arrived);
      while (load_acquire(&header->arrived) < arrivals) continue;
    }
    __syncthreads();
  }
};

// A barrier over the blocks of a cloud at which each tells a number and the bits of a float: afterwards
// `offset` holds the sums of the numbers before each block, `largest` the largest float. One word a block; a
// block that finds all of a round's words knows that what was written before them is there. No block can be
// two rounds ahead of another, so two sets of words suffice; the tag tells a round's words from older ones.
__device__ __forceinline__ void exchange(unsigned long long* words, unsigned round, int part, int parts,
                                         unsigned number, unsigned bits, unsigned* offset,
                                         unsigned* largest) {
  const int lane = threadIdx.x % 32;
  __syncthreads();
  if (threadIdx.x < 32) {
    const unsigned tag = ((round >> 1) + 1) & 0xffff;
    words += (round & 1) * kBatchedParts;
    if (lane == 0) {
      store_release(&words[part],
                    static_cast<unsigned long long>(bits) << 32 | min(number, 0xffffu) << 16 | tag);
    }
    __syncwarp();
    const int each = (parts + 31) / 32, from = lane * each, end = min(from + each, parts);
    unsigned sum = 0, most = 0;
    for (int p = from; p < end; p++) {
      unsigned long long word;
      do {
        word = load_acquire(&words[p]);
      } while ((word & 0xffff) != tag);
      sum += static_cast<unsigned>(word) >> 16;
      offset[p + 1] = sum;
      most = max(most, static_cast<unsigned>(word >> 32));
    }
    __syncwarp();
    unsigned before = sum;
    for (int d = 1; d < 32; d *= 2) {
      const unsigned other = __shfl_up_sync(kAll, before, d);
      if (lane >= d) before += other;
    }
    before -= sum;
    for (int p = from; p < end; p++) offset[p + 1] += before;
    most = warp_max(most);
    if (lane == 0) {
      offset[0] = 0;
      *largest = most;
    }
  }
  __syncthreads();
}

// The finite points of a cloud in the order of cells (2^bits a side) along a curve, in `sorted`, each with
// its index, at most kHeld points a thread; the order inside a cell is arbitrary, and no pick depends on it.
// `cells` (8^bits), the header and the block's `own` (the same as the header unless kParts) are zero at the
// start. Points are scaled down by 4 so that no extent overflows.
template <bool kParts, int kHeld, typename AnyTeam>
__device__ void sort_cloud(const float* points, int count, int bits, AnyTeam& team, unsigned* cells,
                           float4* sorted, unsigned* sums, BatchedHeader* own) {
  const int threads = blockDim.x, from = team.part * threads + threadIdx.x, step = team.parts * threads;
  const int lane = threadIdx.x % 32;
  BatchedHeader* header = team.header;
  unsigned limit[7] = {};  // of ~low, high, ~index: 0 is none
  for (int i = from; i < count; i += step) {
    const float* p = points + static_cast<size_t>(i) * 3;
    if (!finite(p, 3)) continue;
    for (int a = 0; a < 3; a++) {
      limit[a] = max(limit[a], ~ordered(p[a]));
      limit[3 + a] = max(limit[3 + a], ordered(p[a]));
    }
    limit[6] = max(limit[6], ~static_cast<unsigned>(i));
  }
#pragma unroll
  for (int a = 0; a < 7; a++) {
    const unsigned most = warp_max(limit[a]);
    if (lane == 0 && most) atomicMax(&own->limit[a], most);
  }
  if constexpr (kParts) {
    __syncthreads();
    if (threadIdx.x < 7) atomicMax(&header->limit[threadIdx.x], own->limit[threadIdx.x]);
  }
  team.sync();
  const volatile unsigned* bounds = header->limit;
  float origin[3], extent = 0;
  for (int a = 0; a < 3; a++) {
    origin[a] = 0.25f * unordered(~bounds[a]);
    extent = fmaxf(extent, 0.25f * unordered(bounds[3 + a]) - origin[a]);
  }
  const float scale = extent > 0 ? (static_cast<float>(1 << bits) - 0.01f) / extent : 0.0f;
  const int last = (1 << bits) - 1;
  auto cell = [&](const float* p) {
    unsigned at[3];
    for (int a = 0; a < 3; a++) {
      const int place = __float2int_rz((0.25f * p[a] - origin[a]) * scale);  // a NaN becomes 0
      at[a] = min(max(place, 0), last);
    }
    return static_cast<int>(hilbert(at[0], at[1], at[2], bits));
  };
  int cell_of[kHeld];  // of this thread's points; -1: none
  unsigned rank[kHeld];
#pragma unroll
  for (int k = 0; k < kHeld; k++) {
    const int i = from + k * step;
    const float* p = points + static_cast<size_t>(min(i, count - 1)) * 3;
    cell_of[k] = i < count && finite(p, 3) ? cell(p) : -1;
    rank[k] = cell_of[k] < 0 ? 0 : atomicAdd(&cells[cell_of[k]], 1u);
  }
  team.sync();
  if (team.part == 0) {  // from sizes to starts
    const int each = ((1 << 3 * bits) + threads - 1) / threads;
    const int begin = min(static_cast<int>(threadIdx.x) * each, 1 << 3 * bits);
    const int end = min(begin + each, 1 << 3 * bits);
    unsigned sum = 0, total;
    if constexpr (kParts) {  // of several blocks there are 4 cells a thread or more
      uint4* sizes = reinterpret_cast<uint4*>(cells);
#pragma unroll 8
      for (int c = begin / 4; c < end / 4; c++) {
        const uint4 size = __ldcg(&sizes[c]);
        sum += size.x + size.y + size.z + size.w;
      }
      unsigned start = sum_before(sum, sums, &total);
#pragma unroll 8
      for (int c = begin / 4; c < end / 4; c++) {
        const uint4 size = __ldcg(&sizes[c]);
        const unsigned y = start + size.x, z = y + size.y, w = z + size.z;
        __stcg(&sizes[c], make_uint4(start, y, z, w));
        start = w + size.w;
      }
    } else {
      for (int c = begin; c < end; c++) sum += cells[c];
      unsigned start = sum_before(sum, sums, &total);
      for (int c = begin; c < end; c++) {
        const unsigned size = cells[c];
        cells[c] = start;
        start += size;
      }
    }
    if (threadIdx.x == 0) header->finite = total;
  }
  team.sync();
#pragma unroll
  for (int k = 0; k < kHeld; k++) {
    if (cell_of[k] < 0) continue;
    const int i = from + k * step;
    const float* p = points + static_cast<size_t>(i) * 3;
    const float4 point = make_float4(p[0], p[1], p[2], __uint_as_float(i));
    if constexpr (kParts) {
      __stcg(&sorted[__ldcg(&cells[cell_of[k]]) + rank[k]], point);
    } else {
      sorted[cells[cell_of[k]] + rank[k]] = point;
    }
  }
  team.sync();
}

// This lane's points, block q's at [q * stride], and the boxes of the warp's blocks.
struct Held {
  const float4* points;
  int stride;
  float4 *low, *high;  // [kHeld]; then, if kHeld >= 4, one box around all

  __device__ float4 at(int q) const { return points[q * stride]; }
};
template <int kHeld>
constexpr int kBoxesOf = kHeld >= 4 ? kHeld + 1 : kHeld;

// A warp's blocks of 32 points: the levels in registers, a point a lane, and the largest of each block.
// These, and the largest of all, may be `w` of the boxes' lower corners instead, where registers are short.
template <int kHeld, bool kInBoxes = false>
struct Levels {
  float level[kHeld];  // -1: no point
  float tops[kInBoxes ? 1 : kHeld];

  __device__ __forceinline__ float top(Held own, int q) const {
    if constexpr (kInBoxes) {
      return own.low[q].w;
    } else {
      return tops[q];
    }
  }
  __device__ __forceinline__ void set_top(Held own, int q, float value) {
    if constexpr (kInBoxes) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) own.low[q].w = value;
      __syncwarp();
    } else {
      tops[q] = value;
    }
  }
  __device__ __forceinline__ float most(Held own) const {
    if constexpr (kInBoxes) return own.low[kHeld].w;
    float largest = top(own, 0);
#pragma unroll
    for (int q = 1; q < kHeld; q++) largest = fmaxf(largest, top(own, q));
    return largest;
  }
  // After the last of some calls of set_top.
  __device__ __forceinline__ void set_most(Held own) {
    if constexpr (kInBoxes) {
      float largest = own.low[0].w;
#pragma unroll
      for (int q = 1; q < kHeld; q++) largest = fmaxf(largest, own.low[q].w);
      set_top(own, kHeld, largest);
    }
  }
};

// Fills levels and boxes.
template <int kHeld, bool kInBoxes>
__device__ void start_levels(Levels<kHeld, kInBoxes>& held, Held own, const bool (&present)[kHeld]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int q = 0; q < kHeld; q++) {
    const bool in = present[q];
    const float4 p = in ? own.at(q) : make_float4(0, 0, 0, 0);
    held.level[q] = in ? infinity() : -1.0f;
    const float top = __any_sync(kAll, in) ? infinity() : -1.0f;
    const unsigned x = ordered(p.x), y = ordered(p.y), z = ordered(p.z);
    const unsigned x0 = warp_min(in ? x : kAll), x1 = warp_max(in ? x : 0);
    const unsigned y0 = warp_min(in ? y : kAll), y1 = warp_max(in ? y : 0);
    const unsigned z0 = warp_min(in ? z : kAll), z1 = warp_max(in ? z : 0);
    if (lane == 0) {
      own.low[q] = make_float4(unordered(x0), unordered(y0), unordered(z0), 0);
      own.high[q] = make_float4(unordered(x1), unordered(y1), unordered(z1), 0);
    }
    held.set_top(own, q, top);
  }
  __syncwarp();
  if (kHeld >= 4 && lane == 0) {
    float4 l = own.low[0], h = own.high[0];
#pragma unroll
    for (int q = 1; q < kHeld; q++) {
      if (held.top(own, q) <= 0) continue;
      const float4 a = own.low[q], b = own.high[q];
      l = make_float4(fminf(l.x, a.x), fminf(l.y, a.y), fminf(l.z, a.z), 0);
      h = make_float4(fmaxf(h.x, b.x), fmaxf(h.y, b.y), fmaxf(h.z, b.z), 0);
    }
    own.low[kHeld] = l;
    own.high[kHeld] = h;
  }
  held.set_most(own);
}

__device__ __forceinline__ float warp_most(float level) {  // levels and -1 are ordered like ints
#if __CUDA_ARCH__ >= 800
  return __int_as_float(__reduce_max_sync(kAll, __float_as_int(level)));
#else
  return __int_as_float(static_cast<int>(warp_max(__float_as_uint(level) ^ 0x80000000u) ^ 0x80000000u));
#endif
}

// The squared distance from a point to a box, roundings in the order of squared_distance3: by the
// monotonicity of rounding it is at most that to any point in the box, exactly, so no margin is needed.
__device__ __forceinline__ float box_distance(float4 low, float4 high, float4 p) {
  return squared_distance3(fmaxf(fmaxf(low.x - p.x, p.x - high.x), 0.0f),
                           fmaxf(fmaxf(low.y - p.y, p.y - high.y), 0.0f),
                           fmaxf(fmaxf(low.z - p.z, p.z - high.z), 0.0f));
}

// Lowers the levels by `count` picks: a lane tests one pick against a block's box, then the warp takes those
// that may matter.
template <int kHeld, bool kInBoxes>
__device__ __forceinline__ void apply_picks(Levels<kHeld, kInBoxes>& held, Held own, const float4* picks,
                                            int count) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int a = 0; a < count; a += 32) {
    const float4 pick = picks[min(a + lane, count - 1)];
    if (kHeld >= 4) {
      const float most = held.most(own);
      if (!__any_sync(kAll, box_distance(own.low[kHeld], own.high[kHeld], pick) < most)) continue;
    }
    bool changed = false;
#pragma unroll
    for (int q = 0; q < kHeld; q++) {
      const float top = held.top(own, q);
      if (top <= 0) continue;
      const float reach = box_distance(own.low[q], own.high[q], pick);
      unsigned hits = __ballot_sync(kAll, a + lane < count && reach < top);
      if (!hits) continue;
      const float4 p = own.at(q);
      float level = held.level[q];
#pragma unroll 1
      for (; hits; hits &= hits - 1) level = fminf(level, squared_distance(p, picks[a + __ffs(hits) - 1]));
      held.level[q] = level;
      held.set_top(own, q, warp_most(level));
      changed = true;
    }
    if (changed) held.set_most(own);
  }
}

// The same for few hits a block: kLists blocks at a time, and each one's hits collected in a list first, so
// that nothing waits for single bits. `lists`: [kLists, 32] of the warp.
template <int kLists, int kHeld, bool kInBoxes>
__device__ __forceinline__ void apply_listed(Levels<kHeld, kInBoxes>& held, Held own, const float4* picks,
                                             int count, float4* lists) {
  constexpr int kAtOnce = 4;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int a = 0; a < count; a += 32) {
    const bool real = a + lane < count;
    const float4 pick = picks[real ? a + lane : a];
    if (kHeld >= 4) {
      const float most = held.most(own);
      if (!__any_sync(kAll, box_distance(own.low[kHeld], own.high[kHeld], pick) < most)) continue;
    }
#pragma unroll
    for (int q = 0; q < kHeld; q += kLists) {
      int number[kLists], longest = 0;
#pragma unroll
      for (int u = 0; u < kLists; u++) {
        const bool hit = real & (box_distance(own.low[q + u], own.high[q + u], pick) < held.top(own, q + u));
        const unsigned hits = __ballot_sync(kAll, hit);
        number[u] = __popc(hits);
        longest = max(longest, number[u]);
        if (hit) lists[u * 32 + __popc(hits & ((1u << lane) - 1))] = pick;
      }
      if (longest == 0) continue;
      __syncwarp();
      float4 p[kLists];
#pragma unroll
      for (int u = 0; u < kLists; u++) p[u] = own.at(q + u);
#pragma unroll 1
      for (int k = 0; k < longest; k += kAtOnce) {
#pragma unroll
        for (int u = 0; u < kLists; u++) {
          if (k >= number[u]) continue;
#pragma unroll
          for (int i = 0; i < kAtOnce; i++) {
            const float d = squared_distance(p[u], lists[u * 32 + min(k + i, number[u] - 1)]);
            held.level[q + u] = fminf(held.level[q + u], d);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kLists; u++) held.set_top(own, q + u, warp_most(held.level[q + u]));
      __syncwarp();
    }
    held.set_most(own);
  }
}

// Lowers the levels by one pick; whether that may have changed any. The first picks reach everywhere: testing
// boxes would be a waste.
constexpr int kBoxedSteps = 64;
template <int kHeld, bool kInBoxes>
__device__ __forceinline__ bool apply_one(Levels<kHeld, kInBoxes>& held, Held own, float4 pick, bool boxed) {
  if (!boxed) {
#pragma unroll
    for (int q = 0; q < kHeld; q++) held.level[q] = fminf(held.level[q], squared_distance(own.at(q), pick));
#pragma unroll
    for (int q = 0; q < kHeld; q++) held.set_top(own, q, warp_most(held.level[q]));
    held.set_most(own);
    return true;
  }
  bool changed = false;
#pragma unroll
  for (int q = 0; q < kHeld; q++) {
    const float top = held.top(own, q);
    if (top <= 0 || box_distance(own.low[q], own.high[q], pick) >= top) continue;
    held.level[q] = fminf(held.level[q], squared_distance(own.at(q), pick));
    held.set_top(own, q, warp_most(held.level[q]));
    changed = true;
  }
  if (changed) held.set_most(own);
  return changed;
}

// The best point of a warp's blocks: the largest level, then the lowest index.
struct WarpBest {
  float4 point;  // x, y, z, level; of the lane `here` alone
  unsigned index;
  bool here = false, current = false;  // current: no level has changed since

  template <int kHeld, bool kInBoxes>
  __device__ __forceinline__ void look(const Levels<kHeld, kInBoxes>& held, Held own) {
    if (current) return;
    const float level = held.most(own);
    unsigned mine = kAll;
    point = make_float4(0, 0, 0, level);
#pragma unroll
    for (int q = 0; q < kHeld; q++) {
      const float4 p = own.at(q);
      const bool better = (held.level[q] == level) & (level >= 0) & (index_of(p) < mine);
      mine = better ? index_of(p) : mine;
      point.x = better ? p.x : point.x;
      point.y = better ? p.y : point.y;
      point.z = better ? p.z : point.z;
    }
    index = warp_min(mine);
    here = level >= 0 ? mine == index : threadIdx.x % 32 == 0;
    current = true;
  }
};

// Candidates: the points whose level is above `level`, or equal to it with an index below `before`.
struct Threshold {
  float level;
  unsigned before;
  __device__ bool admits(float other, unsigned index) const {
    return larger_key(other, index, level, before);
  }
};

// Steers thresholds to a number of candidates. The same in every thread of a cloud.
//
// Of candidates that lie in reach of each other few are picks, and settling them takes long. How many can be
// far enough apart grows with the number of picks there are, and depends on the cloud; so the number wanted
// follows the picks of the round before.
struct Aim {
  unsigned count;  // of the cloud's points
  float most;      // wanted at most
  float wanted = kFewWanted;
  float exponent = -0.1f;  // log2 of the threshold's ratio to the largest level
  float tie_level = -1;    // all points of this level have an index of at least tie_from
  unsigned tie_from = 0, tie_step = 0;
  Threshold at{0, 0};

  __device__ void start(float level) {
    at = {level * rough_exp2(exponent), 0};
    if (level == tie_level || level == infinity()) {
      if (level != tie_level) tie_step = static_cast<unsigned>(wanted);
      at = {level, min(from(level) + tie_step, count)};
    }
  }

  // After `found` candidates, none or too many; `level` is the largest of all points.
  __device__ void again(float level, unsigned found, int attempt) {
    if (found == 0) {
      if (at.before && level == at.level && at.before < count) {  // ties of higher index are left
        at.before = min(at.before + 3 * (at.before - from(level)) + 64, count);
      } else {
        at = {level * rough_exp2(exponent), 0};
        if (!(at.level < level)) at = {level, count};
      }
    } else if (!at.before && attempt < 2) {  // closer to the largest level
      exponent *= 0.5f;
      at.level = fmaxf(at.level, level * rough_exp2(exponent));
      if (!(at.level < level)) at = {level, count};
    } else {  // ties at the largest level: the lowest indices among them
      const unsigned end = at.level < level || !at.before ? count : at.before, begin = from(level);
      at = {level, begin + static_cast<unsigned>((end - begin) * wanted / found * 0.7f) + 1};
    }
  }

  // After a round with `picks` among `found` candidates.
  __device__ void settled(unsigned found, unsigned picks) {
    if (at.before) {
      tie_step = at.before - from(at.level);
      if (found * 2 < wanted) tie_step = min(tie_step * 2, count);
      tie_from = at.before;
      tie_level = at.level;
    }
    wanted = fminf(fmaxf(6.0f * picks, kFewWanted), most);
    const float factor = rough_exp2(0.5f * __log2f(__fdividef(wanted, static_cast<float>(found))));
    exponent = fminf(fmaxf(exponent * fminf(fmaxf(factor, 0.7f), 1.4f), -2.0f), -1e-3f);
  }

 private:
  __device__ unsigned from(float level) const { return level == tie_level ? tie_from : 0; }
};

// All levels are 0: the finite points that are left go by index, at distance 0. One block; `taken`: a bit a
// point. `done` picks of the cloud are out already.
__device__ __forceinline__ void take_rest(const FarthestPointSample<float>& run, int64_t cloud, int done,
                                          unsigned* taken, unsigned* sums) {
  const unsigned count = static_cast<unsigned>(run.rows.count(cloud)), samples = run.samples;
  const int64_t base = run.rows.index_base(cloud);
  const float* points = run.points + run.rows.begin(cloud) * 3;
  int64_t* index = run.index + cloud * run.samples;
  float* distance = run.distance + cloud * run.samples;
  __syncthreads();
  for (unsigned w = threadIdx.x; w < (count + 31) / 32; w += blockDim.x) taken[w] = 0;
  __syncthreads();
  for (int j = threadIdx.x; j < done; j += blockDim.x) {
    const unsigned i = static_cast<unsigned>(static_cast<volatile int64_t*>(index)[j] - base);
    atomicOr(&taken[i / 32], 1u << i % 32);
  }
  __syncthreads();
  unsigned next = done;
  for (unsigned begin = 0; begin < count && next < samples; begin += blockDim.x) {
    const unsigned i = begin + threadIdx.x;
    const bool left = i < count && !(static_cast<volatile unsigned*>(taken)[i / 32] >> i % 32 & 1) &&
                      finite(points + static_cast<size_t>(i) * 3, 3);
    unsigned total;
    const unsigned at = next + sum_before(left, sums, &total);
    if (left && at < samples) {
      index[at] = base + i;
      distance[at] = 0;
    }
    next += total;
  }
  fill_rest(run, cloud, min(next, samples));
}

}  // namespace any2point
