#include "inverse_list/op.h"
#include "local_aggregate/hopper.h"

namespace any2point {
namespace {

const void* data(const char* name, const Tensor& tensor, ScalarType dtype, const Tensor& like,
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

Tensor local_aggregate_hopper(const Tensor& points, const Tensor& features, const Tensor& center_,
                              const Tensor& neighbor_, const OptionalTensor& divisor,
                              const Tensor& wavelength, std::vector<Tensor> units, double beta, bool guard) {
  A2P_CHECK(features.dim() == 3 && center_.dim() == 2 && neighbor_.dim() == 3,
            "features, center, neighbor: expected [B, N, C / 2], [B, S] and [B, S, K]");
  const ScalarType dtype = features.scalar_type(), single = ScalarType::Float;
  A2P_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
            "features: expected float16 or bfloat16");
  const int64_t clouds = features.size(0), rows = features.size(1), width = 2 * features.size(2);
  const int64_t centers = center_.size(1), neighbors = neighbor_.size(2), groups = clouds * centers;
  A2P_CHECK(!units.empty() && units.size() % 4 == 0, "units: expected four tensors each");
  const int64_t hidden = units[0].size(0), count = static_cast<int64_t>(units.size()) / 4;
  A2P_CHECK(hopper_has(width, hidden, count), "units: expected other sizes, got [", hidden, ", ", width, "]");
  A2P_CHECK(neighbors > 0 && neighbors < 1 << 20 && clouds * rows * width < int64_t{1} << 34,
            "features, neighbor: too large for 32-bit offsets");
  const Tensor center = index_tensor("center", center_, {clouds, centers}, features);
  const Tensor neighbor = index_tensor("neighbor", neighbor_, {clouds, centers, neighbors}, features);

  HopperAggregate args{};
  args.points = static_cast<const float*>(data("points", points, single, features, {clouds, rows, 3}));
  args.features = data("features", features, dtype, features, {clouds, rows, width / 2});
  args.center = center.const_data_ptr<int64_t>();
  args.neighbor = neighbor.const_data_ptr<int64_t>();
  if (divisor)
    args.divisor = static_cast<const float*>(data("divisor", *divisor, single, features, {clouds}));
  args.wavelength = static_cast<const float*>(data("wavelength", wavelength, single, features, {width / 6}));
  for (int64_t u = 0; u < count; u++) {
    const Tensor* unit = &units[4 * u];
    args.units[u] = {data("units", unit[0], dtype, features, {hidden, width}),
                     static_cast<const float*>(data("units", unit[1], single, features, {hidden})),
                     data("units", unit[2], dtype, features, {width, hidden}),
                     static_cast<const float*>(data("units", unit[3], single, features, {width}))};
    // Rows of 16 bytes are read at a time.
    for (const void* weight : {args.units[u].in_weight, args.units[u].out_weight}) {
      A2P_CHECK(reinterpret_cast<uintptr_t>(weight) % 16 == 0, "units: expected data aligned to 16 bytes");
    }
  }
  A2P_CHECK(reinterpret_cast<uintptr_t>(args.features) % 16 == 0,
            "features: expected data aligned to 16 bytes");
  args.rows = rows;
  args.centers = centers;
  args.groups = groups;
  args.neighbors = static_cast<int>(neighbors);
  args.beta = static_cast<float>(beta);
  args.guard = guard;
  args.bfloat16 = dtype == ScalarType::BFloat16;
  Tensor out = torch::stable::new_empty(features, {clouds, centers, width});
  args.out = out.mutable_data_ptr();
  const OnDevice device(features);
  const int processors = hopper_processors();
  const int64_t bytes = hopper_scratch(width, hidden, groups, neighbors, processors);
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
