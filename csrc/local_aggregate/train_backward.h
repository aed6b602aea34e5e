// Local aggregation in training, backward, with the warpgroup products of sm_90a: the passes of train.h over
// the rows, M = B S K. Torch-free. "16 bits": in the type of the features; everything else is float32.
#pragma once

#include "local_aggregate/hopper.h"

namespace any2point {

struct BackwardSize {
  int64_t width;   // C
  int64_t hidden;  // H
  int64_t groups;  // B S
  int neighbors;   // K
  bool bfloat16;
  int processors;
};

// A hidden layer before its normalisation, and that as a factor and a sum.
struct BackwardHidden {
  const void* before;  // [M, H], 16 bits
  const float* scale;  // [H]
  const float* shift;  // [H]
};

// The gradient below the maximum, one row per group and channel.
struct BackwardEntries {
  const float* grad;      // [B S, C]
  const int32_t* argmax;  // [B S, C]
};

// Sums that the normalisation after the second layer needs, as OutSums in train.h.
struct BackwardOutSums {
  const float* weight;     // W2 [C, H]
  const float* bias;       // [C]
  const float* mean;       // [C]
  const float* deviation;  // [C]
  float* grad;             // [C]
  float* grad_normed;      // [C]
  float* outer;            // [C, H]
};

// The sums of entries.
struct BackwardEntrySums {
  BackwardHidden hidden;
  BackwardEntries entries;
  BackwardOutSums sums;
};
int64_t backward_entry_sums_scratch(const BackwardSize& size);
int backward_entry_sums(const BackwardSize& size, const BackwardEntrySums& args, void* scratch, void* stream);

// dz [M, H] = h > 0 ? du weight' + h q' + constant : 0, du as entries or dense.
struct BackwardHiddenGrad {
  BackwardHidden hidden;
  BackwardEntries entries;
  const void* dense;       // du [M, C], 16 bits, or null
  const float* q;          // [H, H]
  const float* constant;   // [H]
  const float* weight;     // [C, H] with entries, [H, C] with dense rows
  const float* mean;       // [H] of the hidden layer before its normalisation
  const float* deviation;  // [H]
  void* dz;                // [M, H], 16 bits
  float* sum;              // [H] of dz
  float* sum_normed;       // [H] of dz times the normalised hidden layer
};
int64_t backward_hidden_grad_scratch(const BackwardSize& size, bool dense);
int backward_hidden_grad(const BackwardSize& size, const BackwardHiddenGrad& args, void* scratch,
                         void* stream);

// dy1 = factor (dz - m1 - normed m2), weight_grad [H, C] = dy1' x. With `dy1` x is the rows as they are
// built, and dy1 is written. Otherwise x is what the unit `below` makes of them, and du, the gradient after
// that, is written with its sums: du = x > 0 ? entries + dy1 weight' : 0.
struct BackwardRows {
  HopperAggregate from;  // without units and out
  const void* before;    // [M, H], 16 bits
  const void* dz;        // [M, H], 16 bits
  const float* mean;     // [H]
  const float* deviation;
  const float* factor;
  const float* m1;
  const float* m2;
  float* weight_grad;  // [H, C]
  void* dy1;           // [M, H], 16 bits, or null

  BackwardEntries entries;
  const float* weight;  // W1' [C, H]
  BackwardHidden below;
  const float* below_weight;  // [C, H], with its normalisation folded in
  const float* below_bias;    // [C]
  BackwardOutSums sums;
  void* du;  // [M, C], 16 bits
};
int64_t backward_rows_scratch(const BackwardSize& size, bool below);
int backward_rows(const BackwardSize& size, const BackwardRows& args, void* scratch, void* stream);

}  // namespace any2point
