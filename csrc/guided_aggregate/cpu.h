// Guided aggregation on the CPU, in passes over chunks (a layer of one cloud) or tokens, see kernel.h for
// what is computed. Torch-free. Everything is float32; rows of channels are padded with zeros to `stride`,
// whole vectors of every instruction set. Sums over rows come as one part per chunk, added up in the order of
// the chunks, so no result depends on the number of threads.
//
// Measured on one AVX-512 core (AMD Zen 5): 8 clouds of 128 tokens in 31 cells a view and 121 voxels, 6
// views, width 384: 3.4 ms forward and 8.8 ms backward; width 768: 6.2 and 14.3 ms. With the product before
// it (qkv, by torch) a block takes 24 ms in training, the composition of torch ops 103 ms. More than
// a third of the kernels' time is the attention in small cells, the rest reads and writes rows.
#pragma once

#include "guided_aggregate/kernel.h"

namespace any2point {

constexpr int64_t padded16(int64_t count) { return (count + 15) / 16 * 16; }

// R = B S tokens, V views, L layers of segments, P = stride, K = padded16(M + 1). Segments that hold tokens
// have a row each, Z in all, and one of zeros comes last.
struct GuidedRows {
  int64_t clouds, tokens, stride, views, layers, inner, heads;
  bool maximum, adaptive;
  Ensemble ensemble;
  float scale, coefficient;
  const float* features;  // [R, P]
  const float* qkv;       // [R, V, 3, M]
  const float* proj;      // [V, K, P]
  const float* keep;      // [V, R] or null
  const int32_t* order;   // the lists of kernel.h
  const int32_t* segment;
  const int32_t* start;
  const int32_t* shift;    // [L, B]: from a segment to its row
  const int32_t* row;      // [L, R]: of each token's segment, Z for none
  int64_t first_maximum;   // row of the first layer that pools by maximum
  const float* mean;       // [L, P] of the rows z
  const float* deviation;  // [L, P]
  const float* factor;     // [L, P]: y = factor (z - mean) + bias
  const float* bias;       // [L, P]
  float* hidden;           // [V, R, K]: per token the heads' output, 1 and zeros, times keep
  float* pooled;           // [Z, K]: their means over the cells
  float* z;                // [Z, P]
  float* g;                // [Z + 1, P]: GELU(y)
  float* length;           // [Z + 1]: norms of the rows g, at least 1e-8
  // Backward.
  const float* grad;  // [R, P] of the result
  const float* m1;    // [L, P]: means over the rows of dy, and
  const float* m2;    // [L, P]: of dy times normalised z; zero in evaluation
  float* dz;          // [Z, P]: dy, then dz
  int32_t* argmax;    // [Z - first_maximum, P]: the token that a maximum comes from
  float* alpha;       // [R, V]: factor on the result's gradient in that of g_v,
  float* beta;        // [R, V]: on the voxel's row,
  float* gamma;       // [R, V]: on g_v itself
  float* delta;       // [R]: on the voxel's row in that of itself

  int64_t rows() const { return clouds * tokens; }
  int64_t width() const { return padded16(inner + 1); }
};

// Tokens of a cell whose pairs with the heads are taken at once; few, so that they stay in the cache.
constexpr int64_t guided_attend_block(int64_t heads) { return heads >= 512 ? 1 : 512 / heads; }

// A chunk is layer * B + cloud; those of views come first. Floats of scratch that passes over chunks need.
int64_t guided_scratch(const GuidedRows& args);

// hidden and pooled of a view's chunk.
void guided_attend_cpu(const GuidedRows& args, int64_t chunk, float* scratch);
// z of a chunk; mean and spread (sum of squares about it) [P] of its rows. `argmax` where it is not null.
void guided_pool_cpu(const GuidedRows& args, int64_t chunk, float* mean, float* spread, float* scratch);
// g and length of a chunk.
void guided_activate_cpu(const GuidedRows& args, int64_t chunk);
// out [R, P] of the tokens [begin, end).
void guided_blend_cpu(const GuidedRows& args, float* out, int64_t begin, int64_t end);

// alpha, beta, gamma and delta of the tokens [begin, end); not for Ensemble::max.
void guided_weights_grad_cpu(const GuidedRows& args, int64_t begin, int64_t end);
// dy of a chunk, and the sums [P] of dy and of dy times normalised z.
void guided_rows_grad_cpu(const GuidedRows& args, int64_t chunk, float* sum, float* sum_normed);
// dz of a chunk; of a view's also grad_proj [K, P] and grad_qkv [R, V, 3, M].
void guided_pool_grad_cpu(const GuidedRows& args, int64_t chunk, float* grad_proj, float* grad_qkv,
                          float* scratch);
// grad_features [R, P] of the tokens [begin, end).
void guided_features_grad_cpu(const GuidedRows& args, float* grad_features, int64_t begin, int64_t end);

// With torch's threads, in host.cpp: the lists, and both directions from and to the caller's arrays. The
// position of the first voxel that is not in [-1, R), or -1.
int64_t guided_lists_cpu(const GuidedLists& args);
void guided_forward_cpu(const GuidedForward& args);
void guided_backward_cpu(const GuidedBackward& args);

}  // namespace any2point
