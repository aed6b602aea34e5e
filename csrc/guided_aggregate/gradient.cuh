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
constexpr int kRowTile = 16;  // rows of a product
constexpr int kRows = 256;    // rows of a slice in shared memory, if a view has no more

// Workspace. Rows of voxels are those of layer V.
struct GradientWork {
  const float* z;     // [L, R, C]
  float* pulls;       // [slices of kPulled, V, R]: parts of G g_v by token
  float* space;       // [R + 1, C]: activations of voxels, zeros at last
  float4* tokens;     // [V, R]: factors of G and s in dg_v, offsets in bytes of G in the cloud and of s
  float* bents;       // [V, R]: factor of g_v in dg_v
  float2* pairs;      // [R, V]: factor of g_v in ds, offset in bytes of its row among those kept
  float* gammas;      // [R]: factor of s in ds
  float* grad_space;  // [R, C]: ds by token; later what rounds before the last one add to dx
  float* dy;          // [L, R, C]
  float2* parts;      // [B, L, C]: sums of dy and of dy z^
  float2* sums;       // [L, C]: their means over all rows
  uint32_t* won;      // [R, 2 * slices]: by bits whether a token has its voxel's maximum
  float* grad_parts;  // [slices, V, R, K]: of the gradient of the heads
  float* proj_parts;  // [B, V, M + 1, C]
};

__host__ __device__ inline int slices_of(const Guided& args, int width) {
  return static_cast<int>((args.channels + width - 1) / width);
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

// dz of rows.
struct RowGradient {
  Lane<2> factor, center, inverse, plain, scaled;

  __device__ RowGradient(const GuidedBackward& args, const float2* sums, int64_t layer, int64_t c) {
    const int64_t at = layer * args.channels + c;
    const float* weight = layer == args.views ? args.space_weight : args.view_weight + layer * args.channels;
    const Lane<2> weights = load<2>(weight + c);
    center = load<2>(args.mean + at);
    inverse = load<2>(args.deviation + at);
#pragma unroll
    for (int n = 0; n < 2; n++) {
      factor.at[n] = weights.at[n] * inverse.at[n];
      plain.at[n] = sums[at + n].x;
      scaled.at[n] = sums[at + n].y;
    }
  }
  __device__ Lane<2> operator()(const Lane<2>& dy, const Lane<2>& z) const {
    Lane<2> dz;
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const float normed = (z.at[n] - center.at[n]) * inverse.at[n];
      dz.at[n] = factor.at[n] * fmaf(-normed, scaled.at[n], dy.at[n] - plain.at[n]);
    }
    return dz;
  }
};

// Bytes of shared memory of a block of the passes below.
int64_t rows_shared(const Guided& args);
int64_t products_shared(const Guided& args);

// Each takes what those before it have written.
int pull_views(const GuidedBackward& args, const GradientWork& work, cudaStream_t stream);  // pulls, space
int row_gradients(const GuidedBackward& args, const GradientWork& work,
                  cudaStream_t stream);  // dy, parts, won
int row_products(const GuidedBackward& args, const GradientWork& work, cudaStream_t stream);  // the rest

}  // namespace guided
}  // namespace any2point
