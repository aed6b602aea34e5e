// Given picks, before the kernels that find the others: which of a start set count, and their distances.
//
// A set [B, S] is as a rule what was picked before, or chosen by hand: distinct finite points. Then pick j is
// start[j], at its distance to the starts before it, which all pairs give without a step a pick. A start that
// is not a finite point of the cloud, or is taken, gives way to the farthest point: if only such follow, the
// set ends there, as the kernels go on with farthest points anyway. If others follow, what is taken depends
// on the farthest points in between, and the streaming kernel of cuda.cu goes one by one.
//
// Pairs: S^2 / 2 distances of 8 instructions, four picks a warp at a time to save loads.
// CUDA, not Triton: atomics and early ends.
#include "farthest_point_sample/given.h"

#include "common/distance.h"
#include "farthest_point_sample/device.cuh"

namespace any2point {
namespace {

constexpr int kMarkThreads = 1024, kPairWarps = 8, kPairPicks = 4;

struct Workspace {
  unsigned* owner;  // [total] the first start that names a row, at first kAll
  float4* points;   // [B, starts]
  int* count;       // [B]
};

// Grid: one block a cloud.
__global__ void __launch_bounds__(kMarkThreads, 1)
    farthest_point_given_kernel(FarthestPointSample<float> run, Workspace work) {
  __shared__ int ends, last;  // the first start that does not count, the last that does
  const int64_t cloud = blockIdx.x, count = run.rows.count(cloud), base = run.rows.index_base(cloud);
  const float* points = run.points + run.rows.begin(cloud) * 3;
  unsigned* owner = work.owner + run.rows.begin(cloud);
  const int64_t* start = run.start + cloud * run.starts;
  const int starts = static_cast<int>(run.starts < run.samples ? run.starts : run.samples);
  if (threadIdx.x == 0) {
    ends = starts;
    last = -1;
  }
  const int64_t first = first_pick(points, count, 3, start[0]);
  __syncthreads();
  if (first < 0) {
    if (threadIdx.x == 0) work.count[cloud] = 0;
    return;
  }
  auto place = [&](int j) {  // of a start, or -1
    const int64_t at = j == 0 ? first : start[j];
    return at >= 0 && at < count && finite(points + at * 3, 3) ? at : -1;
  };
  for (int j = threadIdx.x; j < starts; j += kMarkThreads) {
    const int64_t at = place(j);
    if (at >= 0) atomicMin(&owner[at], static_cast<unsigned>(j));
  }
  __syncthreads();
  for (int j = threadIdx.x; j < starts; j += kMarkThreads) {
    const int64_t at = place(j);
    if (at >= 0 && __ldcg(&owner[at]) == static_cast<unsigned>(j)) {
      atomicMax(&last, j);
      const float* p = points + at * 3;
      work.points[cloud * run.starts + j] = make_float4(p[0], p[1], p[2], __uint_as_float(at));
      run.index[cloud * run.samples + j] = base + at;
    } else {
      atomicMin(&ends, j);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) work.count[cloud] = last < ends ? ends : -1;
}

// Grid: B * chunks blocks of kPairWarps warps, each warp kPairPicks picks in a row.
__global__ void __launch_bounds__(kPairWarps * 32)
    farthest_point_given_distance_kernel(FarthestPointSample<float> run, Workspace work, int chunks) {
  const int64_t cloud = blockIdx.x / chunks;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int count = work.count[cloud];
  const int from = (static_cast<int>(blockIdx.x % chunks) * kPairWarps + warp) * kPairPicks;
  if (from >= count) return;
  const float4* points = work.points + cloud * run.starts;
  float4 pick[kPairPicks];
  float least[kPairPicks];
#pragma unroll
  for (int k = 0; k < kPairPicks; k++) {
    pick[k] = points[min(from + k, count - 1)];
    least[k] = __int_as_float(0x7f800000);
  }
  for (int i = lane; i < from + kPairPicks - 1 && i < count; i += 32) {
    const float4 p = points[i];
#pragma unroll
    for (int k = 0; k < kPairPicks; k++) {
      const float d = squared_distance3(p.x - pick[k].x, p.y - pick[k].y, p.z - pick[k].z);
      if (i < from + k) least[k] = fminf(least[k], d);
    }
  }
  __syncwarp();
#pragma unroll
  for (int k = 0; k < kPairPicks; k++) {
    const unsigned bits = warp_min(__float_as_uint(least[k]));
    if (lane == 0 && from + k < count) {
      run.distance[cloud * run.samples + from + k] = __uint_as_float(bits);
    }
  }
}

int64_t padded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

int64_t given_workspace(const FarthestPointSample<float>& run) {
  if (run.starts == 1) return 0;
  return padded(run.rows.total * 4) + padded(run.rows.clouds * run.starts * 16) + padded(run.rows.clouds * 4);
}

int launch_given(const FarthestPointSample<float>& run, void* workspace, GivenPicks* given, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  char* at = static_cast<char*>(workspace);
  Workspace work{};
  work.owner = reinterpret_cast<unsigned*>(at);
  work.points = reinterpret_cast<float4*>(at + padded(run.rows.total * 4));
  work.count =
      reinterpret_cast<int*>(at + padded(run.rows.total * 4) +
                             padded(run.rows.clouds * run.starts * static_cast<int64_t>(sizeof(float4))));
  *given = {work.count, work.points};
  cudaError_t error = cudaMemsetAsync(work.owner, 0xff, run.rows.total * 4, on);
  if (error != cudaSuccess) return error;
  farthest_point_given_kernel<<<static_cast<unsigned>(run.rows.clouds), kMarkThreads, 0, on>>>(run, work);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const int64_t starts = run.starts < run.samples ? run.starts : run.samples;
  const int chunks = static_cast<int>((starts + kPairWarps * kPairPicks - 1) / (kPairWarps * kPairPicks));
  farthest_point_given_distance_kernel<<<static_cast<unsigned>(run.rows.clouds * chunks), kPairWarps * 32, 0,
                                         on>>>(run, work, chunks);
  return cudaGetLastError();
}

}  // namespace any2point
