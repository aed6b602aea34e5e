// Local aggregation in evaluation with the warpgroup products of sm_90a. Torch-free.
#pragma once

#include <stdint.h>

namespace any2point {

// A residual unit with its normalisations folded in; weights in the type of the features.
struct HopperUnit {
  const void* in_weight;   // [H, C]
  const float* in_bias;    // [H]
  const void* out_weight;  // [C, H]
  const float* out_bias;   // [C]
};

constexpr int kHopperUnits = 2;

struct HopperAggregate {
  const float* points;      // [B, N, 3]
  const void* features;     // [B, N, C / 2], float16 or bfloat16
  const int64_t* center;    // [B, S]; -1: a point at the origin without features
  const int64_t* neighbor;  // [B, S, K]; below 0: the centre itself
  const float* divisor;     // [B], or null: the largest offset of a group, axis by axis
  const float* wavelength;  // [C / 6]
  HopperUnit units[kHopperUnits];
  void* out;        // [B, S, C]
  int64_t rows;     // N
  int64_t centers;  // S
  int64_t groups;   // B S
  int neighbors;    // K
  float beta;
  bool guard;
  bool bfloat16;
};

// Whether there is a kernel for C, H (of all units) and the number of units.
bool hopper_has(int64_t width, int64_t hidden, int64_t units);
// Multiprocessors of the current device.
int hopper_processors();
// Bytes of scratch, 16-byte aligned, on a device with so many multiprocessors.
int64_t hopper_scratch(int64_t width, int64_t hidden, int64_t groups, int64_t neighbors, int processors);
int hopper_aggregate(const HopperAggregate& args, int64_t width, int64_t hidden, int processors,
                     void* scratch, void* stream);

}  // namespace any2point
