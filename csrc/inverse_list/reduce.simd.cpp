// gather_reduce on the CPU: plain loops over channels, which the compiler vectorises for each instruction
// set. Every channel is added up alone and in order, so all sets give the same bits.
#include "inverse_list/kernel.h"

namespace any2point {
namespace A2P_ISA {
namespace {

template <typename T>
struct IndexOf {  // an integer as wide as the accumulator, for masks that need no conversion
  using type = int32_t;
};
template <>
struct IndexOf<double> {
  using type = int64_t;
};

template <typename T, typename List>
struct Row {
  using A = Accumulator<T>;
  using Index = typename IndexOf<T>::type;
  const GatherReduce& args;
  const T* source;  // at the tile's first channel
  const List* order;
  int64_t lo, hi, width;

  // A prebuilt list may hold anything; it must not lead out of the source.
  const T* at(int64_t i) const {
    int64_t row = static_cast<int64_t>(order[i]);
    if (args.per_source != 1) row /= args.per_source;
    row = row < 0 ? 0 : row >= args.sources ? args.sources - 1 : row;
    return source + row * args.channels;
  }
  // Rows lie apart: the next ones are asked for while this one is added.
  void prefetch(int64_t i) const {
    if (i + kAhead >= hi) return;
    const char* next = reinterpret_cast<const char*>(at(i + kAhead));
    for (int64_t byte = 0; byte < width * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(next + byte);
  }

  void sum(A* __restrict__ total) const {
    const A* weight = static_cast<const A*>(args.weight);
    for (int64_t c = 0; c < width; c++) total[c] = 0;
    for (int64_t i = lo; i < hi; i++) {
      prefetch(i);
      const T* __restrict__ values = at(i);
      if (weight) {
        const A w = weight[order[i]];
        for (int64_t c = 0; c < width; c++) total[c] += w * widen(values[c]);
      } else {
        for (int64_t c = 0; c < width; c++) total[c] += widen(values[c]);
      }
    }
  }

  // The first of the largest, or the first NaN; `best` places are counted from lo.
  void max(A* __restrict__ total, Index* __restrict__ best) const {
    const T* first = at(lo);
    for (int64_t c = 0; c < width; c++) total[c] = widen(first[c]), best[c] = 0;
    for (int64_t i = lo + 1; i < hi; i++) {
      prefetch(i);
      const T* __restrict__ values = at(i);
      const Index place = static_cast<Index>(i - lo);
      for (int64_t c = 0; c < width; c++) {
        const A value = widen(values[c]), old = total[c];
        const bool take = (value > old) | ((value != value) & (old == old));
        total[c] = take ? value : old;
        best[c] = take ? place : best[c];
      }
    }
  }

  static constexpr int64_t kAhead = 4;
};

template <typename T, typename List>
void run(const GatherReduce& args, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  A total[kColumnTile];
  typename IndexOf<T>::type best[kColumnTile];
  const int64_t tiles = column_tiles(args.channels);
  for (int64_t item = begin; item < end; item++) {
    const int64_t row = item / tiles, first = item % tiles * kColumnTile;
    const List* start = static_cast<const List*>(args.start) + row + row / args.rows;
    int64_t lo = static_cast<int64_t>(start[0]), hi = static_cast<int64_t>(start[1]);
    lo = lo < 0 ? 0 : lo > args.entries ? args.entries : lo;
    hi = hi < lo ? lo : hi > args.entries ? args.entries : hi;
    int64_t width = args.channels - first;
    width = width < kColumnTile ? width : kColumnTile;
    const T* source = static_cast<const T*>(args.source) + first;
    const List* order = static_cast<const List*>(args.order);
    const Row<T, List> list{args, source, order, lo, hi, width};
    if (args.count && first == 0) args.count[row] = hi - lo;
    const int64_t at = row * args.channels + first;
    T* out = static_cast<T*>(args.out) + at;
    if (args.reduce == Reduce::max) {
      int64_t* argmax = args.argmax + at;
      if (lo == hi) {
        for (int64_t c = 0; c < width; c++) out[c] = T{}, argmax[c] = -1;
        continue;
      }
      list.max(total, best);
      for (int64_t c = 0; c < width; c++) argmax[c] = static_cast<int64_t>(order[lo + best[c]]);
    } else {
      list.sum(total);
      if (args.reduce == Reduce::mean && hi > lo) {
        const A count = static_cast<A>(hi - lo);
        for (int64_t c = 0; c < width; c++) total[c] /= count;
      }
    }
    for (int64_t c = 0; c < width; c++) narrow(total[c], out + c);
  }
}

}  // namespace

void gather_reduce_rows(const GatherReduce& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    args.wide ? run<T, int64_t>(args, begin, end) : run<T, uint32_t>(args, begin, end);
  });
}

}  // namespace A2P_ISA
}  // namespace any2point
