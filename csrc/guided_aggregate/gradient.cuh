// The backward pass where the views are blended by how they agree with space, and a cloud's factors and a
// slice of its rows fit in shared memory. A warp takes a row and its lanes two channels each, so that what
// belongs to a row (its tokens, their factors) is read once for 64 channels.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "guided_aggregate/device.cuh"

namespace any2point {
namespace guided {

constexpr int kSlice = 2 * kWarp;    // channels of a block
constexpr int kPulled = 3 * kSlice;  // channels of a block that sums over all of them
constexpr int kPullWarps = 24;
constexpr int kRowWarps = 12;
constexpr int kProductWarps = 8;
constexpr int kViews = 6;     // that a token collects without a loop
constexpr int kRowTile = 16;  // rows of a product
constexpr int kRows = 256;    // rows of a slice in shared memory, if a view has no more

// Workspace. Rows of voxels are those of layer V.
struct GradientWork {
  float* z;             // [L, R, C]
  void* rows;           // the same in the format's type, normalised if it is narrow; or in tiles
  float* pulls;         // [pull_slices, V, R]: parts of G g_v by token
  void* space;          // [R + 1, C] like rows: activations of voxels, zeros at last
  float4* tokens;       // [V, R]: factors of G and s in dg_v, offsets in bytes of G in the cloud and of s
  float* bents;         // [V, R]: factor of g_v in dg_v
  float2* pairs;        // [R, V]: factor of g_v in ds, offset in bytes of its row among those kept
  float* gammas;        // [R]: factor of s in ds
  float* grad_space;    // [R, C]: ds by token; later what rounds before the last one add to dx
  void* dy;             // [L, R, C] in the format's type
  float2* parts;        // [B, L, C]: sums of dy and of dy z^, for views
  float2* sums;         // [L, C]: their means over all rows
  void* voxels;         // [R, C]: rows of voxels among `rows`, or beside its tiles
  void* voxel_dy;       // [R, C]: likewise
  float2* voxel_parts;  // [voxel_parts, C]: of voxels
  uint4* tables;        // of tiles.cuh, by cloud
  uint8_t* won;         // [R, C / 8]: by bits whether a token has its voxel's maximum
  float* grad_parts;    // [slices, V, R, K]: of the gradient of the heads
  float* proj_parts;    // [B, V, M + 1, C]
};

__host__ __device__ inline int slices_of(const Guided& args, int width) {
  return static_cast<int>((args.channels + width - 1) / width);
}
__host__ __device__ inline int eights_of(const Guided& args) {
  return static_cast<int>((args.channels + 7) / 8);
}

// Rows of a slice that a block keeps: all of one view at least, and a tile that products may read beyond
// them.
inline int kept_rows(const Guided& args) {
  const int64_t one = args.tokens + kRowTile, all = args.tokens * args.views + kRowTile;
  const int64_t most = one > kRows ? one : kRows;
  return static_cast<int>(most < all ? most : all);
}

// Views [first, first of the next group) whose rows fit, or as many as there are warps for.
__device__ inline int last_of_group(const int32_t* held, int view, int views, int most_rows, int most_views) {
  int rows = 0, last = view;
  while (last < views && last - view < most_views && rows + held[last] <= most_rows) rows += held[last++];
  return last;
}

// How rows wait between the passes. Those of 16-bit features do so normalised, as binary16, and their
// gradient in the features' type: half the bytes, of which there are more than the second cache holds.
// Others, and those of maxima, which walks take, are as they were pooled.
template <typename Feature, bool kNarrow_>
struct Format {
  static constexpr bool kNarrow = kNarrow_;
  using T = Feature;
  using Row = std::conditional_t<kNarrow, Half, float>;
  using Gradient = std::conditional_t<kNarrow, T, float>;
};
inline bool is_narrow(const Guided& args) { return args.dtype != Dtype::f32 && !args.maximum; }

template <typename F>
inline void with_format(const Guided& args, const F& function) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      if (is_narrow(args)) return function(Format<T, true>{});
    }
    function(Format<T, false>{});
  });
}

// Into what binary16 can hold; NaN stays.
__device__ inline float bounded(float value) {
#if __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, 0fC77FE000; min.NaN.f32 %0, %0, 0f477FE000;" : "+f"(value));
  return value;
#else
  return value > 65504.0f ? 65504.0f : value < -65504.0f ? -65504.0f : value;
#endif
}
template <int N>
__device__ inline void keep(float* to, const Lane<N>& lane) {
  store(to, lane);
}
template <int N>
__device__ inline void keep(Half* to, Lane<N> lane) {
#pragma unroll
  for (int n = 0; n < N; n++) lane.at[n] = bounded(lane.at[n]);
  store(to, lane);
}

// GELU and its slope, for bfloat16 through one approximate tanh: to what 11 bits of it leave.
template <typename T>
__device__ inline Gelu gelu_for(float y) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, BFloat16>) {
    const float square = fminf(y * y, 50.0f);  // beyond, tanh is 1
    const float factor = fmaf(square, fmaf(square, -3.51516e-4f, 3.70056e-2f), 0.797507f);
    float tail;
    asm("tanh.approx.f32 %0, %1;" : "=f"(tail) : "f"(y * factor));
    const float half = 0.5f * y, bell = power_of_two(square * -0.72134752f);
    return {fmaf(half, tail, half), fmaf(y * 0.39894228f, bell, fmaf(0.5f, tail, 0.5f))};
  }
#endif
  return gelu(y);
}

// Activation of rows, from what waits or, with another format, from what was pooled.
template <typename T, int N, bool kNarrow>
struct Activation {
  Lane<N> center, inverse, weight, bias;

  __device__ Activation(const Guided& args, const float* mean, const float* deviation, int64_t layer,
                        int64_t c) {
    const bool voxels = layer == args.views;
    const int64_t at = layer * args.channels + c;
    center = load<N>(mean + at);
    inverse = load<N>(deviation + at);
    weight = load<N>(voxels ? args.space_weight + c : args.view_weight + at);
    bias = load<N>(voxels ? args.space_bias + c : args.view_bias + at);
  }
  __device__ float normed(int n, float row) const {
    return kNarrow ? row : (row - center.at[n]) * inverse.at[n];
  }
  __device__ Gelu operator()(int n, float normed) const {
    return gelu_for<T>(fmaf(normed, weight.at[n], bias.at[n]));
  }
};

// dz of rows. The mean of dy is subtracted before all else: of rows that are all alike nothing is left.
template <int N, bool kNarrow>
struct RowGradient {
  Lane<N> center, factor, plain, slope;

  __device__ RowGradient(const GuidedBackward& args, const float2* sums, int64_t layer, int64_t c) {
    const int64_t at = layer * args.channels + c;
    const float* weight = layer == args.views ? args.space_weight : args.view_weight + layer * args.channels;
    const Lane<N> weights = load<N>(weight + c), inverse = load<N>(args.deviation + at);
    center = load<N>(args.mean + at);
#pragma unroll
    for (int n = 0; n < N; n++) {
      factor.at[n] = weights.at[n] * inverse.at[n];
      plain.at[n] = sums[at + n].x;
      slope.at[n] = kNarrow ? -sums[at + n].y : -inverse.at[n] * sums[at + n].y;
    }
  }
  __device__ Lane<N> operator()(const Lane<N>& dy, const Lane<N>& row) const {
    Lane<N> dz;
#pragma unroll
    for (int n = 0; n < N; n++) {
      const float away = kNarrow ? row.at[n] : row.at[n] - center.at[n];
      dz.at[n] = factor.at[n] * fmaf(away, slope.at[n], dy.at[n] - plain.at[n]);
    }
    return dz;
  }
};

// Bytes of shared memory of a block of the passes below.
int64_t rows_shared(const Guided& args);
int64_t products_shared(const Guided& args);

// Each takes what those before it have written.
int pull_views(const GuidedBackward& args, const GradientWork& work,
               cudaStream_t stream);  // pulls, space, rows
inline int pull_slices(const Guided& args) { return slices_of(args, kPulled); }
int row_gradients(const GuidedBackward& args, const GradientWork& work,
                  cudaStream_t stream);  // dy, parts, won
int64_t voxel_parts(const Guided& args);
int voxel_gradients(const GuidedBackward& args, const GradientWork& work, cudaStream_t stream);
int row_products(const GuidedBackward& args, const GradientWork& work, cudaStream_t stream);  // the rest

// The same by tiles of 16 rows (tiles.cuh), for what that is made for.
bool has_tiles(const Guided& args);
inline int64_t tile_words(const Guided& args) {  // of 16 bytes
  const int64_t tiles = (args.tokens + kRowTile - 1) / kRowTile * args.views * args.clouds;
  return tiles * kRowTile * slices_of(args, kSlice) * (kSlice / 8);
}
int64_t tile_rows_shared(const Guided& args);
int64_t tile_tables(const Guided& args);  // bytes
int64_t tile_products_shared(const Guided& args);
int pull_tiles(const GuidedBackward& args, const GradientWork& work, cudaStream_t stream);
int tile_gradients(const GuidedBackward& args, const GradientWork& work, cudaStream_t stream);
int tile_products(const GuidedBackward& args, const GradientWork& work, cudaStream_t stream);

}  // namespace guided
}  // namespace any2point
