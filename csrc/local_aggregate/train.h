// Local aggregation in training on the CPU: passes over the rows x [M, C], M = B S K, between which the
// caller turns sums into batch statistics. Rows are made again in every pass; what is stored per unit is its
// hidden layer before normalisation, [M, H]. Torch-free.
//
// Every pass runs over chunks of groups and writes one partial sum per chunk: added up in the order of the
// chunks they do not depend on the number of threads.
//
// For a unit z = ReLU(x + n2(W2 h + b2)), h = ReLU(n1(W1 x + b1)), du the gradient after its last ReLU:
//   statistics of W2 h + b2 follow from sum h and the Gram matrix of h, without the products themselves;
//   dh = p du W2 - h Q + constant,  p = weight2 / deviation2,  Q = W2' diag(p m2 / deviation2) W2,
//   where m1, m2 are the means of du and of du times the normalised product. Below a maximum over K du is one
//   entry per group and channel, and so is its part of dh and of dW2.
//
// Measured on one AVX-512 core (AMD Zen 5), forward and backward of the tokenizer's three stages (K = 81):
// 334 ms per cloud, the composition of torch ops 1,310 ms; the products alone, some 38 GFLOP, would take 170
// ms at the speed of evaluation. Next: the sums over rows beside the products, which are not yet in their
// registers.
#pragma once

#include "local_aggregate/kernel.h"

namespace any2point {

// A unit whose batch statistics are known.
struct TrainedUnit {
  const float* before;  // [M, H]: in(x), before its normalisation,
  const float* scale;   // [H] which is this factor
  const float* shift;   // [H] and this sum
  PackedLinear out;     // with its normalisation folded in
  int64_t hidden;       // H
};

// The rows after the units that are done.
struct TrainedRows {
  Neighborhoods from;
  const TrainedUnit* done;
  int64_t done_count;
  int64_t hidden;  // the largest H of all units
};

// The gradient du after a unit: `dense` [M, C], or where that is null `grad` [B, S, C] at the rows `argmax`.
struct RowGradient {
  const float* grad;
  const int32_t* argmax;
  const float* dense;
};

// Sums that the normalisation after the second layer needs: of du, of du times the normalised product, and of
// du' h. One of each per chunk.
struct OutSums {
  const float* weight;     // W2 [C, H]
  PackedLinear out;        // the same packed, with the bias b2
  const float* bias;       // [C]
  const float* mean;       // [C] of W2 h + b2
  const float* deviation;  // [C] 1 / sqrt(variance + eps)
  float* grad;             // [C]
  float* grad_normed;      // [C]
  float* outer;            // [padded6(C), packed_columns(H)]
};

// n1's backward: y1 = mean + normed / deviation, dy1 = factor (dz - m1 - normed m2).
struct InNorm {
  const float* mean;       // [H]
  const float* deviation;  // [H]
  const float* factor;     // [H]
  const float* m1;         // [H]
  const float* m2;         // [H]
};

constexpr int64_t padded6(int64_t count) { return (count + 5) / 6 * 6; }
constexpr int64_t train_stride(int64_t columns) { return (columns + 47) / 48 * 48; }
// Groups at a time: about 96 rows, enough for a product's weights to be worth reading and few enough for the
// cache.
constexpr int64_t tile_groups(int64_t neighbors) { return neighbors >= 96 ? 1 : 96 / neighbors; }
int64_t train_scratch(const TrainedRows& rows);  // floats per thread

// before [M, H] = next(x); mean and spread (sum of squares about it) of this chunk, [packed_columns(H)].
void train_project(const TrainedRows& rows, const PackedLinear& next, int64_t hidden, float* before,
                   float* mean, float* spread, float* scratch, int64_t begin, int64_t end);
// gram [padded6(H), packed_columns(H)] = h' h, sum [H] of h.
void train_gram(const TrainedRows& rows, const TrainedUnit& unit, float* gram, float* sum, float* scratch,
                int64_t begin, int64_t end);
// out [B, S, C]: the largest of each group's rows; argmax: which.
void train_max(const TrainedRows& rows, float* out, int32_t* argmax, float* scratch, int64_t begin,
               int64_t end);

// The sums of a unit below the maximum.
void train_out_sums(const TrainedRows& rows, const TrainedUnit& unit, const RowGradient& du,
                    const OutSums& sums, float* scratch, int64_t begin, int64_t end);
// dz [M, H] = dh where h > 0; sums [H] of dz and of dz times the normalised hidden layer. `q`: -Q and the
// constant; below a maximum `weight` is p W2 [C, H], otherwise `out` the same, packed.
void train_hidden_grad(const TrainedRows& rows, const TrainedUnit& unit, const RowGradient& du,
                       const PackedLinear& q, const float* weight, const PackedLinear& out,
                       const InNorm& norm, float* dz, float* sum, float* sum_normed, float* scratch,
                       int64_t begin, int64_t end);
// weight_grad [padded6(H), packed_columns(C)] = dy1' x. If units come before this one (`rows.done`), writes
// du [M, C] of the last of them and its `sums`. Otherwise adds dy1 to by_neighbor and by_center [B, N, H],
// and du, which reaches x past the unit, to features [B, N, C / 2]; the groups are then those of whole
// clouds. `in`: W1', packed, without bias.
struct RowsGradOut {
  float* weight_grad;
  const PackedLinear* in;
  float* du;
  const OutSums* sums;
  float* by_neighbor;
  float* by_center;
  float* features;
};
void train_rows_grad(const TrainedRows& rows, const TrainedUnit& unit, const RowGradient& du, const float* dz,
                     const InNorm& norm, const RowsGradOut& to, float* scratch, int64_t begin, int64_t end);

}  // namespace any2point
