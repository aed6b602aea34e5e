#include "guided_aggregate/cpu.h"

#include "common/isa.h"

namespace any2point {

A2P_DECLARE_ISA(void attend(const GuidedRows& args, int64_t chunk, float* scratch);
                void attend_grad(const GuidedRows& args, int64_t chunk, const float* grad_hidden,
                                 float* grad_qkv, float* scratch);
                void pool(const GuidedRows& args, int64_t chunk, float* mean, float* spread, float* scratch);
                void activate(const GuidedRows& args, int64_t chunk);
                void blend(const GuidedRows& args, float* out, int64_t begin, int64_t end);
                void weights_grad(const GuidedRows& args, int64_t begin, int64_t end);
                void rows_grad(const GuidedRows& args, int64_t chunk, float* sum, float* sum_normed);
                void pool_grad(const GuidedRows& args, int64_t chunk, float* grad_proj, float* grad_hidden,
                               float* scratch);
                void features_grad(const GuidedRows& args, float* grad_features, int64_t begin, int64_t end))

namespace {

// As laid out in attention.simd.cpp, with a vector of slack after each array.
int64_t attend_scratch(const GuidedRows& args) {
  const int64_t wide = args.inner / args.heads, all = args.tokens * args.heads + 16;
  const int64_t room = guided_attend_block(args.heads) * args.heads + 16;
  const int64_t tiles = 4 * wide > 2 * wide + 3 ? 4 * wide : 2 * wide + 3;
  return (4 * wide + 3) * all + (tiles + 2 * wide + 2) * room;
}
// Of pooling by maximum: a row, its sum and its largest; backward a row, or the gradient of pooled heads.
int64_t pool_scratch(const GuidedRows& args) { return 3 * args.stride + args.width(); }

void attend_grad_of(const GuidedRows& args, int64_t chunk, const float* grad_hidden, float* grad_qkv,
                    float* scratch) {
  A2P_DISPATCH_ISA(attend_grad, args, chunk, grad_hidden, grad_qkv, scratch)
}

void pool_grad_of(const GuidedRows& args, int64_t chunk, float* grad_proj, float* grad_hidden,
                  float* scratch) {
  A2P_DISPATCH_ISA(pool_grad, args, chunk, grad_proj, grad_hidden, scratch)
}

}  // namespace

int64_t guided_scratch(const GuidedRows& args) {
  const int64_t pool = pool_scratch(args), attend = attend_scratch(args);
  return args.tokens * args.width() + (pool > attend ? pool : attend);
}

void guided_attend_cpu(const GuidedRows& args, int64_t chunk, float* scratch) {
  A2P_DISPATCH_ISA(attend, args, chunk, scratch)
}

void guided_pool_cpu(const GuidedRows& args, int64_t chunk, float* mean, float* spread, float* scratch) {
  A2P_DISPATCH_ISA(pool, args, chunk, mean, spread, scratch)
}

void guided_activate_cpu(const GuidedRows& args, int64_t chunk) { A2P_DISPATCH_ISA(activate, args, chunk) }

void guided_blend_cpu(const GuidedRows& args, float* out, int64_t begin, int64_t end) {
  A2P_DISPATCH_ISA(blend, args, out, begin, end)
}

void guided_weights_grad_cpu(const GuidedRows& args, int64_t begin, int64_t end) {
  A2P_DISPATCH_ISA(weights_grad, args, begin, end)
}

void guided_rows_grad_cpu(const GuidedRows& args, int64_t chunk, float* sum, float* sum_normed) {
  A2P_DISPATCH_ISA(rows_grad, args, chunk, sum, sum_normed)
}

void guided_pool_grad_cpu(const GuidedRows& args, int64_t chunk, float* grad_proj, float* grad_qkv,
                          float* scratch) {
  float* rest = scratch + args.tokens * args.width();
  pool_grad_of(args, chunk, grad_proj, scratch, rest);
  if (chunk < args.views * args.clouds) attend_grad_of(args, chunk, scratch, grad_qkv, rest);
}

void guided_features_grad_cpu(const GuidedRows& args, float* grad_features, int64_t begin, int64_t end) {
  A2P_DISPATCH_ISA(features_grad, args, grad_features, begin, end)
}

}  // namespace any2point
