// The squared distance, with its roundings fixed so that CPU, CUDA and Python give the same bits:
//   D = 1: d0 * d0.   D >= 2: acc = d1 * d1, then fma(d0, d0, acc), fma(d2, d2, acc), fma(d3, d3, acc), ...
// For D = 3 this is fma(dz, dz, fma(dx, dx, dy * dy)), the order that nvcc gave the CUDA code of PointNet++.
// Compiled with -ffp-contract=off and -fmad=false, so nothing else is contracted.
#pragma once

#include <stdint.h>

#include "common/layout.h"

namespace any2point {

A2P_HOST_DEVICE float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
A2P_HOST_DEVICE double fused(double a, double b, double c) {
#ifdef __CUDA_ARCH__
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

template <typename T>
A2P_HOST_DEVICE T squared_distance3(T dx, T dy, T dz) {
  return fused(dz, dz, fused(dx, dx, dy * dy));
}

template <typename T>
A2P_HOST_DEVICE T squared_distance(const T* a, const T* b, int64_t dim) {
  if (dim <= 0) return T(0);
  const T d0 = a[0] - b[0];
  if (dim == 1) return d0 * d0;
  const T d1 = a[1] - b[1];
  T sum = fused(d0, d0, d1 * d1);
  for (int64_t i = 2; i < dim; i++) {
    const T d = a[i] - b[i];
    sum = fused(d, d, sum);
  }
  return sum;
}

}  // namespace any2point
