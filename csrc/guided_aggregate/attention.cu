// Attention among the tokens of each cell: a block per cloud and view, a thread per token, head and pair of
// channels. Where they fit, queries, keys and values are brought to shared memory first, sorted by cell:
// cells hold a few tokens and heads are narrow, so that otherwise every thread would wait for memory many
// times.
#include <type_traits>

#include "guided_aggregate/cloud.cuh"
#include "guided_aggregate/copy.cuh"
#include "guided_aggregate/device.cuh"
#include "guided_aggregate/passes.h"

namespace any2point {
namespace guided {
namespace {

constexpr int kWide = 2;  // channels of a head per thread
constexpr int64_t kRoom = 96 << 10;
constexpr int kStagedThreads = 384;

// Tokens of one cloud and view by place: their position when sorted by cell.
template <typename Q>
struct Cells {
  int64_t view, base, rows, stride;  // base: first token; stride: of qkv
  int count, inner, width;           // S, M, of a head
  const Q* qkv;
  const int32_t *order, *segment, *start;

  __device__ explicit Cells(const Guided& args) {
    view = blockIdx.x % args.views;
    base = blockIdx.x / args.views * args.tokens;
    rows = args.clouds * args.tokens;
    stride = args.views * 3 * args.inner;
    count = static_cast<int>(args.tokens);
    inner = static_cast<int>(args.inner);
    width = static_cast<int>(args.inner / args.heads);
    qkv = static_cast<const Q*>(args.qkv) + view * 3 * args.inner;
    order = args.order + view * rows;
    segment = args.segment + view * rows;
    start = args.start + view * (rows + 1);
  }
  __device__ int64_t token(int place) const { return order[base + place]; }
  __device__ int begin(int place) const { return static_cast<int>(start[segment[token(place)]] - base); }
  __device__ int end(int place) const { return static_cast<int>(start[segment[token(place)] + 1] - base); }
  __device__ const Q* row(int place) const { return qkv + token(place) * stride; }
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

__device__ inline void begin_clouds(const Guided& args, const CloudWork& clouds) {
  if (!clouds.fragments) return;
  split_projection(args, clouds.fragments);
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < 2 + args.clouds) clouds.arrived[i] = 0;
}

// Clouds that fit in shared memory. Everything is fetched at once, by token, before anything is looked up.
// kInner, kHeads: widths known when compiled, or 0.
template <typename Q, int kInner, int kHeads>
__global__ void __launch_bounds__(kStagedThreads)
    attention_staged_kernel(Guided args, float* __restrict__ heads,  // [V, R, K]
                            float* __restrict__ inner,               // [V, R, K]
                            CloudWork clouds) {
  extern __shared__ float4 room[];
  begin_clouds(args, clouds);
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
                         float* __restrict__ inner,               // [V, R, K]
                         CloudWork clouds) {
  begin_clouds(args, clouds);
  const Cells<Q> cells(args);
  const int pad = static_cast<int>(coefficients(args.inner)), chunks = (cells.width + kWide - 1) / kWide;
  const int count = cells.count, num_heads = static_cast<int>(args.heads), width = cells.inner;
  heads += cells.view * cells.rows * pad;
  inner += cells.view * cells.rows * pad;
  const float* keep = args.keep ? args.keep + cells.view * cells.rows : nullptr;
  const auto row = [&](int place) { return cells.row(place); };
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

}  // namespace

int attention_forward(const Guided& args, float* heads, float* inner, cudaStream_t stream,
                      const CloudWork* clouds_) {
  const CloudWork clouds = clouds_ ? *clouds_ : CloudWork{};
  const int blocks = static_cast<int>(args.clouds * args.views);
  int error = 0;
  with_type(args.qkv_dtype, [&](auto type) {
    using Q = decltype(type);
    const int64_t bytes = Staged<Q>(args, nullptr).bytes;
    if (bytes > shared_limit(kRoom)) {
      attention_fwd_kernel<Q><<<blocks, kThreads, 0, stream>>>(args, heads, inner, clouds);
    } else {
      const auto kernel = args.inner == 12 && args.heads == 6 ? attention_staged_kernel<Q, 12, 6>
                                                              : attention_staged_kernel<Q, 0, 0>;
      error = allow_shared(kernel, static_cast<int>(bytes));
      if (error) return;
      kernel<<<blocks, kStagedThreads, bytes, stream>>>(args, heads, inner, clouds);
    }
    error = cudaGetLastError();
  });
  return error;
}

}  // namespace guided
}  // namespace any2point
