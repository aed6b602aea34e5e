// any2point::knn for torch.
#include <limits>
#include <sstream>
#include <string>
#include <tuple>

#include "knn/call.h"
#include "knn/plan.h"

namespace any2point {
namespace {

std::tuple<Tensor, Tensor> knn_cpu(const Tensor& query, const Tensor& points, int64_t k,
                                   const OptionalTensor& query_lengths, const OptionalTensor& lengths,
                                   const OptionalTensor& query_offsets, const OptionalTensor& offsets,
                                   bool sorted) {
  const NeighbourCall call =
      prepare_neighbours(query, points, k, query_lengths, lengths, query_offsets, offsets, false);
  const Choice choice = sorted ? Choice::nearest : Choice::set;
  if (points.scalar_type() == ScalarType::Double) {
    run_neighbours_cpu(call.run(k, std::numeric_limits<double>::infinity(), choice));
  } else {
    run_neighbours_cpu(call.run(k, std::numeric_limits<float>::infinity(), choice));
  }
  return {call.distance, call.index};
}

#ifdef ANY2POINT_WITH_CUDA
std::tuple<Tensor, Tensor> knn_cuda(const Tensor& query, const Tensor& points, int64_t k,
                                    const OptionalTensor& query_lengths, const OptionalTensor& lengths,
                                    const OptionalTensor& query_offsets, const OptionalTensor& offsets,
                                    bool sorted) {
  const torch::stable::accelerator::DeviceGuard guard(points.get_device_index());
  const NeighbourCall call =
      prepare_neighbours(query, points, k, query_lengths, lengths, query_offsets, offsets, false);
  const Choice choice = sorted ? Choice::nearest : Choice::set;
  if (points.scalar_type() == ScalarType::Double) {
    run_neighbours_cuda("knn", call.run(k, std::numeric_limits<double>::infinity(), choice), points);
  } else {
    run_neighbours_cuda("knn", call.run(k, std::numeric_limits<float>::infinity(), choice), points);
  }
  return {call.distance, call.index};
}
#endif

std::string launches(int64_t shared, int64_t clouds, int64_t queries, int64_t points, int64_t dim, int64_t k,
                     bool packed, bool same, bool wide) {
  const SearchPlan plan = plan_search({clouds, dim, k, points, queries, packed, same, wide}, shared);
  const char* names[] = {"general", "scan", "tree"};
  std::ostringstream text;
  text << "{\"kernel\": \"" << names[plan.kernel] << "\", \"sorted\": " << plan.each * kSortThreads
       << ", \"shared\": " << plan.shared << "}";
  return text.str();
}

}  // namespace
}  // namespace any2point

STABLE_TORCH_LIBRARY_IMPL(any2point, CompositeExplicitAutograd, m) {
  m.impl("_neighbour_launches", TORCH_BOX(&any2point::launches));
}

STABLE_TORCH_LIBRARY_IMPL(any2point, CPU, m) { m.impl("knn", TORCH_BOX(&any2point::knn_cpu)); }

#ifdef ANY2POINT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(any2point, CUDA, m) { m.impl("knn", TORCH_BOX(&any2point::knn_cuda)); }
#endif
