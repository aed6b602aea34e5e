// Local aggregation on the CPU, a few groups of neighbours at a time. Torch-free.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace any2point {

// Where the rows x [B S K, C] come from.
struct Neighborhoods {
  const float* points;      // [B, N, 3]
  const float* features;    // [B, N, C / 2]
  const int64_t* center;    // [B, S], in -1..N-1; -1: a point at the origin without features
  const int64_t* neighbor;  // [B, S, K], below N; below 0: the centre itself
  const float* divisor;     // [B], or null: the largest offset of a group, axis by axis
  const float* wavelength;  // [C / 6], and ones up to a multiple of 16
  int64_t rows;             // N
  int64_t centers;          // S
  int64_t neighbors;        // K > 0
  int64_t width;            // C, even
  float beta;               // factor on the offset before it is divided by the wavelengths
  bool guard;               // a group that is flat along an axis has offset 0 there, instead of 0/0
};

// A linear layer as the kernels read it: panels of a few vectors of columns (fewer in the last), each
// [in, columns]. Columns beyond `out` are zero, up to a whole number of lanes.
struct PackedLinear {
  const float* weight;
  const float* bias;  // [packed_columns(out)]
};

// Floats that a layer with `out` columns takes up when packed, per row of its input.
int64_t packed_columns(int64_t out);
// weight [out, in] and bias [out] (or null) into packed [in * packed_columns(out)] and packed_bias.
void pack_linear(const float* weight, const float* bias, int64_t out, int64_t in, float* packed,
                 float* packed_bias);

// x -> ReLU(x + out(ReLU(in(x)))), the batch normalisations folded into the layers.
struct FoldedUnit {
  PackedLinear in, out;
  int64_t hidden;  // H
};

// Evaluation.
struct LocalAggregate {
  Neighborhoods from;
  const FoldedUnit* units;
  int64_t unit_count;
  int64_t hidden;  // the largest H
  float* out;      // [B, S, C]
};

// What one thread needs, in floats.
int64_t local_aggregate_scratch(const LocalAggregate& args);
// Groups [begin, end) of the B * S.
void local_aggregate_cpu(const LocalAggregate& args, float* scratch, int64_t begin, int64_t end);

// A linear layer with weights in bfloat16: panels of 64 columns (the last of 64 or 32), each
// [packed_bf16(in) / 2, columns, 2], zero beyond the layer's own rows and columns.
struct PackedBf16 {
  const BFloat16* weight;
  const float* bias;  // [packed_bf16(out)]
};

struct FoldedUnitBf16 {
  PackedBf16 in, out;
  int64_t hidden;  // H
};

// Evaluation with operands in bfloat16: features, rows x and hidden layers as they enter products, weights.
// Sums, and the x that residuals are added to, are float32.
struct LocalAggregateBf16 {
  Neighborhoods from;        // without features
  const BFloat16* features;  // [B, N, C / 2]
  const FoldedUnitBf16* units;
  int64_t unit_count;
  int64_t hidden;  // the largest H
  BFloat16* out;   // [B, S, C]
};

// Whether this CPU has products of bfloat16, which the functions below need.
bool multiplies_bf16();
// A number of rows or columns as it is when packed.
A2P_ALWAYS_INLINE int64_t packed_bf16(int64_t count) { return (count + 31) / 32 * 32; }
// weight [out, in] and bias [out] into packed [packed_bf16(in) * packed_bf16(out)] and packed_bias.
void pack_linear_bf16(const float* weight, const float* bias, int64_t out, int64_t in, BFloat16* packed,
                      float* packed_bias);
// What one thread needs, in bytes.
int64_t local_aggregate_bf16_scratch(const LocalAggregateBf16& args);
void local_aggregate_bf16(const LocalAggregateBf16& args, void* scratch, int64_t begin, int64_t end);

}  // namespace any2point
