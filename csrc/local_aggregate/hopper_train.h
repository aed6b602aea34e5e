// Local aggregation in training with the warpgroup products of sm_90a: the passes of train.h forward, and the
// sums over points backward. Torch-free. Everything of 16 bits is in the type of the features.
#pragma once

#include "local_aggregate/hopper.h"

namespace any2point {

// A unit whose batch statistics are known.
struct HopperDone {
  const void* before;  // [M, H], M = B S K
  const float* scale;  // [H]
  const float* shift;  // [H]
  const void* weight;  // [C, H], with its normalisation folded in
  const float* bias;   // [C]
};

// Sums come in parts, one for each block of warps that walk over rows.
int64_t hopper_train_parts(int64_t groups, int64_t neighbors, int processors);
int64_t hopper_train_scratch(int64_t width, int64_t groups, int64_t neighbors, int processors);

// `rows` without its units and out.
struct HopperProject {
  HopperAggregate rows;
  HopperDone done[kHopperUnits - 1];
  int units;           // that are done
  const void* weight;  // [H, C]
  const float* bias;   // [H]
  void* before;        // [M, H], perhaps that of the last unit that is done
  float* mean;         // [parts, H], or null: without statistics
  float* spread;       // [parts, H]: sum of squares about it
  float* count;        // [parts]
};
int hopper_project(const HopperProject& args, int64_t width, int64_t hidden, int processors, void* scratch,
                   void* stream);

struct HopperMaximum {
  HopperAggregate rows;
  HopperDone done[kHopperUnits];
  int units;
  float* out;       // [B, S, C]
  int32_t* argmax;  // [B, S, C]
};
int hopper_maximum(const HopperMaximum& args, int64_t width, int64_t hidden, int processors, void* scratch,
                   void* stream);

struct HopperGram {
  const void* before;  // [M, H]
  const float* scale;  // [H]
  const float* shift;  // [H]
  int64_t rows;        // M
  bool bfloat16;
  float* gram;  // [parts.gram, H, H]
  float* sum;   // [parts.sum, H]
};
struct HopperGramParts {
  int64_t gram, sum;
};
HopperGramParts hopper_gram_parts(int64_t rows, int64_t hidden, int processors);
int hopper_gram(const HopperGram& args, int64_t hidden, int processors, void* stream);

struct HopperPoints {
  const void* dy1;         // [M, H]
  const float* grad;       // [B, S, C], or null
  const int32_t* argmax;   // [B, S, C], with grad
  const void* dense;       // [M, C / 2]: the half of the neighbour, or null
  const float* by_center;  // [B S, C / 2]: sums of the other half; without dense those of it are in direct
  const uint32_t* near;    // [B, N + 1] and [B S K]: the inverse list of neighbours, where a missing one
  const uint32_t* pairs;   //   is the centre
  const uint32_t* middle;  // [B, N + 1] and [B S]: the inverse list of centres
  const uint32_t* owned;
  uint32_t first_pair;  // where pairs begin
  int64_t clouds;
  int64_t points;   // N
  int64_t centers;  // S
  int64_t neighbors;
  int64_t hidden;
  int64_t width;
  bool bfloat16;
  bool single;              // features in float32
  const int64_t* neighbor;  // [B, S, K], the index of the first list
  const float* weight;      // W1 [H, C]
  const float* factor;      // of the result, or null: 1
  float* groups;            // [B S, H]: scratch
  float* by_neighbor;       // [B, N, H]: scratch
  float* direct;            // [B, N, C / 2]: scratch, unless there is by_center without dense
  void* features;           // [B, N, C / 2], in the type of dy1 unless single
};
// The index of the inverse list of neighbours.
int hopper_resolve(const int64_t* center, const int64_t* neighbor, int64_t groups, int64_t neighbors,
                   int64_t* to, void* stream);
int hopper_points(const HopperPoints& args, void* stream);
// Of dense alone its sums in direct.
int hopper_point_sums(const HopperPoints& args, void* stream);

}  // namespace any2point
