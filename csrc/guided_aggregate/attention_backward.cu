// Gradient of the attention among the tokens of each cell: a block per cloud and view, all that it reads in
// shared memory (or what is too much for it, in workspace), fetched at once; a thread per token and head.
#include <type_traits>

#include "guided_aggregate/device.cuh"
#include "guided_aggregate/passes.h"

namespace any2point {
namespace guided {
namespace {

constexpr int kMostThreads = 384;  // so that two blocks have room on a processor

// Offsets into the memory of a block.
struct Layout {
  int order;  // int [S]: tokens by place
  int begin;  // int [S]: first place of a token's cell
  int end;    // int [S]
  int row;    // int [S]: of a token's gradient
  int keep;   // float [S]
  int qkv;    // float [S, 3M]
  int grad;   // float [S, M], by row
  int sums;   // float2 [S, H]: log of the softmax's sum; product of the heads with their gradient
  int bytes = 0;

  __host__ __device__ explicit Layout(const Guided& args) {
    const int tokens = static_cast<int>(args.tokens), inner = static_cast<int>(args.inner);
    order = take(4 * tokens);
    begin = take(4 * tokens);
    end = take(4 * tokens);
    row = take(4 * tokens);
    keep = take(4 * tokens);
    qkv = take(12 * tokens * inner);
    grad = take(4 * tokens * inner);
    sums = take(8 * tokens * static_cast<int>(args.heads));
  }
  __host__ __device__ int take(int size) {
    const int at = bytes;
    bytes += (size + 15) / 16 * 16;
    return at;
  }
};

// kHead: width of a head, 0 for any.
template <typename Q, int kHead, bool kShared>
__global__ void __launch_bounds__(kMostThreads)
    attention_kernel(GuidedBackward args, const float* __restrict__ parts,  // [slices, V, R, K]
                     int slices, bool by_token, char* workspace) {
  extern __shared__ float4 room[];
  const Layout layout(args);
  char* shared = kShared ? reinterpret_cast<char*>(room) : workspace + int64_t(blockIdx.x) * layout.bytes;
  int32_t* order = reinterpret_cast<int32_t*>(shared + layout.order);
  int32_t* begins = reinterpret_cast<int32_t*>(shared + layout.begin);
  int32_t* ends = reinterpret_cast<int32_t*>(shared + layout.end);
  int32_t* row_of = reinterpret_cast<int32_t*>(shared + layout.row);
  float* keep = reinterpret_cast<float*>(shared + layout.keep);
  float* qkv = reinterpret_cast<float*>(shared + layout.qkv);
  float* grads = reinterpret_cast<float*>(shared + layout.grad);
  float2* sums = reinterpret_cast<float2*>(shared + layout.sums);
  const int tokens = static_cast<int>(args.tokens), inner = static_cast<int>(args.inner);
  const int heads = static_cast<int>(args.heads), width = kHead > 0 ? kHead : inner / heads;
  const int pad = static_cast<int>(coefficients(inner)), wide = 3 * inner;
  const int64_t view = blockIdx.x % args.views, cloud = blockIdx.x / args.views;
  const int64_t rows = args.clouds * args.tokens, base = cloud * args.tokens, stride = args.views * wide;
  const Q* from = static_cast<const Q*>(args.qkv) + base * stride + view * wide;

#pragma unroll 4
  for (int i = threadIdx.x; i < tokens * wide; i += blockDim.x) {
    const int token = i / wide, k = i - token * wide;
    qkv[i] = widen(from[token * stride + k]);
  }
  const int own = by_token ? tokens : args.count[view * args.clouds + cloud];
  parts += (view * rows + base) * pad;
  for (int i = threadIdx.x; i < own * inner; i += blockDim.x) {
    const int row = i / inner, k = i - row * inner;
    float sum = 0.0f;
#pragma unroll 12
    for (int s = 0; s < slices; s++) sum += parts[s * args.views * rows * pad + row * pad + k];
    grads[i] = sum;
  }
  for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
    const int64_t cell = args.segment[view * rows + base + i];
    const int32_t* start = args.start + view * (rows + 1) + cell;
    order[i] = static_cast<int>(args.order[view * rows + base + i] - base);
    row_of[i] = by_token ? i : static_cast<int>(cell - base);
    keep[i] = args.keep ? args.keep[view * rows + base + i] : 1.0f;
    begins[i] = static_cast<int>(start[0] - base);
    ends[i] = static_cast<int>(start[1] - base);
  }
  __syncthreads();

  const auto dot = [&](const float* a, const float* b) {
    float sum = 0.0f;
#pragma unroll
    for (int d = 0; d < (kHead > 0 ? kHead : width); d++) sum = fmaf(a[d], b[d], sum);
    return sum;
  };
  for (int i = threadIdx.x; i < tokens * heads; i += blockDim.x) {
    const int token = i / heads, head = (i - token * heads) * width;
    const float *query = qkv + token * wide + head, *grad = grads + row_of[token] * inner + head;
    const int begin = begins[token], end = ends[token];
    float most = -INFINITY, sum = 0.0f, delta = 0.0f;
    for (int j = begin; j < end; j++) {
      most = fmaxf(most, args.scale * dot(query, qkv + order[j] * wide + inner + head));
    }
    for (int j = begin; j < end; j++) {
      const float* key = qkv + order[j] * wide + inner + head;
      const float p = __expf(args.scale * dot(query, key) - most);
      sum += p;
      delta = fmaf(p, dot(key + inner, grad), delta);
    }
    sums[i] = make_float2(most + logf(sum), delta / sum * keep[token]);
  }
  __syncthreads();
  Q* out = static_cast<Q*>(args.grad_qkv) + base * stride + view * wide;
  constexpr int kChannels = kHead > 0 ? kHead : 4;  // at once
  for (int i = threadIdx.x; i < tokens * heads; i += blockDim.x) {
    const int token = i / heads, number = i - token * heads, head = number * width;
    const float *query = qkv + token * wide + head, *key = query + inner, *value = key + inner;
    const float* grad = grads + row_of[token] * inner + head;
    const int begin = begins[token], end = ends[token];
    const float2 mine = sums[i];
    const float kept = keep[token];
    for (int first = 0; first < width; first += kChannels) {
      float dq[kChannels] = {}, dk[kChannels] = {}, dv[kChannels] = {};
      for (int j = begin; j < end; j++) {
        const int other = order[j];
        const float *far_query = qkv + other * wide + head, *far_key = far_query + inner;
        const float* far_grad = grads + row_of[other] * inner + head;
        const float2 far = sums[other * heads + number];
        const float far_kept = keep[other];
        const float p = __expf(args.scale * dot(query, far_key) - mine.x);
        const float ds = p * (kept * dot(far_key + inner, grad) - mine.y) * args.scale;
        const float far_p = __expf(args.scale * dot(far_query, key) - far.x);
        const float far_ds = far_p * (far_kept * dot(value, far_grad) - far.y) * args.scale;
#pragma unroll
        for (int d = 0; d < kChannels; d++) {
          if (kHead == 0 && first + d >= width) continue;
          dq[d] = fmaf(ds, far_key[first + d], dq[d]);
          dk[d] = fmaf(far_ds, far_query[first + d], dk[d]);
          dv[d] = fmaf(far_p * far_kept, far_grad[first + d], dv[d]);
        }
      }
      Q* row = out + token * stride + head + first;
#pragma unroll
      for (int d = 0; d < kChannels; d++) {
        if (kHead == 0 && first + d >= width) continue;
        narrow(dq[d], row + d);
        narrow(dk[d], row + inner + d);
        narrow(dv[d], row + 2 * inner + d);
      }
    }
  }
}

}  // namespace

int64_t attention_backward_workspace(const Guided& args) {
  const int64_t bytes = Layout(args).bytes;
  return bytes <= shared_limit(kOptIn) ? 0 : args.clouds * args.views * bytes;
}

int attention_backward(const GuidedBackward& args, const float* parts, int64_t slices, bool by_token,
                       void* workspace, cudaStream_t stream) {
  const int blocks = static_cast<int>(args.clouds * args.views), bytes = Layout(args).bytes;
  const int64_t needed = (args.tokens * args.heads + kWarp - 1) / kWarp * kWarp;
  const int threads = static_cast<int>(needed < kMostThreads ? needed : kMostThreads);
  char* const memory = static_cast<char*>(workspace);
  const bool fits = attention_backward_workspace(args) == 0;
  int error = 0;
  const auto launch = [&](auto type, auto head, auto shared) {
    const auto kernel = attention_kernel<decltype(type), decltype(head)::value, decltype(shared)::value>;
    const int own = decltype(shared)::value ? bytes : 0;
    error = allow_shared(kernel, own);
    if (error) return;
    kernel<<<blocks, threads, own, stream>>>(args, parts, static_cast<int>(slices), by_token, memory);
  };
  with_type(args.qkv_dtype, [&](auto type) {
    if (!fits) {
      launch(type, std::integral_constant<int, 0>{}, std::false_type{});
    } else if (args.inner == 2 * args.heads) {
      launch(type, std::integral_constant<int, 2>{}, std::true_type{});
    } else {
      launch(type, std::integral_constant<int, 0>{}, std::true_type{});
    }
  });
  return error ? error : cudaGetLastError();
}

}  // namespace guided
}  // namespace any2point
