// Attention among the tokens of each cell: a block per cloud and view, a thread per token, head and pair of
// channels. Where they fit, queries, keys and values are brought to shared memory first, sorted by cell:
// cells hold a few tokens and heads are narrow, so that otherwise every thread would wait for memory many
// times.
#include <type_traits>

#include "guided_aggregate/copy.cuh"
#include "guided_aggregate/device.cuh"
#include "guided_aggregate/passes.h"

namespace any2point {
namespace guided {
namespace {

constexpr int kWide = 2;  // channels of a head per thread
constexpr int64_t kRoom = 96 << 10;
constexpr int kStagedThreads = 384;

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

// What a block of attention_staged_kernel has in shared memory. order, keep, bounds, out: by place.
template <typename Q>
struct Staged {
  Q* rows;               // [S, 3M], by token
  float* out;            // [S, K]
  int2 *bounds, *start;  // [S]: begin and end of the place's cell; of each cell
  int* order;            // [S]
  float* keep;           // [S]
  bool packed;           // whether rows can be fetched 16 bytes at a time
  int64_t bytes;

  __host__ __device__ Staged(const Guided& args, void* room) {
    char* at = static_cast<char*>(room);
    const auto take = [&](int64_t size) {
      char* const begin = at;
      at += (size + 15) / 16 * 16;
      return begin;
    };
    rows = reinterpret_cast<Q*>(take(args.tokens * 3 * args.inner * int64_t(sizeof(Q))));
    out = reinterpret_cast<float*>(take(args.tokens * coefficients(args.inner) * 4));
    bounds = reinterpret_cast<int2*>(take(args.tokens * 8));
    start = reinterpret_cast<int2*>(take(args.tokens * 8));
    order = reinterpret_cast<int*>(take(args.tokens * 4));
    keep = reinterpret_cast<float*>(take(args.tokens * 4));
    packed = 3 * args.inner * sizeof(Q) % 16 == 0 && reinterpret_cast<uintptr_t>(args.qkv) % 16 == 0;
    bytes = at - static_cast<char*>(room);
  }
};

// The heads' output of kWide channels d.. of a head for the token at `place`, as function(channel, value);
// rows(place): queries of a token, keys and values `inner` elements after one another.
template <int kHead, typename Rows, typename Put>
__device__ inline void attend(const Rows& rows, int place, int begin, int end, int offset, int d, int width,
                              int inner, float scale, float factor, const Put& put) {
  const auto dot = [&](const auto* a, const auto* b) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < (kHead > 0 ? kHead : width); k++) sum = fmaf(widen(a[k]), widen(b[k]), sum);
    return sum * scale;
  };
  const auto* query = rows(place) + offset;
  float most = -INFINITY;
  for (int j = begin; j < end; j++) most = fmaxf(most, dot(query, rows(j) + offset + inner));
  float sum = 0.0f, out[kWide] = {};
  for (int j = begin; j < end; j++) {
    const auto* key = rows(j) + offset + inner;
    const float p = __expf(dot(query, key) - most);
    sum += p;
#pragma unroll
    for (int w = 0; w < kWide; w++) {
      if (d + w < width) out[w] = fmaf(p, widen(key[inner + d + w]), out[w]);
    }
  }
  const float share = factor / sum;
#pragma unroll
  for (int w = 0; w < kWide; w++) {
    if (d + w < width) put(d + w, out[w] * share);
  }
}

// Clouds that fit in shared memory. Everything is fetched at once, by token, before anything is looked up.
// kInner, kHeads: widths known when compiled, or 0.
template <typename Q, int kInner, int kHeads>
__global__ void __launch_bounds__(kStagedThreads)
    attention_staged_kernel(Guided args, float* __restrict__ heads,  // [V, R, K]
                            float* __restrict__ inner) {             // [V, R, K]
  extern __shared__ float4 room[];
  const int64_t view = blockIdx.x % args.views, cloud = blockIdx.x / args.views;
  const int64_t base = cloud * args.tokens, rows = args.clouds * args.tokens;
  const int count = static_cast<int>(args.tokens), width = kInner > 0 ? kInner : int(args.inner);
  const int num_heads = kHeads > 0 ? kHeads : int(args.heads), wide = width / num_heads;
  const int chunks = (wide + kWide - 1) / kWide, pad = static_cast<int>(coefficients(width));
  const int held = args.count[view * args.clouds + cloud];
  const Staged<Q> staged(args, room);
  const Q* const from = static_cast<const Q*>(args.qkv) + (base * args.views + view) * 3 * width;
  const int64_t stride = args.views * 3 * width;
  constexpr int kEach = 16 / sizeof(Q);
  if (staged.packed) {
    const unsigned each = 3 * width / kEach;
    for (unsigned i = threadIdx.x; i < count * each; i += kStagedThreads) {
      const unsigned token = i / each, k = i % each * kEach;
      copy_async<16>(staged.rows + token * 3 * width + k, from + token * stride + k, true);
    }
  } else {
    for (unsigned i = threadIdx.x; i < unsigned(count * 3 * width); i += kStagedThreads) {
      const unsigned token = i / (3 * width), k = i % (3 * width);
      staged.rows[i] = from[token * stride + k];
    }
  }
  copy_commit();
  for (int i = threadIdx.x; i < count; i += kStagedThreads) {
    const int token = args.order[view * rows + base + i] - static_cast<int>(base);
    staged.order[i] = token;
    staged.keep[i] = args.keep ? args.keep[view * rows + base + token] : 1.0f;
  }
  const int32_t* const start = args.start + view * (rows + 1) + base;
  for (int cell = threadIdx.x; cell < held; cell += kStagedThreads) {
    const int begin = start[cell] - static_cast<int>(base), end = start[cell + 1] - static_cast<int>(base);
    staged.start[cell] = make_int2(begin, end);
    for (int i = begin; i < end; i++) staged.bounds[i] = make_int2(begin, end);
  }
  copy_wait<0>();
  __syncthreads();
  const auto row = [&](int place) { return staged.rows + staged.order[place] * 3 * width; };
  for (unsigned i = threadIdx.x; i < unsigned(count * num_heads * chunks); i += kStagedThreads) {
    const unsigned part = i / chunks;
    const int place = part / num_heads, offset = part % num_heads * wide;
    const int2 bounds = staged.bounds[place];
    attend<kHeads == 0 ? 0 : kInner / (kHeads > 0 ? kHeads : 1)>(
        row, place, bounds.x, bounds.y, offset, i % chunks * kWide, wide, width, args.scale,
        staged.keep[place], [&](int d, float value) { staged.out[place * pad + offset + d] = value; });
  }
  for (unsigned i = threadIdx.x; i < unsigned(count * (pad - width)); i += kStagedThreads) {
    const int place = i / (pad - width), k = i % (pad - width);
    staged.out[place * pad + width + k] = k > 0 ? 0.0f : staged.keep[place];
  }
  __syncthreads();
  inner += (view * rows + base) * pad;
  for (unsigned i = threadIdx.x; i < unsigned(count * pad); i += kStagedThreads) {
    float sum = 0.0f, tokens = 1.0f;
    if (i < unsigned(held * pad)) {
      const int2 bounds = staged.start[i / pad];
      for (int j = bounds.x; j < bounds.y; j++) sum += staged.out[j * pad + i % pad];
      tokens = float(bounds.y - bounds.x);
    }
    inner[i] = sum / tokens;
  }
  if (!args.maximum) return;
  heads += (view * rows + base) * pad;
  for (unsigned i = threadIdx.x; i < unsigned(count * pad); i += kStagedThreads) {
    heads[staged.order[i / pad] * pad + i % pad] = staged.out[i];
  }
}

// Any other clouds, from global memory.
template <typename Q>
__global__ void __launch_bounds__(kThreads)
    attention_fwd_kernel(Guided args, float* __restrict__ heads,  // [V, R, K]
                         float* __restrict__ inner) {             // [V, R, K]
  const Cells<Q, false, 0> cells(args, nullptr);
  const int pad = static_cast<int>(coefficients(args.inner)), chunks = (cells.width + kWide - 1) / kWide;
  const int count = cells.count, num_heads = static_cast<int>(args.heads), width = cells.inner;
  heads += cells.view * cells.rows * pad;
  inner += cells.view * cells.rows * pad;
  const float* keep = args.keep ? args.keep + cells.view * cells.rows : nullptr;
  const auto row = [&](int place) { return cells.query(place, 0); };
  for (int i = threadIdx.x; i < count * num_heads * chunks; i += kThreads) {
    const int place = i / (num_heads * chunks), offset = i / chunks % num_heads * cells.width;
    const int64_t token = cells.token(place);
    attend<0>(row, place, cells.begin(place), cells.end(place), offset, i % chunks * kWide, cells.width,
              width, args.scale, keep ? keep[token] : 1.0f,
              [&](int d, float value) { heads[token * pad + offset + d] = value; });
  }
  for (int i = threadIdx.x; i < count * (pad - width); i += kThreads) {
    const int k = i % (pad - width);
    const int64_t token = cells.token(i / (pad - width));
    heads[token * pad + width + k] = k > 0 ? 0.0f : keep ? keep[token] : 1.0f;
  }
  __syncthreads();
  const int held = args.count[cells.view * args.clouds + blockIdx.x / args.views];
  for (int i = threadIdx.x; i < count * pad; i += kThreads) {
    const int64_t cell = cells.base + i / pad;
    const int k = i % pad;
    float sum = 0.0f, tokens = 1.0f;
    if (i < held * pad) {
      const int begin = static_cast<int>(cells.start[cell] - cells.base);
      const int end = static_cast<int>(cells.start[cell + 1] - cells.base);
      for (int j = begin; j < end; j++) sum += heads[cells.token(j) * pad + k];
      tokens = float(end - begin);
    }
    inner[cell * pad + k] = sum / tokens;
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
  int error = 0;
  with_type(args.qkv_dtype, [&](auto type) {
    using Q = decltype(type);
    const int64_t bytes = Staged<Q>(args, nullptr).bytes;
    if (bytes > shared_limit(kRoom)) {
      attention_fwd_kernel<Q><<<blocks, kThreads, 0, stream>>>(args, heads, inner);
    } else {
      const auto kernel = args.inner == 12 && args.heads == 6 ? attention_staged_kernel<Q, 12, 6>
                                                              : attention_staged_kernel<Q, 0, 0>;
      error = allow_shared(kernel, static_cast<int>(bytes));
      if (error) return;
      kernel<<<blocks, kStagedThreads, bytes, stream>>>(args, heads, inner);
    }
    error = cudaGetLastError();
  });
  return error;
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
