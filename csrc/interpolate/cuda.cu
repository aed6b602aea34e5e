// interpolate on CUDA. A group of up to 16 lanes has a query: each lane a fixed set of columns, 16 bytes at a
// time, of the K rows in order. Gradient of the weights: dot products of the query's gradient with its rows,
// over the lanes in a fixed tree.
//
// H200, us as a graph, K = 3, float32; bytes' floor at the copy bandwidth; and index_add_ of the weighted
// rows in torch, whose atomics add in any order:
//                                              forward   features' gradient   weights'   floor   index_add_
//   32 x 1,024 of   256, C = 256                    14                   27         19      10          259
//   32 x 1,024 of   128, C = 384                    22                   32         28      14
//   32 x 4,096 of 1,024, C = 128                    37                   50         45      21          499
//    1 x  100k of   25k, C =  64                    14                   63         23       9          199
// K rows are read for each one written. A block for each processor, with queries that are next to each other,
// reads most of them from its first cache; with queries dealt out over all blocks the forward pass took 29,
// 45, 57 and 22, the gradient of the weights, by a group for each neighbour, 56, 56, 150 and 62.
#include <algorithm>

#include "common/grid.cuh"
#include "interpolate/kernel.h"

namespace any2point {
namespace {

constexpr int kLargest = 1024;  // threads of a block
constexpr int kRows = 4;        // neighbours that are loaded at once

// The queries of a block are next to each other, as a rule of one cloud, whose rows its first cache then
// holds. A group of `lanes` has one at a time, and the groups of a warp stay together.
struct Walk {
  int64_t first, end, step;
  int lane;

  __device__ Walk(int64_t queries, int lanes) {
    const int64_t each = (queries + gridDim.x - 1) / gridDim.x;
    first = blockIdx.x * each + threadIdx.x / lanes;
    end = min(queries, (blockIdx.x + 1) * each);
    step = blockDim.x / lanes;
    lane = threadIdx.x % lanes;
  }
  // Of the warp: whether any of its groups has a query at `query` or would have had one.
  __device__ bool goes_on(int64_t query, int lanes) const {
    return query - threadIdx.x % kWarp / lanes < end;
  }
};

__device__ int64_t divided(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? uint32_t(a) / uint32_t(b) : a / b;
}

// The rows of a query's neighbours [k, k + kRows).
template <typename T, int V>
struct Rows {
  const Pack<T, V>* at[kRows];  // null: missing
  bool bad = false;             // an index outside of [-1, N)

  __device__ Rows(const Interpolate& args, int64_t query, int64_t k) {
    const auto* cloud = static_cast<const Pack<T, V>*>(args.features) +
                        divided(query, args.queries) * args.rows * (args.channels / V);
#pragma unroll
    for (int j = 0; j < kRows; j++) {
      const int64_t row = k + j < args.neighbours ? args.index[query * args.neighbours + k + j] : -1;
      const bool some = row >= 0 && row < args.rows;
      at[j] = some ? cloud + row * (args.channels / V) : nullptr;
      bad |= !some && row != -1;
    }
  }
  __device__ Pack<T, V> load(int j, int64_t column) const { return at[j] ? at[j][column] : Pack<T, V>{}; }
};

template <typename T, int V>
struct Weighted : Rows<T, V> {
  Accumulator<T> weight[kRows];

  __device__ Weighted(const Interpolate& args, int64_t query, int64_t k) : Rows<T, V>(args, query, k) {
#pragma unroll
    for (int j = 0; j < kRows; j++) {
      const int64_t i = query * args.neighbours + k + j;
      weight[j] = this->at[j] ? static_cast<const Accumulator<T>*>(args.weight)[i] : Accumulator<T>(0);
    }
  }
  __device__ void add_to(Accumulator<T>* total, int64_t column) const {
    Pack<T, V> values[kRows];
#pragma unroll
    for (int j = 0; j < kRows; j++) values[j] = this->load(j, column);
#pragma unroll
    for (int j = 0; j < kRows; j++) {
#pragma unroll
      for (int v = 0; v < V; v++) total[v] += weight[j] * widen(values[j].at[v]);
    }
  }
};

// `few`: up to kRows neighbours.
template <typename T, int V, bool few>
__global__ void __launch_bounds__(kLargest) interpolate_kernel(Interpolate args, int64_t queries, int lanes) {
  using A = Accumulator<T>;
  const Walk walk(queries, lanes);
  const int64_t columns = args.channels / V;
  for (int64_t query = walk.first; query < walk.end; query += walk.step) {
    const Weighted<T, V> all(args, query, 0);  // if these are all
    Pack<T, V>* out = static_cast<Pack<T, V>*>(args.out) + query * columns;
#pragma unroll(few ? 2 : 1)
    for (int64_t c = walk.lane; c < columns; c += lanes) {
      A total[V] = {};
      bool bad = few && all.bad;
      if constexpr (few) {
        all.add_to(total, c);
      } else {
#pragma unroll 2
        for (int64_t k = 0; k < args.neighbours; k += kRows) {
          const Weighted<T, V> some(args, query, k);
          some.add_to(total, c);
          bad |= some.bad;
        }
      }
      Pack<T, V> result;
#pragma unroll
      for (int v = 0; v < V; v++) narrow(bad ? A(NAN) : total[v], result.at + v);
      out[c] = result;
    }
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kLargest) weight_grad_kernel(Interpolate args, int64_t queries, int lanes) {
  using A = Accumulator<T>;
  const Walk walk(queries, lanes);
  const int64_t columns = args.channels / V;
  for (int64_t query = walk.first; walk.goes_on(query, lanes); query += walk.step) {
    const int64_t some = min(query, queries - 1);  // groups beyond the end do what nobody sees
    const Pack<T, V>* grad = static_cast<const Pack<T, V>*>(args.grad) + some * columns;
    for (int64_t k = 0; k < args.neighbours; k += kRows) {
      const Rows<T, V> rows(args, some, k);
      A sums[kRows] = {};
      for (int64_t c = walk.lane; c < columns; c += lanes) {
        const Pack<T, V> x = grad[c];
        Pack<T, V> y[kRows];
#pragma unroll
        for (int j = 0; j < kRows; j++) y[j] = rows.load(j, c);
#pragma unroll
        for (int j = 0; j < kRows; j++) {
#pragma unroll
          for (int v = 0; v < V; v++) sums[j] += A(widen(x.at[v])) * A(widen(y[j].at[v]));
        }
      }
#pragma unroll
      for (int j = 0; j < kRows; j++) {
        for (int d = lanes / 2; d > 0; d /= 2) sums[j] += __shfl_xor_sync(kAll, sums[j], d);
        const int64_t i = query * args.neighbours + k + j;
        if (walk.lane == j % lanes && query < walk.end && k + j < args.neighbours) {
          const int64_t row = args.index[i];
          static_cast<A*>(args.out)[i] = row < -1 || row >= args.rows ? A(NAN) : sums[j];
        }
      }
    }
  }
}

// How the queries of all clouds are spread: one block for each processor if that fills it.
struct Grid {
  int lanes = 1;
  unsigned blocks, threads;

  Grid(int64_t queries, int64_t columns) {
    while (lanes < 16 && lanes < columns && (lanes < 8 || 4 * lanes < columns)) lanes *= 2;
    int device = 0, processors = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    threads = queries * lanes >= int64_t(processors) * kLargest ? kLargest : kThreads;
    const int64_t needed = (queries * lanes + threads - 1) / threads;
    blocks = static_cast<unsigned>(std::min<int64_t>(needed, processors * (kLargest / threads)));
  }
};

template <typename T>
bool vectors(const Interpolate& args, const void* other) {
  return args.channels * sizeof(T) % 16 == 0 && aligned(args.features, 16) && aligned(other, 16);
}

template <typename T, int V>
int launch(const Interpolate& args, int64_t queries, cudaStream_t stream) {
  const Grid grid(queries, args.channels / V);
  if (args.neighbours <= kRows) {
    interpolate_kernel<T, V, true><<<grid.blocks, grid.threads, 0, stream>>>(args, queries, grid.lanes);
  } else {
    interpolate_kernel<T, V, false><<<grid.blocks, grid.threads, 0, stream>>>(args, queries, grid.lanes);
  }
  return cudaGetLastError();
}

template <typename T, int V>
int launch_weight_grad(const Interpolate& args, int64_t queries, cudaStream_t stream) {
  const Grid grid(queries, args.channels / V);
  weight_grad_kernel<T, V><<<grid.blocks, grid.threads, 0, stream>>>(args, queries, grid.lanes);
  return cudaGetLastError();
}

}  // namespace

int interpolate_cuda(const Interpolate& args, int64_t clouds, void* stream_) {
  if (clouds * args.queries * args.channels == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const int64_t queries = clouds * args.queries;
  int error = 0;
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    error = vectors<T>(args, args.out) ? launch<T, 16 / sizeof(T)>(args, queries, stream)
                                       : launch<T, 1>(args, queries, stream);
  });
  return error;
}

int interpolate_weight_grad_cuda(const Interpolate& args, int64_t clouds, void* stream_) {
  if (clouds * args.queries * args.neighbours == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const int64_t queries = clouds * args.queries;
  int error = 0;
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    error = vectors<T>(args, args.grad) ? launch_weight_grad<T, 16 / sizeof(T)>(args, queries, stream)
                                        : launch_weight_grad<T, 1>(args, queries, stream);
  });
  return error;
}

}  // namespace any2point
