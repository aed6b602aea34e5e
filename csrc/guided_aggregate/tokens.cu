// A block per token (or several in turn): activations of its segments' rows, how they agree, and what follows
// for the blend and for its gradient.
#include "guided_aggregate/passes.h"
#include "guided_aggregate/rows.cuh"

namespace any2point {
namespace guided {
namespace {

// A block's token: its activations, and how they agree.
template <typename T, int N>
struct Token {
  const Guided& args;
  const float *mean, *deviation, *z;
  float* sums;   // shared: [4 V + 2]
  float* warps;  // shared: [warps, 16]
  int64_t row, rows;

  __device__ Token(const Guided& args, const float* mean, const float* deviation, const float* z,
                   float* shared)
      : args(args), mean(mean), deviation(deviation), z(z), sums(shared) {
    warps = shared + 4 * args.views + 2;
    row = blockIdx.x;
    rows = args.clouds * args.tokens;
  }
  __device__ Lane<N> activation(int64_t layer, int64_t c) const {
    const int32_t segment = args.segment[layer * rows + row];
    if (segment < 0) return zero<N>();
    const Norm<N> norm(args, mean, deviation, layer, c);
    Lane<N> lane = load<N>(z + (layer * rows + segment) * args.channels + c);
#pragma unroll
    for (int n = 0; n < N; n++) lane.at[n] = gelu(norm(n, lane.at[n])).value;
    return lane;
  }
  __device__ float dot(int64_t view) const { return sums[4 * view]; }
  __device__ float norm2(int64_t view) const { return sums[4 * view + 1]; }
  __device__ float pull(int64_t view) const { return sums[4 * view + 2]; }
  __device__ float weight(int64_t view) const { return sums[4 * view + 3]; }
  __device__ float space_norm2() const { return sums[4 * args.views]; }
  __device__ float total() const { return sums[4 * args.views + 1]; }  // of the weights before division

  // By all threads: dot, norm2, with `grad` its product with the activations (pull), and weights that sum
  // to 1.
  __device__ void agreements(const T* grad) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    for (int64_t view = 0; view < args.views; view++) {
      float value[4] = {};
      for (int64_t c = threadIdx.x * N; c < args.channels; c += kThreads * N) {
        const Lane<N> g = activation(view, c), s = activation(args.views, c);
        Lane<N> d = zero<N>();
        if (grad) d = load<N>(grad + row * args.channels + c);
#pragma unroll
        for (int n = 0; n < N; n++) {
          value[0] = fmaf(g.at[n], s.at[n], value[0]);
          value[1] = fmaf(g.at[n], g.at[n], value[1]);
          value[2] = fmaf(g.at[n], d.at[n], value[2]);
          value[3] = fmaf(s.at[n], s.at[n], value[3]);
        }
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float sum = sum_of_warp(value[i]);
        if (lane == 0) warps[warp * 4 + i] = sum;
      }
      __syncthreads();
      if (threadIdx.x < 4) {
        float sum = 0.0f;
        for (int w = 0; w < kWarps; w++) sum += warps[w * 4 + threadIdx.x];
        sums[threadIdx.x == 3 ? 4 * args.views : 4 * view + threadIdx.x] = sum;
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      float total = 0.0f;
      const float space = fmaxf(sqrtf(space_norm2()), kNorm);
      for (int64_t view = 0; view < args.views; view++) {
        const float cosine = dot(view) / (fmaxf(sqrtf(norm2(view)), kNorm) * space);
        sums[4 * view + 3] = (cosine + 1.0f) / 2.0f;
        total += sums[4 * view + 3];
      }
      total = fmaxf(total, kTiny);
      sums[4 * args.views + 1] = total;
      for (int64_t view = 0; view < args.views; view++) sums[4 * view + 3] /= total;
    }
    __syncthreads();
  }
};

inline int token_shared(int64_t views) { return static_cast<int>(4 * (4 * views + 2 + kWarps * 4)); }

// Any number of views and channels: activations twice, for the cosines and for the blend.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    blend_kernel(GuidedForward args, const float* __restrict__ z) {  // [L, R, C]
  extern __shared__ float shared[];
  const Token<T, N> token(args, args.mean, args.deviation, z, shared);
  const Lane<N> none = zero<N>();
  if (args.ensemble == Ensemble::adaptive) {
    token.agreements(nullptr);
    for (int64_t i = threadIdx.x; i <= 2 * args.views; i += kThreads) {
      const int64_t view = i % args.views;
      args.agreement[i * token.rows + token.row] = i == 2 * args.views ? token.space_norm2()
                                                   : i < args.views    ? token.dot(view)
                                                                       : token.norm2(view);
    }
  }
  const T* features = static_cast<const T*>(args.features) + token.row * args.channels;
  for (int64_t c = threadIdx.x * N; c < args.channels; c += kThreads * N) {
    Lane<N> blend = none;
    for (int64_t v = 0; v < args.views; v++) {
      const Lane<N> g = token.activation(v, c);
      const float weight = args.ensemble == Ensemble::adaptive ? token.weight(v) : 1.0f / args.views;
#pragma unroll
      for (int n = 0; n < N; n++) {
        if (args.ensemble != Ensemble::max) {
          blend.at[n] = fmaf(weight, g.at[n], blend.at[n]);
        } else if (v == 0 || exceeds(g.at[n], blend.at[n])) {
          blend.at[n] = g.at[n];
        }
      }
    }
    store_out<T>(args, token.row * args.channels + c, load<N>(features + c), args.coefficient, blend);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    factors_kernel(GuidedBackward args, const float* __restrict__ z,  // [L, R, C]
                   Factors work) {
  extern __shared__ float shared[];
  const Token<T, N> token(args, args.mean, args.deviation, z, shared);
  const T* grad = static_cast<const T*>(args.grad);
  const int64_t views = args.views;
  float* factors = work.factors + token.row;
  const auto put = [&](int64_t view, float of_grad, float of_space, float of_own) {
    factors[view * token.rows] = of_grad;
    factors[(views + view) * token.rows] = of_space;
    factors[(2 * views + view) * token.rows] = of_own;
  };
  if (args.ensemble == Ensemble::mean) {
    for (int64_t v = threadIdx.x; v < views; v += kThreads) put(v, args.coefficient / views, 0.0f, 0.0f);
    return;
  }
  if (args.ensemble == Ensemble::max) {
    for (int64_t v = threadIdx.x; v < views; v += kThreads) put(v, args.coefficient, 0.0f, 0.0f);
    // As of maxima taken one after the other: each halves the gradient between equal values.
    for (int64_t c = threadIdx.x * N; c < args.channels; c += kThreads * N) {
      Lane<N> most = token.activation(0, c);
      int equal[N], seen[N] = {};
#pragma unroll
      for (int n = 0; n < N; n++) equal[n] = 1;
      for (int64_t v = 1; v < views; v++) {
        const Lane<N> g = token.activation(v, c);
#pragma unroll
        for (int n = 0; n < N; n++) {
          equal[n] = exceeds(g.at[n], most.at[n]) ? 1 : equal[n] + (g.at[n] == most.at[n]);
          if (exceeds(g.at[n], most.at[n])) most.at[n] = g.at[n];
        }
      }
      for (int64_t v = 0; v < views; v++) {
        const Lane<N> g = token.activation(v, c);
        Lane<N> share;
#pragma unroll
        for (int n = 0; n < N; n++) {
          const bool attains = g.at[n] == most.at[n];
          share.at[n] = attains ? exp2f(float(max(seen[n], 1) - equal[n])) : 0.0f;
          seen[n] += attains;
        }
        store(work.shares + (v * token.rows + token.row) * args.channels + c, share);
      }
    }
    return;
  }
  token.agreements(grad);
  __shared__ float own;
  if (threadIdx.x == 0) {
    const float space = fmaxf(sqrtf(token.space_norm2()), kNorm);
    float mean = 0.0f, sum = 0.0f;
    for (int64_t v = 0; v < views; v++) mean = fmaf(token.weight(v), token.pull(v), mean);
    for (int64_t v = 0; v < views; v++) {
      const float norm = fmaxf(sqrtf(token.norm2(v)), kNorm), both = norm * space;
      const float cosine = token.dot(v) / both;
      const float du = 0.5f * args.coefficient * (token.pull(v) - mean) / token.total();
      put(v, args.coefficient * token.weight(v), du / both, norm > kNorm ? -du * cosine / norm / norm : 0.0f);
      token.sums[4 * v] = du / both;
      sum -= du * cosine;
    }
    own = space > kNorm ? sum / space / space : 0.0f;
  }
  __syncthreads();
  for (int64_t c = threadIdx.x * N; c < args.channels; c += kThreads * N) {
    const Lane<N> s = token.activation(views, c);
    Lane<N> ds = zero<N>();
    add(&ds, own, s);
    for (int64_t v = 0; v < views; v++) add(&ds, token.sums[4 * v], token.activation(v, c));
    store(work.space + token.row * args.channels + c, s);
    store(work.grad_space + token.row * args.channels + c, ds);
  }
}

}  // namespace

int blend_each_token(const GuidedForward& args, const float* z, cudaStream_t stream) {
  return with_packs(args, [&](auto type, auto width) {
    const int blocks = static_cast<int>(args.clouds * args.tokens), shared = token_shared(args.views);
    const auto kernel = blend_kernel<decltype(type), decltype(width)::value>;
    kernel<<<blocks, kThreads, shared, stream>>>(args, z);
    return static_cast<int>(cudaGetLastError());
  });
}

int token_factors(const GuidedBackward& args, const float* z, const Factors& factors, cudaStream_t stream) {
  return with_packs(args, [&](auto type, auto width) {
    const int blocks = static_cast<int>(args.clouds * args.tokens), shared = token_shared(args.views);
    using T = decltype(type);
    factors_kernel<T, decltype(width)::value><<<blocks, kThreads, shared, stream>>>(args, z, factors);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace guided
}  // namespace any2point
