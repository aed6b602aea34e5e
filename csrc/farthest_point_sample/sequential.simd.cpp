// Farthest point sampling, one pass over all points a pick. The rule of cpu.cpp: level -1 is taken or
// invalid, and survives every min.
#include "common/simd.h"
#include "farthest_point_sample/cpu.h"

namespace any2point {
namespace A2P_ISA {
namespace {

// Points a pass handles at a time. Every array is padded to a multiple of it with level -1.
constexpr int64_t kStride = 4 * kLanes;

constexpr int64_t padded(int64_t count) { return (count + kStride - 1) / kStride * kStride; }

// To one array a coordinate; what is not finite becomes the origin with level -1.
template <typename T>
void transpose(const FarthestPointCloud<T>& cloud, T* coordinates, T* level, int64_t stride) {
  for (int64_t i = 0; i < stride; i++) level[i] = i < cloud.count ? T(__builtin_inf()) : T(-1);
  for (int64_t d = 0; d < cloud.dim; d++) {
    T* x = coordinates + d * stride;
    for (int64_t i = 0; i < cloud.count; i++) {
      const T value = cloud.points[i * cloud.dim + d];
      const bool finite = value - value == 0;
      x[i] = finite ? value : T(0);
      level[i] = finite ? level[i] : T(-1);
    }
    for (int64_t i = cloud.count; i < stride; i++) x[i] = 0;
  }
}

// kDim = 0: any number of coordinates, read from the cloud.
template <int kDim>
void sample(const FarthestPointCloud<float>& cloud) {
  const int64_t dim = kDim ? kDim : cloud.dim, stride = padded(cloud.count);
  float* level = reinterpret_cast<float*>(cloud.scratch);
  float* x = level + stride;
  transpose(cloud, x, level, stride);
  const Float none = splat(-1);
  int64_t pick = cloud.pick;
  for (int64_t j = 0; j < cloud.samples; j++) {
    cloud.index[j] = pick;
    cloud.distance[j] = level[pick];
    level[pick] = -1;
    if (j + 1 == cloud.samples) return;
    Float best[4] = {none, none, none, none}, to[kDim ? kDim : 1];
    for (int d = 0; d < kDim; d++) to[d] = splat(x[d * stride + pick]);
    for (int64_t i = 0; i < stride; i += kStride) {
      for (int v = 0; v < 4; v++) {
        const int64_t at = i + v * kLanes;
        auto difference = [&](int64_t d) __attribute__((always_inline)) {
          return sub(load(x + d * stride + at), kDim ? to[d] : splat(x[d * stride + pick]));
        };
        const int64_t second = dim > 1 ? 1 : 0;
        Float sum = mul(difference(second), difference(second));
        for (int64_t d = 0; d < dim; d++) {
          if (d != second) sum = fma(difference(d), difference(d), sum);
        }
        const Float lower = min(sum, load(level + at));
        store(level + at, lower);
        best[v] = max(best[v], lower);
      }
    }
    const Float most = splat_max(max(max(best[0], best[1]), max(best[2], best[3])));
    if (!less(none, most)) return;
    for (int64_t i = 0;; i += kStride) {
      uint64_t here = 0;
      for (int v = 0; v < 4; v++) here |= (uint64_t)equal(load(level + i + v * kLanes), most) << v * kLanes;
      if (here) {
        pick = i + __builtin_ctzll(here);
        break;
      }
    }
  }
}

}  // namespace

// Enough for float and double.
int64_t farthest_point_sequential_scratch(int64_t count, int64_t dim) {
  return padded(count) * (dim + 1) * (int64_t)sizeof(double);
}

void farthest_point_sequential(const FarthestPointCloud<float>& cloud) {
  if (cloud.dim == 3) return sample<3>(cloud);
  if (cloud.dim == 2) return sample<2>(cloud);
  return sample<0>(cloud);
}

// The compiler's vectors are enough here: strips long enough that it makes vectors of their loops.
void farthest_point_sequential_double(const FarthestPointCloud<double>& cloud) {
  const int64_t dim = cloud.dim, stride = padded(cloud.count), second = dim > 1 ? 1 : 0;
  double* level = reinterpret_cast<double*>(cloud.scratch);
  double* x = level + stride;
  transpose(cloud, x, level, stride);
  int64_t pick = cloud.pick;
  for (int64_t j = 0; j < cloud.samples; j++) {
    cloud.index[j] = pick;
    cloud.distance[j] = level[pick];
    level[pick] = -1;
    double best[kStride], sum[kStride];
    for (int v = 0; v < kStride; v++) best[v] = -1;
    for (int64_t i = 0; i < stride; i += kStride) {
      const double* row = x + second * stride + i;
      double to = row[pick - i];
      for (int v = 0; v < kStride; v++) sum[v] = (row[v] - to) * (row[v] - to);
      for (int64_t d = 0; d < dim; d++) {
        if (d == second) continue;
        row = x + d * stride + i;
        to = row[pick - i];
        for (int v = 0; v < kStride; v++) sum[v] = __builtin_fma(row[v] - to, row[v] - to, sum[v]);
      }
      double* __restrict lower = level + i;
      for (int v = 0; v < kStride; v++) {
        lower[v] = sum[v] < lower[v] ? sum[v] : lower[v];
        best[v] = lower[v] > best[v] ? lower[v] : best[v];
      }
    }
    double most = -1;
    for (int v = 0; v < kStride; v++) most = best[v] > most ? best[v] : most;
    if (most < 0) return;
    pick = 0;
    while (level[pick] != most) pick++;
  }
}

}  // namespace A2P_ISA
}  // namespace any2point
