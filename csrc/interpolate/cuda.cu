// interpolate on CUDA. Forward: a thread per 16 bytes of output adds up its K rows in order. Gradient of the
// weights: a group of up to 32 lanes per neighbour takes the dot product of two rows, each lane a fixed set
// of columns, and adds the lanes up in a fixed tree.
//
// H200, us as a graph, K = 3, float32; bytes' floor at the copy bandwidth; and index_add_ of the weighted
// rows in torch, whose atomics add in any order:
//                                              forward   features' gradient   weights'   floor   index_add_
//   32 x 1,024 of   256, C = 256                    29                   32         56      10          259
//   32 x 4,096 of 1,024, C = 128                    57                   60        150      21          499
//    1 x  100k of   25k, C =  64                    22                   64         62       9          199
// Forward reads K rows from L2 for each one written: counters on 32 x 512 of 1,024, C = 96 say L2 53 % of its
// peak, DRAM 26 %, issue slots 52 %.
#include "common/grid.cuh"
#include "interpolate/kernel.h"

namespace any2point {
namespace {

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) interpolate_kernel(Interpolate args, Strider strider) {
  using A = Accumulator<T>;
  const T* __restrict__ features = static_cast<const T*>(args.features);
  const A* __restrict__ weight = static_cast<const A*>(args.weight);
  const int64_t* __restrict__ index = args.index;
  int64_t i = strider.first();
  Place place = strider.place(i);  // cloud, query, column
  for (; i < strider.total; i += strider.stride, strider.advance(&place)) {
    const T* cloud = features + place.outer * args.rows * args.channels + place.inner * V;
    const int64_t first = (place.outer * args.queries + place.middle) * args.neighbours;
    A total[V] = {};
    bool bad = false;
#pragma unroll 4
    for (int64_t k = first; k < first + args.neighbours; k++) {
      const int64_t row = index[k];
      const A w = weight[k];
      if (row >= 0 && row < args.rows) {
        const auto values = *reinterpret_cast<const Pack<T, V>*>(cloud + row * args.channels);
#pragma unroll
        for (int v = 0; v < V; v++) total[v] += w * widen(values.at[v]);
      } else {
        bad |= row != -1;
      }
    }
    Pack<T, V> out;
#pragma unroll
    for (int v = 0; v < V; v++) narrow(bad ? A(NAN) : total[v], out.at + v);
    static_cast<Pack<T, V>*>(args.out)[i] = out;
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) weight_grad_kernel(Interpolate args, int64_t clouds, int lanes) {
  using A = Accumulator<T>;
  const int64_t total = clouds * args.queries * args.neighbours, columns = args.channels / V;
  const int64_t groups = int64_t(gridDim.x) * (kThreads / lanes);
  const int lane = threadIdx.x % lanes;
  const int64_t mine = int64_t(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  // Whole warps stay together until the last sum: groups beyond the end add nothing.
  const int64_t warp = mine - threadIdx.x % kWarp / lanes;
  for (int64_t offset = 0; warp + offset < total; offset += groups) {
    const int64_t i = mine + offset;
    const int64_t row = i < total ? args.index[i] : -1;
    A sum = 0;
    if (row >= 0 && row < args.rows) {
      const int64_t query = i / args.neighbours, cloud = query / args.queries;
      const auto* a = reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(args.grad)) + query * columns;
      const auto* b = reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(args.features)) +
                      (cloud * args.rows + row) * columns;
      for (int64_t c = lane; c < columns; c += lanes) {
        const Pack<T, V> x = a[c], y = b[c];
#pragma unroll
        for (int v = 0; v < V; v++) sum += A(widen(x.at[v])) * A(widen(y.at[v]));
      }
    }
    for (int d = lanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(kAll, sum, d);
    if (lane == 0 && i < total) static_cast<A*>(args.out)[i] = row < -1 || row >= args.rows ? A(NAN) : sum;
  }
}

template <typename T>
bool vectors(const Interpolate& args, const void* other) {
  return args.channels * sizeof(T) % 16 == 0 && aligned(args.features, 16) && aligned(other, 16);
}

template <typename T, int V>
int launch(const Interpolate& args, int64_t clouds, cudaStream_t stream) {
  const int64_t columns = args.channels / V;
  const int blocks = grid_for(clouds * args.queries * columns);
  const Strider strider(clouds, args.queries, columns, blocks);
  interpolate_kernel<T, V><<<blocks, kThreads, 0, stream>>>(args, strider);
  return cudaGetLastError();
}

template <typename T, int V>
int launch_weight_grad(const Interpolate& args, int64_t clouds, cudaStream_t stream) {
  int lanes = 1;
  while (lanes < kWarp && lanes * V < args.channels) lanes *= 2;
  const int blocks = grid_for(clouds * args.queries * args.neighbours * lanes);
  weight_grad_kernel<T, V><<<blocks, kThreads, 0, stream>>>(args, clouds, lanes);
  return cudaGetLastError();
}

}  // namespace

int interpolate_cuda(const Interpolate& args, int64_t clouds, void* stream_) {
  if (clouds * args.queries * args.channels == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  int error = 0;
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    error = vectors<T>(args, args.out) ? launch<T, 16 / sizeof(T)>(args, clouds, stream)
                                       : launch<T, 1>(args, clouds, stream);
  });
  return error;
}

int interpolate_weight_grad_cuda(const Interpolate& args, int64_t clouds, void* stream_) {
  if (clouds * args.queries * args.neighbours == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  int error = 0;
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    error = vectors<T>(args, args.grad) ? launch_weight_grad<T, 16 / sizeof(T)>(args, clouds, stream)
                                        : launch_weight_grad<T, 1>(args, clouds, stream);
  });
  return error;
}

}  // namespace any2point
