// What train_backward_rows and train_backward_upper share: where rows are, their sines and cosines, and the
// gradient dy1.
#pragma once

#include "local_aggregate/train_backward.cuh"

namespace any2point {

// Where a row is: beta times its normalised offset, and the row of the features of its point.
struct Place {
  float offset[3];
  int near;  // below 0: none
};

// A warp per group. middles [groups]: row of its centre. zeros [C / 2]: the features of no point.
static __global__ void place_kernel(const HopperAggregate args, int width, Place* places, int* middles,
                                    uint4* zeros) {
  const int lane = threadIdx.x % 32;
  const int64_t group = this_warp();
  if (blockIdx.x == 0 && threadIdx.x < width / 16) zeros[threadIdx.x] = {0, 0, 0, 0};
  if (group >= args.groups) return;
  const float4 scale = scale_of(args, group);
  const float each[3] = {scale.x, scale.y, scale.z};
  const int64_t first = group / args.centers * args.rows, middle = row_of(args, args.center[group], first);
  const float from[3] = {coordinate(args, middle, 0), coordinate(args, middle, 1),
                         coordinate(args, middle, 2)};
  for (int64_t i = group * args.neighbors + lane; i < (group + 1) * args.neighbors; i += 32) {
    const int64_t index = args.neighbor[i], near = index < 0 ? middle : row_of(args, index, first);
    Place place;
    for (int axis = 0; axis < 3; axis++) {
      place.offset[axis] = (coordinate(args, near, axis) - from[axis]) * each[axis] * args.beta;
    }
    place.near = static_cast<int>(near);
    places[i] = place;
  }
  if (lane == 0) middles[group] = static_cast<int>(middle);
}

__device__ __forceinline__ Place load_place(const Place* from) {
  const float4 v = __ldg(reinterpret_cast<const float4*>(from));
  return {{v.x, v.y, v.z}, __float_as_int(v.w)};
}

// Features of a point, where this thread's channels of them begin; none: zeros.
template <int C>
__device__ __forceinline__ const uint4* features_of(const uint4* features, const uint4* zeros, int row) {
  const uint4* from = row < 0 ? zeros : features + static_cast<int64_t>(row) * (C / 16);
  return from + threadIdx.x % 4;
}
// A slice of x is six blocks: sines and cosines of the same frequencies for each axis. Block j, of the point
// if j < 3, of its centre otherwise:
template <int C>
__host__ __device__ constexpr int block_of(int slice, int j) {
  return j * Order<C>::kParts + slice;
}
template <int C>
__device__ __forceinline__ uint4 feature(const uint4* near, const uint4* middle, int slice, int j) {
  return __ldg(j < 3 ? near + block_of<C>(slice, j) * 4 : middle + block_of<C>(slice, j - 3) * 4);
}

// 8 channels of a block of sines and of the block of cosines with the same frequencies.
template <typename T>
__device__ __forceinline__ void encode(float offset, const Eight& frequency, uint4& sine, uint4& cosine) {
  Eight s, c;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float angle = offset * frequency.v[j];
    s.v[j] = __sinf(angle);
    c.v[j] = __cosf(angle);
  }
  sine = add<T>(sine, rounded<T>(s));
  cosine = add<T>(cosine, rounded<T>(c));
}

// dy1 = slope dz + bend y1 + level.
struct InnerNorm {
  const float *mean, *deviation, *factor, *m1, *m2;
};

template <int H>
__device__ __forceinline__ void load_norm(const InnerNorm& norm, float* to) {
  for (int i = threadIdx.x; i < H; i += blockDim.x) {
    const float bend = -norm.factor[i] * norm.deviation[i] * norm.m2[i];
    to[i] = norm.factor[i];
    to[H + i] = bend;
    to[2 * H + i] = -__fmaf_rn(bend, norm.mean[i], norm.factor[i] * norm.m1[i]);
  }
}

struct Line {
  Eight slope, bend, level;
};
template <int H>
__device__ __forceinline__ Line line_of(const float* norm, int c) {
  return {eight(norm + c), eight(norm + H + c), eight(norm + 2 * H + c)};
}

template <typename T>
__device__ __forceinline__ uint4 normed_grad(const uint4& dz, const uint4& before, const Line& line) {
  const Eight y = eight_of<T>(before);
  Eight g = eight_of<T>(dz);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    g.v[j] = __fmaf_rn(g.v[j], line.slope.v[j], __fmaf_rn(y.v[j], line.bend.v[j], line.level.v[j]));
  }
  return rounded<T>(g);
}

// 8 channels of a thread's first or second row.
template <int N>
__device__ __forceinline__ Eight of_sums(const float (&d)[N], int block, int row) {
  Eight v;
#pragma unroll
  for (int j = 0; j < 8; j++) v.v[j] = d[16 * block + j / 2 * 4 + 2 * row + j % 2];
  return v;
}

// weight_grad [H, C] of parts [count, slices, 192, H]; a block per channel of the parts.
template <int C>
__global__ void weight_grad_kernel(const float* parts, int count, float* to) {
  const int hidden = blockDim.x, h = threadIdx.x, slice = blockIdx.x / kSlice, at = blockIdx.x % kSlice;
  const int c = block_of<C>(slice, at / 32) * 32 + at % 32;
  const float* from = parts + static_cast<int64_t>(blockIdx.x) * hidden + h;
  to[static_cast<int64_t>(h) * C + c] = part_sum(from, static_cast<int64_t>(C) * hidden, count);
}

// backward_rows with a unit below.
int64_t backward_upper_scratch(const BackwardSize& size);
int backward_upper(const BackwardSize& size, const BackwardRows& args, void* scratch, cudaStream_t stream);

}  // namespace any2point
