// gather_reduce on CUDA: a thread per 16 bytes of a row walks the row's entries in order, four loads at a
// time. Where rows times columns are too few to fill the chip (pooling of a whole cloud), each row's entries
// are cut into slices, whose results a second kernel adds up in order. The number of slices follows from the
// shapes alone, so results do not depend on the device.
#include "common/grid.cuh"
#include "inverse_list/kernel.h"

namespace any2point {
namespace {

constexpr int64_t kWanted = 1 << 18;  // threads that are enough
constexpr int64_t kSlice = 64;        // entries of a slice, on average, that are too few to cut
constexpr uint32_t kNone = 0xffffffff;

// A running sum or maximum of V channels.
template <typename A, int V>
struct Sum {
  A total[V];
  __device__ void clear() {
#pragma unroll
    for (int v = 0; v < V; v++) total[v] = 0;
  }
  __device__ void add(int v, A value, uint32_t) { total[v] += value; }
};

template <typename A, int V>
struct Max {
  A total[V];
  uint32_t argmax[V];
  __device__ void clear() {
#pragma unroll
    for (int v = 0; v < V; v++) total[v] = 0, argmax[v] = kNone;
  }
  // The first entry, a larger one, or the first NaN.
  __device__ void add(int v, A value, uint32_t entry) {
    const bool take = argmax[v] == kNone || (!(value <= total[v]) && total[v] == total[v]);
    total[v] = take ? value : total[v];
    argmax[v] = take ? entry : argmax[v];
  }
};

template <typename A, int V>
__device__ void store_argmax(const Sum<A, V>&, int64_t*, int64_t) {}
template <typename A, int V>
__device__ void store_argmax(const Max<A, V>& max, int64_t* out, int64_t at) {
#pragma unroll
  for (int v = 0; v < V; v++) out[at + v] = max.argmax[v] == kNone ? -1 : int64_t(max.argmax[v]);
}

struct Slices {
  int64_t number;   // of each row
  void* total;      // [rows, number, channels] of the accumulator's type
  int64_t* argmax;  // the same, for max
};

__device__ int64_t divide(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? uint32_t(a) / uint32_t(b) : a / b;
}

// Where the entries of a row begin and end.
__device__ void bounds(const GatherReduce& args, int64_t row, uint32_t* lo, uint32_t* hi) {
  const uint32_t* start = static_cast<const uint32_t*>(args.start) + row + divide(row, args.rows);
  *lo = start[0];
  *hi = start[1];
}

// The end of a row: divided, rounded, written.
template <typename T, int V, typename R>
__device__ void finish(const GatherReduce& args, const R& result, int64_t row, int64_t at, uint32_t entries,
                       bool first) {
  using A = Accumulator<T>;
  Pack<T, V> out;
#pragma unroll
  for (int v = 0; v < V; v++) {
    A value = result.total[v];
    if (args.reduce == Reduce::mean && entries > 0) value /= A(entries);
    narrow(value, out.at + v);
  }
  *reinterpret_cast<Pack<T, V>*>(static_cast<T*>(args.out) + at) = out;
  if (args.reduce == Reduce::max) store_argmax(result, args.argmax, at);
  if (args.count && first) args.count[row] = entries;
}

template <typename T, int V, template <typename, int> class Result>
__global__ void __launch_bounds__(kThreads)
    gather_reduce_kernel(GatherReduce args, Slices slices, Strider strider) {
  using A = Accumulator<T>;
  const T* __restrict__ source = static_cast<const T*>(args.source);
  const A* __restrict__ weight = static_cast<const A*>(args.weight);
  const uint32_t* __restrict__ order = static_cast<const uint32_t*>(args.order);
  const uint32_t per_source = args.per_source;
  int64_t i = strider.first();
  Place place = strider.place(i);  // row, slice, column
  for (; i < strider.total; i += strider.stride, strider.advance(&place)) {
    const int64_t column = place.inner * V;
    uint32_t lo, hi;
    bounds(args, place.outer, &lo, &hi);
    const uint32_t entries = hi - lo;
    if (slices.number > 1) {
      const uint32_t length = entries / slices.number + 1;
      lo = min(lo + uint32_t(place.middle) * length, hi);
      hi = min(lo + length, hi);
    }
    Result<A, V> result;
    result.clear();
#pragma unroll 4
    for (uint32_t j = lo; j < hi; j++) {
      const uint32_t entry = order[j];
      const int64_t row = per_source == 1 ? entry : entry / per_source;
      const auto values = *reinterpret_cast<const Pack<T, V>*>(source + row * args.channels + column);
      const A w = weight ? weight[entry] : A(1);
#pragma unroll
      for (int v = 0; v < V; v++) result.add(v, w * widen(values.at[v]), entry);
    }
    if (slices.number > 1) {
      const int64_t at = (place.outer * slices.number + place.middle) * args.channels + column;
#pragma unroll
      for (int v = 0; v < V; v++) static_cast<A*>(slices.total)[at + v] = result.total[v];
      if (args.reduce == Reduce::max) store_argmax(result, slices.argmax, at);
    } else {
      finish<T, V>(args, result, place.outer, place.outer * args.channels + column, entries, column == 0);
    }
  }
}

// Adds up a row's slices, in order.
template <typename T, template <typename, int> class Result>
__global__ void slices_kernel(GatherReduce args, Slices slices, Strider strider) {
  using A = Accumulator<T>;
  const A* __restrict__ totals = static_cast<const A*>(slices.total);
  int64_t i = strider.first();
  Place place = strider.place(i);  // row, -, channel
  for (; i < strider.total; i += strider.stride, strider.advance(&place)) {
    Result<A, 1> result;
    result.clear();
    int64_t at = place.outer * slices.number * args.channels + place.inner;
#pragma unroll 4
    for (int64_t s = 0; s < slices.number; s++, at += args.channels) {
      const int64_t entry = args.reduce == Reduce::max ? slices.argmax[at] : 0;
      if (entry >= 0) result.add(0, totals[at], uint32_t(entry));
    }
    uint32_t lo, hi;
    bounds(args, place.outer, &lo, &hi);
    finish<T, 1>(args, result, place.outer, i, hi - lo, place.inner == 0);
  }
}

int64_t slices_of(const GatherReduce& args, int64_t rows, int64_t columns) {
  int64_t number = 1;
  while (number < 4096 && rows * columns * number < kWanted && args.entries / (rows * number * 2) >= kSlice) {
    number *= 2;
  }
  return number;
}

int64_t accumulator_bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }
int64_t element_bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// Elements per thread: 16 bytes where rows and pointers allow.
int vector_of(const GatherReduce& args) {
  const int64_t bytes = element_bytes(args.dtype);
  const bool fits = args.channels * bytes % 16 == 0 && aligned(args.source, 16) && aligned(args.out, 16);
  return fits ? static_cast<int>(16 / bytes) : 1;
}

template <typename T, int V, template <typename, int> class Result>
int launch(const GatherReduce& args, int64_t rows, void* workspace, cudaStream_t stream) {
  const int64_t columns = args.channels / V;
  Slices slices{slices_of(args, rows, columns), nullptr, nullptr};
  if (slices.number > 1) {
    const int64_t items = rows * slices.number * args.channels;
    slices.argmax = static_cast<int64_t*>(workspace);
    slices.total = slices.argmax + (args.reduce == Reduce::max ? items : 0);
  }
  int blocks = grid_for(rows * slices.number * columns);
  gather_reduce_kernel<T, V, Result>
      <<<blocks, kThreads, 0, stream>>>(args, slices, Strider(rows, slices.number, columns, blocks));
  if (slices.number > 1) {
    blocks = grid_for(rows * args.channels);
    slices_kernel<T, Result>
        <<<blocks, kThreads, 0, stream>>>(args, slices, Strider(rows, 1, args.channels, blocks));
  }
  return cudaGetLastError();
}

template <typename T, int V>
int launch_of(const GatherReduce& args, int64_t rows, void* workspace, cudaStream_t stream) {
  return args.reduce == Reduce::max ? launch<T, V, Max>(args, rows, workspace, stream)
                                    : launch<T, V, Sum>(args, rows, workspace, stream);
}

__global__ void narrow_kernel(const int64_t* from, int64_t n, int64_t bound, uint32_t* to) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n; i += int64_t(gridDim.x) * kThreads) {
    to[i] = uint32_t(min(max(from[i], int64_t(0)), bound));
  }
}

}  // namespace

int64_t gather_reduce_workspace(const GatherReduce& args, int64_t rows) {
  if (rows == 0 || args.channels == 0) return 0;
  const int64_t number = slices_of(args, rows, args.channels / vector_of(args));
  const int64_t bytes = accumulator_bytes(args.dtype) + (args.reduce == Reduce::max ? 8 : 0);
  return number > 1 ? rows * number * args.channels * bytes : 0;
}

int gather_reduce_cuda(const GatherReduce& args, int64_t rows, void* workspace, void* stream_) {
  if (rows == 0 || args.channels == 0) return 0;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  int error = 0;
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    error = vector_of(args) > 1 ? launch_of<T, 16 / sizeof(T)>(args, rows, workspace, stream)
                                : launch_of<T, 1>(args, rows, workspace, stream);
  });
  return error;
}

int narrow_list_cuda(const int64_t* from, int64_t n, int64_t bound, uint32_t* to, void* stream) {
  if (n == 0) return 0;
  narrow_kernel<<<grid_for(n), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(from, n, bound, to);
  return cudaGetLastError();
}

}  // namespace any2point
