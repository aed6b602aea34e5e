// Gradient of the attention among the tokens of each cell: a block per cloud, view and part of the heads, all
// that it reads in shared memory (or what is too much for it, in workspace), fetched at once; a thread per
// token and head. More blocks sum up the projection's gradient.
#include <type_traits>

#include "guided_aggregate/device.cuh"
#include "guided_aggregate/passes.h"

namespace any2point {
namespace guided {
namespace {

constexpr int kMostThreads = 384;  // so that three blocks have room on a processor

// Sums over the clouds of the parts [B, V, M + 1, C] of the projection's gradient, by blocks beyond those of
// the attention.
template <int N>
__device__ void sum_projection(const GuidedBackward& args, const float* __restrict__ parts, int64_t block) {
  const int64_t columns = args.views * (args.inner + 1) * args.channels;
  const int64_t i = (block * blockDim.x + threadIdx.x) * N;
  if (i >= columns) return;
  Lane<N> sum = zero<N>();
#pragma unroll 8
  for (int64_t b = 0; b < args.clouds; b++) add(&sum, 1.0f, load<N>(parts + b * columns + i));
  store(args.grad_proj + i, sum);
}

// Parts of the heads that blocks share: two or three, if they are equal.
__host__ __device__ inline int parts_of(int64_t heads) { return heads % 2 == 0 ? 2 : heads % 3 == 0 ? 3 : 1; }

// Offsets into the memory of a block.
struct Layout {
  int order;  // int [S]: tokens by place
  int begin;  // int [S]: first place of a token's cell
  int end;    // int [S]
  int row;    // int [S]: of a token's gradient
  int keep;   // float [S]
  int qkv;    // float [S, 3M], here and below of the part's heads
  int grad;   // float [S, M], by row
  int sums;   // float2 [S, H]: log of the softmax's sum; product of the heads with their gradient
  int bytes = 0;

  __host__ __device__ explicit Layout(const Guided& args) {
    const int tokens = static_cast<int>(args.tokens), parts = parts_of(args.heads);
    const int inner = static_cast<int>(args.inner) / parts;
    order = take(4 * tokens);
    begin = take(4 * tokens);
    end = take(4 * tokens);
    row = take(4 * tokens);
    keep = take(4 * tokens);
    qkv = take(12 * tokens * inner);
    grad = take(4 * tokens * inner);
    sums = take(8 * tokens * (static_cast<int>(args.heads) / parts));
  }
  __host__ __device__ int take(int size) {
    const int at = bytes;
    bytes += (size + 15) / 16 * 16;
    return at;
  }
};

// kHead: width of a head, 0 for any.
template <typename Q, int kHead, bool kShared>
__global__ void __launch_bounds__(kMostThreads, kHead > 0 ? 3 : 1)
    attention_kernel(GuidedBackward args, const float* __restrict__ parts,  // [slices, V, R, K]
                     int slices, bool by_token, char* workspace,
                     const float* __restrict__ proj_parts) {  // [B, V, M + 1, C]
  const int64_t beyond = int64_t(blockIdx.x) - args.clouds * args.views;
  if (beyond >= 0) {
    const int64_t number = beyond * gridDim.y + blockIdx.y;
    return args.channels % 4 == 0 ? sum_projection<4>(args, proj_parts, number)
                                  : sum_projection<1>(args, proj_parts, number);
  }
  extern __shared__ float4 room[];
  const Layout layout(args);
  const int64_t block = int64_t(blockIdx.y) * args.clouds * args.views + blockIdx.x;
  char* shared = kShared ? reinterpret_cast<char*>(room) : workspace + block * layout.bytes;
  int32_t* order = reinterpret_cast<int32_t*>(shared + layout.order);
  int32_t* begins = reinterpret_cast<int32_t*>(shared + layout.begin);
  int32_t* ends = reinterpret_cast<int32_t*>(shared + layout.end);
  int32_t* row_of = reinterpret_cast<int32_t*>(shared + layout.row);
  float* keep = reinterpret_cast<float*>(shared + layout.keep);
  float* qkv = reinterpret_cast<float*>(shared + layout.qkv);
  float* grads = reinterpret_cast<float*>(shared + layout.grad);
  float2* sums = reinterpret_cast<float2*>(shared + layout.sums);
  const int tokens = static_cast<int>(args.tokens), all = static_cast<int>(args.inner);
  const int heads = static_cast<int>(args.heads) / gridDim.y;
  const int width = kHead > 0 ? kHead : all / static_cast<int>(args.heads);
  const int inner = heads * width, pad = static_cast<int>(coefficients(all)), wide = 3 * inner;
  const int64_t view = blockIdx.x % args.views, cloud = blockIdx.x / args.views;
  const int64_t rows = args.clouds * args.tokens, base = cloud * args.tokens, stride = args.views * 3 * all;
  const int64_t own_at = base * stride + view * 3 * all + blockIdx.y * inner;
  constexpr int kChannels = kHead > 0 ? kHead : 1;  // read at once
  constexpr int kSums = kHead > 0 ? kHead : 4;      // summed up at once

  // Loads that wait for one another have others between them.
  const int64_t layer = view * rows + base;
  const int mine = static_cast<int>(threadIdx.x);
  const bool inside = mine < tokens;
  const int64_t cell = inside ? args.segment[layer + mine] : 0, place = inside ? args.order[layer + mine] : 0;
  const float kept_token = inside && args.keep ? args.keep[layer + mine] : 1.0f;
  const Q* const from = static_cast<const Q*>(args.qkv) + own_at;
  const int pieces = wide / kChannels, of_each = inner / kChannels;
#pragma unroll 4
  for (int i = threadIdx.x; i < tokens * pieces; i += blockDim.x) {
    const int token = i / pieces, piece = i - token * pieces, which = piece / of_each;
    const int k = which * all + (piece - which * of_each) * kChannels;
    store(qkv + i * kChannels, load<kChannels>(from + token * stride + k));
  }
  const int32_t* const start = args.start + view * (rows + 1);
  const int32_t first = inside ? start[cell] : 0, last = inside ? start[cell + 1] : 0;
  const int own = by_token ? tokens : args.count[view * args.clouds + cloud];
  parts += (view * rows + base) * pad + blockIdx.y * inner;
  for (int i = threadIdx.x; i < own * of_each; i += blockDim.x) {
    const int row = i / of_each, k = (i - row * of_each) * kChannels;
    Lane<kChannels> sum = zero<kChannels>();
#pragma unroll 12
    for (int s = 0; s < slices; s++) {
      add(&sum, 1.0f, load<kChannels>(parts + s * args.views * rows * pad + row * pad + k));
    }
    store(grads + i * kChannels, sum);
  }
  const auto keep_token = [&](int i, int64_t of_cell, int64_t token, int32_t begin, int32_t end, float kept) {
    order[i] = static_cast<int>(token - base);
    row_of[i] = by_token ? i : static_cast<int>(of_cell - base);
    keep[i] = kept;
    begins[i] = static_cast<int>(begin - base);
    ends[i] = static_cast<int>(end - base);
  };
  if (inside) keep_token(mine, cell, place, first, last, kept_token);
  for (int i = mine + blockDim.x; i < tokens; i += blockDim.x) {
    const int64_t its = args.segment[layer + i];
    keep_token(i, its, args.order[layer + i], start[its], start[its + 1],
               args.keep ? args.keep[layer + i] : 1.0f);
  }
  __syncthreads();

  const auto dot = [&](const float* a, const float* b) {
    float sum = 0.0f;
    for (int d = 0; d < width; d += kChannels) {
      const Lane<kChannels> left = load<kChannels>(a + d), right = load<kChannels>(b + d);
#pragma unroll
      for (int n = 0; n < kChannels; n++) sum = fmaf(left.at[n], right.at[n], sum);
    }
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
  Q* const out = static_cast<Q*>(args.grad_qkv) + own_at;
  for (int i = threadIdx.x; i < tokens * heads; i += blockDim.x) {
    const int token = i / heads, number = i - token * heads, head = number * width;
    const float *query = qkv + token * wide + head, *key = query + inner, *value = key + inner;
    const float* grad = grads + row_of[token] * inner + head;
    const int begin = begins[token], end = ends[token];
    const float2 mine = sums[i];
    const float kept = keep[token];
    for (int first = 0; first < width; first += kSums) {
      const auto each = [&](const auto& function) {
#pragma unroll
        for (int d = 0; d < kSums; d += kChannels) {
          if (kHead > 0 || first + d < width) function(d / kChannels, first + d);
        }
      };
      Lane<kChannels> dq[kSums / kChannels] = {}, dk[kSums / kChannels] = {}, dv[kSums / kChannels] = {};
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
        each([&](int i, int d) {
          add(&dq[i], ds, load<kChannels>(far_key + d));
          add(&dk[i], far_ds, load<kChannels>(far_query + d));
          add(&dv[i], far_p * far_kept, load<kChannels>(far_grad + d));
        });
      }
      each([&](int i, int d) {
        Q* const row = out + token * stride + head + d;
        store(row, dq[i]);
        store(row + all, dk[i]);
        store(row + 2 * all, dv[i]);
      });
    }
  }
}

}  // namespace

int64_t attention_backward_workspace(const Guided& args) {
  const int64_t bytes = Layout(args).bytes;
  return bytes <= shared_limit(kOptIn) ? 0 : args.clouds * args.views * parts_of(args.heads) * bytes;
}

int attention_backward(const GuidedBackward& args, const float* parts, int64_t slices, bool by_token,
                       const float* proj_parts, void* workspace, cudaStream_t stream) {
  const int heads = parts_of(args.heads), bytes = Layout(args).bytes;
  const int64_t needed = (args.tokens * (args.heads / heads) + kWarp - 1) / kWarp * kWarp;
  const int threads = static_cast<int>(needed < kMostThreads ? needed : kMostThreads);
  const int64_t columns = args.views * (args.inner + 1) * args.channels;
  const int64_t each = int64_t(threads) * heads * (args.channels % 4 == 0 ? 4 : 1);
  const dim3 blocks(static_cast<unsigned>(args.clouds * args.views + (columns + each - 1) / each),
                    static_cast<unsigned>(heads));
  char* const memory = static_cast<char*>(workspace);
  const bool fits = attention_backward_workspace(args) == 0;
  int error = 0;
  const auto launch = [&](auto type, auto head, auto shared) {
    const auto kernel = attention_kernel<decltype(type), decltype(head)::value, decltype(shared)::value>;
    const int own = decltype(shared)::value ? bytes : 0;
    error = allow_shared(kernel, own);
    if (error) return;
    kernel<<<blocks, threads, own, stream>>>(args, parts, static_cast<int>(slices), by_token, memory,
                                             proj_parts);
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
