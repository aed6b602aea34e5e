#include "inverse_list/kernel.h"

#include <algorithm>

namespace any2point {
namespace {

// Channels that are accumulated at once: 1 kB of float32, which stays in the first-level cache.
constexpr int64_t kTile = 256;

template <typename T, typename List>
struct Row {
  using A = Accumulator<T>;
  const GatherReduce& args;
  const T* source;  // at the tile's first channel
  const List* order;
  int64_t lo, hi, width;

  int64_t entry(int64_t i) const { return static_cast<int64_t>(order[i]); }
  // A prebuilt list may hold anything; it must not lead out of the source.
  const T* at(int64_t e) const {
    const int64_t row = args.per_source == 1 ? e : e / args.per_source;
    return source + std::clamp<int64_t>(row, 0, args.sources - 1) * args.channels;
  }

  void sum(A* total) const {
    const A* weight = static_cast<const A*>(args.weight);
    for (int64_t c = 0; c < width; c++) total[c] = 0;
    for (int64_t i = lo; i < hi; i++) {
      const T* values = at(entry(i));
      if (weight) {
        const A w = weight[entry(i)];
        for (int64_t c = 0; c < width; c++) total[c] += w * widen(values[c]);
      } else {
        for (int64_t c = 0; c < width; c++) total[c] += widen(values[c]);
      }
    }
  }

  void max(A* best, int64_t* argmax) const {
    for (int64_t c = 0; c < width; c++) best[c] = 0, argmax[c] = -1;
    for (int64_t i = lo; i < hi; i++) {
      const int64_t e = entry(i);
      const T* values = at(e);
      for (int64_t c = 0; c < width; c++) {
        const A value = widen(values[c]);
        // The first entry, a larger one, or the first NaN.
        const bool take = argmax[c] < 0 || (!(value <= best[c]) && best[c] == best[c]);
        best[c] = take ? value : best[c];
        argmax[c] = take ? e : argmax[c];
      }
    }
  }
};

template <typename T, typename List>
void run(const GatherReduce& args, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  A total[kTile];
  const int64_t tiles = column_tiles(args.channels);
  for (int64_t item = begin; item < end; item++) {
    const int64_t row = item / tiles, first = item % tiles * kTile;
    const List* start = static_cast<const List*>(args.start) + row + row / args.rows;
    const T* source = static_cast<const T*>(args.source) + first;
    const int64_t lo = std::clamp<int64_t>(start[0], 0, args.entries);
    const int64_t hi = std::clamp<int64_t>(start[1], lo, args.entries);
    const int64_t width = std::min(kTile, args.channels - first);
    const Row<T, List> list{args, source, static_cast<const List*>(args.order), lo, hi, width};
    if (args.count && first == 0) args.count[row] = hi - lo;
    const int64_t at = row * args.channels + first;
    T* out = static_cast<T*>(args.out) + at;
    if (args.reduce == Reduce::max) {
      list.max(total, args.argmax + at);
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

int64_t column_tiles(int64_t channels) { return (channels + kTile - 1) / kTile; }

template <typename List>
int64_t inverse_list_cpu(const int64_t* index, int64_t entries, int64_t rows, int64_t base, List* start,
                         List* order) {
  int64_t bad = -1;
  std::fill(start, start + rows + 1, List(0));
  for (int64_t r = 0; r < entries; r++) {
    const int64_t row = index[r];
    if (row >= 0 && row < rows) {
      start[row]++;
    } else if (row != -1 && bad < 0) {
      bad = r;
    }
  }
  // Ends of the rows first; filling from the back then leaves each start at its row's beginning.
  List end = static_cast<List>(base);
  for (int64_t n = 0; n <= rows; n++) start[n] = end += start[n];
  for (int64_t r = entries - 1; r >= 0; r--) {
    const int64_t row = index[r];
    if (row >= 0 && row < rows) order[--start[row]] = static_cast<List>(base + r);
  }
  return bad;
}
template int64_t inverse_list_cpu(const int64_t*, int64_t, int64_t, int64_t, uint32_t*, uint32_t*);
template int64_t inverse_list_cpu(const int64_t*, int64_t, int64_t, int64_t, int64_t*, int64_t*);

void gather_reduce_cpu(const GatherReduce& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    args.wide ? run<T, int64_t>(args, begin, end) : run<T, uint32_t>(args, begin, end);
  });
}

}  // namespace any2point
