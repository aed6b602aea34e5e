// interpolate on the CPU: plain loops over channels, which the compiler vectorises for each instruction set.
// The order of every sum is written down, so all sets give the same bits.
#include "interpolate/kernel.h"

namespace any2point {
namespace A2P_ISA {
namespace {

constexpr int64_t kTile = 256;  // channels accumulated at once

// The row that neighbour `i` (of all B * S * K) means: null for -1 and, noted in `bad`, for anything else
// outside of the cloud.
template <typename T>
const T* row_of(const Interpolate& args, int64_t cloud, int64_t i, int64_t* bad) {
  const int64_t row = args.index[i];
  if (row >= 0 && row < args.rows) {
    return static_cast<const T*>(args.features) + (cloud * args.rows + row) * args.channels;
  }
  if (row != -1 && *bad < 0) *bad = i;
  return nullptr;
}

// Sixteen running sums, added up in a tree.
template <typename T>
Accumulator<T> dot(const T* __restrict__ a, const T* __restrict__ b, int64_t n) {
  constexpr int kSums = 16;
  Accumulator<T> sum[kSums] = {};
  int64_t c = 0;
  for (; c + kSums <= n; c += kSums) {
    for (int i = 0; i < kSums; i++) sum[i] += widen(a[c + i]) * widen(b[c + i]);
  }
  for (int i = 0; c + i < n; i++) sum[i] += widen(a[c + i]) * widen(b[c + i]);
  for (int width = kSums / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; i++) sum[i] += sum[i + width];
  }
  return sum[0];
}

}  // namespace

int64_t interpolate_rows(const Interpolate& args, int64_t begin, int64_t end) {
  int64_t bad = -1;
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    A total[kTile];
    for (int64_t s = begin; s < end; s++) {
      const int64_t cloud = s / args.queries, first = s * args.neighbours;
      const A* weight = static_cast<const A*>(args.weight) + first;
      T* __restrict__ out = static_cast<T*>(args.out) + s * args.channels;
      for (int64_t c0 = 0; c0 < args.channels; c0 += kTile) {
        const int64_t rest = args.channels - c0, width = rest < kTile ? rest : kTile;
        for (int64_t c = 0; c < width; c++) total[c] = 0;
        for (int64_t k = 0; k < args.neighbours; k++) {
          const T* __restrict__ row = row_of<T>(args, cloud, first + k, &bad);
          if (!row) continue;
          const A w = weight[k];
          for (int64_t c = 0; c < width; c++) total[c] += w * widen(row[c0 + c]);
        }
        for (int64_t c = 0; c < width; c++) narrow(total[c], out + c0 + c);
      }
    }
  });
  return bad;
}

int64_t weight_grad_rows(const Interpolate& args, int64_t begin, int64_t end) {
  int64_t bad = -1;
  dispatch(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    for (int64_t s = begin; s < end; s++) {
      const int64_t cloud = s / args.queries, first = s * args.neighbours;
      const T* grad = static_cast<const T*>(args.grad) + s * args.channels;
      A* out = static_cast<A*>(args.out) + first;
      for (int64_t k = 0; k < args.neighbours; k++) {
        const T* row = row_of<T>(args, cloud, first + k, &bad);
        out[k] = row ? dot(grad, row, args.channels) : A(0);
      }
    }
  });
  return bad;
}

}  // namespace A2P_ISA
}  // namespace any2point
