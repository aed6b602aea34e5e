// any2point::farthest_point_sample for torch: checks, outputs, parallel loop over clouds.
#include <sstream>
#include <string>
#include <tuple>

#include "common/tensor.h"
#include "farthest_point_sample/kernel.h"
#include "farthest_point_sample/plan.h"

namespace any2point {
namespace {

struct Call {
  Layout layout;
  OptionalTensor start;
  Tensor index, distance;
  int64_t samples;
  bool pointnet2;
  int64_t starts;

  template <typename T>
  FarthestPointSample<T> run() {
    return {layout.points.const_data_ptr<T>(),
            layout.rows,
            layout.dim,
            samples,
            start ? start->const_data_ptr<int64_t>() : nullptr,
            pointnet2,
            index.mutable_data_ptr<int64_t>(),
            distance.mutable_data_ptr<T>(),
            starts};
  }
};

Call prepare(const Tensor& points, int64_t samples, const OptionalTensor& lengths,
             const OptionalTensor& offsets, const OptionalTensor& start, bool pointnet2) {
  A2P_CHECK(points.scalar_type() == ScalarType::Float || points.scalar_type() == ScalarType::Double,
            "points: expected float32 or float64");
  A2P_CHECK(samples >= 0, "num_samples: expected at least 0, got ", samples);
  Layout layout = layout_of("points", points, lengths, offsets);
  A2P_CHECK(layout.dim >= 1, "points: expected at least one coordinate");
  A2P_CHECK(!pointnet2 || layout.dim == 3, "points: expected 3 coordinates for the order of pointnet2");
  const int64_t clouds = layout.rows.clouds;
  OptionalTensor first;
  int64_t starts = 1;
  if (start && start->dim() == 2) {
    starts = start->size(1);
    A2P_CHECK(starts >= 1 && !pointnet2, "start: expected one start a cloud");
    first = index_tensor("start", *start, {clouds, starts}, points);
  } else if (start) {
    first = index_tensor("start", *start, {clouds}, points);
  }
  Tensor index = torch::stable::new_empty(layout.points, {clouds, samples}, ScalarType::Long);
  Tensor distance = torch::stable::new_empty(layout.points, {clouds, samples});
  return {layout, first, index, distance, samples, pointnet2, starts};
}

template <typename T>
void run_cpu(const FarthestPointSample<T>& run) {
  torch::stable::parallel_for(0, run.rows.clouds, 1, [&](int64_t first, int64_t last) {
    farthest_point_sample_cpu(run, first, last);
  });
}

std::tuple<Tensor, Tensor> sample_cpu(const Tensor& points, int64_t samples, const OptionalTensor& lengths,
                                      const OptionalTensor& offsets, const OptionalTensor& start,
                                      bool pointnet2) {
  Call call = prepare(points, samples, lengths, offsets, start, pointnet2);
  if (points.scalar_type() == ScalarType::Double) {
    run_cpu(call.run<double>());
  } else {
    run_cpu(call.run<float>());
  }
  return {call.index, call.distance};
}

#ifdef ANY2POINT_WITH_CUDA
template <typename T>
void run_cuda(const FarthestPointSample<T>& run, const Tensor& like) {
  const int64_t bytes = farthest_point_sample_workspace(run);
  const Tensor workspace = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  void* stream = current_stream(like.get_device_index());
  check_cuda("farthest_point_sample",
             farthest_point_sample_cuda(run, bytes ? workspace.mutable_data_ptr() : nullptr, stream));
}

std::tuple<Tensor, Tensor> sample_cuda(const Tensor& points, int64_t samples, const OptionalTensor& lengths,
                                       const OptionalTensor& offsets, const OptionalTensor& start,
                                       bool pointnet2) {
  const torch::stable::accelerator::DeviceGuard guard(points.get_device_index());
  Call call = prepare(points, samples, lengths, offsets, start, pointnet2);
  if (points.scalar_type() == ScalarType::Double) {
    run_cuda(call.run<double>(), points);
  } else {
    run_cuda(call.run<float>(), points);
  }
  return {call.index, call.distance};
}
#endif

std::string launches(int64_t capability, int64_t processors, int64_t shared, bool cooperative, int64_t clouds,
                     int64_t most, bool packed, bool ragged, int64_t samples) {
  const DeviceLimits device{static_cast<int>(capability), static_cast<int>(processors), shared, cooperative};
  const Launches all = farthest_point_launches(device, clouds, most, packed, ragged, samples);
  std::ostringstream text;
  text << "[";
  for (int i = 0; i < all.count; i++) {
    const Launch& next = all.launch[i];
    const char* names[] = {"registers", "batched", "large"};
    text << (i ? ", " : "") << "{\"kernel\": \"" << names[next.kernel] << "\", \"above\": " << next.above
         << ", \"up_to\": " << next.up_to << ", \"parts\": " << next.plan.parts
         << ", \"warps\": " << next.plan.warps << ", \"words\": " << next.plan.words
         << ", \"held\": " << next.plan.held << ", \"capacity\": " << next.plan.capacity
         << ", \"most\": " << next.plan.most << ", \"wanted\": " << next.plan.wanted
         << ", \"shared\": " << next.plan.shared << "}";
  }
  text << "]";
  return text.str();
}

}  // namespace
}  // namespace any2point

STABLE_TORCH_LIBRARY_IMPL(any2point, CompositeExplicitAutograd, m) {
  m.impl("_farthest_point_launches", TORCH_BOX(&any2point::launches));
}

STABLE_TORCH_LIBRARY_IMPL(any2point, CPU, m) {
  m.impl("farthest_point_sample", TORCH_BOX(&any2point::sample_cpu));
}

#ifdef ANY2POINT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(any2point, CUDA, m) {
  m.impl("farthest_point_sample", TORCH_BOX(&any2point::sample_cuda));
}
#endif
