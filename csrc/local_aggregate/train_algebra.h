// What lies between the passes of training (train.h) on CUDA: batch statistics and what follows from them, in
// float64 and a launch or two each, where torch would take dozens. Torch-free. Without a comment on the type:
// float32.
#pragma once

#include <stdint.h>

namespace any2point {

// Mean and variance of everything from those of its parts, and the normalisation as a factor and a sum.
struct InStatistics {
  const float* mean;    // [parts, H]
  const float* spread;  // [parts, H]: sum of squares about it
  const float* count;   // [parts]
  int64_t parts, hidden;
  const float* weight;  // [H] of the normalisation
  const float* bias;    // [H]
  double eps;
  double* to_mean;       // [H], float64
  double* to_deviation;  // [H], float64: 1 / sqrt(variance + eps)
  float* single;         // [4, H]: scale, shift, mean, deviation
};
int in_statistics(const InStatistics& args, void* stream);

// Statistics of the second layer from those of h, and the unit as later passes take it.
struct OutStatistics {
  const float* gram;  // [parts, H, H]
  const float* sum;   // [sum_parts, H]
  int64_t parts, sum_parts, rows, hidden, width;
  const float* out_weight;  // [C, H]
  const float* out_bias;    // [C]
  const float* weight;      // [C] of the normalisation
  const float* bias;        // [C]
  double eps;
  bool bfloat16;
  double* to_gram;       // [H, H], float64: scratch
  double* to_mean;       // [C], float64
  double* to_deviation;  // [C], float64
  double* hidden_mean;   // [H], float64
  double* hidden_sum;    // [H], float64
  double* hidden_outer;  // [H, H], float64: of (h - mean) h'
  float* single;         // [2, C]: mean, deviation
  void* folded;          // [C, H], 16 bits: out_weight with the normalisation
  float* shift;          // [C]
};
int out_statistics(const OutStatistics& args, void* stream);

// The gradient below the maximum, where its ReLU lets it through: entries = out > 0 ? size grad : 0. `size`
// is a power of two that brings the hidden layer's gradient into the middle of float16's range, or 1.
struct Entries {
  const float* grad;        // [count]
  const float* out;         // [count]
  int64_t count;            // B S C
  const float* out_weight;  // [C, H], or null: size 1
  const float* out_scale;   // [C]
  const double* deviation;  // [C], float64
  int64_t hidden, width;
  float* largest;  // [kEntryParts]: scratch
  float* entries;  // [count]
  float* sizes;    // [2]: size and 1 / size
};
constexpr int kEntryParts = 256;
int entries(const Entries& args, void* stream);

// Backward through the normalisation after the second layer.
struct Pull {
  const float* total;          // [C]: sum of du
  const float* normed;         // [C]: and of du times the normalised product
  const float* outer;          // [C, H]: du' h
  const float* out_weight;     // [C, H]
  const float* out_scale;      // [C]: weight of the normalisation
  const double* deviation;     // [C], float64
  const double* hidden_mean;   // [H], float64
  const double* hidden_sum;    // [H], float64
  const double* hidden_outer;  // [H, H], float64
  int64_t rows, hidden, width;
  bool transposed;  // `carried`
  float* out_grad;  // [C, H]: gradient of out_weight
  float* q;         // [H, H]: -Q
  float* constant;  // [H]
  float* carried;   // [C, H], or transposed: out_weight with the normalisation
};
int pull(const Pull& args, void* stream);

}  // namespace any2point
