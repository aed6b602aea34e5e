// Every op of the library: the table of contents. A schema here, the kernels in csrc/<op>/, the public
// function with checks, fake and autograd in any2point/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(any2point, m) {
  // Padded [B, N, D] with lengths [B], or packed [P, D] with offsets [B + 1]; all of them int64.
  m.def(
      "farthest_point_sample(Tensor points, SymInt num_samples, Tensor? lengths, Tensor? offsets, Tensor? "
      "start, "
      "bool pointnet2) -> (Tensor index, Tensor distance)");
  // Distances come first: opcheck sums outputs in place, which a leading integer tensor would make impossible.
  m.def(
      "knn(Tensor query, Tensor points, int k, Tensor? query_lengths, Tensor? lengths, Tensor? query_offsets, "
      "Tensor? offsets, bool sorted) -> (Tensor distance, Tensor index)");
  m.def(
      "ball_query(Tensor query, Tensor points, float radius, int k, Tensor? query_lengths, Tensor? lengths, "
      "Tensor? query_offsets, Tensor? offsets, bool nearest) -> (Tensor distance, Tensor index, Tensor count)");

  // The SIMD level in use ("scalar", "avx2", "avx512"); a non-empty argument sets it, for tests.
  m.def("_simd(str level) -> str");
}
