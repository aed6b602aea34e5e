// Guided aggregation in passes, torch-free. R = B * S tokens, V views, L layers of segments: the cells of
// every view, then (adaptive ensemble) the voxels. Segments that hold tokens are rows z [L, R, C]:
//
//   views:  z = pool over tokens of x + proj' [h; keep]   (h: heads of the attention inside the cell, times
//   keep) voxels: z = max x + mean x y = (z - mean) * deviation * weight + bias,  g = GELU(y), per token g_v
//   and s out = x + coefficient * sum_v w_v g_v / sum_v w_v,  w_v = (cos(g_v, s) + 1) / 2
//
// Backward, with G = coefficient * dout, u_v = cos(g_v, s), W = sum w_v, norms n clamped at 1e-8:
//
//   du_v = (G g_v - G blend) / (2 W)
//   dg_v = w_v / W G + du_v / (n_v n_s) s - du_v u_v / n_v^2 g_v,  summed over the tokens of a segment
//   ds   = sum_v du_v / (n_v n_s) g_v - du_v u_v / n_s^2 s
//   dy = dg GELU'(y),  dz = deviation weight (dy - (sum dy + z^ sum dy z^) / N), z^ normalised z
//   dx = dout + sum_v dz / n + ..., dh = proj dz / n, dproj = sum [h; keep] dz'
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace any2point {

enum class Ensemble { adaptive, mean, max };

// What forward and backward share. All pointers are to contiguous arrays.
struct Guided {
  Dtype dtype, qkv_dtype;
  int64_t clouds, tokens, channels, views, layers;  // B, S, C, V, L
  int64_t inner, heads;                             // M, H
  int64_t total;  // rows that the statistics of views count, 0: the segments that hold tokens
  bool maximum;   // views pool by maximum + mean
  bool training;
  bool residual;  // x is part of out; without, dout is no part of dx
  Ensemble ensemble;
  float scale, coefficient, eps;
  const void* features;                                                  // [R, C]
  const void* qkv;                                                       // [R, V, 3, M]
  const float* proj;                                                     // [V, M + 1, C]
  const float *view_weight, *view_bias, *space_weight, *space_bias;      // [V, C], [C]
  const float *view_mean, *view_variance, *space_mean, *space_variance;  // running, in evaluation
  const int32_t* order;                                                  // [L, R]
  const int32_t* segment;                                                // [L, R]
  const int32_t* start;                                                  // [L, R + 1]
  const int32_t* count;                                                  // [L, B]
  const float* keep;                                                     // [V, R] or null
};

namespace guided {
// K: coefficients of the projection per token or cell, M heads and a factor on the bias, padded with zeros.
A2P_ALWAYS_INLINE int64_t coefficients(int64_t inner) { return (inner + 1 + 3) / 4 * 4; }
}  // namespace guided

struct GuidedForward : Guided {
  const float* base;                   // [R, C], in place of x as part of out, or null
  void* out;                           // [R, C] of the features' dtype; with base, float32
  float *mean, *deviation, *unbiased;  // [L, C]
  // For the backward pass, on CUDA: inner_means [V, R, K] by segment, means of [h; keep] over the cells,
  // zeros where there are none; agreement [2V + 1, R] of the adaptive ensemble: g_v . s of every view, then
  // |g_v|^2, then |s|^2.
  float *inner_means, *agreement;
};

struct GuidedBackward : Guided {
  const float *mean, *deviation;         // [L, C]
  const float *inner_means, *agreement;  // of the forward pass, on CUDA
  const void* grad;                      // [R, C] of the features' dtype
  void* grad_features;                   // [R, C]
  void* grad_qkv;                        // [R, V, 3, M]
  float* grad_proj;                      // [V, M + 1, C]
  float *grad_view_weight, *grad_view_bias, *grad_space_weight, *grad_space_bias;
};

struct GuidedLists {
  int64_t clouds, tokens, views, layers, cells;
  const int64_t* cell;     // [B, V, S], in range
  const int64_t* cluster;  // [B, S], or null without voxels
  int32_t *order, *segment, *start, *count;
};

// Gradients of LayerNorm and product of 16-bit features, given what the product made.
struct GuidedProductBackward {
  Dtype dtype;
  int64_t rows, channels, columns;     // R, C, N
  const float *grad, *product;         // [R, N]
  const void *features, *weight;       // [R, C], [N, C] of their dtype
  const float *sums, *bias, *moments;  // [N], [N], [2, R]
  void* grad_features;                 // [R, C]
  float *grad_weight, *grad_bias;      // [N, C], [N]
};

// LayerNorm and product of 16-bit features: out = LN(x) weight^T + bias.
struct GuidedProduct {
  Dtype dtype;
  int64_t rows, channels, columns;  // R, C, N
  float eps;
  const void* features;      // [R, C]
  const float* whole;        // [R, C], rounded to the dtype instead of features, or null
  void* rounded;             // [R, C], of whole
  const void* weight;        // [N, C] of the dtype
  const float *sums, *bias;  // [N], sums of the weight's rows
  float* out;                // [R, N]
  float* moments;            // [2, R]: mean and 1 / deviation of the tokens' channels
};

// On CUDA: bytes of workspace, and the work itself, asynchronous. They return a cudaError_t.
int64_t guided_lists_workspace(const GuidedLists& args);
int guided_lists_cuda(const GuidedLists& args, void* workspace, int64_t bytes, void* stream);
int64_t guided_forward_workspace(const Guided& args);
int guided_forward_cuda(const GuidedForward& args, void* workspace, void* stream);
int64_t guided_backward_workspace(const Guided& args);
int guided_backward_cuda(const GuidedBackward& args, void* workspace, void* stream);
int64_t guided_product_backward_workspace(const GuidedProductBackward& args);
int guided_product_backward_cuda(const GuidedProductBackward& args, void* workspace, void* stream);
bool guided_product_fits(int64_t channels);
int guided_product_cuda(const GuidedProduct& args, void* stream);

}  // namespace any2point
