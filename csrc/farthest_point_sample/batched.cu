// Exact batched farthest point sampling on CUDA: the picks of the sequential algorithm, bit for bit, in its
// order, but many a round. (docs/fps.md has the proof, the rounds and the measurements.)
//
// The level of a point is its squared distance to the picks so far; the next pick has the largest level, the
// lowest index among equals. Say that a point's key is (level, index), larger levels and then lower indices
// first. A point need not wait for its turn. Let c be a point such that no undecided point j of larger key
// lies in its reach (d(c, j) < level of c). All that is picked before c has a larger key than c, so none of
// it lowers the level of c: c will be picked, at this very level. Levels never rise along the sequence, so
// sorting picks by key gives the order.
//
// This file: clouds that several blocks share, resident together (cooperative launch); batched_cluster.cu has
// the kernel for small clouds.
//
// A round: (1) candidates, all points above a threshold that is steered to a useful number of them; (2) the
// candidates within each candidate's reach; (3) settling: a candidate waits while a larger one in its reach
// is undecided, takes over the distance to a larger one that is picked (and is out once it falls to the
// threshold), and else is a pick. There is no barrier in this: each polls the states of the others, a word
// each, level and a bit for picks. The largest undecided key can always move, so it ends; levels only fall,
// so an old state delays but never deceives. (4) Ranks by key; (5) all points are lowered by all picks, block
// by block of 32 points along a Hilbert curve: a pick not closer to a block's box than its largest level
// changes nothing in it, which is exact without a margin as rounding is monotonic. The first picks, and a few
// after a poor round, come one by one. When all levels are 0, what is left goes by index.
//
// The blocks of 1,024 threads meet twice a round through words in L2. Points lie in shared memory, levels in
// registers.
//
// H200, us a call, uniform ball, everything included; rounds + single picks; the sequential kernel of
// cuda.cu:
//   8 x 16,384 -> 4,096         372     27 + 28     5,165    16 blocks a cloud
//   1 x 100,000 -> 25,000     1,013     45 + 24    35,680    98
//   1 x 1,000,000 -> 250,000  7,794    183 + 40         -   132
//
// A bound for one kind of work: updating all points by all picks without pruning would be 0.56 ms of
// arithmetic at 100,000, 56 ms at 1,000,000. What limits: the two meetings of a round with the waiting there
// (44 % of the time with 98 blocks; the second, at the end of the longest chain of settling, is the longer);
// at a million, those and the box tests. Counters (16,384; 100,000; a million): of the 25.3, 24.2, 22.6
// cycles that a warp spends on an instruction it waits 14.9, 14.4, 12.2 at barriers, most of it for the warp
// that polls the other blocks, 2.7 to 2.9 for the instruction before, 1.7, 1.6, 2.4 for shared memory, 1.1
// to 1.4 for L2; issue slots 32, 33, 35 % of their peak, L2 2 to 3 %, DRAM nothing.
//
// Of 8 points a thread 64 registers are too few. What is the same in all threads, and the blocks' largest
// levels, are therefore in shared memory: spilled, they came from L2, 8,090 us at a million.
//
// Tried and slower: a lane a candidate walking bit rows of neighbours, each block settling all candidates to
// save the second meeting (518 us at 8,192, and 10 times that where many candidates are in reach of each
// other); points read from L2 at a million (12,900); a Morton curve (465 at 8,192; 12,650 at a million);
// the kernel of batched_cluster.cu (446 at 16,384).
//
// Next: fewer, larger rounds at a million, where shared memory caps the candidates.
//
// Polled states are single words in L2 with one writer, and any age of them is right: relaxed (volatile)
// accesses suffice. In shared memory nothing is polled.
// CUDA, not Triton: polling, ballots and words between blocks.
#include "farthest_point_sample/batched.cuh"

namespace any2point {
namespace {

struct Workspace {
  BatchedHeader* headers;     // [B]
  unsigned long long* words;  // [B, 6, kBatchedParts]
  unsigned* cells;            // [B, 8^bits]
  float4* sorted;             // [total + capacity] x, y, z, index bits
  float4* candidates;         // [B, 2, parts, segment] x, y, z, index bits
  unsigned* states;           // [B, 2, parts, segment]
  float4* picks;              // [B, 2, parts, segment] x, y, z, bits of the level
  unsigned* pick_index;       // [B, 2, parts, segment]
  unsigned* taken;            // a bit a row, padded to words a cloud
};

// Where things of this cloud begin: in shared memory, as registers are short.
struct Begin {
  const float* points;
  int64_t* index;
  float* distance;
  int64_t base;               // of the cloud's indices
  unsigned long long* words;  // [6, kBatchedParts]
  int64_t segments;           // in the workspace
};

struct Shared {
  Begin begin;
  BatchedHeader header;  // the block's share of the cloud's
  float4 slot[2][32];    // x, y, z, bits of a warp's largest level
  unsigned slot_index[2][32];
  unsigned found[4], most[4], accepted[4];  // by round % 4: candidates, bits of the largest level, picks
  unsigned offset[kBatchedParts + 1];
  unsigned sums[32];
  unsigned largest;
  Aim aim[kBatchedWarps];  // the same for all; a copy a warp, as there are no registers left for it
};
static_assert(sizeof(Shared) <= kBatchedFixed, "what the plan counts for it");

// Grid: `parts` blocks a cloud, kBatchedThreads threads. Clouds of at most `above` points, or of more than
// the blocks hold, belong to another launch.
template <int kHeld>
__global__ void __launch_bounds__(kBatchedThreads, 1)
    farthest_point_batched_kernel(FarthestPointSample<float> run, int64_t above, BatchedPlan plan,
                                  GivenPicks given, Workspace work) {
  constexpr int kBoxes = kBoxesOf<kHeld>;
  extern __shared__ float4 dynamic[];
  const int parts = plan.parts;
  const int64_t cloud = blockIdx.x / parts;
  const int part = blockIdx.x % parts;
  const int64_t wide_count = run.rows.count(cloud);
  const int starts = given.count ? given.count[cloud] : 1;
  if (wide_count <= above || wide_count > plan.capacity || starts < 0) return;

  const int count = static_cast<int>(wide_count), most = plan.most, listed = plan.listed;
  float4* held_points = dynamic;                           // [kHeld * kBatchedThreads] x, y, z, index bits
  float4* boxes = held_points + kHeld * kBatchedThreads;   // [2, kBatchedWarps, kBoxes]
  float4* candidate = boxes + 2 * kBatchedWarps * kBoxes;  // [most + 8]
  float4* pick = candidate;                                // [most + 8] picks come when candidates have gone
  float2* list = reinterpret_cast<float2*>(pick + most + 8);  // [warps * slots, listed]
  unsigned* state = reinterpret_cast<unsigned*>(list + kBatchedWarps * plan.slots * listed);  // [most]
  unsigned* place = state + most;       // [most] where the state is between blocks
  unsigned* pick_index = place;         // [most]
  unsigned* neighbours = place + most;  // [warps * slots], at least `most`
  Shared& s = *reinterpret_cast<Shared*>(neighbours + kBatchedWarps * plan.slots);

  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const float* points = run.points + run.rows.begin(cloud) * 3;
  if (tid < static_cast<int>(sizeof(BatchedHeader) / 4)) reinterpret_cast<unsigned*>(&s.header)[tid] = 0;
  if (tid < 4) s.found[tid] = s.most[tid] = s.accepted[tid] = 0;
  if (tid == 0) {
    s.begin = {points,
               run.index + cloud * run.samples,
               run.distance + cloud * run.samples,
               run.rows.index_base(cloud),
               work.words + cloud * 6 * kBatchedParts,
               cloud * 2 * parts * plan.segment};
  }
  __syncthreads();
  Team team{part, parts, work.headers + cloud};
  float4* sorted = work.sorted + run.rows.begin(cloud);
  unsigned* cells = work.cells + (cloud << 3 * plan.bits);
  sort_cloud<true, kHeld>(points, count, plan.bits, team, cells, sorted, s.sums, &s.header);

  const volatile BatchedHeader* header = team.header;
  const int finite_points = static_cast<int>(header->finite);
  if (finite_points == 0) {
    if (part == 0) fill_rest(run, cloud, 0);
    return;
  }
  const int64_t wanted = run.start ? run.start[cloud] : 0;
  int first = static_cast<int>(~header->limit[6]);
  if (wanted >= 0 && wanted < count && finite(points + wanted * 3, 3)) first = static_cast<int>(wanted);

  // The warp's blocks are spread over the cloud, or, if there are many, in a row.
  Levels<kHeld, kHeld == 8> held;
  bool present[kHeld];
  const int row = warp * kHeld;  // its first block in held_points, if they are in a row
#pragma unroll
  for (int q = 0; q < kHeld; q++) {
    const int block =
        kHeld >= 4 ? (warp * parts + part) * kHeld + q : (q * kBatchedWarps + warp) * parts + part;
    const int at = block * 32 + lane;
    present[q] = at < finite_points;
    held_points[kHeld >= 4 ? row * 32 + q * 32 + lane : q * kBatchedThreads + tid] =
        present[q] ? __ldcg(&sorted[at]) : make_float4(0, 0, 0, 0);
  }
  __syncthreads();
  const Held own{held_points + (kHeld >= 4 ? row * 32 + lane : tid), kHeld >= 4 ? 32 : kBatchedThreads,
                 boxes + warp * kBoxes, boxes + (kBatchedWarps + warp) * kBoxes};
  start_levels(held, own, present);
  __syncthreads();

  const int samples = static_cast<int>(run.samples < wide_count ? run.samples : wide_count);
  if (given.count) {
    apply_picks(held, own, static_cast<const float4*>(given.points) + cloud * run.starts, starts);
  } else {
    if (part == 0 && tid == 0) {
      s.begin.index[0] = s.begin.base + first;
      s.begin.distance[0] = infinity();
    }
    apply_one(held, own, make_float4(points[first * 3], points[first * 3 + 1], points[first * 3 + 2], 0),
              false);
  }

  unsigned step = 0, round = 0, settled = 0;
  int done = starts, plain = max(starts + 1, 1 + plan.steps);  // picks up to `plain` are made one by one
  float level = infinity();                                    // no level is above it
  const auto steer = [&](auto change) {
    __syncwarp();
    Aim aim = s.aim[warp];
    change(aim);
    __syncwarp();
    if (lane == 0) s.aim[warp] = aim;
    return aim.at;
  };
  if (lane == 0) s.aim[warp] = Aim{static_cast<unsigned>(count), static_cast<float>(plan.wanted)};

  // One pick of the sequential algorithm. A warp whose box is out of the last pick's reach keeps its best.
  WarpBest kept;
  auto sequential_step = [&] {
    WarpBest best;
    if constexpr (kHeld < 8) best = kept;
    best.look(held, own);
    if constexpr (kHeld < 8) kept = best;
    const unsigned parity = step & 1;
    if (best.here) {
      s.slot[parity][warp] = best.point;
      s.slot_index[parity][warp] = best.index;
    }
    __syncthreads();
    const float4 other = s.slot[parity][lane];
    const unsigned other_index = s.slot_index[parity][lane];
    float largest = warp_most(other.w);
    unsigned lowest = warp_min(other.w == largest ? other_index : kAll);
    float4 chosen = make_float4(0, 0, 0, 0);
    // One word a block: level, inverted index (30 bits) and a tag, all that is exchanged, so no fence is
    // needed. A block without points sends level 0.
    constexpr unsigned kMask = 0x3fffffffu;
    const unsigned tag = ((step >> 1) & 1) + 1;
    unsigned long long* slots = s.begin.words + parity * kBatchedParts;
    if (tid == 0) {
      const unsigned long long bits = __float_as_uint(fmaxf(largest, 0.0f));
      *static_cast<volatile unsigned long long*>(&slots[part]) =
          bits << 32 | (kMask - (lowest & kMask)) << 2 | tag;
    }
    if (warp == 0) {
      unsigned long long most = 0;
      for (int p = lane; p < parts; p += 32) {
        unsigned long long word;
        do {
          word = load_relaxed(&slots[p]);
        } while ((word & 3) != tag);
        most = word > most ? word : most;
      }
      __syncwarp();
      const unsigned high = static_cast<unsigned>(most >> 32), bits = warp_max(high);
      const unsigned low = warp_max(high == bits ? static_cast<unsigned>(most) : 0u);
      if (lane == 0) {
        s.largest = bits;
        s.offset[0] = kMask - (low >> 2);
      }
    }
    __syncthreads();
    largest = __uint_as_float(s.largest);
    lowest = s.offset[0];
    if (largest > 0) {
      const float* p = s.begin.points + static_cast<size_t>(lowest) * 3;
      chosen = make_float4(__ldg(p), __ldg(p + 1), __ldg(p + 2), 0);
    }
    step++;
    level = largest;
    if (!(level > 0)) return;
    if (part == 0 && tid == 0) {
      s.begin.index[done] = s.begin.base + lowest;
      s.begin.distance[done] = level;
    }
    done++;
    if (apply_one(held, own, chosen, done > kBoxedSteps)) kept.current = false;
  };

  while (done < samples && level > 0) {
    if (done < plain) {
      sequential_step();
      continue;
    }
    // Candidates.
    Threshold threshold = steer([&](Aim& aim) { aim.start(level); });
    int found = 0;
    bool fits = false;
#pragma unroll 1
    for (int attempt = 0; attempt < 8 && !fits && level > 0; attempt++) {
      const unsigned turn = round & 3;
      unsigned votes[kHeld];
      unsigned total = 0;
      float largest = 0;
#pragma unroll
      for (int q = 0; q < kHeld; q++) {
        const float top = held.top(own, q);
        largest = fmaxf(largest, top);
        votes[q] = 0;
        if (top < threshold.level) continue;
        bool in = held.level[q] > threshold.level;
        if (threshold.before) in = threshold.admits(held.level[q], index_of(own.at(q)));
        votes[q] = __ballot_sync(kAll, in);
        total += __popc(votes[q]);
      }
      unsigned at = 0;
      if (lane == 0) {  // the largest level is of use only if there is no candidate
        if (total) {
          at = atomicAdd(&s.found[turn], total);
        } else if (largest > 0) {
          atomicMax(&s.most[turn], __float_as_uint(largest));
        }
      }
      at = __shfl_sync(kAll, at, 0);
      const int64_t segment =
          s.begin.segments + (static_cast<int64_t>(round & 1) * parts + part) * plan.segment;
#pragma unroll
      for (int q = 0; q < kHeld; q++) {
        const unsigned k = at + __popc(votes[q] & ((1u << lane) - 1));
        at += __popc(votes[q]);
        if (!(votes[q] >> lane & 1) || static_cast<int>(k) >= plan.segment) continue;
        __stcg(&work.candidates[segment + k], own.at(q));
        __stcg(&work.states[segment + k], __float_as_uint(held.level[q]));
      }
      unsigned bits;
      __syncthreads();
      // A segment that overflows makes the sum too large.
      const unsigned number = static_cast<int>(s.found[turn]) > plan.segment ? 0xffffu : s.found[turn];
      exchange(s.begin.words + 2 * kBatchedParts, round, part, parts, number, s.most[turn], s.offset,
               &s.largest);
      found = s.offset[parts];
      bits = s.largest;
      fits = found > 0 && found <= most;
      if (found == 0) level = __uint_as_float(bits);
      if (tid == 0) s.found[(round + 2) & 3] = s.most[(round + 2) & 3] = s.accepted[(round + 2) & 3] = 0;
      round++;
      if (!fits && level > 0) threshold = steer([&](Aim& aim) { aim.again(level, found, attempt); });
    }
    if (!(level > 0)) break;
    if (!fits) {
      plain = done + 1;
      continue;
    }
    unsigned* accepted = &s.accepted[(round - 1) & 3];
    const int64_t parity = s.begin.segments + static_cast<int64_t>((round - 1) & 1) * parts * plan.segment;
    for (int p = warp; p < parts; p += kBatchedWarps) {
      const int begin = s.offset[p], size = s.offset[p + 1] - begin;
      for (int k = lane; k < size; k += 32) {
        const int from = p * plan.segment + k;
        candidate[begin + k] = __ldcg(&work.candidates[parity + from]);
        state[begin + k] = __ldcg(&work.states[parity + from]);  // perhaps newer already: still exact
        place[begin + k] = from;
      }
    }
    __syncthreads();

    // Neighbours: a warp a candidate, its lanes over the others.
    const int team_warps = kBatchedWarps * parts, mine = warp * parts + part;
    unsigned open = 0;
#pragma unroll 1
    for (int i = 0; i * team_warps + mine < found; i++) {
      const int c = i * team_warps + mine;
      unsigned size = 0;
      open |= 1u << i;
      const float4 p = candidate[c];
      const float reach = __uint_as_float(state[c]);
      float2* entries = list + (warp * plan.slots + i) * listed;
#pragma unroll 4
      for (int from = 0; from < found; from += 32) {
        const int j = from + lane;
        const float d = squared_distance(p, candidate[min(j, found - 1)]);
        const unsigned hits = __ballot_sync(kAll, d < reach && j < found && j != c);
        const unsigned k = size + __popc(hits & ((1u << lane) - 1));
        if ((hits >> lane & 1) && static_cast<int>(k) < listed)
          entries[k] = make_float2(d, __int_as_float(j));
        size += __popc(hits);
      }
      if (lane == 0) neighbours[warp * plan.slots + i] = size;
    }
    __syncwarp();

    // Settle: a candidate without a larger open neighbour in its reach is a pick.
    const int64_t segment = parity + static_cast<int64_t>(part) * plan.segment;
    volatile unsigned* states = work.states + parity;
#pragma unroll 1
    while (open) {
#pragma unroll 1
      for (unsigned todo = open; todo; todo &= todo - 1) {
        const int i = __ffs(todo) - 1, c = i * team_warps + mine, row = warp * plan.slots + i;
        const float reach = __uint_as_float(static_cast<volatile unsigned*>(state)[c]);
        const float4 p = candidate[c];
        const int known = neighbours[row];
        const bool all = known > listed;  // too many to list
        const int size = all ? found : known;
        float least = reach;
        bool blocked = false;
#pragma unroll 1
        for (int k = lane; k < size; k += 32) {
          const int j = all ? k : __float_as_int(list[row * listed + k].y);
          const float d = all ? squared_distance(p, candidate[k]) : list[row * listed + k].x;
          const unsigned other = states[place[j]];
          const float other_level = __uint_as_float(other & ~kAccepted);
          if (j == c || d >= reach || other_level < reach) continue;
          if (other_level == reach && index_of(candidate[j]) > index_of(p)) continue;
          if (other & kAccepted) {
            least = fminf(least, d);
          } else {
            blocked = true;
          }
        }
        __syncwarp();
        const unsigned now = warp_min(__float_as_uint(least));
        const float level_now = __uint_as_float(now);
        unsigned word = now;
        if (level_now < reach) {
          if (!threshold.admits(level_now, index_of(p))) open &= ~(1u << i);
        } else if (!__any_sync(kAll, blocked)) {
          open &= ~(1u << i);
          word |= kAccepted;
          if (lane == 0) {
            const unsigned k = atomicAdd(accepted, 1u);
            const float4 entry = make_float4(p.x, p.y, p.z, level_now);
            __stcg(&work.picks[segment + k], entry);
            __stcg(&work.pick_index[segment + k], index_of(p));
          }
        } else {
          continue;
        }
        if (lane == 0) {
          static_cast<volatile unsigned*>(state)[c] = word;
          states[place[c]] = word;
        }
        __syncwarp();
      }
    }
    int picks;
    __syncthreads();
    exchange(s.begin.words + 4 * kBatchedParts, settled++, part, parts, *accepted, 0, s.offset, &s.largest);
    picks = s.offset[parts];
    for (int p = warp; p < parts; p += kBatchedWarps) {
      const int begin = s.offset[p], size = s.offset[p + 1] - begin;
      for (int k = lane; k < size; k += 32) {
        pick[begin + k] = __ldcg(&work.picks[parity + p * plan.segment + k]);
        pick_index[begin + k] = __ldcg(&work.pick_index[parity + p * plan.segment + k]);
      }
    }
    __syncthreads();

    // The order of the picks: by level, falling, then by index.
#pragma unroll 1
    for (int a = mine; a < picks; a += team_warps) {
      const float a_level = pick[a].w;
      const unsigned a_index = pick_index[a];
      unsigned before = 0;
#pragma unroll 4
      for (int b = 0; b < picks; b += 32) {
        const bool in = b + lane < picks;
        const float b_level = in ? pick[b + lane].w : -1;
        before += b_level > a_level || (b_level == a_level && pick_index[b + lane] < a_index);
      }
      before = warp_sum(before);
      if (lane == 0 && done + static_cast<int>(before) < samples) {
        s.begin.index[done + before] = s.begin.base + a_index;
        s.begin.distance[done + before] = a_level;
      }
    }
    done += picks;
    if (picks < plan.few) plain = done + plan.few;
    if (done >= samples) break;
    apply_picks(held, own, pick, picks);
    kept.current = false;
    level = threshold.level;
    steer([&](Aim& aim) { aim.settled(found, picks); });
  }
  if (done < samples) team.sync();  // other blocks wrote picks too
  if (part != 0) return;
  if (done < samples) {
    take_rest(run, cloud, done, work.taken + run.rows.begin(cloud) / 32 + cloud, s.sums);
  } else {
    fill_rest(run, cloud, samples);
  }
}

// Hands out pieces of the workspace; with a null start it only measures.
struct Arena {
  uintptr_t at;
  template <typename T>
  T* take(int64_t count) {
    const uintptr_t piece = (at + 255) & ~uintptr_t(255);
    at = piece + count * sizeof(T);
    return reinterpret_cast<T*>(piece);
  }
};

// `zeroed`: the bytes at the start that must be zero.
Workspace carve(const FarthestPointSample<float>& run, const BatchedPlan& plan, Arena* arena,
                int64_t* zeroed) {
  Workspace work{};
  const int64_t clouds = run.rows.clouds, segments = clouds * 2 * plan.parts * plan.segment;
  const uintptr_t begin = arena->at;
  work.headers = arena->take<BatchedHeader>(clouds);
  work.words = arena->take<unsigned long long>(clouds * 6 * kBatchedParts);
  work.cells = arena->take<unsigned>(clouds << 3 * plan.bits);
  *zeroed = static_cast<int64_t>(arena->at - begin);
  work.sorted = arena->take<float4>(run.rows.total);
  work.candidates = arena->take<float4>(segments);
  work.states = arena->take<unsigned>(segments);
  work.picks = arena->take<float4>(segments);
  work.pick_index = arena->take<unsigned>(segments);
  work.taken = arena->take<unsigned>(run.rows.total / 32 + clouds + 1);
  return work;
}

template <int kHeld>
cudaError_t launch(FarthestPointSample<float> run, int64_t above, BatchedPlan plan, GivenPicks given,
                   Workspace work, cudaStream_t stream) {
  const auto kernel = farthest_point_batched_kernel<kHeld>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(plan.shared));
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(run.rows.clouds * plan.parts));
  void* arguments[] = {&run, &above, &plan, &given, &work};
  return cudaLaunchCooperativeKernel(kernel, grid, dim3(kBatchedThreads), arguments, plan.shared, stream);
}

cudaError_t launch_held(const FarthestPointSample<float>& run, int64_t above, const BatchedPlan& plan,
                        const GivenPicks& given, const Workspace& work, cudaStream_t stream) {
  if (plan.held == 1) return launch<1>(run, above, plan, given, work, stream);
  if (plan.held == 2) return launch<2>(run, above, plan, given, work, stream);
  if (plan.held == 4) return launch<4>(run, above, plan, given, work, stream);
  return launch<8>(run, above, plan, given, work, stream);
}

}  // namespace

int64_t batched_workspace(const FarthestPointSample<float>& run, const BatchedPlan& plan) {
  Arena arena{0};
  int64_t zeroed = 0;
  carve(run, plan, &arena, &zeroed);
  return arena.at ? static_cast<int64_t>(arena.at) + 256 : 0;
}

int launch_batched(const FarthestPointSample<float>& run, int64_t above, const BatchedPlan& plan,
                   const GivenPicks& given, void* workspace, void* stream) {
  Arena arena{reinterpret_cast<uintptr_t>(workspace)};
  int64_t zeroed = 0;
  const Workspace work = carve(run, plan, &arena, &zeroed);
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaMemsetAsync(workspace, 0, zeroed, on);
  if (error != cudaSuccess) return error;
  return launch_held(run, above, plan, given, work, on);
}

}  // namespace any2point
