// Exact batched farthest point sampling on CUDA for small clouds, on one block each or, from sm_90 on, on one
// cluster of blocks that write into each other's shared memory. The claim of batched.cu (proof: docs/fps.md);
// what differs is a round, which has at most 96 or 128 candidates, barriers and no polling:
// (1) Candidates. In a cluster every block sends its own to all, and from here on all blocks do the same, so
// that one cluster barrier a round is enough. (2) Pairs: a bit for each that is larger, and for each larger
// one in reach. (3) Settling, a thread a candidate: who has no undecided one ahead is a pick; those that
// picks are ahead of fall, and are out below the threshold. Two barriers a turn, and 2.0 to 2.2 turns a round
// (uniform ball): few wait long, and few that fall stay in. (4) A pick's rank is the number of picks among
// the larger ones: popcounts. (5) All points are lowered by all picks, as in batched.cu.
//
// H200, us a call from C++, uniform ball, everything included; rounds + single picks; in brackets what the
// polling kernel of batched.cu took, at up to 2,048 points in a form for one block that this one replaced:
//   32 x 1,024 -> 512      85 (126)   17 + 14
//   32 x 2,048 -> 512     113 (156)   22 + 10
//   32 x 4,096 -> 1,024   180 (276)   33 + 8     clusters of 3
//   32 x 8,192 -> 2,048   318 (415)   43 + 12    clusters of 3
//    1 x 8,192 -> 2,048   257 (337)   43 + 12    a cluster of 8
// As a graph's replay, with a shorter sort and shorter single picks since: 77, 104 and 304 for 32 x 1,024,
// 2,048 and 8,192.
//
// Floor: a kernel of one pick a step takes at least 80 to 100 us for 512 picks. What limits: the latency of
// short dependent phases between barriers, with four warps to a scheduler. Counters (32 x 1,024, 2,048,
// 8,192): of the 7.7, 7.4, 8.4 cycles that a warp spends on an instruction it waits 2.0, 1.8, 1.7 for the one
// before, 1.4, 1.4, 1.0 for shared memory, 1.2, 1.1, 1.8 at barriers of the block, 0.4 at those of the
// cluster (8,192), and 0.9 for its turn; issue slots 52, 54, 48 % of their peak, shared memory with L1 34,
// 38, 34 %, L2 and DRAM nothing. 71,000 instructions a scheduler at 1,024 points would be 36 us without any
// waiting, 98,000 at 2,048 49. At 1,024 points 12,000 cycles are the sort, 20,000 the single picks, and a
// round takes 1,100 (candidates), 1,500 (pairs), 2,100 (settling) and 1,600 (update). At 8,192 the update,
// and the waiting for the block whose update is the longest, are 340,000 of 610,000 cycles.
//
// Tried and slower or no better (1,024 / 2,048 points, us): one warp settling all, two or four candidates a
// lane (94 / 127); bits of hits taken one by one in the update (83 / 111); 64 candidates (83 / 114); 8 warps
// (128 / 178) and 32 (87 / 112), when 16 took 84 / 111; clusters of 2 (97 / 122) and 4 (113 / 135): their
// barrier costs more than their points save. 8,192 points: one block 485, clusters of 2 366, of 4 447 to 531
// (32 of them do not run at once: a cluster stays within 16 to 18 processors), 64 candidates 475. 16,384
// points, clusters of 8 and 16: 446 and 947; batched.cu takes 425.
//
// Next: candidates in the order of their keys, so that pairs need no comparison of keys and half of them
// none at all; a more even update.
//
// CUDA, not Triton: ballots, clusters.
#include "farthest_point_sample/batched.cuh"

namespace any2point {
namespace {

struct Workspace {
  BatchedHeader* headers;  // [B]
  unsigned* cells;         // [B, 8^bits]
  float4* sorted;          // [total] x, y, z, index bits
};

struct alignas(16) Shared {
  BatchedHeader header;              // the cloud's, or the block's share of it
  unsigned found[4][kClusterParts];  // by round % 4: candidates of each block
  unsigned most[4];                  // and the bits of the largest level, if there are none
  unsigned sums[32];
  unsigned count;  // candidates so far in this block
  Threshold at;
};

struct ClusterTeam {
  int part, parts;
  BatchedHeader* header;
  __device__ void sync() {
    if (parts > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }
};

// Settles the candidates, a thread each; all threads meet in it. Returns the number of picks.
//
// `larger` and `ahead`, [kWords, most]: for each candidate the ones of larger key, and those of them in its
// reach. A candidate without an open one ahead is a pick. One that picks are ahead of falls to the least of
// their distances: it is out if that is below the threshold, else its key is another, and what is larger is
// found anew for it.
template <int kWords>
__device__ __forceinline__ int settle(const float4* candidate, float* candidate_level, const unsigned* masks,
                                      int found, const Threshold& threshold, unsigned (*words)[kWords],
                                      float4* pick, int64_t* index, float* distance, int left, int64_t base) {
  constexpr int kMost = kWords * 32;
  const int c = threadIdx.x, lane = c % 32, word = c / 32;
  const float4 p = candidate[c < found ? c : 0];
  float level = c < found ? candidate_level[c] : -1.0f;
  unsigned larger[kWords], ahead[kWords], open[kWords], accepted[kWords];
#pragma unroll
  for (int v = 0; v < kWords; v++) {
    const bool some = v * 32 < found && c < found;
    larger[v] = some ? masks[v * kMost + c] : 0;
    ahead[v] = some ? masks[(kWords + v) * kMost + c] : 0;
    open[v] = v * 32 >= found ? 0 : found - v * 32 >= 32 ? kAll : (1u << (found - v * 32)) - 1;
    accepted[v] = 0;
  }
  bool waiting = c < found;  // neither picked nor out
#pragma unroll 1
  for (;;) {
    unsigned blocked = 0;
#pragma unroll
    for (int v = 0; v < kWords; v++) blocked |= ahead[v] & open[v];
    const bool ready = waiting & (blocked == 0);
    const unsigned fresh_here = __ballot_sync(kAll, ready);
    if (lane == 0 && word < kWords) words[0][word] = fresh_here;
    __syncthreads();
    unsigned fresh[kWords], rest = 0;
#pragma unroll
    for (int v = 0; v < kWords; v++) {
      fresh[v] = words[0][v];
      accepted[v] |= fresh[v];
      open[v] &= ~fresh[v];
      rest |= open[v];
    }
    if (!rest) break;
    waiting &= !ready;
    unsigned hits[kWords], some = 0;
#pragma unroll
    for (int v = 0; v < kWords; v++) {
      hits[v] = waiting ? ahead[v] & fresh[v] : 0;
      some |= hits[v];
    }
    float now = level;
#pragma unroll 1
    while (some) {
      unsigned bits = hits[0];
      int from = 0;
#pragma unroll
      for (int v = 1; v < kWords; v++) {
        from = bits ? from : v * 32;
        bits = bits ? bits : hits[v];
      }
      now = fminf(now, squared_distance(p, candidate[from + __ffs(bits) - 1]));
      some = 0;
#pragma unroll
      for (int v = 0; v < kWords; v++) {
        if (from == v * 32) hits[v] &= hits[v] - 1;
        some |= hits[v];
      }
    }
    const bool fell = now < level, stays = threshold.admits(now, index_of(p));
    const unsigned out_here = __ballot_sync(kAll, fell & !stays),
                   again_here = __ballot_sync(kAll, fell & stays);
    waiting &= !(fell & !stays);
    level = now;
    if (fell & stays) candidate_level[c] = now;
    if (lane == 0 && word < kWords) {
      words[1][word] = out_here;
      words[2][word] = again_here;
    }
    __syncthreads();
    unsigned again[kWords], any = 0;
#pragma unroll
    for (int v = 0; v < kWords; v++) {
      open[v] &= ~words[1][v];
      again[v] = words[2][v];
      any |= again[v];
    }
    if (!any) continue;
#pragma unroll
    for (int v = 0; v < kWords; v++) {
#pragma unroll 1
      for (unsigned bits = again[v]; bits; bits &= bits - 1) {
        const int j = v * 32 + __ffs(bits) - 1;
        const float4 q = candidate[j];
        const float reach = candidate_level[j];
        const bool over = larger_key(level, index_of(p), reach, index_of(q));
        const unsigned over_here = __ballot_sync(kAll, over);
        const unsigned near_here = __ballot_sync(kAll, over & (squared_distance(q, p) < reach));
        const unsigned mask = over ? ~(bits & -bits) : kAll;
        larger[v] &= mask;
        ahead[v] &= mask;
        if (lane == 0 && word < kWords) {
          words[3][word] = over_here;
          words[4][word] = near_here;
        }
        __syncthreads();
        if (c == j) {
#pragma unroll
          for (int u = 0; u < kWords; u++) {
            larger[u] = words[3][u];
            ahead[u] = words[4][u];
          }
        }
        __syncthreads();
      }
    }
  }
  int picks = 0, rank = 0;
  bool picked = false;
#pragma unroll
  for (int v = 0; v < kWords; v++) {
    picks += __popc(accepted[v]);
    rank += __popc(larger[v] & accepted[v]);
    picked |= v == word && (accepted[v] >> lane & 1);
  }
  if (picked) {
    pick[rank] = make_float4(p.x, p.y, p.z, level);
    if (rank < left) {
      index[rank] = base + index_of(p);
      distance[rank] = level;
    }
  }
  return picks;
}

// Grid: `parts` blocks a cloud, one cluster. Clouds of at most `above` points, or of more than the blocks
// hold, belong to another launch.
template <int kWarps, int kHeld, int kWords, bool kCluster>
__global__ void __launch_bounds__(kWarps * 32, 1)
    farthest_point_cluster_kernel(FarthestPointSample<float> run, int64_t above, BatchedPlan plan,
                                  GivenPicks given, Workspace work) {
  constexpr int kLists = kWarps == 32 || kHeld == 1 ? 1 : 2;
  constexpr int kBoxes = kBoxesOf<kHeld>, kThreads = kWarps * 32, kMost = kWords * 32;
  extern __shared__ float4 dynamic[];
  const int parts = kCluster ? plan.parts : 1;
  const int64_t cloud = blockIdx.x / parts;
  const int part = blockIdx.x % parts;
  const int64_t wide_count = run.rows.count(cloud);
  const int starts = given.count ? given.count[cloud] : 1;
  if (wide_count <= above || wide_count > plan.capacity || starts < 0) return;

  const int tid = threadIdx.x, lane = tid % 32;
  const int warp = __shfl_sync(kAll, tid / 32, 0);  // known to be the same in all lanes
  const int count = static_cast<int>(wide_count);
  float4* held_points = dynamic;                   // [kHeld * kThreads] x, y, z, index bits
  float4* boxes = held_points + kHeld * kThreads;  // [2, kWarps, kBoxes]
  float4* slot = boxes + 2 * kWarps * kBoxes;  // [2, kWarps * parts] x, y, z, bits of a warp's largest level
  unsigned* slot_index = reinterpret_cast<unsigned*>(slot + 2 * kWarps * parts);  // [2, kWarps * parts]
  Shared& s = *reinterpret_cast<Shared*>(slot_index + 2 * kWarps * parts);
  float4* candidate = reinterpret_cast<float4*>(&s + 1);                   // [kMost]
  float4* pick = candidate + kMost;                                        // [kMost]
  float* candidate_level = reinterpret_cast<float*>(pick + kMost);         // [kMost]
  unsigned* masks = reinterpret_cast<unsigned*>(candidate_level + kMost);  // [kWords, 2, kMost]
  constexpr int kListWords = kLists * kWarps * 128;
  constexpr int kMaskWords = 2 * kWords * kMost > kListWords ? 2 * kWords * kMost : kListWords;
  float4* lists = reinterpret_cast<float4*>(masks) + warp * kLists * 32;  // of the warp, when masks have gone
  auto words = reinterpret_cast<unsigned (*)[kWords]>(masks + kMaskWords);   // [8, kWords]
  float4* inbox = reinterpret_cast<float4*>(words + 8);                      // [2, parts, kMost]
  float* inbox_level = reinterpret_cast<float*>(inbox + 2 * parts * kMost);  // [2, parts, kMost]
  unsigned* scratch = reinterpret_cast<unsigned*>(candidate);                // for the sort and the rest

  const float* points = run.points + run.rows.begin(cloud) * 3;
  ClusterTeam team{part, parts, kCluster ? work.headers + cloud : &s.header};
  float4* sorted = kCluster ? work.sorted + run.rows.begin(cloud) : held_points;
  unsigned* cells = kCluster ? work.cells + (cloud << 3 * plan.bits) : scratch;
  for (int i = part * kThreads + tid; i < 1 << 3 * plan.bits; i += parts * kThreads) cells[i] = 0;
  for (int i = tid; i < static_cast<int>(sizeof(Shared) / 4); i += kThreads)
    reinterpret_cast<unsigned*>(&s)[i] = 0;
  if (kCluster && part == 0 && tid < static_cast<int>(sizeof(BatchedHeader) / 4)) {
    reinterpret_cast<unsigned*>(team.header)[tid] = 0;
  }
  team.sync();
  sort_cloud<kCluster, kHeld>(points, count, plan.bits, team, cells, sorted, s.sums, &s.header);

  const volatile BatchedHeader* header = team.header;
  const int finite_points = static_cast<int>(header->finite);
  if (finite_points == 0) {
    if (part == 0) fill_rest(run, cloud, 0);
    return;
  }
  const int64_t wanted = run.start ? run.start[cloud] : 0;
  int first = static_cast<int>(~header->limit[6]);
  if (wanted >= 0 && wanted < count && finite(points + wanted * 3, 3)) first = static_cast<int>(wanted);

  Levels<kHeld> held;
  bool present[kHeld];
  const int row = warp * kHeld;
#pragma unroll
  for (int q = 0; q < kHeld; q++) {
    const int block = kHeld >= 4 ? (warp * parts + part) * kHeld + q : (q * kWarps + warp) * parts + part;
    const int at = block * 32 + lane;
    present[q] = at < finite_points;
    if (kCluster) {
      held_points[kHeld >= 4 ? row * 32 + q * 32 + lane : q * kThreads + tid] =
          present[q] ? __ldcg(&sorted[at]) : make_float4(0, 0, 0, 0);
    }
  }
  __syncthreads();
  const Held own{held_points + (kHeld >= 4 ? row * 32 + lane : tid), kHeld >= 4 ? 32 : kThreads,
                 boxes + warp * kBoxes, boxes + (kWarps + warp) * kBoxes};
  start_levels(held, own, present);
  __syncthreads();

  int64_t* index = run.index + cloud * run.samples;
  float* distance = run.distance + cloud * run.samples;
  const int64_t base = run.rows.index_base(cloud);
  const int samples = static_cast<int>(run.samples < wide_count ? run.samples : wide_count);
  if (given.count) {
    apply_listed<kLists>(held, own, static_cast<const float4*>(given.points) + cloud * run.starts, starts,
                         lists);
  } else {
    if (part == 0 && tid == 0) {
      index[0] = base + first;
      distance[0] = infinity();
    }
    apply_one(held, own, make_float4(points[first * 3], points[first * 3 + 1], points[first * 3 + 2], 0),
              false);
  }

  unsigned step = 0, round = 0;
  int done = starts, plain = max(starts + 1, 1 + plan.steps);
  float level = infinity();
  int last_picks = 0;
  Aim aim{static_cast<unsigned>(count), static_cast<float>(plan.wanted)};  // of the last warp
  bool aimed = false;  // whether s.at is that of this round

  // One pick of the sequential algorithm. A warp whose box is out of the last pick's reach keeps its best.
  WarpBest best_of_warp;
  auto sequential_step = [&] {
    best_of_warp.look(held, own);
    const int slots = kWarps * parts, from = (step & 1) * slots;
    if (best_of_warp.here) {
      const int at = from + part * kWarps + warp;
      if constexpr (kCluster) {
        for (int r = 0; r < parts; r++) {
          store_peer(peer_address(&slot[at], r), best_of_warp.point);
          store_peer(peer_address(&slot_index[at], r), best_of_warp.index);
        }
      } else {
        slot[at] = best_of_warp.point;
        slot_index[at] = best_of_warp.index;
      }
    }
    __syncwarp();
    team.sync();
    float best = -1;
    unsigned best_index = kAll;
    int best_slot = from;
#pragma unroll 1
    for (int i = lane; i < slots; i += 32) {
      const float other = slot[from + i].w;
      const unsigned other_index = slot_index[from + i];
      const bool better = larger_key(other, other_index, best, best_index);
      best = better ? other : best;
      best_index = better ? other_index : best_index;
      best_slot = better ? from + i : best_slot;
    }
    __syncwarp();
    level = warp_most(best);
    const unsigned lowest = warp_min(best == level ? best_index : kAll);
    const int owner = __ffs(__ballot_sync(kAll, best == level && best_index == lowest)) - 1;
    const float4 chosen = slot[__shfl_sync(kAll, best_slot, owner)];
    step++;
    aimed = false;
    if (!(level > 0)) return;
    if (part == 0 && tid == 0) {
      index[done] = base + lowest;
      distance[done] = level;
    }
    done++;
    if (apply_one(held, own, chosen, done > kBoxedSteps)) best_of_warp.current = false;
  };

  while (done < samples && level > 0) {
    if (done < plain) {
      sequential_step();
      continue;
    }
    if (!aimed) {
      if (warp == kWarps - 1) {
        aim.start(level);
        if (lane == 0) s.at = aim.at;
      }
      __syncthreads();
    }
    // Candidates.
    int found = 0;
    bool fits = false;
    Threshold at;
#pragma unroll 1
    for (int attempt = 0; attempt < 8 && level > 0; attempt++) {
      const unsigned turn = round & 3;
      at = s.at;
      unsigned votes[kHeld];
      unsigned total = 0;
      float largest = 0;
#pragma unroll
      for (int q = 0; q < kHeld; q++) {
        largest = fmaxf(largest, held.top(own, q));
        bool in = held.level[q] > at.level;
        if (at.before) in = at.admits(held.level[q], index_of(own.at(q)));
        votes[q] = __ballot_sync(kAll, in);
        total += __popc(votes[q]);
      }
      if (total) {
        unsigned to = 0;
        if constexpr (kCluster) {
          if (lane == 0) to = atomicAdd(&s.count, total);
          if (lane < parts) add_peer(peer_address(&s.found[turn][part], lane), total);
        } else {
          if (lane == 0) to = atomicAdd(&s.found[turn][0], total);
        }
        to = __shfl_sync(kAll, to, 0);
#pragma unroll
        for (int q = 0; q < kHeld; q++) {
          const int k = to + __popc(votes[q] & ((1u << lane) - 1));
          to += __popc(votes[q]);
          if (!(votes[q] >> lane & 1) || k >= kMost) continue;
          if constexpr (kCluster) {
            const int place = ((turn & 1) * parts + part) * kMost + k;
            const float4 p = own.at(q);
            for (int r = 0; r < parts; r++) {
              store_peer(peer_address(&inbox[place], r), p);
              store_peer(peer_address(&inbox_level[place], r), __float_as_uint(held.level[q]));
            }
          } else {
            candidate[k] = own.at(q);
            candidate_level[k] = held.level[q];
          }
        }
        __syncwarp();
      } else if (largest > 0 && lane < parts) {  // of use only if there is no candidate
        if constexpr (kCluster) {
          max_peer(peer_address(&s.most[turn], lane), __float_as_uint(largest));
        } else {
          atomicMax(&s.most[turn], __float_as_uint(largest));
        }
      }
      __syncwarp();
      team.sync();
      found = 0;
      for (int p = 0; p < parts; p++) found += s.found[turn][p];
      fits = found > 0 && found <= kMost;
      if (found == 0) level = __uint_as_float(s.most[turn]);
      if (tid < kClusterParts) s.found[(round + 2) & 3][tid] = 0;
      if (tid == 0) {
        s.most[(round + 2) & 3] = 0;
        s.count = 0;
      }
      if (fits) {
        if constexpr (kCluster) {
          if (tid < found) {
            int p = 0, k = tid;
            for (; k >= static_cast<int>(s.found[turn][p]); p++) k -= s.found[turn][p];
            const int place = ((turn & 1) * parts + p) * kMost + k;
            candidate[tid] = inbox[place];
            candidate_level[tid] = inbox_level[place];
          }
          __syncthreads();
        }
        round++;
        break;
      }
      round++;
      if (warp == kWarps - 1) {
        aim.again(level, found, attempt);
        if (lane == 0) s.at = aim.at;
      }
      __syncthreads();
    }
    if (!(level > 0)) break;
    if (!fits) {
      plain = done + 1;
      continue;
    }
    // Who is larger than whom, and in reach: a warp takes 32 candidates, a lane each, against 8 others, which
    // gives a byte of each mask.
    unsigned char* bytes = reinterpret_cast<unsigned char*>(masks);
    const int tiles = (found + 31) / 32;
#pragma unroll 1
    for (int t = warp; t < tiles * tiles * 4; t += kWarps) {
      const int c = t % tiles * 32 + lane, from = t / tiles * 8;
      const float4 p = candidate[c];
      const float reach = candidate_level[c];
      unsigned larger = 0, ahead = 0;
#pragma unroll
      for (int k = 0; k < 8; k++) {
        const float4 q = candidate[from + k];
        const bool over = larger_key(candidate_level[from + k], index_of(q), reach, index_of(p));
        larger |= over ? 1u << k : 0;
        ahead |= over & (squared_distance(q, p) < reach) ? 1u << k : 0;
      }
      const unsigned real = from + 8 <= found ? 0xffu : from < found ? (1u << (found - from)) - 1 : 0;
      const int at = (from / 32 * kMost + c) * 4 + from / 8 % 4;
      bytes[at] = static_cast<unsigned char>(larger & real);
      bytes[at + kWords * kMost * 4] = static_cast<unsigned char>(ahead & real);
    }
    if (warp == kWarps - 1) {  // of less work than others here; from the picks of the round before
      aim.settled(found, last_picks);
      aim.start(at.level);
      if (lane == 0) s.at = aim.at;
    }
    __syncthreads();
    const int left = part == 0 ? samples - done : 0;
    const int picks = settle<kWords>(candidate, candidate_level, masks, found, at, words, pick, index + done,
                                     distance + done, left, base);
    __syncthreads();
    last_picks = picks;
    done += picks;
    if (picks < plan.few) plain = done + plan.few;
    if (done >= samples) break;
    apply_listed<kLists>(held, own, pick, picks, lists);
    best_of_warp.current = false;
    level = at.level;
    aimed = true;
  }
  if (part != 0) return;
  if (done < samples) {
    take_rest(run, cloud, done, scratch, s.sums);
  } else {
    fill_rest(run, cloud, samples);
  }
}

template <int kWarps, int kHeld, int kWords, bool kCluster>
cudaError_t launch(const FarthestPointSample<float>& run, int64_t above, const BatchedPlan& plan,
                   GivenPicks given, Workspace work, cudaStream_t stream) {
  const auto kernel = farthest_point_cluster_kernel<kWarps, kHeld, kWords, kCluster>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(plan.shared));
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(run.rows.clouds * plan.parts));
  config.blockDim = dim3(kWarps * 32);
  config.dynamicSmemBytes = plan.shared;
  config.stream = stream;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = plan.parts;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = kCluster ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, run, above, plan, given, work);
}

uintptr_t take(uintptr_t* at, int64_t bytes) {
  const uintptr_t piece = (*at + 255) & ~uintptr_t(255);
  *at = piece + bytes;
  return piece;
}
Workspace carve(const FarthestPointSample<float>& run, const BatchedPlan& plan, uintptr_t* at) {
  Workspace work{};
  if (plan.parts == 1) return work;
  work.headers = reinterpret_cast<BatchedHeader*>(take(at, run.rows.clouds * sizeof(BatchedHeader)));
  work.cells = reinterpret_cast<unsigned*>(take(at, run.rows.clouds * 4 << 3 * plan.bits));
  work.sorted = reinterpret_cast<float4*>(take(at, run.rows.total * 16));
  return work;
}

}  // namespace

int64_t cluster_workspace(const FarthestPointSample<float>& run, const BatchedPlan& plan) {
  uintptr_t at = 0;
  carve(run, plan, &at);
  return at ? static_cast<int64_t>(at) + 256 : 0;
}

int launch_cluster(const FarthestPointSample<float>& run, int64_t above, const BatchedPlan& plan,
                   const GivenPicks& given, void* workspace, void* stream) {
  uintptr_t at = reinterpret_cast<uintptr_t>(workspace);
  const Workspace work = carve(run, plan, &at);
  const auto on = static_cast<cudaStream_t>(stream);
  if (plan.parts > 1) {
    if (plan.held == 2) return launch<16, 2, 4, true>(run, above, plan, given, work, on);
    if (plan.held == 4) return launch<16, 4, 4, true>(run, above, plan, given, work, on);
    if (plan.held == 6) return launch<16, 6, 4, true>(run, above, plan, given, work, on);
    return launch<16, 8, 4, true>(run, above, plan, given, work, on);
  }
  if (plan.warps == 32) {
    if (plan.held == 4) return launch<32, 4, 4, false>(run, above, plan, given, work, on);
    return launch<32, 8, 4, false>(run, above, plan, given, work, on);
  }
  if (plan.held == 2) return launch<16, 2, 3, false>(run, above, plan, given, work, on);
  return launch<16, 4, 4, false>(run, above, plan, given, work, on);
}

}  // namespace any2point
