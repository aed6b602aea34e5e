// Farthest point sampling on CUDA: the rule of cpu.cpp, one dependent step a pick.
//
// Clouds of up to 8,192 points with D = 3, float: one block a cloud, all points and their levels in registers
// (4 warps x 8 points a lane for 1,024, up to 8 x 32 for 8,192; no spills). A step is a pass over the
// registers, two warp reductions (REDUX from sm_80 on: largest level, then lowest index), one barrier, and a
// read of the warps' results and of the pick's coordinates from shared memory. Nothing else is read after the
// first load. Larger clouds: the same kernel on many blocks a cloud, launched cooperatively; each step the
// blocks exchange one 64-bit word through L2 (level, index and a tag, so no fence is needed). All else (other
// D, double, more blocks than fit the device, the order of pointnet2): one block a cloud streams points and
// levels from L1/L2.
//
// From 384 picks on (256 for more than 8,192 points) the batched kernels of batched_cluster.cu and batched.cu
// take over, where the GPU allows it; plan.h says which launch gets which clouds. Start sets: given.cu.
//
// The chain of dependent steps is the limit, not memory or arithmetic: a block-wide argmax with its barrier
// alone takes 0.15 to 0.18 us a step, so that 32 x 1,024 -> 512 cannot go below about 0.08-0.10 ms this way.
// CUDA, not Triton: tile-level reductions would put several barriers into each step.
//
// H200, us a call (ns a step), and the best of pointnet2_ops, pytorch3d, pointops and torch_fps in the same
// run:
//   32 x 1,024 -> 512      148 (290)    383      1.5 to 1.8 times the floor above
//   32 x 2,048 -> 512      205 (400)    480
//   32 x 8,192 -> 2,048  1,466 (716)  3,739
//   8 x 16,384 -> 4,096  5,165 (1,261)  16,949   cooperative: two exchanges through L2 bound a step
//   1 x 100,000 -> 25,000  35,680 (1,427)  487,367
#include "farthest_point_sample/kernel.h"

#include "common/distance.h"
#include "farthest_point_sample/batched.h"
#include "farthest_point_sample/device.cuh"
#include "farthest_point_sample/given.h"

namespace any2point {
namespace {

// Registers.

struct Best {
  unsigned bits;   // of the level; 0: nothing above 0
  unsigned index;  // within the cloud
};

// The best of all threads of a cloud, the same in every one. One barrier a step: slots alternate between
// steps.
template <int kWarps, bool kParts>
class Reduction {
 public:
  __device__ Reduction(Best (*slots)[kWarps], unsigned long long* words, int part, int parts)
      : slots_(slots), words_(words), part_(part), parts_(parts) {}

  // `find(bits)`: the lowest index of this thread with that level, or kAll.
  template <typename Find>
  __device__ Best operator()(unsigned bits, Find find) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned most = warp_max(bits);
    const unsigned lowest = warp_min(find(most));
    Best* slots = slots_[step_ & 1];
    if (lane == 0) slots[warp] = {most, lowest};
    __syncthreads();
    Best best = slots[0];
#pragma unroll
    for (int w = 1; w < kWarps; w++) {
      const Best other = slots[w];
      if (other.bits > best.bits || (other.bits == best.bits && other.index < best.index)) best = other;
    }
    if (kParts) best = exchange(best, lane);
    step_++;
    return best;
  }

 private:
  // Through one word a block: level, inverted index (30 bits), and a tag that tells this step from the last
  // one in the same word (0: never written). No block can be two steps ahead of another: to publish step s +
  // 1 it must have read every word of step s. The word is all that blocks share, so relaxed accesses suffice.
  __device__ Best exchange(Best best, int lane) {
    constexpr unsigned kMask = 0x3fffffffu;
    volatile unsigned long long* words = words_ + (step_ & 1) * parts_;
    const unsigned tag = ((step_ >> 1) & 1) + 1;
    if (threadIdx.x == 0) {
      words[part_] =
          static_cast<unsigned long long>(best.bits) << 32 | (kMask - (best.index & kMask)) << 2 | tag;
    }
    __syncwarp();
    unsigned long long most = 0;
    for (int p = lane; p < parts_; p += 32) {
      unsigned long long word;
      do {
        word = words[p];
      } while ((word & 3) != tag);
      most = word > most ? word : most;
    }
    __syncwarp();
    const unsigned high = static_cast<unsigned>(most >> 32), bits = warp_max(high);
    const unsigned low = warp_max(high == bits ? static_cast<unsigned>(most) : 0u);
    return {bits, kMask - (low >> 2)};
  }

  Best (*slots_)[kWarps];
  unsigned long long* words_;  // [2][parts] of this cloud, zero at the start
  int part_, parts_;
  unsigned step_ = 0;
};

// Grid: `parts` blocks a cloud (1 unless kParts), kWarps * 32 threads. Clouds of at most `above` points, or
// of more than the blocks can hold, belong to another launch.
template <int kWarps, int kPoints, bool kParts>
__global__ void __launch_bounds__(kWarps * 32, 1)
    farthest_point_sample_kernel(FarthestPointSample<float> run, int64_t above, int parts,
                                 unsigned long long* words, GivenPicks given) {
  constexpr int kThreads = kWarps * 32, kHeld = kThreads * kPoints;
  constexpr bool kShared = !kParts && kHeld <= 2048;  // else the pick's coordinates come from L1
  __shared__ Best slots[2][kWarps];
  __shared__ float shared[kShared ? 3 : 1][kShared ? kHeld : 1];

  const int64_t cloud = kParts ? blockIdx.x / parts : blockIdx.x;
  const int part = kParts ? blockIdx.x % parts : 0;
  const int64_t wide_count = run.rows.count(cloud);
  if (wide_count <= above || wide_count > static_cast<int64_t>(kHeld) * parts) return;
  const unsigned count = static_cast<unsigned>(wide_count);
  const float* points = run.points + run.rows.begin(cloud) * 3;
  const int64_t wanted = run.start ? run.start[cloud] : 0;
  const int starts = given.count ? given.count[cloud] : 1;
  if (starts < 0) return;
  const int64_t first = first_pick(points, count, 3, wanted);
  if (first < 0) {
    if (part == 0) fill_rest(run, cloud, 0);
    return;
  }

  const unsigned mine = part * kHeld + threadIdx.x;  // point i of this thread is mine + i * kThreads
  float x[kPoints], y[kPoints], z[kPoints];
  unsigned level[kPoints];  // bits of a float that is never negative: ordered like it. 0: never to be picked
  unsigned left = 0;        // bit i: point i is finite and not picked
#pragma unroll
  for (int i = 0; i < kPoints; i++) {
    const unsigned k = mine + i * kThreads;
    x[i] = y[i] = z[i] = 0.0f;
    level[i] = 0;
    if (k < count && finite(points + static_cast<size_t>(k) * 3, 3)) {
      x[i] = points[static_cast<size_t>(k) * 3];
      y[i] = points[static_cast<size_t>(k) * 3 + 1];
      z[i] = points[static_cast<size_t>(k) * 3 + 2];
      level[i] = __float_as_uint(__int_as_float(0x7f800000));
      left |= 1u << i;
    }
    if (kShared) {
      shared[0][k] = x[i];
      shared[1][k] = y[i];
      shared[2][k] = z[i];
    }
  }
  __syncthreads();

  Reduction<kWarps, kParts> reduce(slots, kParts ? words + cloud * 2 * parts : nullptr, part, parts);
  int64_t* index = run.index + cloud * run.samples;
  float* distance = run.distance + cloud * run.samples;
  const int64_t base = run.rows.index_base(cloud);
  const bool writer = part == 0 && threadIdx.x == 0;
  Best pick{0x7f800000u, static_cast<unsigned>(first)};
  int64_t j = 0;
  if (given.count) {  // all but the last, which the loop takes
    const float4* picks = static_cast<const float4*>(given.points) + cloud * run.starts;
    for (; j < starts - 1; j++) {
      const float4 p = picks[j];
      const unsigned local = __float_as_uint(p.w) - mine;
      if (local < kHeld && local % kThreads == 0) left &= ~(1u << local / kThreads);
#pragma unroll
      for (int i = 0; i < kPoints; i++) {
        level[i] = min(level[i], __float_as_uint(squared_distance3(x[i] - p.x, y[i] - p.y, z[i] - p.z)));
      }
    }
    pick = {__float_as_uint(distance[j]), __float_as_uint(picks[j].w)};
  }
  // A picked point's level falls to 0, its distance to itself; while any level is above 0 that is mark
  // enough.
  for (;;) {
    if (writer) {
      index[j] = base + pick.index;
      distance[j] = __uint_as_float(pick.bits);
    }
    const unsigned local = pick.index - mine;
    if (local < kHeld && local % kThreads == 0) left &= ~(1u << local / kThreads);
    if (++j == run.samples) return;
    float px, py, pz;
    if (kShared) {
      px = shared[0][pick.index];
      py = shared[1][pick.index];
      pz = shared[2][pick.index];
    } else {
      const float* p = points + static_cast<size_t>(pick.index) * 3;
      px = __ldg(p);
      py = __ldg(p + 1);
      pz = __ldg(p + 2);
    }
    unsigned most = 0;
#pragma unroll
    for (int i = 0; i < kPoints; i++) {
      const float d = squared_distance3(x[i] - px, y[i] - py, z[i] - pz);
      level[i] = min(level[i], __float_as_uint(d));
      most = max(most, level[i]);
    }
    pick = reduce(most, [&](unsigned bits) {
      unsigned at = kAll;
#pragma unroll
      for (int i = kPoints - 1; i >= 0; i--) at = level[i] == bits ? mine + i * kThreads : at;
      return at;
    });
    if (pick.bits == 0) break;
  }
  // All points left coincide with picks: they go by index, at distance 0.
  for (; j < run.samples; j++) {
    pick = reduce(left ? 1u : 0u,
                  [&](unsigned bits) { return bits && left ? mine + (__ffs(left) - 1) * kThreads : kAll; });
    if (pick.bits == 0) break;
    if (writer) {
      index[j] = base + pick.index;
      distance[j] = 0.0f;
    }
    const unsigned local = pick.index - mine;
    if (local < kHeld && local % kThreads == 0) left &= ~(1u << local / kThreads);
  }
  if (part == 0) fill_rest(run, cloud, j);
}

// Streaming.

constexpr int kStreamThreads = 1024;

// A tie goes to the lowest order: the index itself, or what the thread tree of pointnet2_ops amounts to: the
// bit-reversed number of the thread (of 2^bits) that visits a point, then the index.
template <bool kPointnet2>
__device__ __forceinline__ uint64_t tie_order(int64_t i, int bits) {
  if (!kPointnet2) return static_cast<uint64_t>(i);
  const uint64_t thread = bits ? __brev(static_cast<unsigned>(i) << (32 - bits)) : 0;
  return thread << 48 | static_cast<uint64_t>(i);
}

// Grid: one block a cloud, kStreamThreads threads. `levels`: one a row, -1 for points that cannot be picked.
// With `given`, only the clouds that it leaves out.
template <typename T, int kDim, bool kPointnet2>
__global__ void __launch_bounds__(kStreamThreads, 1)
    farthest_point_stream_kernel(FarthestPointSample<T> run, int64_t above, T* levels, GivenPicks given) {
  __shared__ T slot_level[2][32];
  __shared__ uint64_t slot_order[2][32];
  const int64_t cloud = blockIdx.x, count = run.rows.count(cloud), dim = kDim ? kDim : run.dim;
  if (count <= above || (given.count && given.count[cloud] >= 0)) return;
  const T* points = run.points + run.rows.begin(cloud) * dim;
  T* level = levels + run.rows.begin(cloud);
  int64_t* index = run.index + cloud * run.samples;
  T* distance = run.distance + cloud * run.samples;
  const int64_t base = run.rows.index_base(cloud);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int bits = 0;
  while (bits < 9 && (int64_t(2) << bits) <= count) bits++;

  int64_t pick = first_pick(points, count, dim, run.start ? run.start[cloud * run.starts] : 0);
  const int64_t fallback = kPointnet2 ? first_pick(points, count, dim, 0) : -1;
  const T infinity = static_cast<T>(__int_as_float(0x7f800000));
  for (int64_t i = threadIdx.x; i < count; i += kStreamThreads) {
    const T* p = points + i * dim;
    bool in = finite(p, dim);
    if (kPointnet2) in = in && static_cast<double>(squared_distance3(p[0], p[1], p[2])) > 1e-3;
    level[i] = in ? (kPointnet2 ? T(1e10) : infinity) : T(-1);
  }
  T reached = infinity;
  int64_t j = 0;
  for (; j < run.samples && pick >= 0; j++) {
    if (threadIdx.x == 0) {
      index[j] = base + pick;
      distance[j] = reached;
    }
    if (j + 1 == run.samples) return;
    const T* taken = points + pick * dim;
    T best = -1;
    uint64_t best_order = ~0ull;
#pragma unroll(kDim ? 4 : 2)
    for (int64_t i = threadIdx.x; i < count; i += kStreamThreads) {
      const T before = level[i];
      const T d = squared_distance(points + i * dim, taken, dim);
      T now = d < before ? d : before;  // -1 stays; so it does if d is NaN, as only then is the level -1
      if (!kPointnet2 && i == pick) now = T(-1);
      if (now != before) level[i] = now;
      const uint64_t order = tie_order<kPointnet2>(i, bits);
      if (now > best || (kPointnet2 && now == best && order < best_order)) {
        best = now;
        best_order = order;
      }
    }
    auto reduce_warp = [&] {
      for (int d = 16; d; d >>= 1) {
        const T other = __shfl_xor_sync(kAll, best, d);
        const uint64_t order = __shfl_xor_sync(kAll, best_order, d);
        if (other > best || (other == best && order < best_order)) {
          best = other;
          best_order = order;
        }
      }
    };
    reduce_warp();
    if (lane == 0) {
      slot_level[j & 1][warp] = best;
      slot_order[j & 1][warp] = best_order;
    }
    __syncthreads();
    best = slot_level[j & 1][lane];
    best_order = slot_order[j & 1][lane];
    reduce_warp();
    pick = best < 0 ? fallback : static_cast<int64_t>(best_order & 0xffffffffffffull);
    reached = best < 0 ? T(0) : best;
    if (!kPointnet2 &&
        j + 1 < run.starts) {  // the same in all threads; the barrier is past the levels' writes
      const int64_t next = run.start[cloud * run.starts + j + 1];
      if (next >= 0 && next < count && level[next] >= 0) {
        pick = next;
        reached = level[next];
      }
      __syncthreads();  // before levels change again
    }
  }
  fill_rest(run, cloud, j);
}

// Launches.

constexpr int kPartWarps = 8, kPartPoints = 16;
constexpr int64_t kPart = kPartWarps * 32 * kPartPoints;

// The most points that a cloud of this run can have, as far as the host knows.
template <typename T>
int64_t most_points(const FarthestPointSample<T>& run) {
  return run.rows.packed() ? run.rows.total : run.rows.padded;
}

// Whether sizes may differ from most_points.
template <typename T>
bool ragged(const FarthestPointSample<T>& run) {
  return run.rows.packed() || run.rows.lengths;
}

template <typename T>
int64_t parts_of(const FarthestPointSample<T>& run) {
  return (most_points(run) + kPart - 1) / kPart;
}

// The runs that have kernels other than the streaming one.
bool has_choice(const FarthestPointSample<float>& run) { return run.dim == 3 && !run.pointnet2; }
bool has_choice(const FarthestPointSample<double>&) { return false; }

DeviceLimits device_limits() {
  int device = 0, major = 0, minor = 0, processors = 1, shared = 0, cooperative = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  return {10 * major + minor, processors, shared, cooperative != 0};
}

Launches launches_of(const FarthestPointSample<float>& run) {
  return farthest_point_launches(device_limits(), run.rows.clouds, most_points(run), run.rows.packed(),
                                 ragged(run), run.samples);
}
Launches launches_of(const FarthestPointSample<double>&) { return {}; }

// Blocks that wait for each other must all be resident.
bool parts_fit(const FarthestPointSample<float>& run) {
  int device, cooperative = 0, processors = 0, blocks = 0;
  if (most_points(run) >= 1 << 30 || cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const auto kernel = farthest_point_sample_kernel<kPartWarps, kPartPoints, true>;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kPartWarps * 32, 0);
  return cooperative && run.rows.clouds * parts_of(run) <= static_cast<int64_t>(processors) * blocks;
}

template <int kWarps, int kPoints>
cudaError_t launch_registers(const FarthestPointSample<float>& run, int64_t above, const GivenPicks& given,
                             cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(run.rows.clouds));
  farthest_point_sample_kernel<kWarps, kPoints, false>
      <<<grid, kWarps * 32, 0, stream>>>(run, above, 1, nullptr, given);
  return cudaGetLastError();
}

cudaError_t launch_parts(FarthestPointSample<float> run, int64_t above, void* words, GivenPicks given,
                         cudaStream_t stream) {
  int parts = static_cast<int>(parts_of(run));
  const cudaError_t error =
      cudaMemsetAsync(words, 0, run.rows.clouds * 2 * parts * sizeof(unsigned long long), stream);
  if (error != cudaSuccess) return error;
  void* arguments[] = {&run, &above, &parts, &words, &given};
  const auto kernel = farthest_point_sample_kernel<kPartWarps, kPartPoints, true>;
  return cudaLaunchCooperativeKernel(kernel, dim3(static_cast<unsigned>(run.rows.clouds * parts)),
                                     dim3(kPartWarps * 32), arguments, 0, stream);
}

template <typename T, int kDim, bool kPointnet2>
cudaError_t launch_stream(const FarthestPointSample<T>& run, int64_t above, void* levels, cudaStream_t stream,
                          const GivenPicks& given = {}) {
  const dim3 grid(static_cast<unsigned>(run.rows.clouds));
  farthest_point_stream_kernel<T, kDim, kPointnet2>
      <<<grid, kStreamThreads, 0, stream>>>(run, above, static_cast<T*>(levels), given);
  return cudaGetLastError();
}

cudaError_t launch(const FarthestPointSample<double>& run, void* workspace, cudaStream_t stream) {
  if (run.pointnet2) return launch_stream<double, 3, true>(run, -1, workspace, stream);
  return launch_stream<double, 0, false>(run, -1, workspace, stream);
}

cudaError_t launch(const FarthestPointSample<float>& run, void* workspace, cudaStream_t stream) {
  if (run.pointnet2) return launch_stream<float, 3, true>(run, -1, workspace, stream);
  if (!has_choice(run)) return launch_stream<float, 0, false>(run, -1, workspace, stream);
  GivenPicks given;
  if (run.starts > 1) {
    const int error = launch_given(run, workspace, &given, stream);
    if (error != cudaSuccess) return static_cast<cudaError_t>(error);
    workspace = static_cast<char*>(workspace) + given_workspace(run);
    const cudaError_t streamed = launch_stream<float, 3, false>(run, -1, workspace, stream, given);
    if (streamed != cudaSuccess) return streamed;
  }
  const Launches all = launches_of(run);
  for (int i = 0; i < all.count; i++) {
    const Launch& next = all.launch[i];
    int error = cudaSuccess;
    if (next.kernel == Launch::batched) {
      const auto launch = next.plan.words ? launch_cluster : launch_batched;
      error = launch(run, next.above, next.plan, given, workspace, stream);
    } else if (next.kernel == Launch::large) {
      error = parts_fit(run) ? launch_parts(run, next.above, workspace, given, stream)
                             : launch_stream<float, 3, false>(run, next.above, workspace, stream);
    } else if (next.up_to <= 1024) {
      error = launch_registers<4, 8>(run, next.above, given, stream);
    } else if (next.up_to <= 2048) {
      error = launch_registers<8, 8>(run, next.above, given, stream);
    } else if (next.up_to <= 4096) {
      error = launch_registers<8, 16>(run, next.above, given, stream);
    } else {
      error = launch_registers<8, 32>(run, next.above, given, stream);
    }
    if (error != cudaSuccess) return static_cast<cudaError_t>(error);
  }
  return cudaSuccess;
}

}  // namespace

namespace {
int64_t workspace_of(const FarthestPointSample<float>& run, const BatchedPlan& plan) {
  return plan.words ? cluster_workspace(run, plan) : batched_workspace(run, plan);
}
int64_t workspace_of_given(const FarthestPointSample<float>& run) { return given_workspace(run); }
int64_t workspace_of_given(const FarthestPointSample<double>&) { return 0; }
int64_t workspace_of(const FarthestPointSample<double>&, const BatchedPlan&) { return 0; }
}  // namespace

template <typename T>
int64_t farthest_point_sample_workspace(const FarthestPointSample<T>& run) {
  const int64_t levels = run.rows.total * static_cast<int64_t>(sizeof(T));
  if (!has_choice(run)) return levels;
  const Launches all = launches_of(run);
  int64_t most = run.starts > 1 ? levels : 0;
  for (int i = 0; i < all.count; i++) {
    int64_t bytes = 0;
    if (all.launch[i].kernel == Launch::batched) bytes = workspace_of(run, all.launch[i].plan);
    if (all.launch[i].kernel == Launch::large) {
      const int64_t words = run.rows.clouds * 2 * parts_of(run) * 8;
      bytes = words > levels ? words : levels;
    }
    most = bytes > most ? bytes : most;
  }
  return most + workspace_of_given(run);
}

template <typename T>
int farthest_point_sample_cuda(const FarthestPointSample<T>& run, void* workspace, void* stream) {
  if (run.rows.clouds == 0 || run.samples == 0) return cudaSuccess;
  return launch(run, workspace, static_cast<cudaStream_t>(stream));
}

template int64_t farthest_point_sample_workspace(const FarthestPointSample<float>&);
template int64_t farthest_point_sample_workspace(const FarthestPointSample<double>&);
template int farthest_point_sample_cuda(const FarthestPointSample<float>&, void*, void*);
template int farthest_point_sample_cuda(const FarthestPointSample<double>&, void*, void*);

}  // namespace any2point
