// Local aggregation in training, backward, with the warpgroup products of sm_90a: the passes of train.h over
// the rows, M = B S K. Torch-free. "16 bits": in the type of the features; everything else is float32.
//
// H200, 32 clouds, K = 81, float16, us of a pass with all that it launches, and its floor: memory (4.3 TB/s),
// products (790 TFLOP/s) or sines, whichever is highest:
//   centres, channels, hidden               512, 192, 96    256, 384, 192    128, 768, 32
//   entry_sums                                130   65         181   65         43   11
//   hidden_grad, entries                      230  121         361  186         79   21
//   hidden_grad, dense rows                   272  237
//   rows, of a unit above another             826  474
//   rows, of the first                        303  178         407  178        192   61
// Limit: shared memory, which is busy for 45 to 67 % of the time (operands of products, and what stands in
// them per column: a thread has 8 columns of a row and reads their factors again for each), and that three
// teams of a multiprocessor hide little of what one waits for; dense rows: memory. The largest, `rows` of a
// unit above another, is two kernels: the second reads du again, 250 us, as registers do not hold the sums of
// both; 52 of them are for the sums of groups, for which the gradient of the features then need not read half
// of du (77 us less). Without gain: entries put into zeros in shared memory instead of comparisons, sums of
// groups of dy1 beside its product, another order of what each team builds.
//
// Gradients of rows take each other's place, always a block's own rows: the second half of du that of the dz
// above, the dz below that of this half, dy1 that of dz. So training has two tensors of the size of y1 beside
// those that were saved: 1.15 GB at most in the first of these stages, 1.17 GB in all three.
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

// What du is given as; added: dz has du weight' already. dy1: entries, with dy1 as below in place of dz and
// without its sums.
enum class BackwardGiven { entries, dense, added, dy1 };

// dz [M, H] = h > 0 ? du weight' + h q' + constant : 0.
struct BackwardHiddenGrad {
  BackwardGiven given;
  BackwardHidden hidden;
  BackwardEntries entries;
  const void* near;  // du [M, C], 16 bits, in two halves of channels, or null
  const void* center;
  const float* q;          // [H, H]
  const float* constant;   // [H]
  const float* weight;     // [C, H] with entries, [H, C] with dense rows
  const float* mean;       // [H] of the hidden layer before its normalisation
  const float* deviation;  // [H]
  // [M, H], 16 bits, perhaps in the place of `center`, or dy1 in that of y1; null: sums alone
  void* dz;
  float* sum;                     // [H] of dz
  float* sum_normed;              // [H] of dz times the normalised hidden layer
  const float *factor, *m1, *m2;  // [H] of dy1
};
int64_t backward_hidden_grad_scratch(const BackwardSize& size, BackwardGiven given);
int backward_hidden_grad(const BackwardSize& size, const BackwardHiddenGrad& args, void* scratch,
                         void* stream);

// dy1 = factor (dz - m1 - normed m2), weight_grad [H, C] = dy1' x. Without `near` x is the rows as they are
// built, and dy1 is left in the place of dz. Otherwise x is what the unit `below` makes of them, and du, the
// gradient after that, is written with its sums, its second half of channels in the place of dz:
// du = x > 0 ? entries + dy1 weight' : 0.
struct BackwardRows {
  HopperAggregate from;  // without units and out
  const void* before;    // [M, H], 16 bits
  void* dz;              // [M, H], 16 bits
  const float* mean;     // [H]
  const float* deviation;
  const float* factor;
  const float* m1;
  const float* m2;
  float* weight_grad;  // [H, C]

  BackwardEntries entries;
  const float* weight;  // W1' [C, H]
  BackwardHidden below;
  const float* below_weight;  // [C, H], with its normalisation folded in
  const float* below_bias;    // [C]
  BackwardOutSums sums;
  void* near;       // [M, C / 2], 16 bits: the first half of du, or null
  float* by_group;  // [B S, C / 2]: sums of the second
};
int64_t backward_rows_scratch(const BackwardSize& size, bool below);
int backward_rows(const BackwardSize& size, const BackwardRows& args, void* scratch, void* stream);

}  // namespace any2point
