#include "local_aggregate/hopper_op.h"

namespace any2point {

const void* hopper_data(const char* name, const Tensor& tensor, ScalarType dtype, const Tensor& like,
                        std::vector<int64_t> shape) {
  check_same_device(name, tensor, like);
  A2P_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous(), name,
            ": expected a contiguous tensor of another dtype");
  A2P_CHECK(tensor.dim() == static_cast<int64_t>(shape.size()), name, ": expected ", shape.size(),
            " dimensions");
  for (size_t i = 0; i < shape.size(); i++) {
    A2P_CHECK(tensor.size(i) == shape[i], name, ": expected size ", shape[i], " in dimension ", i, ", got ",
              tensor.size(i));
  }
  return tensor.const_data_ptr();
}

const void* hopper_aligned(const char* name, const Tensor& tensor, const Tensor& like,
                           std::vector<int64_t> shape) {
  const void* data = hopper_data(name, tensor, like.scalar_type(), like, shape);
  A2P_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name, ": expected data aligned to 16 bytes");
  return data;
}

HopperFrom hopper_from(const Tensor& points, const Tensor& features, const Tensor& center_,
                       const Tensor& neighbor_, const OptionalTensor& divisor, const Tensor& wavelength,
                       double beta, bool guard) {
  A2P_CHECK(features.dim() == 3 && center_.dim() == 2 && neighbor_.dim() == 3,
            "features, center, neighbor: expected [B, N, C / 2], [B, S] and [B, S, K]");
  const ScalarType dtype = features.scalar_type(), single = ScalarType::Float;
  A2P_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
            "features: expected float16 or bfloat16");
  const int64_t clouds = features.size(0), rows = features.size(1), width = 2 * features.size(2);
  const int64_t centers = center_.size(1), neighbors = neighbor_.size(2), groups = clouds * centers;
  A2P_CHECK(neighbors > 0 && neighbors < 1 << 20 && clouds * rows * width < int64_t{1} << 34,
            "features, neighbor: too large for 32-bit offsets");
  HopperFrom from{{},
                  features,
                  index_tensor("center", center_, {clouds, centers}, features),
                  index_tensor("neighbor", neighbor_, {clouds, centers, neighbors}, features),
                  clouds,
                  groups,
                  neighbors,
                  width};
  HopperAggregate& args = from.args;
  args.points = static_cast<const float*>(hopper_data("points", points, single, features, {clouds, rows, 3}));
  args.features = hopper_aligned("features", features, features, {clouds, rows, width / 2});
  args.center = from.center.const_data_ptr<int64_t>();
  args.neighbor = from.neighbor.const_data_ptr<int64_t>();
  if (divisor) {
    args.divisor = static_cast<const float*>(hopper_data("divisor", *divisor, single, features, {clouds}));
  }
  args.wavelength =
      static_cast<const float*>(hopper_data("wavelength", wavelength, single, features, {width / 6}));
  args.rows = rows;
  args.centers = centers;
  args.groups = groups;
  args.neighbors = static_cast<int>(neighbors);
  args.beta = static_cast<float>(beta);
  args.guard = guard;
  args.bfloat16 = dtype == ScalarType::BFloat16;
  return from;
}

namespace {

Tensor local_aggregate_hopper(const Tensor& points, const Tensor& features, const Tensor& center,
                              const Tensor& neighbor, const OptionalTensor& divisor, const Tensor& wavelength,
                              std::vector<Tensor> units, double beta, bool guard) {
  HopperFrom from = hopper_from(points, features, center, neighbor, divisor, wavelength, beta, guard);
  HopperAggregate& args = from.args;
  A2P_CHECK(!units.empty() && units.size() % 4 == 0, "units: expected four tensors each");
  const int64_t width = from.width, hidden = units[0].size(0), count = static_cast<int64_t>(units.size()) / 4;
  A2P_CHECK(hopper_has(width, hidden, count), "units: expected other sizes, got [", hidden, ", ", width, "]");
  const auto floats = [&](const Tensor& tensor, int64_t size) {
    return static_cast<const float*>(hopper_data("units", tensor, ScalarType::Float, features, {size}));
  };
  for (int64_t u = 0; u < count; u++) {
    const Tensor* unit = &units[4 * u];
    args.units[u] = {hopper_aligned("units", unit[0], features, {hidden, width}), floats(unit[1], hidden),
                     hopper_aligned("units", unit[2], features, {width, hidden}), floats(unit[3], width)};
  }
  Tensor out = torch::stable::new_empty(features, {from.clouds, args.centers, width});
  args.out = out.mutable_data_ptr();
  const OnDevice device(features);
  const int processors = hopper_processors();
  const int64_t bytes = hopper_scratch(width, hidden, from.groups, from.neighbors, processors);
  Tensor room = scratch(features, bytes);
  check_cuda("local_aggregate",
             hopper_aggregate(args, width, hidden, processors, room.mutable_data_ptr(), device.stream));
  return out;
}

}  // namespace
}  // namespace any2point

STABLE_TORCH_LIBRARY_IMPL(any2point, CUDA, m) {
  m.impl("_local_aggregate_hopper", TORCH_BOX(&any2point::local_aggregate_hopper));
}
