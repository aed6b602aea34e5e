// The gradient of segment_pool on CUDA: every row fetches its part, 16 bytes per thread. The pooling itself
// is inverse_list's gather_reduce.
//
// H200, us as a graph, float32, mean and max; bytes' floor at the copy bandwidth; and index_select in torch,
// the gradient of a sum by index_add_:
//                                        mean   max   floor   index_select
//      32,768 rows,   4,096 x  96           8     8       3             22
//   1,000,000 rows, 100,000 x  64         124   189      69            605
//   1,000,000 rows, 100,000 x   3          19    21       5             13
//     100,000 rows,  20,000 x 256          55    77      29             63
// max reads 8 bytes of argmax for each element.
#include "common/grid.cuh"
#include "segment_pool/kernel.h"

namespace any2point {
namespace {

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    segment_pool_bwd_kernel(SegmentPoolBackward args, Strider strider) {
  using A = Accumulator<T>;
  const Pack<T, V>* __restrict__ grad = static_cast<const Pack<T, V>*>(args.grad);
  int64_t i = strider.first();
  Place place = strider.place(i);  // row, -, column
  for (; i < strider.total; i += strider.stride, strider.advance(&place)) {
    const int64_t segment = args.segment[place.outer];
    Pack<T, V> out{};
    if (segment >= 0 && segment < args.segments) {
      const int64_t from = segment * strider.inner + place.inner;
      out = grad[from];
      if (args.reduce == Reduce::max) {
#pragma unroll
        for (int v = 0; v < V; v++) {
          if (args.saved[from * V + v] != place.outer) out.at[v] = T{};
        }
      } else if (args.reduce == Reduce::mean) {
        const A count = A(args.saved[segment]);
#pragma unroll
        for (int v = 0; v < V; v++) narrow(widen(out.at[v]) / count, out.at + v);
      }
    }
    static_cast<Pack<T, V>*>(args.out)[i] = out;
  }
}

template <typename T, int V>
int launch(const SegmentPoolBackward& args, int64_t entries, cudaStream_t stream) {
  const int64_t columns = args.channels / V;
  const int blocks = grid_for(entries * columns);
  const Strider strider(entries, 1, columns, blocks);
  segment_pool_bwd_kernel<T, V><<<blocks, kThreads, 0, stream>>>(args, strider);
  return cudaGetLastError();
}

}  // namespace

int segment_pool_backward_cuda(const SegmentPoolBackward& args, int64_t entries, void* stream_) {
  if (entries * args.channels == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  int error = 0;
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    const bool vectors =
        args.channels * sizeof(T) % 16 == 0 && aligned(args.grad, 16) && aligned(args.out, 16);
    error = vectors ? launch<T, 16 / sizeof(T)>(args, entries, stream) : launch<T, 1>(args, entries, stream);
  });
  return error;
}

}  // namespace any2point
