// One group at a time: its rows x [K, C] are built in the cache, go through the residual units there, and
// leave as their maximum [C]. Nothing of size [B, S, K, C] exists.
//
// Floor: the products, 4 C H multiplications and additions per neighbour and unit. At the tokenizer's sizes
// (1024 points, K = 81) that is 13.2 GFLOP per cloud, and 12 million pairs of sine and cosine beside it.
// Measured on one AVX-512 core (AMD Zen 5): 56 ms per cloud, 235 GFLOP/s over all, of which the sines take 6
// ms; the composition of torch ops takes 680 ms. groups.bf16.cpp is the same with products of bfloat16.
#include "local_aggregate/tile.h"

namespace any2point {
namespace A2P_ISA {
void pack_panels(const float* weight, const float* bias, int64_t out, int64_t in, float* packed,
                 float* packed_bias) {
  const int64_t columns = padded(out);
  for (int64_t first = 0; first < columns; first += kPanel) {
    const int64_t width = columns - first < kPanel ? columns - first : kPanel;
    for (int64_t d = 0; d < in; d++) {
      for (int64_t j = 0; j < width; j++) {
        *packed++ = first + j < out ? weight[(first + j) * in + d] : 0.0f;
      }
    }
  }
  for (int64_t j = 0; j < columns; j++) packed_bias[j] = bias && j < out ? bias[j] : 0.0f;
}

void aggregate_groups(const LocalAggregate& args, float* scratch, int64_t begin, int64_t end) {
  const int64_t count = args.from.neighbors, width = args.from.width;
  const int64_t rows = (count + kRows - 1) / kRows * kRows, columns = padded(width);
  const int64_t hidden_stride = padded(args.hidden);
  float* x = scratch;
  float* hidden = x + rows * columns;
  float* offset = hidden + rows * hidden_stride;
  memset(x, 0, sizeof(float) * rows * columns);  // padding, which the products read
  for (int64_t group = begin; group < end; group++) {
    build_rows(args.from, group, offset, x, columns);
    for (int64_t u = 0; u < args.unit_count; u++) {
      const FoldedUnit& unit = args.units[u];
      layer<Into::relu>(x, columns, unit.in, width, unit.hidden, hidden, hidden_stride, rows);
      layer<Into::add_relu>(hidden, hidden_stride, unit.out, unit.hidden, width, x, columns, rows);
    }
    largest_rows(x, columns, count, width, args.out + group * width);
  }
}

}  // namespace A2P_ISA
}  // namespace any2point
