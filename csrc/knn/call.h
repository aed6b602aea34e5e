// Checks and outputs that the ops over csrc/knn share: knn and ball_query.
#pragma once

#include "common/tensor.h"
#include "knn/kernel.h"

namespace any2point {

struct NeighbourCall {
  Layout queries, clouds;
  Tensor index, distance;
  OptionalTensor count;

  template <typename T>
  Neighbours<T> run(int64_t k, T limit, Choice choice) const {
    return {queries.points.const_data_ptr<T>(),
            queries.rows,
            clouds.points.const_data_ptr<T>(),
            clouds.rows,
            clouds.dim,
            k,
            limit,
            choice,
            index.mutable_data_ptr<int64_t>(),
            distance.mutable_data_ptr<T>(),
            count ? count->mutable_data_ptr<int64_t>() : nullptr};
  }
};

inline NeighbourCall prepare_neighbours(const Tensor& query, const Tensor& points, int64_t k,
                                        const OptionalTensor& query_lengths, const OptionalTensor& lengths,
                                        const OptionalTensor& query_offsets, const OptionalTensor& offsets,
                                        bool counted) {
  A2P_CHECK(points.scalar_type() == ScalarType::Float || points.scalar_type() == ScalarType::Double,
            "points: expected float32 or float64");
  A2P_CHECK(query.scalar_type() == points.scalar_type(), "query: expected the dtype of points");
  check_same_device("query", query, points);
  A2P_CHECK(k >= 0, "k: expected at least 0, got ", k);
  Layout queries = layout_of("query", query, query_lengths, query_offsets);
  Layout clouds = layout_of("points", points, lengths, offsets);
  A2P_CHECK(queries.rows.packed() == clouds.rows.packed(), "query: expected the layout of points");
  A2P_CHECK(queries.rows.clouds == clouds.rows.clouds, "query: expected ", clouds.rows.clouds,
            " clouds, got ", queries.rows.clouds);
  A2P_CHECK(clouds.dim >= 1, "points: expected at least one coordinate");
  A2P_CHECK(queries.dim == clouds.dim, "query: expected ", clouds.dim, " coordinates, got ", queries.dim);
  std::vector<int64_t> shape(query.sizes().begin(), query.sizes().end() - 1);
  OptionalTensor count;
  if (counted) count = torch::stable::new_empty(queries.points, shape, ScalarType::Long);
  shape.push_back(k);
  Tensor index = torch::stable::new_empty(queries.points, shape, ScalarType::Long);
  Tensor distance = torch::stable::new_empty(queries.points, shape);
  return {queries, clouds, index, distance, count};
}

template <typename T>
void run_neighbours_cpu(const Neighbours<T>& run) {
  for (int64_t cloud = 0; cloud < run.rows.clouds && sizeof(T) == 4; cloud++) {
    A2P_CHECK(run.rows.count(cloud) < (int64_t(1) << 31) - 64,
              "points: expected fewer than 2^31 float32 points in a cloud on the CPU");
  }
  neighbours_cpu(run, [](int64_t n, const Range& body) { torch::stable::parallel_for(0, n, 1, body); });
}

#ifdef ANY2POINT_WITH_CUDA
template <typename T>
void run_neighbours_cuda(const char* op, const Neighbours<T>& run, const Tensor& like) {
  Tensor workspace;
  const int64_t bytes = neighbours_workspace(run);
  if (bytes > 0) workspace = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  void* memory = bytes > 0 ? workspace.mutable_data_ptr() : nullptr;
  check_cuda(op, neighbours_cuda(run, memory, current_stream(like.get_device_index())));
}
#endif

}  // namespace any2point
