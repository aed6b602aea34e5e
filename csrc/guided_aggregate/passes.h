// Passes on CUDA that forward and backward share. They return a cudaError_t.
#pragma once

#include <cuda_runtime.h>

#include "guided_aggregate/kernel.h"

namespace any2point {
namespace guided {

// heads [V, R, K]: per token the heads' output and, at M, 1, both times keep; inner [V, R, K]: their means
// over the cells, by segment. Unless `clouds` is null, it also makes what the kernels of clouds begin with.
struct CloudWork;
int attention_forward(const Guided& args, float* heads, float* inner, cudaStream_t stream,
                      const CloudWork* clouds = nullptr);
// parts [slices, V, R, K]: of the gradient of the heads, by token or by segment (the same for all tokens of a
// cell). proj_parts [B, V, M + 1, C]: of the projection's gradient, which is summed up too.
int64_t attention_backward_workspace(const Guided& args);
int attention_backward(const GuidedBackward& args, const float* parts, int64_t slices, bool by_token,
                       const float* proj_parts, void* workspace, cudaStream_t stream);

struct Rows {
  const float *heads, *inner;  // [V, R, K]
  float* z;                    // [L, R, C]
  float2* parts;               // [B, L, C]: mean and spread about it
};

// Rows z, and with `statistics` their parts.
int pool_rows(const Guided& args, const Rows& rows, bool statistics, cudaStream_t stream);
// The same as products of matrices, for what this is made for.
bool pools_by_matrix(const Guided& args);
int pool_by_matrix(const Guided& args, const Rows& rows, bool statistics, cudaStream_t stream);

// out from rows and their statistics. memory: workspace.
int64_t blend_workspace(const Guided& args);
int blend_tokens(const GuidedForward& args, const float* z, void* memory, cudaStream_t stream);
// The same with a block per token, for all that blend_tokens has no room for.
int blend_each_token(const GuidedForward& args, const float* z, cudaStream_t stream);

// All passes behind the attention, for what fits_clouds says.
bool fits_clouds(const Guided& args);
int64_t clouds_workspace(const Guided& args);
CloudWork work_of_clouds(const Guided& args, void* memory);
int forward_of_clouds(const GuidedForward& args, void* memory, cudaStream_t stream);

// The same in evaluation of few clouds, for what is_small_batch says, and the attention if it can.
bool is_small_batch(const Guided& args);
bool small_batch_attends(const Guided& args);
int forward_of_small_batch(const GuidedForward& args, cudaStream_t stream);

// What the gradient of the blend gives each token.
struct Factors {
  float* factors;             // [3, V, R]: of G, of s and of g in dg
  float *space, *grad_space;  // [R, C]: s and ds, with voxels
  float* shares;              // [V, R, C]: of G, where the ensemble is a maximum
};
int token_factors(const GuidedBackward& args, const float* z, const Factors& factors, cudaStream_t stream);

}  // namespace guided
}  // namespace any2point
