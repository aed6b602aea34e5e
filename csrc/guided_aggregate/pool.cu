// Tokens pooled into the rows of their segments, with partial means and spreads of the rows for batch
// normalisation. Blocks of a cloud, a slice of its channels and a few views, and blocks of as many voxels as
// a cloud has tokens.
#include "guided_aggregate/copy.cuh"
#include "guided_aggregate/passes.h"
#include "guided_aggregate/pool.cuh"

namespace any2point {
namespace guided {
namespace {

constexpr int kViews = 3;   // of a block at most
constexpr int kInner = 12;  // width of the attention whose projection has room in registers

// The projection of a view at the lane's channels.
template <int N, bool kHeld>
struct Projection {
  const float* from;  // [M + 1, C]
  int64_t channels;
  int inner;
  Lane<N> held[kHeld ? kInner + 1 : 1];

  __device__ Projection(const Guided& args, int64_t view, int64_t c)
      : channels(args.channels), inner(static_cast<int>(args.inner)) {
    from = args.proj + view * (inner + 1) * channels + c;
    if (!kHeld) return;
#pragma unroll
    for (int k = 0; k <= kInner; k++) held[k] = load<N>(from + k * channels);
  }
  // Adds the product with coefficients [K].
  __device__ void operator()(Lane<N>* acc, const float* coefficients) const {
    if constexpr (kHeld) {
      float a[kInner + 4];
#pragma unroll
      for (int k = 0; k <= kInner; k += 4) {
        const float4 four = *reinterpret_cast<const float4*>(coefficients + k);
        a[k] = four.x, a[k + 1] = four.y, a[k + 2] = four.z, a[k + 3] = four.w;
      }
#pragma unroll
      for (int k = 0; k <= kInner; k++) add(acc, a[k], held[k]);
    } else {
      for (int k = 0; k <= inner; k += 4) {
        const float4 a = *reinterpret_cast<const float4*>(coefficients + k);
        const float* row = from + k * channels;
        add(acc, a.x, load<N>(row));
        add(acc, a.y, load<N>(from + min(k + 1, inner) * channels));  // padding is zero
        add(acc, a.z, load<N>(from + min(k + 2, inner) * channels));
        add(acc, a.w, load<N>(from + min(k + 3, inner) * channels));
      }
    }
  }
};

// How much shared memory a block takes, and where what is in it begins.
struct Shared {
  int64_t x, coefficients, order, start, spreads, sizes, bytes;

  Shared(const Guided& args, int views, int64_t width, int64_t element, bool staged) {
    const int64_t tokens = staged ? args.tokens : 0;
    int64_t used = 0;
    const auto take = [&](int64_t size) {
      const int64_t at = used;
      used += (size + 15) / 16 * 16;
      return at;
    };
    x = take(tokens * width * element);
    coefficients = take(views * tokens * guided::coefficients(args.inner) * 4);
    order = take(views * tokens * 4);
    start = take(views * (tokens + 1) * 4);
    spreads = take((kWarps + views - 1) * width * 8);
    sizes = take(kWarps * views * 4);
    bytes = used;
  }
};

// kStage: what the views of a block read is brought to shared memory, and their projection to registers.
// Grid: clouds, slices of channels, groups of `group` views and then, if there are any, voxels.
template <typename T, int N, bool kStage, bool kMaximum>
__global__ void __launch_bounds__(kThreads, 2)
    pool_kernel(Guided args, Rows to, Shared shared, int group, bool statistics) {
  extern __shared__ float4 room[];
  constexpr int kWidth = kWarp * N;
  char* const memory = reinterpret_cast<char*>(room);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t cloud = blockIdx.x, rows = args.clouds * args.tokens, channels = args.channels;
  const int64_t base = cloud * args.tokens, own = int64_t(blockIdx.y) * kWidth + lane * N;
  const bool active = own < channels;
  const int64_t c = active ? own : 0;
  const T* x = static_cast<const T*>(args.features) + c;
  float2* const spreads = reinterpret_cast<float2*>(memory + shared.spreads);
  int32_t* const sizes = reinterpret_cast<int32_t*>(memory + shared.sizes);
  const int64_t first_view = int64_t(blockIdx.z) * group;
  const int views = static_cast<int>(min(int64_t(group), args.views - first_view));
  if (views <= 0) return pool_voxels<T, N>(args, to, spreads, sizes, statistics);
  if (threadIdx.x < kWarps * views) sizes[threadIdx.x] = 0;
  // A warp goes through consecutive views, and the last of its views may be the first of the next warp's: so
  // no two have the same place.
  const auto put = [&](const Spread<N>& spread, int view) {
    if (spread.size == 0 || !statistics) return;
    spread.store_to(spreads + (warp + view) * kWidth + lane * N);
    if (lane == 0) sizes[view * kWarps + warp] = spread.size;
  };

  const int count = static_cast<int>(args.tokens), pad = static_cast<int>(coefficients(args.inner));
  const float* const from = kMaximum ? to.heads : to.inner;
  if (kStage) {
    // Rows of the slice, and behind them what their coefficients are.
    T* const rows_to = reinterpret_cast<T*>(memory + shared.x);
    const int64_t column = int64_t(blockIdx.y) * kWidth;
    for (int i = threadIdx.x; i < count * kWarp; i += kThreads) {
      const int at = i % kWarp * N;
      const bool inside = column + at < channels;
      const T* source = static_cast<const T*>(args.features) + (base + i / kWarp) * channels;
      copy_async<sizeof(T) * N>(rows_to + i / kWarp * kWidth + at, source + (inside ? column + at : 0),
                                inside);
    }
    float* const coefficients_to = reinterpret_cast<float*>(memory + shared.coefficients);
    int32_t* const order_to = reinterpret_cast<int32_t*>(memory + shared.order);
    int32_t* const start_to = reinterpret_cast<int32_t*>(memory + shared.start);
    for (int v = 0; v < views; v++) {
      const int64_t view = first_view + v;
      const int held = kMaximum ? count : args.count[view * args.clouds + cloud];
      for (int i = threadIdx.x * 4; i < held * pad; i += kThreads * 4) {
        copy_async<16>(coefficients_to + v * count * pad + i, from + (view * rows + base) * pad + i, true);
      }
      for (int i = threadIdx.x; i < count; i += kThreads) {
        order_to[v * count + i] = args.order[view * rows + base + i] - static_cast<int32_t>(base);
      }
      for (int i = threadIdx.x; i <= count; i += kThreads) {
        start_to[v * (count + 1) + i] = args.start[view * (rows + 1) + base + i] - static_cast<int32_t>(base);
      }
    }
    copy_commit();
    copy_wait<0>();
  }
  __syncthreads();
  int total = 0;
  for (int v = 0; v < views; v++) total += args.count[(first_view + v) * args.clouds + cloud];
  const int first = total * warp / kWarps, last = total * (warp + 1) / kWarps;
  int before = 0;
  for (int v = 0; v < views; v++) {
    const int64_t view = first_view + v;
    const int held = args.count[view * args.clouds + cloud];
    const int from_row = max(first - before, 0), to_row = min(last - before, held);
    before += held;
    if (from_row >= to_row) continue;
    const Projection<N, kStage> projection(args, view, c);
    // Staged arrays count from the cloud's first token.
    const int64_t shift = kStage ? 0 : base;
    const T* const row_at = kStage ? reinterpret_cast<const T*>(memory + shared.x) + lane * N : x;
    const int64_t pitch = kStage ? kWidth : channels;
    const float* const factors =
        kStage ? reinterpret_cast<const float*>(memory + shared.coefficients) + v * count * pad
               : from + view * rows * pad;
    const int32_t* const order = kStage ? reinterpret_cast<const int32_t*>(memory + shared.order) + v * count
                                        : args.order + view * rows;
    const int32_t* const start =
        kStage ? reinterpret_cast<const int32_t*>(memory + shared.start) + v * (count + 1)
               : args.start + view * (rows + 1);
    float* const z = to.z + (view * rows + base - shift) * channels + c;
    Spread<N> spread;
    walk<N, kMaximum>(
        start, order, shift + from_row, shift + to_row, lane,
        [&](int32_t token) {
          Lane<N> value = load<N>(row_at + token * pitch);
          if (kMaximum) projection(&value, factors + token * pad);
          return value;
        },
        [&](int64_t segment, Lane<N> row, const Lane<N>& most, int tokens) {
          const float share = reciprocal(float(tokens));
#pragma unroll
          for (int n = 0; n < N; n++) row.at[n] = fmaf(row.at[n], share, kMaximum ? most.at[n] : 0.0f);
          if (!kMaximum) projection(&row, factors + segment * pad);
          if (active) store(z + segment * channels, row);
          spread.put(row);
        });
    put(spread, v);
  }
  if (!statistics) return;
  __syncthreads();
  for (int i = threadIdx.x; i < views * kWidth; i += kThreads) {
    const int v = i / kWidth, column = i % kWidth;
    const int64_t channel = int64_t(blockIdx.y) * kWidth + column;
    if (channel >= channels) continue;
    to.parts[(cloud * args.layers + first_view + v) * channels + channel] =
        merge(spreads + v * kWidth + column, sizes + v * kWarps, kWarps, kWidth);
  }
}

template <typename T, int N, bool kStage, bool kMaximum>
int launch(const Guided& args, const Rows& rows, bool statistics, cudaStream_t stream) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t slices = (args.channels + kWarp * N - 1) / (kWarp * N);
  const auto groups = [&](int group) { return (args.views + group - 1) / group; };
  int group = kViews;  // fewer where there would be fewer than two blocks for each processor
  while (group > 1 && args.clouds * slices * groups(group) < 2 * processors) group--;
  const Shared shared(args, group, kWarp * N, sizeof(T), kStage);
  const auto kernel = pool_kernel<T, N, kStage, kMaximum>;
  if (const int error = allow_shared(kernel, static_cast<int>(shared.bytes))) return error;
  const dim3 grid(static_cast<unsigned>(args.clouds), static_cast<unsigned>(slices),
                  static_cast<unsigned>(groups(group) + (args.layers > args.views)));
  kernel<<<grid, kThreads, shared.bytes, stream>>>(args, rows, shared, group, statistics);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

int pool_rows(const Guided& args, const Rows& rows, bool statistics, cudaStream_t stream) {
  if (pools_by_matrix(args)) return pool_by_matrix(args, rows, statistics, stream);
  return with_packs(args, [&](auto type, auto width) {
    using T = decltype(type);
    constexpr int N = decltype(width)::value;
    if constexpr (N == 4) {
      const Shared shared(args, kViews, kWarp * N, sizeof(T), true);
      if (args.inner == kInner && shared.bytes <= shared_limit(kStaged)) {
        return args.maximum ? launch<T, N, true, true>(args, rows, statistics, stream)
                            : launch<T, N, true, false>(args, rows, statistics, stream);
      }
    }
    return args.maximum ? launch<T, N, false, true>(args, rows, statistics, stream)
                        : launch<T, N, false, false>(args, rows, statistics, stream);
  });
}

}  // namespace guided
}  // namespace any2point
