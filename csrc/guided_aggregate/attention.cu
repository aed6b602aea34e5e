// Attention among the tokens of each cell: a block per cloud and view, a thread per token, head and pair of
// channels. Cells hold a few tokens and heads are narrow, so keys and values come straight from the cache.
#include "guided_aggregate/passes.h"

#include "guided_aggregate/device.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kWide = 2;  // channels of a head per thread

// One cloud and view, with the numbers of a thread's task.
template <typename Q>
struct Cells {
  const Guided& args;
  int64_t view, base, rows, stride, width;  // base: first token; stride: of qkv; width: of a head
  const Q* qkv;
  const int32_t *order, *segment, *start;

  __device__ explicit Cells(const Guided& args) : args(args) {
    view = blockIdx.x % args.views;
    base = blockIdx.x / args.views * args.tokens;
    rows = args.clouds * args.tokens;
    stride = args.views * 3 * args.inner;
    width = args.inner / args.heads;
    qkv = static_cast<const Q*>(args.qkv) + view * 3 * args.inner;
    order = args.order + view * rows;
    segment = args.segment + view * rows;
    start = args.start + view * (rows + 1);
  }
  __device__ const Q* query(int64_t token, int64_t head) const { return qkv + token * stride + head * width; }
  __device__ const Q* key(int64_t token, int64_t head) const { return query(token, head) + args.inner; }
  __device__ const Q* value(int64_t token, int64_t head) const { return key(token, head) + args.inner; }
  template <typename A, typename B>
  __device__ float dot(const A* a, const B* b) const {
    float sum = 0.0f;
    for (int64_t d = 0; d < width; d++) sum = fmaf(widen(a[d]), widen(b[d]), sum);
    return sum;
  }
};

template <typename Q>
__global__ void __launch_bounds__(kThreads)
    attention_fwd_kernel(Guided args, float* __restrict__ heads,  // [V, R, K]
                         float* __restrict__ inner) {             // [V, R, K]
  const Cells<Q> cells(args);
  const int pad = coefficients(args.inner), chunks = (cells.width + kWide - 1) / kWide;
  const int count = args.tokens, num_heads = args.heads, tasks = count * num_heads * chunks;
  heads += cells.view * cells.rows * pad;
  inner += cells.view * cells.rows * pad;
  const float* keep = args.keep ? args.keep + cells.view * cells.rows : nullptr;
  for (int i = threadIdx.x; i < tasks; i += kThreads) {
    const int place = i / (num_heads * chunks), head = i / chunks % num_heads, d = i % chunks * kWide;
    const int64_t token = cells.order[cells.base + place];
    const int64_t cell = cells.segment[token], begin = cells.start[cell], end = cells.start[cell + 1];
    const Q* query = cells.query(token, head);
    float most = -INFINITY;
    for (int64_t j = begin; j < end; j++) {
      most = fmaxf(most, args.scale * cells.dot(query, cells.key(cells.order[j], head)));
    }
    float sum = 0.0f, out[kWide] = {};
    for (int64_t j = begin; j < end; j++) {
      const int64_t other = cells.order[j];
      const float p = __expf(args.scale * cells.dot(query, cells.key(other, head)) - most);
      const Q* value = cells.value(other, head) + d;
      sum += p;
#pragma unroll
      for (int w = 0; w < kWide; w++) {
        if (d + w < cells.width) out[w] = fmaf(p, widen(value[w]), out[w]);
      }
    }
    const float factor = keep ? keep[token] : 1.0f;
#pragma unroll
    for (int w = 0; w < kWide; w++) {
      if (d + w < cells.width) heads[token * pad + head * cells.width + d + w] = out[w] / sum * factor;
    }
  }
  for (int i = threadIdx.x; i < count; i += kThreads) {
    for (int k = args.inner; k < pad; k++) {
      heads[(cells.base + i) * pad + k] = k > args.inner ? 0.0f : keep ? keep[cells.base + i] : 1.0f;
    }
  }
  __syncthreads();
  const int held = args.count[cells.view * args.clouds + blockIdx.x / args.views];
  for (int i = threadIdx.x; i < held * pad; i += kThreads) {
    const int64_t cell = cells.base + i / pad;
    const int k = i % pad;
    const int64_t begin = cells.start[cell], end = cells.start[cell + 1];
    float sum = 0.0f;
    for (int64_t j = begin; j < end; j++) sum += heads[cells.order[j] * pad + k];
    inner[cell * pad + k] = sum / float(end - begin);
  }
}

// grad_heads [slices, V, R, K]: of a token (`by_token`) or of its cell, in parts to add up.
template <typename Q>
__global__ void __launch_bounds__(kThreads)
    attention_bwd_kernel(GuidedBackward args, const float* __restrict__ parts, int64_t slices, bool by_token,
                         float* __restrict__ grad_heads,  // [V, R, K]
                         float* __restrict__ sums) {      // [V, R, H, 2]: log of the softmax's sum, delta
  const Cells<Q> cells(args);
  const int pad = coefficients(args.inner), chunks = (cells.width + kWide - 1) / kWide;
  const int count = args.tokens, num_heads = args.heads, width = args.inner;
  const float* keep = args.keep ? args.keep + cells.view * cells.rows : nullptr;
  parts += cells.view * cells.rows * pad;
  grad_heads += cells.view * cells.rows * pad;
  sums += cells.view * cells.rows * args.heads * 2;
  for (int i = threadIdx.x; i < count * width; i += kThreads) {
    const int64_t token = cells.base + i / width;
    const int k = i % width;
    const int64_t row = by_token ? token : cells.segment[token];
    float sum = 0.0f;
    for (int64_t s = 0; s < slices; s++) sum += parts[(s * args.views * cells.rows + row) * pad + k];
    grad_heads[token * pad + k] = keep ? sum * keep[token] : sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count * num_heads; i += kThreads) {
    const int64_t token = cells.order[cells.base + i / num_heads];
    const int head = i % num_heads;
    const int64_t cell = cells.segment[token], begin = cells.start[cell], end = cells.start[cell + 1];
    const Q* query = cells.query(token, head);
    const float* grad = grad_heads + token * pad + head * cells.width;
    float most = -INFINITY, sum = 0.0f, delta = 0.0f;
    for (int64_t j = begin; j < end; j++) {
      most = fmaxf(most, args.scale * cells.dot(query, cells.key(cells.order[j], head)));
    }
    for (int64_t j = begin; j < end; j++) {
      const int64_t other = cells.order[j];
      const float p = __expf(args.scale * cells.dot(query, cells.key(other, head)) - most);
      sum += p;
      delta = fmaf(p, cells.dot(cells.value(other, head), grad), delta);
    }
    sums[(token * args.heads + head) * 2] = most + logf(sum);
    sums[(token * args.heads + head) * 2 + 1] = delta / sum;
  }
  __syncthreads();
  Q* out = static_cast<Q*>(args.grad_qkv) + cells.view * 3 * args.inner;
  for (int i = threadIdx.x; i < count * num_heads * chunks; i += kThreads) {
    const int place = i / (num_heads * chunks), head = i / chunks % num_heads, d = i % chunks * kWide;
    const int64_t token = cells.order[cells.base + place];
    const int64_t cell = cells.segment[token], begin = cells.start[cell], end = cells.start[cell + 1];
    const Q *query = cells.query(token, head), *key = cells.key(token, head);
    const Q* value = cells.value(token, head);
    const float* grad = grad_heads + token * pad + head * cells.width;
    const float* own = sums + (token * args.heads + head) * 2;
    float dq[kWide] = {}, dk[kWide] = {}, dv[kWide] = {};
    for (int64_t j = begin; j < end; j++) {
      const int64_t other = cells.order[j];
      const Q *far_query = cells.query(other, head), *far_key = cells.key(other, head);
      const float* far_grad = grad_heads + other * pad + head * cells.width;
      const float* far = sums + (other * args.heads + head) * 2;
      const float p = __expf(args.scale * cells.dot(query, far_key) - own[0]);
      const float ds = p * (cells.dot(cells.value(other, head), grad) - own[1]) * args.scale;
      const float far_p = __expf(args.scale * cells.dot(far_query, key) - far[0]);
      const float far_ds = far_p * (cells.dot(value, far_grad) - far[1]) * args.scale;
#pragma unroll
      for (int w = 0; w < kWide; w++) {
        if (d + w < cells.width) {
          dq[w] = fmaf(ds, widen(far_key[d + w]), dq[w]);
          dk[w] = fmaf(far_ds, widen(far_query[d + w]), dk[w]);
          dv[w] = fmaf(far_p, far_grad[d + w], dv[w]);
        }
      }
    }
    Q* row = out + token * cells.stride + head * cells.width + d;
#pragma unroll
    for (int w = 0; w < kWide; w++) {
      if (d + w < cells.width) {
        narrow(dq[w], row + w);
        narrow(dk[w], row + args.inner + w);
        narrow(dv[w], row + 2 * args.inner + w);
      }
    }
  }
}

}  // namespace

int attention_forward(const Guided& args, float* heads, float* inner, cudaStream_t stream) {
  with_type(args.qkv_dtype, [&](auto type) {
    attention_fwd_kernel<decltype(type)>
        <<<static_cast<int>(args.clouds * args.views), kThreads, 0, stream>>>(args, heads, inner);
  });
  return cudaGetLastError();
}

int attention_backward(const GuidedBackward& args, const float* parts, int64_t slices, bool by_token,
                       float* grad_heads, float* sums, cudaStream_t stream) {
  with_type(args.qkv_dtype, [&](auto type) {
    attention_bwd_kernel<decltype(type)><<<static_cast<int>(args.clouds * args.views), kThreads, 0, stream>>>(
        args, parts, slices, by_token, grad_heads, sums);
  });
  return cudaGetLastError();
}

}  // namespace guided
}  // namespace any2point
