// any2point::ball_query for torch: the search of csrc/knn with a limit.
#include <tuple>

#include "knn/call.h"

namespace any2point {
namespace {

std::tuple<Tensor, Tensor, Tensor> ball_query_cpu(const Tensor& query, const Tensor& points, double radius,
                                                  int64_t k, const OptionalTensor& query_lengths,
                                                  const OptionalTensor& lengths,
                                                  const OptionalTensor& query_offsets,
                                                  const OptionalTensor& offsets, bool nearest) {
  const NeighbourCall call =
      prepare_neighbours(query, points, k, query_lengths, lengths, query_offsets, offsets, true);
  const Choice choice = nearest ? Choice::nearest : Choice::first;
  if (points.scalar_type() == ScalarType::Double) {
    run_neighbours_cpu(call.run(k, ball_limit<double>(radius), choice));
  } else {
    run_neighbours_cpu(call.run(k, ball_limit<float>(radius), choice));
  }
  return {call.distance, call.index, *call.count};
}

#ifdef ANY2POINT_WITH_CUDA
std::tuple<Tensor, Tensor, Tensor> ball_query_cuda(const Tensor& query, const Tensor& points, double radius,
                                                   int64_t k, const OptionalTensor& query_lengths,
                                                   const OptionalTensor& lengths,
                                                   const OptionalTensor& query_offsets,
                                                   const OptionalTensor& offsets, bool nearest) {
  const torch::stable::accelerator::DeviceGuard guard(points.get_device_index());
  const NeighbourCall call =
      prepare_neighbours(query, points, k, query_lengths, lengths, query_offsets, offsets, true);
  const Choice choice = nearest ? Choice::nearest : Choice::first;
  if (points.scalar_type() == ScalarType::Double) {
    run_neighbours_cuda("ball_query", call.run(k, ball_limit<double>(radius), choice), points);
  } else {
    run_neighbours_cuda("ball_query", call.run(k, ball_limit<float>(radius), choice), points);
  }
  return {call.distance, call.index, *call.count};
}
#endif

}  // namespace
}  // namespace any2point

STABLE_TORCH_LIBRARY_IMPL(any2point, CPU, m) { m.impl("ball_query", TORCH_BOX(&any2point::ball_query_cpu)); }

#ifdef ANY2POINT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(any2point, CUDA, m) {
  m.impl("ball_query", TORCH_BOX(&any2point::ball_query_cuda));
}
#endif
