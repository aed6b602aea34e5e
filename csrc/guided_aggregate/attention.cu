// Attention among the tokens of each cell: a block per cloud and view, a thread per token, head and pair of
// channels. Where they fit, queries, keys and values are brought to shared memory first, sorted by cell:
// cells hold a few tokens and heads are narrow, so that otherwise every thread would wait for memory many
// times.
#include <type_traits>

#include "guided_aggregate/device.cuh"
#include "guided_aggregate/passes.h"

namespace any2point {
namespace guided {
namespace {

constexpr int kWide = 2;  // channels of a head per thread
constexpr int64_t kRoom = 96 << 10;

// Tokens of one cloud and view by place: their position when sorted by cell. kStage: in shared memory; kHead:
// width of a head, 0 for any.
template <typename Q, bool kStage, int kHead>
struct Cells {
  using Element = std::conditional_t<kStage, float, Q>;
  const Guided& args;
  int64_t view, base, rows, stride;  // base: first token; stride: of qkv
  int count, inner, pitch, width;    // S, M, of staged rows, of a head
  const Q* qkv;
  const int32_t *order, *segment, *start;
  float* staged;    // shared: [S, pitch]
  int32_t* bounds;  // shared: [S, 3]: begin and end of the cell, token
  float* memory;    // what is free

  __device__ Cells(const Guided& args, float* shared) : args(args) {
    view = blockIdx.x % args.views;
    base = blockIdx.x / args.views * args.tokens;
    rows = args.clouds * args.tokens;
    stride = args.views * 3 * args.inner;
    count = static_cast<int>(args.tokens);
    inner = static_cast<int>(args.inner);
    width = kHead > 0 ? kHead : static_cast<int>(args.inner / args.heads);
    pitch = 3 * inner | 1;
    qkv = static_cast<const Q*>(args.qkv) + view * 3 * args.inner;
    order = args.order + view * rows;
    segment = args.segment + view * rows;
    start = args.start + view * (rows + 1);
    if (!kStage) return;
    bounds = reinterpret_cast<int32_t*>(shared);
    staged = shared + 3 * count;
    memory = staged + (count * pitch + 3) / 4 * 4;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int32_t token = order[base + i], cell = segment[token];
      bounds[3 * i] = start[cell] - static_cast<int32_t>(base);
      bounds[3 * i + 1] = start[cell + 1] - static_cast<int32_t>(base);
      bounds[3 * i + 2] = token;
    }
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x; i < count * 3 * inner; i += kThreads) {
      const int place = i / (3 * inner), k = i % (3 * inner);
      staged[place * pitch + k] = widen(qkv[bounds[3 * place + 2] * stride + k]);
    }
    __syncthreads();
  }
  __device__ int64_t token(int place) const { return kStage ? bounds[3 * place + 2] : order[base + place]; }
  __device__ int begin(int place) const {
    return kStage ? bounds[3 * place] : static_cast<int>(start[segment[token(place)]] - base);
  }
  __device__ int end(int place) const {
    return kStage ? bounds[3 * place + 1] : static_cast<int>(start[segment[token(place)] + 1] - base);
  }
  __device__ const Element* query(int place, int head) const {
    if constexpr (kStage) {
      return staged + place * pitch + head * width;
    } else {
      return qkv + token(place) * stride + head * width;
    }
  }
  __device__ const Element* key(int place, int head) const { return query(place, head) + inner; }
  __device__ const Element* value(int place, int head) const { return key(place, head) + inner; }
  template <typename A, typename B>
  __device__ float dot(const A* a, const B* b) const {
    float sum = 0.0f;
#pragma unroll
    for (int d = 0; d < (kHead > 0 ? kHead : width); d++) sum = fmaf(widen(a[d]), widen(b[d]), sum);
    return sum;
  }
};

template <typename Q, bool kStage, int kHead>
__global__ void __launch_bounds__(kThreads)
    attention_fwd_kernel(Guided args, float* __restrict__ heads,  // [V, R, K]
                         float* __restrict__ inner) {             // [V, R, K]
  extern __shared__ float4 room[];
  const Cells<Q, kStage, kHead> cells(args, reinterpret_cast<float*>(room));
  const int pad = static_cast<int>(coefficients(args.inner)), chunks = (cells.width + kWide - 1) / kWide;
  const int count = cells.count, num_heads = static_cast<int>(args.heads), width = cells.inner;
  heads += cells.view * cells.rows * pad;
  inner += cells.view * cells.rows * pad;
  const float* keep = args.keep ? args.keep + cells.view * cells.rows : nullptr;
  const auto row = [&](int place) {
    return kStage ? cells.memory + place * pad : heads + cells.token(place) * pad;
  };
  for (int i = threadIdx.x; i < count * num_heads * chunks; i += kThreads) {
    const int place = i / (num_heads * chunks), head = i / chunks % num_heads, d = i % chunks * kWide;
    const int begin = cells.begin(place), end = cells.end(place);
    const auto* query = cells.query(place, head);
    float most = -INFINITY;
    for (int j = begin; j < end; j++) most = fmaxf(most, args.scale * cells.dot(query, cells.key(j, head)));
    float sum = 0.0f, out[kWide] = {};
    for (int j = begin; j < end; j++) {
      const float p = __expf(args.scale * cells.dot(query, cells.key(j, head)) - most);
      const auto* value = cells.value(j, head) + d;
      sum += p;
#pragma unroll
      for (int w = 0; w < kWide; w++) {
        if (d + w < cells.width) out[w] = fmaf(p, widen(value[w]), out[w]);
      }
    }
    const float factor = keep ? keep[cells.token(place)] : 1.0f;
#pragma unroll
    for (int w = 0; w < kWide; w++) {
      if (d + w < cells.width) row(place)[head * cells.width + d + w] = out[w] / sum * factor;
    }
  }
  for (int i = threadIdx.x; i < count * (pad - width); i += kThreads) {
    const int place = i / (pad - width), k = width + i % (pad - width);
    row(place)[k] = k > width ? 0.0f : keep ? keep[cells.token(place)] : 1.0f;
  }
  __syncthreads();
  const int held = args.count[cells.view * args.clouds + blockIdx.x / args.views];
  for (int i = threadIdx.x; i < held * pad; i += kThreads) {
    const int64_t cell = cells.base + i / pad;
    const int k = i % pad, begin = static_cast<int>(cells.start[cell] - cells.base);
    const int end = static_cast<int>(cells.start[cell + 1] - cells.base);
    float sum = 0.0f;
    for (int j = begin; j < end; j++) sum += row(j)[k];
    inner[cell * pad + k] = sum / float(end - begin);
  }
  if constexpr (kStage) {
    for (int i = threadIdx.x; args.maximum && i < count * pad; i += kThreads) {
      heads[cells.token(i / pad) * pad + i % pad] = row(i / pad)[i % pad];
    }
  }
}

// grad_heads [slices, V, R, K]: of a token (`by_token`) or of its cell, in parts to add up.
template <typename Q, bool kStage, int kHead>
__global__ void __launch_bounds__(kThreads)
    attention_bwd_kernel(GuidedBackward args, const float* __restrict__ parts, int64_t slices, bool by_token,
                         float* __restrict__ grad_heads,  // [V, R, K]
                         float* __restrict__ sums) {      // [V, R, H, 2]: log of the softmax's sum, delta
  extern __shared__ float4 room[];
  const Cells<Q, kStage, kHead> cells(args, reinterpret_cast<float*>(room));
  const int pad = static_cast<int>(coefficients(args.inner)), chunks = (cells.width + kWide - 1) / kWide;
  const int count = cells.count, num_heads = static_cast<int>(args.heads), width = cells.inner;
  const float* keep = args.keep ? args.keep + cells.view * cells.rows : nullptr;
  parts += cells.view * cells.rows * pad;
  // By place, in global memory from the cloud's first token on.
  grad_heads = kStage ? cells.memory : grad_heads + (cells.view * cells.rows + cells.base) * pad;
  sums = kStage ? cells.memory + count * pad : sums + (cells.view * cells.rows + cells.base) * num_heads * 2;
  for (int i = threadIdx.x; i < count * width; i += kThreads) {
    const int place = i / width, k = i % width;
    const int64_t token = cells.token(place), row = by_token ? token : cells.segment[token];
    const int64_t step = args.views * cells.rows * pad;
    float sum = 0.0f;
#pragma unroll 6
    for (int64_t s = 0; s < slices; s++) sum += parts[s * step + row * pad + k];
    grad_heads[place * pad + k] = keep ? sum * keep[token] : sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count * num_heads; i += kThreads) {
    const int place = i / num_heads, head = i % num_heads, begin = cells.begin(place), end = cells.end(place);
    const auto* query = cells.query(place, head);
    const float* grad = grad_heads + place * pad + head * cells.width;
    float most = -INFINITY, sum = 0.0f, delta = 0.0f;
    for (int j = begin; j < end; j++) most = fmaxf(most, args.scale * cells.dot(query, cells.key(j, head)));
    for (int j = begin; j < end; j++) {
      const float p = __expf(args.scale * cells.dot(query, cells.key(j, head)) - most);
      sum += p;
      delta = fmaf(p, cells.dot(cells.value(j, head), grad), delta);
    }
    sums[2 * i] = most + logf(sum);
    sums[2 * i + 1] = delta / sum;
  }
  __syncthreads();
  Q* out = static_cast<Q*>(args.grad_qkv) + cells.view * 3 * args.inner;
  for (int i = threadIdx.x; i < count * num_heads * chunks; i += kThreads) {
    const int place = i / (num_heads * chunks), head = i / chunks % num_heads, d = i % chunks * kWide;
    const int begin = cells.begin(place), end = cells.end(place);
    const auto *query = cells.query(place, head), *key = cells.key(place, head);
    const auto* value = cells.value(place, head);
    const float* grad = grad_heads + place * pad + head * cells.width;
    const float* own = sums + (place * num_heads + head) * 2;
    float dq[kWide] = {}, dk[kWide] = {}, dv[kWide] = {};
    for (int j = begin; j < end; j++) {
      const auto *far_query = cells.query(j, head), *far_key = cells.key(j, head);
      const float* far_grad = grad_heads + j * pad + head * cells.width;
      const float* far = sums + (j * num_heads + head) * 2;
      const float p = __expf(args.scale * cells.dot(query, far_key) - own[0]);
      const float ds = p * (cells.dot(cells.value(j, head), grad) - own[1]) * args.scale;
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
    Q* row = out + cells.token(place) * cells.stride + head * cells.width + d;
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

// Bytes of shared memory to stage a cloud with `extra` floats per token.
int64_t staged_bytes(const Guided& args, int64_t extra) {
  return 4 * (args.tokens * (3 + (3 * args.inner | 1) + extra) + 3);
}

// function(element, whether rows are staged, width of heads)
template <typename F>
int with_cells(const Guided& args, int64_t bytes, const F& function) {
  int error = 0;
  with_type(args.qkv_dtype, [&](auto type) {
    if (bytes > shared_limit(kRoom)) {
      error = function(type, std::false_type{}, std::integral_constant<int, 0>{}, 0);
    } else if (args.inner == 2 * args.heads) {
      error = function(type, std::true_type{}, std::integral_constant<int, 2>{}, static_cast<int>(bytes));
    } else {
      error = function(type, std::true_type{}, std::integral_constant<int, 0>{}, static_cast<int>(bytes));
    }
  });
  return error;
}

}  // namespace

int attention_forward(const Guided& args, float* heads, float* inner, cudaStream_t stream) {
  const int blocks = static_cast<int>(args.clouds * args.views);
  const int64_t bytes = staged_bytes(args, coefficients(args.inner));
  return with_cells(args, bytes, [&](auto type, auto stage, auto head, int shared) {
    const auto kernel = attention_fwd_kernel<decltype(type), decltype(stage)::value, decltype(head)::value>;
    if (const int error = allow_shared(kernel, shared)) return error;
    kernel<<<blocks, kThreads, shared, stream>>>(args, heads, inner);
    return static_cast<int>(cudaGetLastError());
  });
}

int attention_backward(const GuidedBackward& args, const float* parts, int64_t slices, bool by_token,
                       float* grad_heads, float* sums, cudaStream_t stream) {
  const int blocks = static_cast<int>(args.clouds * args.views);
  const int64_t bytes = staged_bytes(args, coefficients(args.inner) + 2 * args.heads);
  return with_cells(args, bytes, [&](auto type, auto stage, auto head, int shared) {
    const auto kernel = attention_bwd_kernel<decltype(type), decltype(stage)::value, decltype(head)::value>;
    if (const int error = allow_shared(kernel, shared)) return error;
    kernel<<<blocks, kThreads, shared, stream>>>(args, parts, slices, by_token, grad_heads, sums);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace guided
}  // namespace any2point
