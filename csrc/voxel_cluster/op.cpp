#include "voxel_cluster/kernel.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "inverse_list/op.h"

namespace any2point {
namespace {

struct Arguments {
  Layout layout;
  OptionalTensor origin;
  VoxelPoints points;
};

Arguments arguments(const Tensor& points, const std::vector<double>& size, const OptionalTensor& lengths,
                    const OptionalTensor& offsets, const OptionalTensor& origin) {
  Arguments a{layout_of("points", points, lengths, offsets), {}, {}};
  VoxelPoints& p = a.points;
  const ScalarType dtype = points.scalar_type();
  A2P_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "points: expected float32 or float64");
  A2P_CHECK(a.layout.dim >= 1 && a.layout.dim <= kVoxelDims && int64_t(size.size()) == a.layout.dim,
            "points: expected 1 to 3 coordinates and a size for each");
  p.rows = a.layout.rows;
  p.dim = static_cast<int>(a.layout.dim);
  p.wide = dtype == ScalarType::Double;
  p.points = a.layout.points.const_data_ptr();
  std::copy(size.begin(), size.end(), p.size);
  if (origin) {
    check_same_device("origin", *origin, points);
    A2P_CHECK(origin->scalar_type() == dtype && origin->dim() == 2 && origin->size(0) == p.rows.clouds &&
                  origin->size(1) == a.layout.dim,
              "origin: expected [B, D] of the points' dtype");
    a.origin = torch::stable::contiguous(*origin);
    p.origin = a.origin->const_data_ptr();
  }
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> voxel_cluster(const Tensor& points, std::vector<double> size,
                                                         OptionalTensor lengths, OptionalTensor offsets,
                                                         OptionalTensor origin) {
  const Arguments a = arguments(points, size, lengths, offsets, origin);
  const VoxelPoints& p = a.points;
  const int64_t rows = p.rows.total, clouds = p.rows.clouds;
  std::vector<int64_t> shape(points.sizes().begin(), points.sizes().end() - 1);
  Tensor cluster_ = torch::stable::new_empty(points, shape, ScalarType::Long);
  Tensor start_ = torch::stable::new_empty(points, {rows + 1}, ScalarType::Long);
  Tensor order_ = torch::stable::new_empty(points, {rows}, ScalarType::Long);
  Tensor count_ = torch::stable::new_empty(points, {}, ScalarType::Long);
  int64_t* cluster = cluster_.mutable_data_ptr<int64_t>();
  int64_t* start = start_.mutable_data_ptr<int64_t>();
  int64_t* order = order_.mutable_data_ptr<int64_t>();

#ifdef ANY2POINT_WITH_CUDA
  if (points.is_cuda()) {
    A2P_CHECK(rows < kCudaListLimit, "points: expected fewer than 2^32 rows on CUDA");
    const OnDevice device(points);
    const Tensor workspace = scratch(points, voxel_cluster_workspace(p));
    const VoxelOut out{cluster, start, order, count_.mutable_data_ptr<int64_t>()};
    check_cuda("voxel_cluster", voxel_cluster_cuda(p, out, workspace.mutable_data_ptr(), device.stream));
    return {cluster_, start_, order_, count_};
  }
#endif
  const int64_t grain = std::max<int64_t>(1, 4096 * clouds / std::max<int64_t>(rows, 1));
  const auto per_cloud = [&](const auto& function) {
    torch::stable::parallel_for(0, clouds, grain, [&](int64_t lo, int64_t hi) {
      for (int64_t b = lo; b < hi; b++) function(b);
    });
  };
  std::fill(cluster, cluster + rows, -1);
  std::vector<int64_t> first(clouds + 1, 0), number(clouds + 1, 0);  // rows and clusters before each cloud
  per_cloud([&](int64_t b) { first[b + 1] = voxel_count_cpu(p, b); });
  for (int64_t b = 0; b < clouds; b++) first[b + 1] += first[b];
  A2P_CHECK(first[clouds] <= rows, "offsets: expected 0, ..., P, never falling");
  per_cloud([&](int64_t b) {
    number[b + 1] = voxel_sort_cpu(p, b, first[b + 1] - first[b], order + first[b], cluster);
  });
  for (int64_t b = 0; b < clouds; b++) {
    A2P_CHECK(number[b + 1] >= 0,
              "size: expected voxels large enough to be numbered in int32 from the origin, got a point "
              "beyond that in row ",
              -1 - number[b + 1]);
    number[b + 1] += number[b];
  }
  per_cloud([&](int64_t b) {
    int64_t last = -1;
    for (int64_t i = first[b]; i < first[b + 1]; i++) {
      int64_t& id = cluster[order[i]];
      id += number[b];
      if (id != last) start[last = id] = i;
    }
  });
  int64_t end = first[clouds];
  std::fill(start + number[clouds], start + rows + 1, end);
  for (int64_t row = 0; row < rows; row++) {
    if (cluster[row] < 0) order[end++] = row;
  }
  *count_.mutable_data_ptr<int64_t>() = number[clouds];
  return {cluster_, start_, order_, count_};
}

}  // namespace
}  // namespace any2point

STABLE_TORCH_LIBRARY_IMPL(any2point, CPU, m) {
  m.impl("voxel_cluster", TORCH_BOX(&any2point::voxel_cluster));
}
#ifdef ANY2POINT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(any2point, CUDA, m) {
  m.impl("voxel_cluster", TORCH_BOX(&any2point::voxel_cluster));
}
#endif
